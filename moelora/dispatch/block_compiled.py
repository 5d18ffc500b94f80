"""Block site on a CPU in float32, by compiled kernels; the same mathematics as ``sorted``, rows never copied whole.

The kernels (block.cpp) work on the slots of all tokens sorted by expert. Kept for the backward pass are the inputs and
what has the rank of one expert for each slot.

Shapes: T tokens, D width of the block, F width between the projections, E experts, K slots per token, R stacked rank,
N occupied slots, Q the largest rank of an expert.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import extension
from .block_inputs import Activation, BlockInputs, frozen, weight_gradient
from .slots import Factors, Rows, Slots, at, by_column, by_rank, rows, rowwise

FORMULAS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def usable(inputs: BlockInputs, activation: Activation) -> bool:
    """Whether the kernels are there and know this dtype, device and nonlinearity."""
    p = inputs.activated_TF
    known = p.device.type == "cpu" and p.dtype == torch.float32 and activation.formula is not None
    return known and extension.library() is not None


def compiled(
    inputs: BlockInputs, indices_TK: Tensor, ranks: Sequence[int], activation: Activation, normalized: bool
) -> tuple[Tensor, Tensor | None]:
    """The mix (T, F) and the update of the output (T, D); see block.py."""
    scales = [None if low is None else low.scale_R() for low in inputs.projections]
    call = _Call(indices_TK, tuple(ranks), activation, normalized, scales)
    mix, update = _Compiled.apply(call, *inputs.tensors())  # type: ignore[no-untyped-call]
    return mix, update


class _Mix(ctypes.Structure):
    _fields_ = [
        *((name, Rows) for name in ("activated", "multiplied", "keep")),
        *((name, ctypes.c_void_p) for name in ("low_activated", "low_multiplied")),
        *((name, Factors) for name in ("B_activated", "B_multiplied", "A_down")),
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("columns", "formula", "threads")),
    ]


class _MixGradients(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "d_mix", "d_down", "d_activated", "d_multiplied", "d_low_activated", "d_low_multiplied", "d_B_activated",
            "d_B_multiplied", "d_A_down", "d_weight",
        )
    ]  # fmt: skip


@dataclass
class _Call:
    """What does not change between forward and backward; see the arguments of :func:`compiled`."""

    indices_TK: Tensor
    ranks: tuple[int, ...]
    activation: Activation
    normalized: bool
    scales: list[Tensor | None]


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> Any:
        p, u, x1, A1, B1, x2, A2, B2, _, A3, B3, weights_TK, keep = [None if t is None else rowwise(t) for t in tensors]
        assert p is not None and weights_TK is not None
        s1, s2, s3 = call.scales
        slots = Slots(call.indices_TK, call.ranks)
        low1 = None if x1 is None else slots.to_ranks(x1, by_rank(A1, s1))
        low2 = low1 if x2 is x1 and A2 is A1 else None if x2 is None else slots.to_ranks(x2, by_rank(A2, s2))
        weight_N = weights_TK.reshape(-1)[slots.slot_N]
        mix = torch.zeros(p.shape)
        down = None if A3 is None else p.new_empty(slots.count, slots.width)
        struct = _mix_struct(call, slots, p, u, low1, B1, low2, B2, A3, weight_N, keep)
        slots.kernels.moelora_mix_forward(ctypes.byref(slots.struct), ctypes.byref(struct), at(mix), at(down))
        if call.normalized and not any(_changes(slots, A, B) for A, B in ((A1, B1), (A2, B2))):
            mix = frozen(BlockInputs(p, u, None, None, None, weights_TK, None), call.activation)
        update = None
        if down is not None and B3 is not None:
            update = p.new_zeros(p.shape[0], B3.shape[0])
            slots.from_ranks(down, by_column(B3, s3), update, None, None)
        ctx.save_for_backward(p, u, x1, A1, B1, x2, A2, B2, A3, B3, weights_TK, keep, low1, low2, down, weight_N)
        ctx.call, ctx.slots = call, slots
        return mix, update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mix: Tensor, d_update: Tensor | None) -> Any:
        p, u, x1, A1, B1, x2, A2, B2, A3, B3, weights_TK, keep, low1, low2, down, weight_N = ctx.saved_tensors
        call, slots = ctx.call, ctx.slots
        s1, s2, s3 = call.scales
        d_B3 = d_down = None
        if B3 is not None and d_update is not None:
            d_update = d_update.contiguous()
            d_down = slots.to_ranks(d_update, by_column(B3, s3))
            d_B3 = torch.empty_like(B3)
            slots.from_ranks(down, by_column(B3, s3), None, d_update, d_B3)
        d_mix = d_mix.contiguous()
        d_p, d_u = torch.zeros_like(d_mix), None if u is None else torch.zeros_like(d_mix)
        d_B1, d_B2, d_A3 = (None if m is None else torch.empty_like(m) for m in (B1, B2, A3))
        d_low1, d_low2 = (None if low is None else torch.empty_like(low) for low in (low1, low2))
        d_weight_N = torch.empty_like(weight_N)
        struct = _mix_struct(call, slots, p, u, low1, B1, low2, B2, A3, weight_N, keep)
        grads = _MixGradients(*map(at, (d_mix, d_down, d_p, d_u, d_low1, d_low2, d_B1, d_B2, d_A3, d_weight_N)))
        slots.kernels.moelora_mix_backward(ctypes.byref(slots.struct), ctypes.byref(struct), ctypes.byref(grads))
        d_x1, d_A1 = _hidden_gradients(slots, x1, A1, d_low1, s1, ctx.needs_input_grad[3])
        d_x2, d_A2 = _hidden_gradients(slots, x2, A2, d_low2, s2, ctx.needs_input_grad[6])
        d_weights = weight_gradient(d_weight_N, weights_TK, slots.slot_N, call.normalized)
        return None, d_p, d_u, d_x1, d_A1, d_B1, d_x2, d_A2, d_B2, None, d_A3, d_B3, d_weights, None


def _mix_struct(
    call: _Call,
    slots: Slots,
    p: Tensor,
    u: Tensor | None,
    low1: Tensor | None,
    B1: Tensor | None,
    low2: Tensor | None,
    B2: Tensor | None,
    A3: Tensor | None,
    weight_N: Tensor,
    keep: Tensor | None,
) -> _Mix:
    s1, s2, s3 = call.scales
    assert call.activation.formula is not None
    return _Mix(
        rows(p), rows(u), rows(keep), at(low1), at(low2), by_column(B1, s1), by_column(B2, s2),
        by_rank(A3, s3), at(weight_N), p.shape[1], FORMULAS[call.activation.formula], slots.threads(p.shape[1]),
    )  # fmt: skip


def _hidden_gradients(
    slots: Slots, x: Tensor | None, A: Tensor | None, d_low: Tensor | None, scale: Tensor | None, wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input (T, D) and of A (R, D)."""
    if x is None or A is None or d_low is None:
        return None, None
    d_x = x.new_zeros(x.shape) if wanted else None
    d_A = torch.empty_like(A)
    slots.from_ranks(d_low, by_rank(A, scale), d_x, x, d_A)
    return d_x, d_A


def _changes(slots: Slots, A: Tensor | None, B: Tensor | None) -> bool:
    """Whether neither of the factors is all zero; looks no further than the first number that is not."""
    return A is not None and B is not None and all(slots.kernels.moelora_any(at(m), m.numel()) for m in (A, B))
