"""LoRA-LEGO: adapters are taken apart into single ranks, like ones are put together, and one adapter is built of them.

Source: Zhao et al. 2024 (arXiv 2409.16167). A row of A with its column of B is a minimal semantic unit; the units of
all adapters at a linear are clustered by k-means, and the k centroids are the merged adapter of rank k. A mean of
vectors that differ is shorter than they are, so each centroid is brought to the mean norm of its units (their parameter
reweighting). No code is published.

Our reading:

* The units of an adapter depend on its factors, not on its update alone: (Q A, B Q^-1) is the same adapter with other
  units. Here they are the singular vectors of the update with ``sqrt(|w| s sigma)`` on both, which are its own.
* A unit and its negative are one update, ``a b^T = (-a)(-b)^T``, and a singular vector has no sign of its own, so the
  distance of two units is that of the nearer of the two signs. Units of one adapter are orthogonal, and then neither is
  the nearer: the largest entry of a is taken to be positive.
* The paper also rescales the output for the change of rank; we could not check its constant and leave it out, so that k
  equal to the sum of all ranks gives exactly the sum. Fewer units stand for a sum of fewer updates:
  :func:`~moelora.composition.distance` says how far that is from the sum, or from the mean.

Shapes: D in, O out, N units, k clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .adapter import Factors
from .canonical import Term, spectrum
from .merging import METHODS, Method, Rank, largest_rank


@METHODS.register("lego")
class Lego(Method):
    """Clusters of single ranks; see the text of the module.

    Attributes:
        k: rank of the result; by default the largest rank of an adapter at the module. At most the number of units is
            taken.
        seed: of the first centroids. restarts: the best of so many clusterings. steps: at most, of each.
    """

    k: Rank | None = None
    seed: int = 0
    restarts: Annotated[int, Field(gt=0)] = 10
    steps: Annotated[int, Field(gt=0)] = 100

    def merge(self, terms: Sequence[Term]) -> Factors:
        units = torch.cat([_units(term) for term in terms])
        width = terms[0].factors.A.shape[1]
        k = min(self.k or largest_rank(terms), max(len(units), 1))
        if not len(units):  # all updates are zero
            units = units.new_zeros(1, units.shape[1])
        # In the space that the units span, which has the same distances and far fewer dimensions.
        basis, coordinates = torch.linalg.qr(units.T)
        units = coordinates.T.contiguous()
        generator = torch.Generator().manual_seed(self.seed)
        found = min((cluster(units, k, generator, self.steps) for _ in range(self.restarts)), key=lambda c: c.spread)
        centroids = _reweighted(units, found) @ basis.T
        return Factors(centroids[:, :width], centroids[:, width:].T, 1.0)


def _units(term: Term) -> Tensor:
    """(n, D + O) float64: the units of one adapter without those that have no length; a negative weight is in B."""
    found = spectrum(term.factors)
    smallest = found.S[0] * torch.finfo(torch.float64).eps * max(found.Vh.shape[1], found.U.shape[0])
    there = (smallest < found.S).nonzero().flatten() if term.weight else found.S.new_empty(0, dtype=torch.int64)
    root = (found.S[there] * abs(term.weight)).sqrt().unsqueeze(1)
    a, b = root * found.Vh[there], root * found.U.T[there]
    turn = a.gather(1, a.abs().argmax(dim=1, keepdim=True)).sign()
    return torch.cat([turn * a, turn * b if term.weight >= 0 else -turn * b], dim=1)


@dataclass(frozen=True)
class Clusters:
    """A clustering of units (N, width).

    Attributes:
        centroids: (k, width). members: (N,) int64, the cluster of each. signs: (N,) 1 or -1, which of the two units
            that stand for one update is the nearer. spread: sum of the squared distances.
    """

    centroids: Tensor
    members: Tensor
    signs: Tensor
    spread: float


def cluster(units: Tensor, k: int, generator: torch.Generator, steps: int = 100) -> Clusters:
    """k-means of units whose sign is of no matter, from centroids drawn as by k-means++ (Arthur, Vassilvitskii 2007).

    No cluster is empty: one that loses all its units takes the one that is farthest from its centroid.

    Args:
        units: (N, width) float64, N at least k.
    """
    centroids = _first(units, k, generator)
    before = units.new_empty(0), units.new_empty(0)
    for _ in range(steps):
        members, signs = _nearest(units, centroids)
        _fill(units, centroids, members, signs, k)
        aligned = units * signs.unsqueeze(1)
        counts = torch.bincount(members, minlength=k).unsqueeze(1)
        centroids = torch.zeros_like(centroids).index_add_(0, members, aligned) / counts
        if torch.equal(members, before[0]) and torch.equal(signs, before[1]):
            break
        before = members, signs
    spread = (aligned - centroids[members]).square().sum().item()
    return Clusters(centroids, members, signs, spread)


def _squared(units: Tensor, centroids: Tensor) -> Tensor:
    """(N, k) squared distances to the nearer sign."""
    inner = (units @ centroids.T).abs()
    return (units.square().sum(1, keepdim=True) + centroids.square().sum(1) - 2 * inner).clamp(min=0)


def _nearest(units: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) the nearest centroid of each unit, and the sign that is the nearer to it."""
    members = _squared(units, centroids).argmin(dim=1)
    own = centroids[members]
    # Below this the sign of the product is one of rounding.
    noise = 1e-9 * units.norm(dim=1) * own.norm(dim=1)
    return members, torch.where((units * own).sum(1) < -noise, -1.0, 1.0).to(units.dtype)


def _first(units: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """(k, width) units, each drawn by its squared distance from those that were; never one of them twice."""
    free = torch.ones(len(units), dtype=torch.float64)
    chosen: list[int] = []
    chances = free
    for _ in range(k):
        chosen.append(int(torch.multinomial(chances, 1, generator=generator)))
        free[chosen[-1]] = 0
        nearest = _squared(units, units[chosen]).min(dim=1).values * free
        chances = nearest if nearest.sum() > 0 else free
    return units[chosen].clone()


def _fill(units: Tensor, centroids: Tensor, members: Tensor, signs: Tensor, k: int) -> None:
    """Give every empty cluster the unit that is farthest from its centroid, of a cluster with more than one."""
    counts = torch.bincount(members, minlength=k)
    for empty in (counts == 0).nonzero().flatten().tolist():
        distances = (units * signs.unsqueeze(1) - centroids[members]).square().sum(1)
        taken = int(torch.where(counts[members] > 1, distances, -1.0).argmax())
        counts[members[taken]] -= 1
        counts[empty] += 1
        members[taken], signs[taken] = empty, 1.0


def _reweighted(units: Tensor, found: Clusters) -> Tensor:
    """(k, width) the centroids with the mean norm of their units."""
    k = len(found.centroids)
    lengths = units.new_zeros(k).index_add_(0, found.members, units.norm(dim=1))
    wanted = lengths / torch.bincount(found.members, minlength=k)
    own = found.centroids.norm(dim=1)
    return found.centroids * torch.where(own > 0, wanted / own, 0.0).unsqueeze(1)
