"""Linear site on a CPU in float32, by compiled kernels: the same mathematics as ``sorted``, rows never copied.

The kernels (block.cpp) work on the slots of all tokens sorted by expert, and add into the frozen linear's output.

Shapes: T tokens, D in, O out, E experts, K picks, R stacked rank, N occupied slots sorted by expert, Q the largest rank
of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import extension
from .gate import Gate, may_overwrite
from .slots import Slots, add_few, by_column, by_rank

# Slots that are not worth sorting: those of a few tokens that are being generated.
FEW = 32


def usable(hidden: Tensor) -> bool:
    """Whether the kernels are there and know this dtype and device."""
    return hidden.device.type == "cpu" and hidden.dtype == torch.float32 and extension.library() is not None


def compiled(out: Tensor, hidden: Tensor, lora_A: Tensor, lora_B: Tensor, gate: Gate) -> Tensor:
    """(..., O) ``out`` plus the gated update, as one autograd node; first derivatives only.

    Args:
        out: (..., O) output of the frozen linear; may be changed in place.
        hidden: (..., D). lora_A: (R, D), lora_B: (O, R) stacked experts. gate: not of experts that are always on.
    """
    indices_TK, weights_TK = gate.slots()
    if isinstance(gate.scale, Tensor):
        lora_B = lora_B * gate.scale.to(lora_B.dtype)
    else:
        weights_TK = weights_TK * gate.scale
    if indices_TK.numel() <= FEW and not torch.is_grad_enabled():
        out = out.contiguous()
        out_TO, x_TD = out.view(-1, out.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        given = (x_TD, lora_A, lora_B, indices_TK, weights_TK)
        add_few(gate.ranks, out_TO, *(tensor.contiguous() for tensor in given))
        return out
    result: Tensor = _Compiled.apply(  # type: ignore[no-untyped-call]
        Slots(indices_TK, gate.ranks), out, hidden.contiguous(), lora_A.contiguous(), lora_B.contiguous(), weights_TK
    )
    return result


class _Compiled(torch.autograd.Function):
    """Keeps x (T, D), and of each slot its low-rank activations (N, Q), weight and token."""

    @staticmethod
    def forward(
        ctx: Any, slots: Slots, out: Tensor, hidden: Tensor, A: Tensor, B: Tensor, weights_TK: Tensor
    ) -> Tensor:
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        one_R = A.new_ones(A.shape[0])  # the kernels' own scale, which would be lost on the weights' gradients
        low_NQ = slots.to_ranks(x_TD, by_rank(A, one_R))
        weight_N1 = weights_TK.reshape(-1)[slots.slot_N].unsqueeze(1)
        if may_overwrite(out):
            ctx.mark_dirty(out)
        else:
            out = out.clone(memory_format=torch.contiguous_format)
        slots.from_ranks(low_NQ * weight_N1, by_column(B, one_R), out.view(-1, out.shape[-1]), None, None)
        ctx.save_for_backward(hidden, A, B, low_NQ, weight_N1)
        ctx.slots, ctx.one_R, ctx.shape = slots, one_R, weights_TK.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        hidden, A, B, low_NQ, weight_N1 = ctx.saved_tensors
        slots: Slots = ctx.slots
        d_TO = d_out.reshape(-1, d_out.shape[-1]).contiguous()
        factors = by_column(B, ctx.one_R)
        d_gated_NQ = slots.to_ranks(d_TO, factors)
        d_B = torch.empty_like(B)
        slots.from_ranks(low_NQ * weight_N1, factors, None, d_TO, d_B)
        d_weights = low_NQ.new_zeros(ctx.shape)
        d_weights.view(-1).index_copy_(0, slots.slot_N, (d_gated_NQ * low_NQ).sum(-1))
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        d_x = torch.zeros_like(x_TD) if ctx.needs_input_grad[2] else None
        d_A = torch.empty_like(A)
        slots.from_ranks(d_gated_NQ * weight_N1, by_rank(A, ctx.one_R), d_x, x_TD, d_A)
        return None, d_out, None if d_x is None else d_x.view(hidden.shape), d_A, d_B, d_weights
