"""How much of each expert reaches each token, and how a node adds to the output of the frozen linear.

Shapes: T tokens, O out, K picks, R stacked rank (sum of the experts' ranks), U units that are weighed: experts, or
single ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """How much of each rank reaches the output, token by token.

    Attributes:
        weights: (..., U) for all units, or (..., K) for the chosen ones; ``None`` where experts are always on.
        indices: (..., K) int64 of the chosen units, -1 for none; ``None`` when dense.
        ranks: rank of each unit. scale: factor of all ranks, or (R,).
        factors: mix the factors of the units rather than their outputs; see :class:`~moelora.routing.RoutingRecord`.
    """

    weights: Tensor | None
    indices: Tensor | None
    ranks: Sequence[int]
    scale: float | Tensor
    factors: bool = False

    def per_unit(self) -> Tensor | None:
        """(..., U) weights, zero where not chosen."""
        if self.weights is None or self.indices is None:
            return self.weights
        dense = self.weights.new_zeros(*self.weights.shape[:-1], len(self.ranks))
        return dense.scatter_add(-1, self.indices.clamp(min=0), self.weights * (self.indices >= 0))

    def slots(self) -> tuple[Tensor, Tensor]:
        """(T, K) int64 indices, -1 for none, and weights of the units of each token; all of them when dense."""
        assert self.weights is not None, "experts that are always on need no slots"
        indices = self.indices
        if indices is None:
            indices = torch.arange(len(self.ranks), device=self.weights.device).expand(self.weights.shape)
        return indices.reshape(-1, indices.shape[-1]), self.weights.reshape(-1, indices.shape[-1])

    def per_rank(self) -> Tensor | None:
        """(..., R) weights, each unit's repeated over its ranks."""
        weights = self.per_unit()
        return None if weights is None else over_ranks(weights, self.ranks)


def over_ranks(weights: Tensor, ranks: Sequence[int]) -> Tensor:
    """(..., R) each unit's value (..., U) repeated over its ranks."""
    if len(set(ranks)) == 1:
        return weights if ranks[0] == 1 else weights.repeat_interleave(ranks[0], dim=-1)
    total = sum(ranks)
    return weights.repeat_interleave(torch.tensor(ranks, device=weights.device), dim=-1, output_size=total)


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; some, such as ``meta``, do not have it."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def may_overwrite(out: Tensor) -> bool:
    """Whether the node that adds to ``out`` may do so in place.

    The history of a leaf cannot be replaced; that of a view can, at the cost of a copy in the backward pass. If the
    frozen linear kept its output for its own backward pass, autograd would notice the change and say so.
    """
    return out.is_contiguous() and not out._is_view() and not (out.is_leaf and out.requires_grad)
