"""The model card of a composed mixture: what it was made of, how it routes, how to load it and make it again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from .. import __version__
from ..checkpoints.native import front_matter
from ..model import MoELoRAModel
from ..registry import ROUTERS
from ..schema import Pluggable
from .adapter import Adapter


@dataclass(frozen=True)
class Member:
    """An adapter and where the user found it; ``None`` for one in memory."""

    adapter: Adapter
    source: str | None


def page(model: MoELoRAModel, members: Sequence[Member], general: Sequence[Member], subtract: str) -> str:
    """The text of the card.

    Args:
        model: the mixture. general: the adapters whose common part was taken off. subtract: how.
    """
    [site] = model.mixture.sites
    assert site.router is not None
    backbone = model.backbone_config.name
    parts = [
        f"{front_matter(backbone, 'composition', site.router.kind)}\n# A mixture of {len(members)} LoRA adapters",
        f"{len(members)} finished adapters on the frozen backbone `{backbone}`, with the router `{site.router.kind}` "
        f"over them at {len(model.containers())} linears; composed by moelora {__version__}. The adapters are as their "
        "authors trained them.",
        _table(members),
        *_tasks(site.router.kind, members),
    ]
    if general:
        parts += [f"What these have in common was taken off each of them (GenKnowSub, {subtract}):", _table(general)]
    parts += [
        f"## Router\n\n```yaml\n{_yaml(site.router)}```",
        "## Load it\n\n```python\nimport moelora\n\n"
        f'model = moelora.from_pretrained("path/to/this/folder", backbone={json.dumps(backbone)})\n```',
        *_again(model, members, general, subtract),
    ]
    return "\n\n".join(parts) + "\n"


def with_router(text: str, old: Pluggable, new: Pluggable) -> str:
    """The text of a card after its router was set in another way."""
    return text.replace(_yaml(old), _yaml(new)).replace(_argument(old), _argument(new))


def with_section(text: str, title: str, said: str, settings: Mapping[str, Any]) -> str:
    """The text of a card with a section about what was done after composing."""
    return f"{text}\n## {title}\n\n{said}\n\n```yaml\n{yaml.safe_dump(dict(settings), sort_keys=False)}```\n"


def _yaml(router: Pluggable) -> str:
    return str(yaml.safe_dump(router.to_dict(), sort_keys=False))


def _argument(router: Pluggable) -> str:
    return f"router={router.to_dict()!r}"


def facts(member: Member) -> dict[str, Any]:
    """What is to be said of an adapter, in plain JSON types."""
    adapter = member.adapter
    return {
        "name": adapter.name,
        "source": member.source,
        "backbone": adapter.backbone.name,
        "ranks": sorted({factors.rank for factors in adapter.factors.values()}),
        "scales": sorted({factors.scale for factors in adapter.factors.values()}),
        "modules": dict(Counter(module.rpartition(".")[2] for module in adapter.factors)),
        "parameters": sum(factors.A.numel() + factors.B.numel() for factors in adapter.factors.values()),
    }


def _table(members: Sequence[Member]) -> str:
    lines = [
        "| | adapter | from | rank | scale | modules | trained on | parameters |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for index, member in enumerate(members):
        said = facts(member)
        cells = [
            str(index),
            said["name"],
            _code(member.source) if member.source is not None else "memory",
            ", ".join(str(rank) for rank in said["ranks"]),
            ", ".join(f"{scale:.4g}" for scale in said["scales"]),
            ", ".join(f"{count} × {name}" for name, count in said["modules"].items()),
            _code(said["backbone"]),
            f"{said['parameters']:,}",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _tasks(kind: str, members: Sequence[Member]) -> list[str]:
    if ROUTERS.get(kind).task_ids is None:
        return []
    listed = ", ".join(f"{index} {member.adapter.name}" for index, member in enumerate(members))
    return [f"Pass `task_ids`, one for each sequence, where the router asks for them: {listed}."]


def _again(model: MoELoRAModel, members: Sequence[Member], general: Sequence[Member], subtract: str) -> list[str]:
    """The call that makes the mixture from the same adapters, before any training; none where one was in memory."""
    sources = [member.source for member in (*members, *general)]
    if None in sources:
        return []
    [site] = model.mixture.sites
    assert site.router is not None
    own: Mapping[str, Any] = {"dropout": site.experts.dropout, "expert_dropout": site.experts.expert_dropout}
    arguments = [
        repr([member.source for member in members]),
        _argument(site.router),
        f"backbone={model.backbone_config.name!r}",
        f"names={[member.adapter.name for member in members]!r}",
        *([f"general={[member.source for member in general]!r}", f"subtract={subtract!r}"] if general else []),
        *([f"experts={own!r}"] if site.experts.dropout else []),
    ]
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return [f"## Make it again\n\n```python\nmodel = moelora.compose(\n{lines})\n```"]
