"""What a trainer measures beside the loss: where tokens went, and named averages over a logging window.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..analysis import metrics
from ..experts.container import Container
from ..mixture import MoELoRAModel
from ..routers.base import Router
from ..routing import RoutingRecord, SiteInfo
from ..slot import RoutingSlot

Count = Callable[[Router[Any], RoutingRecord], Tensor]


def chosen(router: Router[Any], record: RoutingRecord) -> Tensor:
    """(E,) how often real tokens went to each expert."""
    return record.counts()


def balanced(router: Router[Any], record: RoutingRecord) -> Tensor:
    """(E,) what the router's load-balance loss counts, which under a capacity is more than what was admitted."""
    return router.balance_counts(record)


# What stands before the counts of a site, each a sum over real tokens.
HEAD = ("rows", "ess", "entropy", "margin")
# Lines of the log are read by people and paid by the key: a mixture with more site configurations is summed up.
MOST_GROUPS = 300


class Manner(NamedTuple):
    """What the last record of a site shows of how its router decides.

    Attributes:
        dense: every expert has a weight. scored: there is a distribution over experts, so that the margin says how
            certain the router is. free: the router looked at the token, and was not told by a label or a table.
    """

    dense: bool = False
    scored: bool = False
    free: bool = False


@dataclass(frozen=True)
class SiteLoad:
    """What a meter counted at one site.

    Attributes:
        container: of the site. load_E: (E,) float64, how often each expert was chosen (dense routing: the sum of
            |weight|), or each rank of a router of single ranks. tokens: real tokens.
        ess: mean over tokens of the effective support size of the weights w, ``(sum |w|)^2 / sum w^2``: K equal weights
            have K, and a token without any 0. entropy: mean over tokens of the entropy, in nats, of the router's
            distribution, or of the |weights| where it has none. margin: mean over tokens of its largest value minus
            the second largest. 0 in a meter that was not told to look at ``gates``.
        manner: how its router decides.
    """

    container: Container
    load_E: NDArray[np.float64]
    tokens: float
    ess: float
    entropy: float
    margin: float
    manner: Manner


