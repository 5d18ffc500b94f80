"""Linear site with tokens grouped by expert: only chosen experts are computed, whatever their number.

Where torch has grouped matrix products for the device and dtype, nothing is read back to the host; else a loop over
the experts reads their counts, which only the CPU does for free.

Shapes: T tokens, D in, O out, C columns of any matrix of tokens, E experts, K picks, R stacked rank, N = T·K slots
sorted by expert, Q the largest rank of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gate import Gate, may_overwrite

# torch 2.9, the oldest that moelora takes, does not have it here.
_grouped_mm: Any = getattr(F, "grouped_mm", None)


def usable(out: Tensor, hidden: Tensor, gate: Gate) -> bool:
    """Whether this needs no count on the host, or has it there."""
    return hidden.device.type == "cpu" or _grouped(out, hidden, gate.ranks)


def _grouped(out: Tensor, hidden: Tensor, ranks: Sequence[int]) -> bool:
    """Whether grouped products take these: one rank, every row in whole lines of 16 bytes, and a dtype they know."""
    if _grouped_mm is None or len(set(ranks)) > 1:
        return False
    if any(size * hidden.element_size() % 16 for size in (hidden.shape[-1], out.shape[-1], ranks[0])):
        return False
    if hidden.device.type == "cpu":
        return hidden.dtype != torch.float64
    return hidden.dtype == torch.bfloat16 and torch.cuda.get_device_capability(hidden.device) >= (8, 0)


def sorted_(out: Tensor, hidden: Tensor, lora_A: Tensor, lora_B: Tensor, gate: Gate) -> Tensor:
    """(..., O) ``out`` plus the gated update, as one autograd node; first derivatives only.

    Args:
        out: (..., O) output of the frozen linear; may be changed in place.
        hidden: (..., D). lora_A: (R, D), lora_B: (O, R) stacked experts. gate: not of experts that are always on.
    """
    indices_TK, weights_TK = gate.slots()
    scale = gate.scale
    if isinstance(scale, Tensor):
        lora_B, scale = lora_B * scale.to(lora_B.dtype), 1.0
    # An empty slot is one of expert 0 with the weight 0, so that the number of slots is known without looking.
    weights_TK = weights_TK * (indices_TK >= 0) * scale
    groups = _Groups(indices_TK.clamp(min=0), gate.ranks, _grouped(out, hidden, gate.ranks))
    result: Tensor = _Sorted.apply(groups, out, hidden, lora_A, lora_B, weights_TK)  # type: ignore[no-untyped-call]
    return result


class _Groups:
    """Slots sorted by expert, and products of their rows with the factors of their experts."""

    def __init__(self, indices_TK: Tensor, ranks: Sequence[int], grouped: bool) -> None:
        self.ranks, self.grouped = ranks, grouped
        slots = indices_TK.shape[1]
        flat = indices_TK.reshape(-1)
        self.order_N = torch.argsort(flat, stable=True)
        self.token_N = torch.div(self.order_N, slots, rounding_mode="floor")
        counts = flat.new_zeros(len(ranks)).scatter_add_(0, flat, torch.ones_like(flat))
        self.ends = counts.cumsum(0).to(torch.int32)

    @cached_property
    def parts(self) -> list[tuple[slice, slice]]:
        """Slots and stacked ranks of every expert that has both."""
        ends, edges = self.ends.tolist(), list(accumulate(self.ranks))
        each = zip([0, *ends], ends, [0, *edges], edges, strict=False)
        return [(slice(a, b), slice(c, d)) for a, b, c, d in each if b > a and d > c]

    def to_ranks(self, rows_NC: Tensor, M_RC: Tensor) -> Tensor:
        """(N, Q) ``M x`` of each slot, zero beyond the rank of its expert."""
        if self.grouped:
            each: Tensor = _grouped_mm(rows_NC, self._by_expert(M_RC).transpose(1, 2), offs=self.ends)
            return each
        low_NQ = rows_NC.new_zeros(rows_NC.shape[0], max(self.ranks))
        for slots, ranks in self.parts:
            low_NQ[slots, : ranks.stop - ranks.start] = rows_NC[slots] @ M_RC[ranks].T
        return low_NQ

    def add_from_ranks(self, out_TC: Tensor, low_NQ: Tensor, M_RC: Tensor) -> None:
        """Add ``M^T y`` of each slot to its token."""
        if self.grouped:
            out_TC.index_add_(0, self.token_N, _grouped_mm(low_NQ, self._by_expert(M_RC), offs=self.ends))
            return
        for slots, ranks in self.parts:
            rows = low_NQ[slots, : ranks.stop - ranks.start] @ M_RC[ranks]
            out_TC.index_add_(0, self.token_N[slots], rows)

    def outer(self, low_NQ: Tensor, rows_NC: Tensor) -> Tensor:
        """(R, C) sum over the slots of each expert of ``y x^T``."""
        if self.grouped:
            sums: Tensor = _grouped_mm(low_NQ.T, rows_NC, offs=self.ends)
            return sums.flatten(0, 1)
        total = rows_NC.new_zeros(sum(self.ranks), rows_NC.shape[1])
        for slots, ranks in self.parts:
            torch.mm(low_NQ[slots, : ranks.stop - ranks.start].T, rows_NC[slots], out=total[ranks])
        return total

    def _by_expert(self, M_RC: Tensor) -> Tensor:
        return M_RC.view(len(self.ranks), -1, M_RC.shape[1])


class _Sorted(torch.autograd.Function):
    """Keeps x (T, D), the low-rank activations and weights of the slots, and their order."""

    @staticmethod
    def forward(
        ctx: Any, groups: _Groups, out: Tensor, hidden: Tensor, A: Tensor, B: Tensor, weights_TK: Tensor
    ) -> Tensor:
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        low_NQ = groups.to_ranks(x_TD.index_select(0, groups.token_N), A)
        weight_N1 = weights_TK.reshape(-1)[groups.order_N].unsqueeze(1)
        if may_overwrite(out):
            ctx.mark_dirty(out)
        else:
            out = out.clone(memory_format=torch.contiguous_format)
        groups.add_from_ranks(out.view(-1, out.shape[-1]), low_NQ * weight_N1.to(low_NQ.dtype), B.T.contiguous())
        ctx.save_for_backward(hidden, A, B, low_NQ, weight_N1)
        ctx.groups, ctx.slots = groups, weights_TK.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        hidden, A, B, low_NQ, weight_N1 = ctx.saved_tensors
        groups: _Groups = ctx.groups
        weight = weight_N1.to(low_NQ.dtype)
        d_rows_NO = d_out.reshape(-1, d_out.shape[-1]).index_select(0, groups.token_N)
        d_gated_NQ = groups.to_ranks(d_rows_NO, B.T.contiguous())
        d_B = groups.outer(low_NQ * weight, d_rows_NO).T
        exact = torch.promote_types(weight_N1.dtype, torch.float32)
        d_weight_N = (d_gated_NQ * low_NQ).sum(-1, dtype=exact).to(weight_N1.dtype)
        d_weights = torch.empty_like(d_weight_N).index_copy_(0, groups.order_N, d_weight_N).view(ctx.slots)
        d_low_NQ = d_gated_NQ * weight
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        d_A = groups.outer(d_low_NQ, x_TD.index_select(0, groups.token_N))
        d_x = None
        if ctx.needs_input_grad[2]:
            d_x = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
            groups.add_from_ranks(d_x.view(x_TD.shape), d_low_NQ, A)
        return None, d_out, d_x, d_A, d_B, d_weights
