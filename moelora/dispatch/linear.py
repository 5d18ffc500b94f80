"""Linear site: ``B ((A x) * g)``, with the experts of a site stacked on the rank axis.

Implementations, all the same mathematics:

* ``reference``: one unit after the other in plain autograd; the slow twin of the tests.
* ``plain``: all ranks at once in plain autograd. It can be compiled by torch.compile, transformed by torch.func and
  differentiated twice, and it mixes factors.
* ``fused``: the same two products as one autograd node that keeps the input (which the frozen linear keeps anyway),
  ``A x`` and the gate, and adds into the frozen linear's output in place.
* ``sorted``: tokens grouped by expert, so that only chosen experts are computed; see linear_sorted.py.
* ``compiled``: the same by CPU kernels in float32; see linear_compiled.py.

Shapes: T tokens, D in, O out, E experts, K picks, R stacked rank (sum of the experts' ranks), U units that are weighed:
experts, or single ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import linear_compiled, linear_sorted
from .gate import Gate as Gate
from .gate import autocasts, may_overwrite
from .gate import over_ranks as over_ranks


def routed(out: Tensor, hidden: Tensor, lora_A: Tensor, lora_B: Tensor, gate: Gate) -> Tensor:
    """(..., O) ``out`` plus the gated update, by the implementation that suits.

    Args:
        out: (..., O) output of the frozen linear; may be changed in place.
        hidden: (..., D) input after dropout. lora_A: (R, D), lora_B: (O, R) stacked experts, in any dtype.
    """
    device = hidden.device.type
    if autocasts(device):
        with torch.autocast(device, enabled=False):
            return routed(out, hidden.to(torch.get_autocast_dtype(device)), lora_A, lora_B, gate)
    lora_A, lora_B = lora_A.to(hidden.dtype), lora_B.to(hidden.dtype)
    return IMPLEMENTATIONS[choose(out, hidden, gate)](out, hidden, lora_A, lora_B, gate)


def choose(out: Tensor, hidden: Tensor, gate: Gate) -> str:
    """Name of the implementation that suits; looks at shapes and dtypes only, so that a GPU never waits for it."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or gate.factors or out.dtype != hidden.dtype:
        return "plain"
    if gate.indices is None or gate.indices.shape[-1] * max(gate.ranks) >= sum(gate.ranks):
        return "fused"
    if linear_compiled.usable(hidden):
        return "compiled"
    # One product with all ranks computes much that the gate then closes. Measured on a CPU in float32 at widths of 576
    # to 4096, sorted takes 1.0, 0.95 and 0.7 to 0.9 of its time with 64, 128 and 256 ranks. A GPU was not measured: by
    # its roofline about 160 ranks come for nothing.
    most = 64 if hidden.device.type == "cpu" else 160
    stacked = sum(gate.ranks) <= most
    return "fused" if stacked or not linear_sorted.usable(out, hidden, gate) else "sorted"


def plain(out: Tensor, hidden: Tensor, lora_A: Tensor, lora_B: Tensor, gate: Gate) -> Tensor:
    """The same as :func:`routed`, in plain autograd."""
    return from_low(out, F.linear(hidden, lora_A), lora_B, gate)


def from_low(out: Tensor, low: Tensor, lora_B: Tensor, gate: Gate) -> Tensor:
    """(..., O) the same as :func:`routed` in plain autograd, from the low-rank activations (..., R)."""
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
        weight = 1.0 if weights is None else weights[..., unit : unit + 1].to(low.dtype)
        out = out + (low * weight) @ lora_B[:, part].T
        start += rank
    assert start == lora_A.shape[0], f"ranks {gate.ranks} do not add up to {lora_A.shape[0]}"
    return out


def fused(out: Tensor, hidden: Tensor, lora_A: Tensor, lora_B: Tensor, gate: Gate) -> Tensor:
    """The same as :func:`routed`, as one autograd node; first derivatives only."""
    weights, factor = gate.per_unit(), gate.scale
    if isinstance(factor, Tensor):
        lora_B, factor = lora_B * factor.to(lora_B.dtype), 1.0
    if weights is not None:
        if len(set(gate.ranks)) > 1:
            weights = over_ranks(weights, gate.ranks)
        weights = weights.reshape(-1, weights.shape[-1])
    result: Tensor = _Fused.apply(out, hidden, lora_A, lora_B, weights, factor)  # type: ignore[no-untyped-call]
    return result


class _Fused(torch.autograd.Function):
    """Keeps x (T, D), low = A x (T, R) and the gate (T, U), where every unit has R / U ranks."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, hidden: Tensor, A: Tensor, B: Tensor, weights_TU: Tensor | None, factor: float
    ) -> Tensor:
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        low_TR = x_TD @ A.T
        ctx.save_for_backward(hidden, A, B, low_TR, weights_TU)
        ctx.factor = factor
        return _add_rows(ctx, out, _gated(low_TR, weights_TU, factor), B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        hidden, A, B, low_TR, weights_TU = ctx.saved_tensors
        x_TD, d_TO = hidden.reshape(-1, hidden.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
        _, wants_x, wants_A, wants_B, wants_gate, _ = ctx.needs_input_grad
        d_B = d_TO.T @ _gated(low_TR, weights_TU, ctx.factor) if wants_B else None
        d_gated_TR = d_TO @ B
        d_weights = None
        if wants_gate:
            inner = (d_gated_TR * low_TR).unflatten(-1, (weights_TU.shape[-1], -1))
            exact = torch.promote_types(weights_TU.dtype, torch.float32)
            d_weights = (inner.sum(-1, dtype=exact) * ctx.factor).to(weights_TU.dtype)
        d_low_TR = _gated(d_gated_TR, weights_TU, ctx.factor)
        d_A = d_low_TR.T @ x_TD if wants_A else None
        d_x = (d_low_TR @ A).view(hidden.shape) if wants_x else None
        return d_out, d_x, d_A, d_B, d_weights, None


def _add_rows(ctx: Any, out: Tensor, rows_TR: Tensor, B: Tensor) -> Tensor:
    """(..., O) ``out + rows B^T``, inside the forward of a node; in place where that is allowed."""
    if may_overwrite(out):
        ctx.mark_dirty(out)
        out.view(-1, out.shape[-1]).addmm_(rows_TR, B.T)
        return out
    return torch.addmm(out.reshape(-1, out.shape[-1]), rows_TR, B.T).view(out.shape)


def _gated(low_TR: Tensor, weights_TU: Tensor | None, factor: float) -> Tensor:
    """(T, R) low-rank activations, or their gradients, times the gate and the factor."""
    if weights_TU is None:
        return low_TR * factor
    gate_TU1 = (weights_TU * factor).to(low_TR.dtype).unsqueeze(-1)
    gated: Tensor = (low_TR.unflatten(-1, (weights_TU.shape[-1], -1)) * gate_TU1).flatten(-2)
    return gated


Implementation = Callable[[Tensor, Tensor, Tensor, Tensor, Gate], Tensor]
IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": reference,
    "plain": plain,
    "fused": fused,
    "sorted": linear_sorted.sorted_,
    "compiled": linear_compiled.compiled,
}