class LoadMeter:
    """A listener that adds up, site by site, how often each expert was chosen by real tokens.

    All numbers are in one vector on the device, so that adding and reducing it are one operation for all sites;
    nothing is read back before :meth:`sites`, :meth:`metrics` or :meth:`state`.

    Args:
        count: what counts as chosen.
        gates: also measure the weights of each token and how certain the router is; see :class:`SiteLoad`.
    """

    def __init__(self, model: MoELoRAModel, count: Count = chosen, gates: bool = False) -> None:
        self._containers: dict[str, Container] = {
            name: container for name, container in model.containers().items() if container.router is not None
        }
        self._count = count
        self._gates = gates
        self._sizes = [len(HEAD) + _router(container).num_units for container in self._containers.values()]
        self._manners: dict[str, Manner] = {}
        self.clear()

    def clear(self) -> None:
        """Forget everything counted so far."""
        self._sums: Tensor | None = None
        self._parts: dict[str, Tensor] = {}
        self._heard: dict[str, None] = {}

    def _hold(self, sums: Tensor) -> None:
        """Let ``sums`` be the vector; its parts are views."""
        self._sums = sums
        self._parts = dict(zip(self._containers, sums.split(self._sizes), strict=True))

    @torch.no_grad()
    def __call__(self, site: SiteInfo, record: RoutingRecord) -> None:
        name = site.name
        if self._sums is None:
            self._hold(torch.zeros(sum(self._sizes), dtype=torch.float64, device=record.weights.device))
        part = self._parts[name]
        self._heard[name] = None
        router = _router(self._containers[name])
        part[len(HEAD) :] += self._count(router, record).to(part.device)
        if self._gates:
            self._manners[name] = _manner(router, record)
            part[: len(HEAD)] += _gates(record).to(part.device)
        elif record.mask is None:
            part[0] += record.weights[..., 0].numel()
        else:
            part[0] += record.mask.sum().to(part.device)

    @property
    def counts(self) -> dict[str, Tensor]:
        """(E,) float64 by the name of the site."""
        return {name: self._parts[name][len(HEAD) :] for name in self._heard}

    def add(self, other: LoadMeter) -> None:
        """Add what another meter of the same model counted."""
        if other._sums is None:
            return
        if self._sums is None:
            self._hold(other._sums.clone())
        else:
            self._sums += other._sums
        self._heard |= other._heard
        self._manners |= other._manners

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Sum over ranks, in one call of ``total``. Sites that this rank never reached count as zero."""
        if not self._containers:
            return
        sums = torch.zeros(sum(self._sizes), dtype=torch.float64) if self._sums is None else self._sums
        self._hold(total(sums))
        self._heard |= dict.fromkeys(self._containers)

    def by_router(self) -> dict[Router[Any], Tensor]:
        """(E,) float64 of each router, over the sites that share it; after :meth:`reduce`."""
        loads: dict[Router[Any], Tensor] = {}
        counts = self.counts
        for name, container in self._containers.items():
            router = _router(container)
            before = loads.get(router)
            loads[router] = counts[name] if before is None else before + counts[name]
        return loads

    def tokens(self) -> float:
        """Real tokens that passed the first routed site."""
        return float(self._parts[next(iter(self._heard))][0]) if self._heard else 0.0

    def share(self) -> dict[int, Tensor]:
        """(E,) selections per real token of each site configuration, over the rows of all its sites."""
        groups: dict[int, list[Tensor]] = {}
        for name, container in self._containers.items():
            if name in self._heard:
                groups.setdefault(container.group, []).append(self._parts[name])
        sums = {group: torch.stack(parts).sum(0) for group, parts in groups.items()}
        return {group: part[len(HEAD) :] / part[0].clamp(min=1) for group, part in sums.items()}

    def sites(self) -> dict[str, SiteLoad]:
        """What was counted, by the name of the site; sites without a token are left out. Reads from the device."""
        if self._sums is None:
            return {}
        result = {}
        values = np.split(self._sums.cpu().numpy().copy(), np.cumsum(self._sizes)[:-1])
        for (name, container), part in zip(self._containers.items(), values, strict=True):
            tokens = float(part[0])
            if tokens > 0:
                ess, entropy, margin = (float(value) / tokens for value in part[1 : len(HEAD)])
                manner = self._manners.get(name, Manner())
                result[name] = SiteLoad(container, part[len(HEAD) :], tokens, ess, entropy, margin, manner)
        return result

    def metrics(self) -> dict[str, float]:
        """Numbers for each routed site configuration, over its sites and everything counted. Reads from the device.

        Of the load of the experts, ``max_utilization``: the largest as a multiple of its fair share; ``entropy``: mean
        over sites, 1 when even and 0 when one expert takes all; ``cv``: mean over sites of the standard deviation over
        the mean; ``dead_experts``: pairs of site and expert that no token chose. Of the gates, ``ess`` and, where the
        router has a distribution over experts, ``margin``: means over tokens of all sites; see :class:`SiteLoad`.
        """
        groups: dict[int, list[SiteLoad]] = {}
        for site in self.sites().values():
            groups.setdefault(site.container.group, []).append(site)
        if len(groups) > MOST_GROUPS:
            groups = {0: [site for sites in groups.values() for site in sites]}
        logs: dict[str, float] = {}
        for group, sites in groups.items():
            prefix = "load/" if len(groups) == 1 else f"load/sites.{group}."
            logs |= {prefix + name: value for name, value in self._measures(sites).items()}
        return logs

    def _measures(self, sites: list[SiteLoad]) -> dict[str, float]:
        loads = [site.load_E for site in sites if site.load_E.any()]
        if len(loads) < len(sites):
            return {}
        result = {
            "max_utilization": max(float(metrics.utilisation(load).max()) for load in loads),
            "entropy": float(np.mean([metrics.balance(load) for load in loads])),
            "cv": float(np.mean([metrics.variation(load) for load in loads])),
            "dead_experts": float(sum(int((load == 0).sum()) for load in loads)),
        }
        if self._gates:
            result["ess"] = _mean([(site.ess, site.tokens) for site in sites])
        if scored := [(site.margin, site.tokens) for site in sites if site.manner.scored]:
            result["margin"] = _mean(scored)
        return result

    def state(self) -> dict[str, Any]:
        """Plain numbers from which :meth:`restore` goes on exactly."""
        return {name: self._parts[name].tolist() for name in self._heard}

    def restore(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        """Go on from what :meth:`state` returned."""
        self.clear()
        if not state:
            return
        self._hold(torch.zeros(sum(self._sizes), dtype=torch.float64, device=device))
        for name, values in state.items():
            self._parts[name].copy_(torch.tensor(values, dtype=torch.float64))
            self._heard[name] = None


def _router(container: Container) -> Router[Any]:
    assert container.router is not None
    return container.router


def _manner(router: Router[Any], record: RoutingRecord) -> Manner:
    # Without probs a distribution is a softmax over those that were chosen, and over one it says nothing.
    scored = record.probs is not None or (record.logits is not None and record.weights.shape[-1] > 1)
    free = record.probs is not None or record.logits is not None or router.needs_activations
    return Manner(record.indices is None, scored, free)


def _gates(record: RoutingRecord) -> Tensor:
    """(4,) float64 the sums of ``HEAD`` over real tokens of one record, computed in float32 for each."""
    tiny = torch.finfo(torch.float32).tiny
    weights = record.weights.float().abs()
    total = weights.sum(-1, keepdim=True)
    ess = (total.squeeze(-1) / torch.linalg.vector_norm(weights, dim=-1).clamp_min(tiny)).square()
    probs = weights / total.clamp_min(tiny) if record.probs is None else record.probs.float()
    best = probs.max(dim=-1, keepdim=True)
    # Not topk, which is several times slower.
    margin = best.values.squeeze(-1) - probs.scatter(-1, best.indices, 0).amax(-1)
    each = torch.stack([torch.ones_like(ess), ess, torch.special.entr(probs).sum(-1), margin])
    if record.mask is not None:
        each = torch.where(record.mask, each, 0)
    return each.reshape(len(HEAD), -1).sum(-1, dtype=torch.float64)


def _mean(values: list[tuple[float, float]]) -> float:
    """Of (value, weight)."""
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)


class Averages:
    """Sums of named scalars since the last time they were taken; stays on the device until then."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight = 0.0

    def add(self, values: Mapping[str, Tensor], factor: float | Tensor = 1.0) -> None:
        """Add each value times ``factor``."""
        for name, value in values.items():
            scaled = value.detach().double() * factor
            self.sums[name] = self.sums[name] + scaled if name in self.sums else scaled

    def take(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Each sum divided by ``weight`` and averaged over ranks by ``mean``; starts afresh."""
        if not self.sums or self.weight == 0:
            return {}
        values = mean(torch.stack([*self.sums.values()]) / self.weight).tolist()
        result = dict(zip(self.sums, values, strict=True))
        self.sums, self.weight = {}, 0.0
        return result


@contextmanager
def only_listener(slot: RoutingSlot, listener: LoadMeter | None = None) -> Iterator[None]:
    """Within the block only ``listener`` hears records: the forward is not one of the training's own."""
    before = slot.listeners
    slot.listeners = [] if listener is None else [listener]
    try:
        yield
    finally:
        slot.listeners = before
