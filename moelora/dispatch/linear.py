"""Linear site: ``B ((A x) * g)``, with the experts of a site stacked on the rank axis.

Shapes: T tokens, D in, O out, E experts, K picks, R stacked rank (sum of the experts' ranks), U units that are weighed:
experts, or single ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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


def routed(out: Tensor, hidden: Tensor, lora_A: Tensor, lora_B: Tensor, gate: Gate) -> Tensor:
    """(..., O) ``out`` plus the gated update.

    Args:
        out: (..., O) output of the frozen linear; may be changed in place.
        hidden: (..., D) input after dropout. lora_A: (R, D), lora_B: (O, R) stacked experts.
    """
    return from_low(out, F.linear(hidden, lora_A.to(hidden.dtype)), lora_B, gate)


def from_low(out: Tensor, low: Tensor, lora_B: Tensor, gate: Gate) -> Tensor:
    """(..., O) the same as :func:`routed`, from the low-rank activations (..., R)."""
    weights = gate.per_rank()
    if gate.factors:
        low = _mixed(low, gate)
    low = low * gate.scale
    if weights is not None:
        low = low * weights.to(low.dtype)
    result: Tensor = out + F.linear(low, lora_B.to(low.dtype)).to(out.dtype)
    return result


def _mixed(low: Tensor, gate: Gate) -> Tensor:
    """(..., R) the low-rank activations of the mixed ``lora_A``, once for every unit."""
    weights, rank = gate.per_unit(), gate.ranks[0]
    assert weights is not None and len(set(gate.ranks)) == 1, "factors of different ranks cannot be mixed"
    each = low.unflatten(-1, (len(gate.ranks), rank)) * weights.unsqueeze(-1).to(low.dtype)
    mixed: Tensor = each.sum(-2, keepdim=True).expand_as(each).flatten(-2)
    return mixed


def reference(out: Tensor, hidden: Tensor, lora_A: Tensor, lora_B: Tensor, gate: Gate) -> Tensor:
    """The same as :func:`routed`, one unit after the other; for tests."""
    weights = gate.per_unit()
    start = 0
    for unit, rank in enumerate(gate.ranks):
        part = slice(start, start + rank)
        scale = gate.scale if not isinstance(gate.scale, Tensor) else gate.scale[part]
        low = (hidden @ lora_A[part].T) * scale
        weight = 1.0 if weights is None else weights[..., unit : unit + 1]
        out = out + (low * weight) @ lora_B[:, part].T
        start += rank
    assert start == lora_A.shape[0], f"ranks {gate.ranks} do not add up to {lora_A.shape[0]}"
    return out
