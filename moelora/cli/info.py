"""``moelora info``: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .common import (
    AsJson,
    CacheDir,
    Checkpoint,
    LocalFilesOnly,
    Revision,
    Subfolder,
    Token,
    hub_options,
    print_json,
    print_lines,
    size_text,
)

if TYPE_CHECKING:
    from ..checkpoints import Description
    from ..config import SiteConfig


def info(
    path: Checkpoint,
    as_json: AsJson = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Say what a checkpoint holds, without loading its backbone: layout, experts, routers, sizes, damage.

    Example: `moelora info runs/quickstart`
    """
    from ..checkpoints import describe

    found = describe(path, **hub_options(revision, subfolder, token, cache_dir, local_files_only))
    if as_json:
        print_json(found.to_dict())
        return
    print_lines(_lines(found))


def _lines(found: Description) -> Iterator[str]:
    yield f"path: {found.path}"
    yield f"layout: {found.layout}" + (f" ({found.detail})" if found.detail else "")
    yield f"backbone: {_backbone(found)}"
    dtypes = found.dtypes if len(found.dtypes) == 1 else [f"{count:,} {dtype}" for dtype, count in found.dtypes.items()]
    yield f"parameters: {found.parameters:,} ({', '.join(dtypes)})"
    yield f"size: {size_text(found.bytes)}"
    if found.damage is None:
        yield "damage: unknown, since this layout has no manifest"
    else:
        yield f"damage: {len(found.damage) or 'none'}"
        yield from (f"  {problem}" for problem in found.damage)
    if found.reward is not None:
        yield f"reward model: {_reward(found.reward)}"
    for entry, names in _groups(found):
        yield f"sites: {len(names)}, {_places(names)}"
        yield f"  experts: {_experts(entry.experts)}"
        yield f"  router: {_router(entry.router)}"
    if found.mixture.modules_to_save:
        yield f"saved whole: {', '.join(found.mixture.modules_to_save)}"


def _reward(reward: Mapping[str, Any]) -> str:
    """Its categories with their capabilities."""
    categories = reward.get("categories") or {}
    named = [f"{name} ({', '.join(content.get('capabilities', ()))})" for name, content in categories.items()]
    about = f"base {reward.get('base')}, aggregator {reward.get('aggregator')}"
    return f"{'; '.join(named)}; {about}" if named else "a single one, without categories"


def _backbone(found: Description) -> str:
    named = found.backbone.to_dict()
    about = [f"{key} {value}" for key, value in named.items() if key != "name" and value is not None]
    about += [f"{key} {value}" for key, value in found.architecture.to_dict().items() if value is not None]
    return f"{found.backbone.name} ({', '.join(about)})" if about else found.backbone.name


def _groups(found: Description) -> Iterator[tuple[SiteConfig, list[str]]]:
    """Sites whose experts and router are the same, with their configuration."""
    groups: dict[str, tuple[SiteConfig, list[str]]] = {}
    for index, (entry, names) in enumerate(zip(found.mixture.sites, found.sites, strict=True)):
        for name in names:
            site = entry.at(name)
            # Entries stay apart: sites of one entry may share a router.
            groups.setdefault(f"{index} {site.experts}", (site, []))[1].append(name)
    yield from groups.values()


def _places(names: Sequence[str]) -> str:
    """``q_proj x 30, v_proj x 30 in layers 0-29``."""
    from ..sites import layer_of

    endings = [name.rpartition(".")[2] for name in names]
    counted = ", ".join(f"{ending} x {endings.count(ending)}" for ending in dict.fromkeys(endings))
    layers = sorted({layer for name in names if (layer := layer_of(name)) is not None})
    return counted + (f" in layers {_ranges(layers)}" if layers else "")


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 7, 9-11``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _experts(config: Any) -> str:
    shown = [f"r {_same(config.ranks)}", f"alpha {_same(config.alphas)}", f"scale {_same(config.scales)}"]
    return (
        f"{config.num_experts} x {config.kind}, {', '.join([*shown, *_others(config, ('num_experts', 'r', 'alpha'))])}"
    )


def _router(config: Any) -> str:
    if config is None:
        return "none, the expert is always on"
    return ", ".join([config.kind, *_others(config, ())])


def _others(config: Any, said: Iterable[str]) -> Iterator[str]:
    """The options that are set, besides those that are said already."""
    for name, value in config.to_dict().items():
        if name not in ("kind", *said) and value not in (None, [], {}):
            yield f"{name} {_same(value) if isinstance(value, list) else value}"


def _same(values: Sequence[Any]) -> str:
    """One value where all are the same, else the first few."""
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    if len(set(shown)) == 1:
        return shown[0]
    return f"[{', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}]"
