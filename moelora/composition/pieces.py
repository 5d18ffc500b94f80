"""What an export consists of before it is written: plain adapters, and what is to be said of each.

Shapes: U weights of a router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..model import MoELoRAModel
from ..routing import RoutingContext
from ..site_weights import context_fields, only_one, site_weights
from .adapter import Adapter
from .canonical import spectrum
from .detached import Detached, Site
from .divergence import Batch, Divergence, measure
from .export_card import table
from .folding import one_expert, one_lora
from .merging import Distance, distance
from .writing import PeftAdapter

# What is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
FIELDS = ("task_ids", "task_types", "request_ids", "phase")


@dataclass(frozen=True)
class Piece:
    """One adapter of an export.

    Attributes:
        title: heading of its card. exact: it computes what it stands for, up to rounding. says: paragraphs of its card.
        distance: what cutting its ranks lost, by module. divergence: from the mixture, as measured.
    """

    whole: PeftAdapter
    title: str
    exact: bool
    says: Sequence[str] = field(default_factory=list)
    distance: Distance | None = None
    divergence: Divergence | None = None

    @property
    def name(self) -> str:
        """Of the adapter, and of its folder where there are several."""
        return self.whole.adapter.name


@dataclass(frozen=True)
class Texts:
    """Batches of forwards.

    Attributes:
        batches: to take mean weights over. held_out: others, to measure on.
    """

    batches: Sequence[Batch] = ()
    held_out: Sequence[Batch] = ()

    def on(self, device: torch.device) -> Texts:
        """The same on a device."""
        return Texts(*([_moved(batch, device) for batch in each] for each in (self.batches, self.held_out)))


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def experts_of(mixture: Detached, names: Sequence[str] | None, tell: Progress) -> tuple[list[Piece], list[str]]:
    """Every expert as an adapter of its own.

    Args:
        names: of the experts; by default those of the adapters that they come from, or ``expert_00`` and so on.

    Returns:
        The adapters, and the names of experts that have rank 0 everywhere, so that they are the frozen backbone.

    Raises:
        ConfigError: not one name for each expert, one that is no name of a folder, or an expert that PEFT cannot have.
    """
    wanted = mixture.names() if names is None else _checked(names, mixture.num_experts)
    pieces, left_out = [], []
    for index, name in enumerate(wanted):
        tell("Taking experts apart", index, len(wanted))
        whole = one_expert(mixture, index, name)
        if whole is None:
            left_out.append(name)
            continue
        title = f"{name}: expert {index} of a mixture of {len(wanted)}"
        pieces.append(Piece(whole, title, True, [_origin(mixture), *_about_expert(mixture, index)]))
    tell("Taking experts apart", len(wanted), len(wanted))
    if not pieces:
        raise ConfigError(f"{mixture.source}: every expert has the rank 0, which leaves nothing to write")
    return pieces, left_out


def _checked(names: Sequence[str], count: int) -> list[str]:
    if len(names) != count or len(set(names)) != count:
        raise ConfigError(f"names gives {list(names)} for {count} experts: give each one of its own")
    for name in names:
        if Path(name).name != name or name.startswith("."):
            raise ConfigError(f"names: {name!r} is no name of a folder: leave out '/' and a dot at the start")
    return list(names)


def _origin(mixture: Detached) -> str:
    configs = mixture.content.mixture.sites
    kinds = " and ".join(dict.fromkeys(f"{c.experts.num_experts} × {c.experts.kind}" for c in configs))
    said = (
        f"Exported from `{mixture.source}` (layout {mixture.layout}), a mixture of LoRA experts ({kinds}) on the "
        f"frozen backbone `{mixture.content.backbone.name}`."
    )
    if mixture.has_backbone:
        said += (
            " That backbone lies in the mixture's own files, among the experts: before this adapter is loaded, write "
            "it as a model of its own, `moelora.from_pretrained(mixture).unload().save_pretrained(folder)`."
        )
    return said


def _about_expert(mixture: Detached, expert: int) -> list[str]:
    routed = [site for site in mixture.sites if site.config.router is not None]
    kinds = ", ".join(dict.fromkeys(f"`{site.config.router.kind}`" for site in routed if site.config.router))
    absent = [site for site in routed if expert >= site.config.experts.num_experts]
    says = [
        f"On that backbone it computes what the mixture computes when expert {expert} has the weight 1 at every site "
        "and all others have 0, up to rounding."
    ]
    if kinds:
        says.append(
            f"The router ({kinds}) is not in it: the mixture itself weighs several experts, or this one less, so what "
            "it says is not what this adapter says."
        )
    if len(routed) < len(mixture.sites):
        says.append(
            f"At {len(mixture.sites) - len(routed)} of {len(mixture.sites)} sites the mixture has one expert that is "
            "always on; that one is in it."
        )
    if absent:
        says.append(f"It has nothing at {len(absent)} sites that have fewer experts, `{absent[0].path}` first.")
    return says


def lora_of(
    mixture: Detached,
    model: MoELoRAModel | None,
    name: str,
    *,
    rank: int | None,
    approximate: bool,
    texts: Texts,
    context: Mapping[str, Any],
    tell: Progress,
) -> Piece:
    """The whole mixture as one adapter.

    Args:
        model: the mixture on its backbone, where it is at hand. rank: at most this rank at each module.
        approximate: where no weights hold for every token, take those that the router names, or the mean over the text.
        context: fields of the routing context.

    Raises:
        ConfigError: it is no LoRA, or only an approximation is, which was not asked for or needs what is not there.
    """
    fields = _fields(context)
    weights, inexact = _known(mixture, RoutingContext(**fields))
    if inexact and not approximate:
        raise ConfigError(_why_not(mixture, inexact))
    if model is not None:
        texts = texts.on(model.device)
        weights, _ = site_weights(model, approximate, _Told(texts.batches, tell), fields)
    elif missing := [site for site in inexact if site.path not in weights]:
        raise ConfigError(
            f"site {missing[0].path!r} routes by the token: its mean weights need the model itself and text; give a "
            "loaded model and batches (on the command line --text FILE or --data)"
        )
    frozen = {} if model is None else {c.site.path: c.base for c in model.containers().values()}
    whole = one_lora(mixture, weights, name, frozen)
    cut, lost = (whole, None) if rank is None else _cut(whole, rank)
    piece = Piece(cut, f"{name}: a mixture as one LoRA", not inexact and lost is None, distance=lost)
    if model is not None and (texts.batches or texts.held_out):
        piece = replace(piece, divergence=_measured(piece, model, texts, fields, tell))
    return replace(piece, says=[_origin(mixture), *_about_lora(mixture, piece, inexact, context)])


class _Told(list[Batch]):
    """Batches that tell how many of them were taken."""

    def __init__(self, batches: Sequence[Batch], tell: Progress) -> None:
        super().__init__(batches)
        self._tell = tell

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(super().__iter__()):
            self._tell("Weighing experts", index, len(self))
            yield batch
        self._tell("Weighing experts", len(self), len(self))


def _fields(context: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := [name for name in context if name not in FIELDS]:
        raise ConfigError(f"context names {', '.join(unknown)}: a router may go by {', '.join(FIELDS)}")
    return context_fields(context)


def _known(mixture: Detached, context: RoutingContext) -> tuple[dict[str, Tensor], list[Site]]:
    """(U,) weights by site where they hold for every token, and the sites that one LoRA is not exactly."""
    weights, inexact = {}, []
    for site in mixture.sites:
        found = site.constant_weights(context)
        if found is not None:
            weights[site.path] = found
        if found is None or (site.is_block and not only_one(found)):
            inexact.append(site)
    return weights, inexact


def _why_not(mixture: Detached, inexact: Sequence[Site]) -> str:
    reasons = []
    by_token = {site.config.router.kind for site in inexact if site.config.router is not None and site.router is None}
    by_context = {site.router.kind for site in inexact if site.router is not None and not site.is_block}
    if by_token:
        reasons.append(f"router {', '.join(map(repr, sorted(by_token)))} weighs experts by the token")
    if by_context:
        reasons.append(
            f"router {', '.join(map(repr, sorted(by_context)))} has weights that hold for every token only under a "
            "context that was not given, or with other options (context={'task_ids': ...}; --context task_ids=3)"
        )
    if any(site.is_block for site in inexact):
        reasons.append(
            "a block has a nonlinearity between its linears, so a weighted sum of several experts is not what any LoRA "
            "of its linears computes"
        )
    return (
        f"{mixture.source}: {len(inexact)} of {len(mixture.sites)} sites, {inexact[0].path!r} first, are no LoRA: "
        f"{'; '.join(reasons)}. Export its experts one by one (export_experts, --what experts), or an approximation "
        "by mean weights, whose distance from the mixture is measured (approximate=True with text; --approximate "
        "--text FILE)"
    )


def _cut(whole: PeftAdapter, rank: int) -> tuple[PeftAdapter, Distance | None]:
    """The adapter with at most that rank at each module, and what that lost; ``None`` where nothing was cut."""
    adapter = whole.adapter
    if rank < 1:
        raise ConfigError(f"rank is {rank}: give 1 or more")
    if whole.magnitudes:
        raise ConfigError("rank cannot be cut in a DoRA adapter: its magnitudes belong to the factors that it has")
    if all(factors.rank <= rank for factors in adapter.factors.values()):
        return whole, None
    factors = {
        path: spectrum(each).largest(rank) if each.rank > rank else each for path, each in adapter.factors.items()
    }
    cut = Adapter(adapter.name, factors, adapter.backbone, adapter.architecture)
    return replace(whole, adapter=cut), distance(cut, [adapter])


def _measured(piece: Piece, model: MoELoRAModel, texts: Texts, fields: Mapping[str, Any], tell: Progress) -> Divergence:
    """The divergence of the adapter as it will be written."""
    with TemporaryDirectory() as folder:
        piece.whole.write(Path(folder), "")
        return measure(
            model,
            Path(folder),
            texts.held_out or texts.batches,
            fields,
            held_out=bool(texts.held_out),
            progress=lambda done, total: tell("Comparing with the mixture", done, total),
        )


def _about_lora(mixture: Detached, piece: Piece, inexact: Sequence[Site], context: Mapping[str, Any]) -> list[str]:
    given = ", ".join(f"{name} = {value}" for name, value in context.items())
    under = f" under {given}" if given else ""
    if inexact:
        says = [
            f"An approximation: {len(inexact)} of {len(mixture.sites)} sites route by the token or mix several experts "
            f"around a nonlinearity, and no LoRA does that. Each expert has one weight for all tokens here{under}, the "
            "mean over a text or the one that its method merges with."
        ]
    else:
        says = [
            f"The experts have weights that are the same for every token{under}, so the mixture is one LoRA with the "
            "ranks of all of them; the weights are in its factors."
            + ("" if piece.distance else " It computes what the mixture computes, up to rounding.")
        ]
    if piece.distance is not None:
        rows = [[f"`{path}`", str(m.rank), f"{m.relative:.2%}"] for path, m in piece.distance.modules.items()]
        says += [
            f"Its ranks were cut: the updates of all modules together are off by {piece.distance.relative:.2%} "
            "(Frobenius norm of the difference over that of the update).",
            table(["module", "rank", "off by"], rows),
        ]
    if piece.divergence is not None:
        says.append(f"Measured against the mixture: {piece.divergence}.")
    elif not piece.exact:
        says.append("How far its answers are from those of the mixture was not measured.")
    return says
