"""Several LoRA adapters into one: the methods by name, and how far the result is from the sum.

Here experts stay LoRA; :mod:`moelora.merging` merges them into the frozen weights.

Sources: the methods and their names are those of PEFT's ``add_weighted_adapter`` (0.21.2); TIES is Yadav et al. 2023
(arXiv 2306.01708), DARE is Yu et al. 2023 (arXiv 2311.03099), LoRA-LEGO see ``lego.py``. That adapters merge well is
not to be expected: see arXiv 2506.13479.

Shapes: D in, O out, r rank.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from ..checkpoints.by_module import in_order
from ..config import Closed
from ..errors import CheckpointError, ConfigError
from ..registry import Registry
from .adapter import Adapter, Factors
from .canonical import Term, norm, spectrum, stacked

logger = logging.getLogger(__name__)

METHODS: Registry[Method] = Registry("merging method", "moelora.composition")
Rank = Annotated[int, Field(gt=0)]


class Method(Closed):
    """A way to make one pair of factors of several; its fields are its options.

    Attributes:
        equal_ranks: it computes with A and B by themselves, so all adapters must have one rank at a module.
    """

    kind: ClassVar[str]
    equal_ranks: ClassVar[bool] = False

    @abstractmethod
    def merge(self, terms: Sequence[Term]) -> Factors:
        """The merged factors of one linear, from those adapters that have something there; inputs stay as they are."""

    def running(self) -> AbstractContextManager[Any]:
        """Around the merging of all modules, in the order of the backbone."""
        return nullcontext()


@METHODS.register("cat")
class Cat(Method):
    """``[A_1; A_2; ...]`` and ``[w_1 s_1 B_1, w_2 s_2 B_2, ...]``: exactly the weighted sum, with all ranks."""

    def merge(self, terms: Sequence[Term]) -> Factors:
        return stacked(terms)


@METHODS.register("linear")
class Linear(Method):
    """``(sum_e sqrt(w_e s_e) B_e) (sum_e sqrt(w_e s_e) A_e)``, the factor form of PEFT.

    Not the sum of the updates: every A meets every B, so there are terms of two adapters. The sign of a weight is in A.
    """

    equal_ranks = True

    def merge(self, terms: Sequence[Term]) -> Factors:
        parts = [(signed, root, term.factors) for (signed, root), term in zip(roots(terms), terms, strict=True)]
        A = torch.stack([signed * factors.A.double() for signed, _, factors in parts]).sum(0)
        B = torch.stack([root * factors.B.double() for _, root, factors in parts]).sum(0)
        return Factors(A, B, 1.0)


@METHODS.register("svd")
class Svd(Method):
    """The best approximation of the weighted sum in a given rank; exact where the rank is that of the sum.

    Attributes:
        rank: of the result; by default the largest rank of an adapter at the module, as PEFT has it.
        energy: take the smallest rank that keeps this share of the squared norm instead, module by module.
    """

    rank: Rank | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.rank is not None and self.energy is not None:
            raise ValueError("rank and energy both say how much to keep: give one of them")
        return self

    def merge(self, terms: Sequence[Term]) -> Factors:
        found = spectrum(stacked(terms))
        if self.energy is None:
            return found.largest(self.rank or largest_rank(terms))
        squares = found.S.square().cumsum(0)
        return found.largest(1 + int((squares < self.energy * squares[-1]).sum()))


def roots(terms: Iterable[Term]) -> list[tuple[float, float]]:
    """``sqrt(|w s|)`` of each term, with the sign of w s and without it."""
    coefficients = [term.weight * term.factors.scale for term in terms]
    return [(abs(value) ** 0.5 * (1 if value >= 0 else -1), abs(value) ** 0.5) for value in coefficients]


def largest_rank(terms: Iterable[Term]) -> int:
    """The largest rank of an adapter."""
    return max(term.factors.rank for term in terms)


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str,
    weights: Sequence[float] | None = None,
    name: str = "merged",
    **options: Any,
) -> Adapter:
    """One LoRA adapter out of several, in float32 with scale 1. The given ones stay as they are.

    An adapter that has nothing at a module counts as zero there; ranks, scales and modules may differ.

    Args:
        method: ``cat`` (exact), ``svd``, ``lego``, ``linear``; with ``pip install moelora[peft]`` also ``ties``,
            ``dare_linear``, ``dare_ties``, ``magnitude_prune``, and each of these with ``_svd`` behind.
        weights: one for each adapter; 1 by default, so that the result stands for the sum, not for the mean.
        name: of the result. **options: of the method, such as ``rank=8``.

    Raises:
        ConfigError: no such method or option, or the method needs ranks that are equal.
        CheckpointError: the adapters are not of one backbone.
    """
    weights = _checked(adapters, weights)
    chosen = METHODS.get(method).parse(options, where=f"method {method!r}")
    table = _by_module(adapters, weights)
    if chosen.equal_ranks:
        _refuse_ragged(method, table)
    with torch.no_grad(), chosen.running():
        merged = {path: chosen.merge(terms) for path, terms in table.items()}
    factors = {
        path: Factors(each.A.float().contiguous(), each.B.float().contiguous(), each.scale)
        for path, each in merged.items()
    }
    return Adapter(name, factors, adapters[0].backbone, adapters[0].architecture)


def _checked(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    """The weights, after a look at whether the adapters belong together."""
    if not adapters:
        raise ConfigError("there are no adapters to merge: give at least one")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ConfigError(f"there are {len(weights)} weights for {len(adapters)} adapters: give one for each")
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights are {weights}: expected finite numbers")
    first = adapters[0]
    for other in adapters[1:]:
        if differences := first.architecture.differences(other.architecture):
            raise CheckpointError(
                f"adapters {first.name!r} and {other.name!r} are not of one backbone: {'; '.join(differences)}"
            )
        if other.backbone.name != first.backbone.name:
            logger.warning(
                "adapter %r names the backbone %s, adapter %r names %s: they only go together if these have the same "
                "weights",
                first.name,
                first.backbone.name,
                other.name,
                other.backbone.name,
            )
    return weights


def _by_module(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Term]]:
    """What each adapter has at each module, in the order of layers."""
    table: dict[str, list[Term]] = {}
    owners: dict[str, Adapter] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, factors in adapter.factors.items():
            if not factors.rank:
                continue
            first = owners.setdefault(path, adapter)
            wanted, found = _widths(first.factors[path]), _widths(factors)
            if wanted != found:
                raise CheckpointError(
                    f"adapters {first.name!r} and {adapter.name!r} are not of one backbone: {path}: expected (in, out) "
                    f"= {wanted}, found {found}"
                )
            table.setdefault(path, []).append(Term(weight, factors))
    return {path: table[path] for path in sorted(table, key=in_order)}


def _widths(factors: Factors) -> tuple[int, int]:
    return factors.A.shape[1], factors.B.shape[0]


def _refuse_ragged(method: str, table: Mapping[str, Sequence[Term]]) -> None:
    for path, terms in table.items():
        ranks = [term.factors.rank for term in terms]
        if len(set(ranks)) > 1:
            raise ConfigError(
                f"method {method!r} computes with A and B by themselves and needs adapters of one rank; at {path} they "
                f"have {ranks}: take 'cat', 'svd' or 'lego', or a method that ends with '_svd'"
            )


@dataclass(frozen=True)
class ModuleDistance:
    """How far the update of one module is from what it stands for.

    Attributes:
        rank: of the module. error: Frobenius norm of the difference. wanted: Frobenius norm of what it stands for.
    """

    rank: int
    error: float
    wanted: float

    @property
    def relative(self) -> float:
        """``error / wanted``; 0 where both are."""
        return _share(self.error, self.wanted)


@dataclass(frozen=True)
class Distance:
    """How far an adapter is from the weighted sum of others, module by module; ``str()`` of it has a line for each."""

    modules: Mapping[str, ModuleDistance]

    @property
    def relative(self) -> float:
        """Of all modules together: the norm of all differences over the norm of all that was wanted."""
        total = {
            name: sum(getattr(each, name) ** 2 for each in self.modules.values()) ** 0.5 for name in ("error", "wanted")
        }
        return _share(total["error"], total["wanted"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        modules = {path: {**vars(each), "relative": each.relative} for path, each in self.modules.items()}
        return {"relative": self.relative, "modules": modules}

    def __str__(self) -> str:
        lines = [f"{path}: rank {each.rank}, off by {each.relative:.2%}" for path, each in self.modules.items()]
        return "\n".join([*lines, f"all modules: off by {self.relative:.2%}"])


def _share(error: float, wanted: float) -> float:
    if error == 0:
        return 0.0
    return error / wanted if wanted else float("inf")


@torch.no_grad()
def distance(merged: Adapter, adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Distance:
    """How far ``merged`` is from ``sum_e w_e s_e B_e A_e``, without forming a matrix of the size of a weight.

    Args:
        weights: one for each adapter; 1 by default. With 1 / N it is the distance from the mean.

    Raises:
        ConfigError, CheckpointError: as :func:`merge_adapters`.
    """
    weights = _checked(adapters, weights)
    wanted = _by_module(adapters, weights)
    found = _by_module([*adapters, merged], [*weights, -1.0])
    modules = {}
    for path, terms in found.items():
        own = merged.factors.get(path)
        modules[path] = ModuleDistance(0 if own is None else own.rank, norm(terms), norm(wanted.get(path, [])))
    return Distance(modules)
