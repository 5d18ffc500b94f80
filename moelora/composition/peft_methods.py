"""The merging methods that PEFT computes: TIES, DARE and pruning by magnitude, by its own functions.

Each comes in two forms, as in PEFT's ``add_weighted_adapter`` (0.21.2). By itself the method is applied to the A of all
adapters and to their B, with the weights ``sqrt(w s)``: all must have one rank, and every A meets every B, so the
result is not what the method would make of the updates. With ``_svd`` behind it is applied to the updates themselves,
one matrix of the size of a weight for each adapter, and the result is cut to ``rank``: that takes the singular value
decomposition of a whole matrix, minutes for each module of a large model.

An adapter that has nothing at a module takes no part there.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..config import Closed
from ..errors import ConfigError
from .adapter import Factors
from .canonical import Spectrum, Term
from .merging import METHODS, Method, Rank, largest_rank, roots


class _Pruned(Closed):
    """What the methods share.

    Attributes:
        density: share of the entries that each adapter keeps.
    """

    density: Annotated[float, Field(gt=0, le=1)]

    @abstractmethod
    def mix(self, tensors: list[Tensor], weights: Tensor) -> Tensor:
        """One matrix out of several of one shape; weights: (adapters,)."""

    def call(self, function: str, *args: Any) -> Tensor:
        """A function of PEFT's.

        Raises:
            ConfigError: PEFT is not installed.
        """
        try:
            utils = import_module("peft.utils.merge_utils")
        except ImportError as error:
            raise ConfigError(
                f"this merging method is PEFT's, which is not installed ({error}): pip install moelora[peft], or take "
                "'cat', 'svd' or 'lego'"
            ) from None
        with warnings.catch_warnings():
            # That a density of 1 prunes nothing is what it says.
            warnings.filterwarnings("ignore", "The density .* no pruning will be performed", UserWarning)
            result: Tensor = getattr(utils, function)(*args)
        return result


class _Magnitude(_Pruned):
    """Each adapter keeps its largest entries, and the weighted sum is taken."""

    def mix(self, tensors: list[Tensor], weights: Tensor) -> Tensor:
        return self.call("magnitude_prune", tensors, weights, self.density)


class _Ties(_Pruned):
    """Each adapter keeps its largest entries; a sign is elected for each entry, and the mean of those with it is taken.

    Attributes:
        majority_sign: whether the sum of the entries elects the sign (``total``) or their number (``frequency``).
    """

    majority_sign: Literal["total", "frequency"] = "total"

    def mix(self, tensors: list[Tensor], weights: Tensor) -> Tensor:
        return self.call("ties", tensors, weights, self.density, self.majority_sign)


class _Random(_Pruned):
    """What the random methods share.

    Attributes:
        seed: which entries are dropped follows from it; the global generators stay as they are.
    """

    seed: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the merging of all modules: one stream of random numbers for all of them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield


class _DareLinear(_Random):
    """Each adapter keeps random entries, scaled up by 1 / density, and the weighted sum is taken."""

    def mix(self, tensors: list[Tensor], weights: Tensor) -> Tensor:
        return self.call("dare_linear", tensors, weights, self.density)


class _DareTies(_Random):
    """As ``dare_linear``, and then a sign is elected as in ``ties``."""

    majority_sign: Literal["total", "frequency"] = "total"

    def mix(self, tensors: list[Tensor], weights: Tensor) -> Tensor:
        return self.call("dare_ties", tensors, weights, self.density, self.majority_sign)


class _OnFactors(_Pruned, Method):
    equal_ranks = True

    def merge(self, terms: Sequence[Term]) -> Factors:
        signed, plain = (torch.tensor(values) for values in zip(*roots(terms), strict=True))
        A = self.mix([term.factors.A.float() for term in terms], signed)
        B = self.mix([term.factors.B.float() for term in terms], plain)
        return Factors(A, B, 1.0)


class _OnUpdates(_Pruned, Method):
    """Attributes: rank: of the result; by default the largest rank of an adapter at the module."""

    rank: Rank | None = None

    def merge(self, terms: Sequence[Term]) -> Factors:
        updates = [term.factors.scale * (term.factors.B.float() @ term.factors.A.float()) for term in terms]
        mixed = self.mix(updates, torch.tensor([term.weight for term in terms]))
        U, S, Vh = torch.linalg.svd(mixed, full_matrices=False)
        return Spectrum(U, S, Vh).largest(self.rank or largest_rank(terms))


@METHODS.register("magnitude_prune")
class MagnitudePrune(_Magnitude, _OnFactors):
    """Pruning by magnitude, on the factors."""


@METHODS.register("magnitude_prune_svd")
class MagnitudePruneSvd(_Magnitude, _OnUpdates):
    """Pruning by magnitude, on the updates."""


@METHODS.register("ties")
class Ties(_Ties, _OnFactors):
    """TIES on the factors."""


@METHODS.register("ties_svd")
class TiesSvd(_Ties, _OnUpdates):
    """TIES on the updates, as its paper means it."""


@METHODS.register("dare_linear")
class DareLinear(_DareLinear, _OnFactors):
    """DARE on the factors."""


@METHODS.register("dare_linear_svd")
class DareLinearSvd(_DareLinear, _OnUpdates):
    """DARE on the updates, as its paper means it."""


@METHODS.register("dare_ties")
class DareTies(_DareTies, _OnFactors):
    """DARE with the election of signs of TIES, on the factors."""


@METHODS.register("dare_ties_svd")
class DareTiesSvd(_DareTies, _OnUpdates):
    """DARE with the election of signs of TIES, on the updates."""
