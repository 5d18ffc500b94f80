"""Offline pruning of a growing bank: atoms that hardly any token uses are removed, and what that changes is measured.

Not in MoRAM's code, whose "rank pruning" is the threshold of router ``moram``: that silences an atom for a token, but
the atom is stored and asked all the same. Here an atom goes where its weight, averaged over the real tokens of a
calibration set in evaluation mode, is below ``eps``. Weights of a site sum to at most 1, so an atom that did as much as
any other of R would have 1 / R. The others answer as before, but the norm over all atoms loses a term, so outputs move.

Shapes: R atoms of a site.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .config import SiteConfig
from .errors import ConfigError, DataError, UserError
from .evaluation.scoring import evaluating
from .experts import Container
from .experts.rank1 import Rank1Config, Rank1Experts
from .model import MoELoRAModel
from .routing import RoutingRecord, SiteInfo
from .shift import Batches, Shift, logits, outputs_of, shift_between

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruning:
    """What was removed, and what it changed.

    Attributes:
        eps: the weight below which an atom went.
        before, after: atoms of each task, by site. shift: how far the outputs on the calibration set moved.
    """

    eps: float
    before: dict[str, tuple[int, ...]]
    after: dict[str, tuple[int, ...]]
    shift: Shift

    @property
    def removed(self) -> int:
        """Atoms that were removed, of all sites."""
        return sum(map(sum, self.before.values())) - sum(map(sum, self.after.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        sites = {name: {"before": list(ranks), "after": list(self.after[name])} for name, ranks in self.before.items()}
        return {"eps": self.eps, "removed": self.removed, "shift": self.shift.to_dict(), "sites": sites}


def atom_weights(model: MoELoRAModel, batches: Batches) -> dict[str, Tensor]:
    """The mean weight of every atom over the real tokens of ``batches``, in evaluation mode.

    Args:
        batches: keyword arguments of the model's call; padding is told by their ``attention_mask``.

    Returns:
        By site, (R,) float64 on the CPU. An atom that a token did not choose, or whose score was below the threshold,
        has weight 0 for that token.

    Raises:
        ConfigError: the model has no growing bank whose atoms are weighed one by one.
        DataError: there is no real token.
    """
    names = prunable(model)
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}

    def hear(site: SiteInfo, record: RoutingRecord) -> None:
        if site.name not in names:
            return
        weights = record.dense_weights().double()
        real = torch.ones_like(weights[..., 0]) if record.mask is None else record.mask.to(weights)
        total = (weights * real.unsqueeze(-1)).reshape(-1, weights.shape[-1]).sum(0).cpu()
        sums[site.name] = sums.get(site.name, 0) + total
        counts[site.name] = counts.get(site.name, 0.0) + float(real.sum())

    with evaluating(model), model.slot.using(listener=hear):
        for batch in batches:
            model(
                **{key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            )
    empty = [name for name in names if not counts.get(name)]
    if empty:
        raise DataError(f"no real token of the calibration set reached site {empty[0]!r}: give batches with some")
    return {name: sums[name] / counts[name] for name in names}


def prune(model: MoELoRAModel, batches: Batches, eps: float, read: Callable[[Any], Tensor] = logits) -> Pruning:
    """Remove the atoms whose mean weight over a calibration set is below ``eps``; those left are bitwise the same.

    With ``eps`` 0 nothing is removed and nothing changes. A site keeps its heaviest atom in any case; a task may lose
    all of its atoms, and still counts as a task. Scales stay, the next task brings as many atoms as the last one did,
    and the model is saved and loaded as any other. Where something was removed, make a new optimizer.

    Args:
        batches: the calibration set; see :func:`atom_weights`. The outputs of all batches are kept twice for the shift.
        eps: at least 0; weights of a site sum to at most 1.
        read: what to compare of the model's outputs; see :func:`~moelora.shift.outputs_of`.

    Raises:
        ConfigError: the model has no growing bank whose atoms are weighed one by one.
        DataError: there is no real token.
        UserError: ``eps`` is negative.
    """
    if not eps >= 0:
        raise UserError(f"eps is {eps}, but no weight is below 0: give 0 or more, such as a tenth of 1 / (atoms)")
    weights = atom_weights(model, batches)
    before = outputs_of(model, batches, read)
    containers = {name: model.containers()[name] for name in weights}
    places = {name: _staying(mean, eps) for name, mean in weights.items()}
    ranks = {name: container.site.ranks for name, container in containers.items()}
    after = {name: _of_each_task(places[name], ranks[name]) for name in containers}
    if after != ranks:
        _apply(model, containers, places, after)
    done = Pruning(eps, ranks, after, shift_between(before, outputs_of(model, batches, read)))
    logger.info("%d of %d atoms were removed, none heavier than %g", done.removed, sum(map(len, weights.values())), eps)
    return done


def prunable(model: MoELoRAModel) -> list[str]:
    """Names of the sites whose atoms can be removed one by one.

    Raises:
        ConfigError: there is none, or one has a router with tensors for the atoms there are.
    """
    found = {
        name: container
        for name, container in model.containers().items()
        if any(isinstance(bank, Rank1Experts) for bank in container.banks())
    }
    if not found:
        kinds = sorted({site.experts.kind for site in model.mixture.sites})
        raise ConfigError(f"no experts of this mixture are atoms (they are of kind {', '.join(kinds)}): take 'rank1'")
    for name, container in found.items():
        router = container.router
        if router is None or router.level != "rank" or router.state_dict() or len(list(container.banks())) > 1:
            kind = "none" if router is None else router.kind
            raise ConfigError(
                f"site {name!r}: atoms are removed one by one where the router weighs each of them and has no tensors "
                f"of its own, found router {kind!r}: take router 'moram' at linear sites"
            )
    return list(found)


def _staying(mean: Tensor, eps: float) -> Tensor:
    """(R',) places of the atoms to keep, rising; at least the heaviest."""
    stays = mean >= eps
    stays[mean.argmax()] = True
    return stays.nonzero().squeeze(-1)


def _of_each_task(places: Tensor, ranks: Sequence[int]) -> tuple[int, ...]:
    """How many of these atoms each task has."""
    tasks = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    return tuple(torch.bincount(tasks[places], minlength=len(ranks)).tolist())


def _apply(
    model: MoELoRAModel, containers: dict[str, Container], places: dict[str, Tensor], after: dict[str, tuple[int, ...]]
) -> None:
    """Remove what does not stay; configuration, sites, routers and banks follow."""
    sites = list(model.mixture.sites)
    for group in sorted({container.group for container in containers.values()}):
        mine = {c.site.path: after[name] for name, c in containers.items() if c.group == group}
        sites[group] = _pruned(sites[group], mine)
    for name, container in containers.items():
        config = container.config = sites[container.group].at(container.site.path)
        assert container.router is not None
        container.site = replace(container.site, ranks=config.experts.ranks)
        container.router.site = replace(container.router.site, ranks=config.experts.ranks)
        for bank in container.banks():
            assert isinstance(bank, Rank1Experts)
            bank.keep_atoms(config.experts, places[name].to(bank.lora_A.device))
    model.mixture = model.mixture.model_copy(update={"sites": sites})


def _pruned(site: SiteConfig, kept: dict[str, tuple[int, ...]]) -> SiteConfig:
    """The configuration of a group of sites of which each has so many atoms of each task left."""
    experts: Rank1Config = site.experts
    # The first pattern that fits holds, and a path may be the end of a longer one.
    longest = sorted(kept, key=len, reverse=True)
    changed = {**experts.to_dict(), "kept": None, "kept_pattern": {path: list(kept[path]) for path in longest}}
    return SiteConfig.parse({**site.to_dict(), "experts": changed})
