"""How differently tasks are routed, and how the routing of a task moves while later tasks are learnt.

The measure is the Jensen–Shannon divergence (Lin 1991, "Divergence measures based on the Shannon entropy") in base 2:
half of what p and q each need in bits over their middle m = (p + q) / 2,

    JS(p, q) = KL(p | m) / 2 + KL(q | m) / 2,

0 where both use the experts alike and 1 where they share none; symmetric, and finite for experts that one of them never
uses. It is taken of the shares of the experts of one site, and the mean over sites counts every site alike.

Shapes: E experts, N tasks, M moments at which the routing was recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import DataError
from .metrics import Array, shares
from .stats import RoutingStats, SiteStats


@dataclass(frozen=True)
class Drift:
    """How the routing of tasks differs between them, and over time.

    Attributes:
        tasks: their names, in the order in which they are learnt.
        between: (N, N) divergence between each two tasks at the last moment, mean over sites; 0 on the diagonal.
        since: (M, N) divergence of each task's routing at each moment from that right after it was learnt, mean over
            sites; NaN before that.
        sites: of each site, the mean of its divergence between two tasks at the last moment; NaN for a single task.
    """

    tasks: tuple[str, ...]
    between: Array
    since: Array
    sites: dict[str, float]

    @property
    def between_tasks(self) -> float:
        """Mean divergence between two different tasks at the last moment; NaN for a single task."""
        return _mean_of_pairs(self.between)

    @property
    def since_learnt(self) -> float:
        """Mean over all tasks but the last of how far their routing moved after they were learnt; NaN for one task."""
        moved = self.since[-1, :-1]
        return float(moved.mean()) if moved.size else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what was not measured is ``None``."""
        return {
            "between_tasks": _plain(self.between_tasks),
            "since_learnt": _plain(self.since_learnt),
            "tasks": list(self.tasks),
            "between": [[_plain(value) for value in row] for row in self.between.tolist()],
            "since": [[_plain(value) for value in row] for row in self.since.tolist()],
            "sites": {name: _plain(value) for name, value in self.sites.items()},
        }


def divergence(one: ArrayLike, other: ArrayLike) -> Array:
    """(...) Jensen–Shannon divergence of two loads, (..., E) each, base 2: 0 alike, 1 nothing in common.

    Where one of them has fewer experts it is from a time before the others were added, which had no load then. NaN
    where nothing was recorded.
    """
    p, q = _padded(shares(one), shares(other))
    middle = (p + q) / 2
    found: Array = (_bits(p, middle) + _bits(q, middle)) / 2
    # Rounding alone leaves the interval.
    return np.clip(found, 0, 1)


def between_tasks(site: SiteStats) -> Array:
    """(N, N) divergence between the routing of each two tasks at one site."""
    load_NE = site.load_NE
    return divergence(load_NE[:, None, :], load_NE[None, :, :])


def routing_drift(moments: Sequence[RoutingStats]) -> Drift:
    """Compare the routing of tasks with each other, and with what it was when each of them was learnt.

    Args:
        moments: M = N recordings of the same data, of all tasks in the order in which they are learnt: the first after
            the first task, the last after the last. Experts may become more on the way; what was pruned in between
            cannot be compared, as atoms have no name but their place.

    Raises:
        DataError: there is none, they are not one for each task, tasks or sites differ between them, or a bank has
            shrunk.
    """
    if not moments:
        raise DataError("routing drift needs a recording after each task, none was given")
    first = moments[0]
    _check(moments)
    count = len(first.tasks)
    between, since, sites = [], [], {}
    for place, site in enumerate(moments[-1].sites):
        pairs = between_tasks(site)
        between.append(pairs)
        sites[site.name] = _mean_of_pairs(pairs)
        loads = [moment.sites[place].load_NE for moment in moments]
        moved = np.full((len(moments), count), np.nan)
        for task in range(count):
            for moment in range(task, len(moments)):
                moved[moment, task] = divergence(loads[task][task], loads[moment][task])
        since.append(moved)
    return Drift(first.tasks, np.mean(between, axis=0), np.mean(since, axis=0), sites)


def _check(moments: Sequence[RoutingStats]) -> None:
    first = moments[0]
    if len(moments) != len(first.tasks):
        raise DataError(
            f"routing drift needs a recording after each of the {len(first.tasks)} tasks, got {len(moments)}"
        )
    names = [site.name for site in first.sites]
    for number, moment in enumerate(moments):
        if moment.tasks != first.tasks:
            raise DataError(
                f"recording {number} has the tasks {', '.join(moment.tasks)}, the first has {', '.join(first.tasks)}: "
                "record the same tasks, in the order in which they are learnt"
            )
        if [site.name for site in moment.sites] != names:
            raise DataError(f"recording {number} has other sites than the first: record the same model")
        before = moments[max(number - 1, 0)].sites
        for site, earlier in zip(moment.sites, before, strict=True):
            if site.num_experts < earlier.num_experts:
                raise DataError(
                    f"site {site.name!r} had {earlier.num_experts} experts in recording {number - 1} and has "
                    f"{site.num_experts} in recording {number}: what was pruned in between cannot be compared"
                )


def _padded(one: Array, other: Array) -> tuple[Array, Array]:
    """Both with as many experts, those that only one knows with no share in the other."""
    most = max(one.shape[-1], other.shape[-1])
    wide = [np.pad(each, [(0, 0)] * (each.ndim - 1) + [(0, most - each.shape[-1])]) for each in (one, other)]
    return wide[0], wide[1]


def _bits(p: Array, middle: Array) -> Array:
    """(...) KL(p | middle) in bits, where ``middle`` is above 0 wherever ``p`` is; NaN where ``p`` is."""
    ratio = np.divide(p, middle, out=np.ones(np.broadcast_shapes(p.shape, middle.shape)), where=p > 0)
    total: Array = (p * np.log2(ratio)).sum(axis=-1)
    return total


def _mean_of_pairs(pairs: Array) -> float:
    """Mean of what is not on the diagonal; NaN for a single row."""
    off = pairs[~np.eye(len(pairs), dtype=bool)]
    return float(off.mean()) if off.size else float("nan")


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else value
