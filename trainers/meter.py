"""What a trainer measures beside the loss: where tokens went, and named averages over a logging window.

Shapes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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


class LoadMeter:
    """A listener that adds up, site by site, how often each expert was chosen by real tokens.

    Attributes:
        counts: (E,) float64 by the name of the site. rows: real tokens by the name of the site, as a tensor.
    """

    def __init__(self, model: MoELoRAModel, count: Count = chosen) -> None:
        self._containers: dict[str, Container] = {
            name: container for name, container in model.containers().items() if container.router is not None
        }
        self._count = count
        self.counts: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}

    def __call__(self, site: SiteInfo, record: RoutingRecord) -> None:
        router = self._containers[site.name].router
        assert router is not None
        count = self._count(router, record)
        tokens = record.weights[..., 0]
        rows = count.new_tensor(tokens.numel()) if record.mask is None else record.mask.sum().to(count)
        if site.name in self.counts:
            count, rows = self.counts[site.name] + count, self.rows[site.name] + rows
        self.counts[site.name], self.rows[site.name] = count, rows

    def clear(self) -> None:
        """Forget everything counted so far."""
        self.counts, self.rows = {}, {}

    def add(self, other: LoadMeter) -> None:
        """Add what another meter of the same model counted."""
        for name, count in other.counts.items():
            if name in self.counts:
                count, rows = self.counts[name] + count, self.rows[name] + other.rows[name]
            else:
                rows = other.rows[name]
            self.counts[name], self.rows[name] = count, rows

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Sum over ranks, in one call of ``total``. Sites that this rank never reached count as zero."""
        if not self._containers:
            return
        device = next(iter(self.counts.values())).device if self.counts else torch.device("cpu")
        parts = []
        for name, container in self._containers.items():
            assert container.router is not None
            zero = torch.zeros(container.router.num_units, dtype=torch.float64, device=device)
            parts += [self.counts.get(name, zero), self.rows.get(name, zero[0]).reshape(1)]
        pieces = total(torch.cat(parts)).split([part.numel() for part in parts])
        for index, name in enumerate(self._containers):
            self.counts[name], self.rows[name] = pieces[2 * index], pieces[2 * index + 1].squeeze(0)

    def groups(self) -> dict[int, list[str]]:
        """Names of the sites counted so far, by the index of their site configuration."""
        groups: dict[int, list[str]] = {}
        for name, container in self._containers.items():
            if name in self.counts:
                groups.setdefault(container.group, []).append(name)
        return groups

    def by_router(self) -> dict[Router[Any], Tensor]:
        """(E,) float64 of each router, over the sites that share it; after :meth:`reduce`."""
        loads: dict[Router[Any], Tensor] = {}
        for name, container in self._containers.items():
            assert container.router is not None
            before = loads.get(container.router)
            loads[container.router] = self.counts[name] if before is None else before + self.counts[name]
        return loads

    def tokens(self) -> float:
        """Real tokens that passed the first routed site."""
        return float(next(iter(self.rows.values()))) if self.rows else 0.0

    def share(self) -> dict[int, Tensor]:
        """(E,) selections per real token of each site configuration, over the rows of all its sites."""
        result = {}
        for group, names in self.groups().items():
            rows = torch.stack([self.rows[name] for name in names]).sum().clamp(min=1)
            result[group] = torch.stack([self.counts[name] for name in names]).sum(0) / rows
        return result

    def metrics(self) -> dict[str, float]:
        """Three numbers for each routed site configuration, over its sites and everything counted.

        ``max_utilization``: the largest load of an expert as a multiple of its fair share. ``entropy``: mean over
        sites of the entropy of the load, 1 when even and 0 when one expert takes all. ``dead_experts``: pairs of site
        and expert that no token chose.
        """
        groups = self.groups()
        logs: dict[str, float] = {}
        for group, names in groups.items():
            load = torch.stack([self.counts[name] for name in names])
            total = load.sum(-1, keepdim=True)
            if not bool((total > 0).all()):
                continue
            probs, experts = load / total, load.shape[-1]
            prefix = "load/" if len(groups) == 1 else f"load/sites.{group}."
            logs[prefix + "max_utilization"] = float(probs.max()) * experts
            logs[prefix + "entropy"] = float(torch.special.entr(probs).sum(-1).mean()) / math.log(max(experts, 2))
            logs[prefix + "dead_experts"] = float((load == 0).sum())
        return logs

    def state(self) -> dict[str, Any]:
        """Plain numbers from which :meth:`restore` goes on exactly."""
        return {name: [*count.tolist(), float(self.rows[name])] for name, count in self.counts.items()}

    def restore(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        """Go on from what :meth:`state` returned."""
        self.clear()
        for name, values in state.items():
            numbers = torch.tensor(values, dtype=torch.float64, device=device)
            self.counts[name], self.rows[name] = numbers[:-1], numbers[-1]


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
