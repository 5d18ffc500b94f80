"""Block site in torch without sorting: every slot is computed for all tokens, the ranks of other experts masked out.

Nothing is read back to the host and no shape depends on a value, so a GPU never waits and ``torch.compile`` sees one
graph. The elementwise work is that of K slots, as it must be; the products with few ranks cost R ranks instead of r for
each slot, which a GPU hardly notices while R is small beside the width of the block.

One autograd node that keeps tensors of size T only and recomputes the slots one after the other in the backward pass.
With ``normalized`` weights the sum is taken around the frozen activation, ``f + sum_e w_e (a_e - f)``: the same value,
exact while no expert changes anything, and with a gradient for the router that is no difference of large numbers.

Shapes: T tokens, F width between the projections, E experts, K slots per token, R stacked rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_inputs import Activation, BlockInputs

Function = Callable[[Tensor], Tensor]


def masked(
    inputs: BlockInputs, indices_TK: Tensor, ranks: Sequence[int], activation: Activation, normalized: bool
) -> tuple[Tensor, Tensor | None]:
    """The mix (T, F) and the update of the output (T, O); see block.py."""
    x = inputs
    low1, low2 = (None if low is None else low.low() for low in (x.activated, x.multiplied))
    B1, B2 = (None if low is None else low.B_OR for low in (x.activated, x.multiplied))
    A3 = None if x.down is None else x.down.A_RI
    owner_R = owners(ranks, indices_TK.device)
    mix, low3 = _Masked.apply(  # type: ignore[no-untyped-call]
        activation.function, normalized, indices_TK, owner_R, x.activated_TF, x.multiplied_TF, low1, B1, low2, B2, A3,
        x.weights_TK * (indices_TK >= 0), x.keep_TF,
    )  # fmt: skip
    if x.down is None:
        return mix, None
    return mix, F.linear(low3 * x.down.scale, x.down.B_OR)


def owners(ranks: Sequence[int], device: torch.device) -> Tensor:
    """(R,) int64: the expert that each rank belongs to, made on the device itself."""
    used = [rank for rank in ranks if rank]
    if used and set(ranks[: len(used)]) == {used[0]}:
        return torch.arange(sum(used), device=device).div(used[0], rounding_mode="floor")
    parts = [torch.full((rank,), expert, device=device) for expert, rank in enumerate(ranks)]
    return torch.cat(parts)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, normalized: bool, *tensors: Tensor | None) -> Any:
        indices_TK, owner_R, p, u, low1, B1, low2, B2, A3, weights_TK, keep = tensors
        assert p is not None and weights_TK is not None and indices_TK is not None and owner_R is not None
        first, second = _Half(p, low1, B1), None if u is None else _Half(u, low2, B2)
        with torch.autocast(p.device.type, enabled=False):
            base = _gated(function(p), u) if normalized else None
            mix = torch.zeros_like(p) if base is None else base.clone()
            low3 = p.new_zeros(p.shape[0], 0 if A3 is None else A3.shape[0])
            for slot in range(indices_TK.shape[1]):
                own_TR = indices_TK[:, slot : slot + 1] == owner_R
                weight_T1 = weights_TK[:, slot : slot + 1]
                a = _gated(function(first.rows(own_TR)), None if second is None else second.rows(own_TR))
                mix.addcmul_(a if base is None else a - base, weight_T1)
                if A3 is not None:
                    low3.addcmul_((a if keep is None else a * keep) @ A3.T, own_TR * weight_T1)
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.normalized = function, normalized
        return mix, low3

    @staticmethod
    def backward(ctx: Any, d_mix: Tensor, d_low3: Tensor) -> Any:
        indices_TK, owner_R, p, u, low1, B1, low2, B2, A3, weights_TK, keep = ctx.saved_tensors
        first, second = _Half(p, low1, B1), None if u is None else _Half(u, low2, B2)
        d_A3 = None if A3 is None else torch.zeros_like(A3)
        d_weights: list[Tensor] = []
        with torch.autocast(p.device.type, enabled=False):
            base = _gated(ctx.function(p), u) if ctx.normalized else None
            for slot in range(indices_TK.shape[1]):
                own_TR = indices_TK[:, slot : slot + 1] == owner_R
                weight_T1 = weights_TK[:, slot : slot + 1]
                act, slope = torch.func.vjp(ctx.function, first.rows(own_TR))  # type: ignore[misc]
                other = None if second is None else second.rows(own_TR)
                a = _gated(act, other)
                product, v = d_mix * (a if base is None else a - base), d_mix
                if A3 is not None and d_A3 is not None:
                    d_own = d_low3 * own_TR
                    through = d_own @ A3 if keep is None else (d_own @ A3) * keep
                    product, v = product.addcmul_(through, a), v + through
                    d_A3.addmm_((d_own * weight_T1).T, a if keep is None else a * keep)
                d_weights.append(product.sum(1, dtype=torch.promote_types(p.dtype, torch.float32)))
                d_a = v * weight_T1
                if second is not None:
                    second.add(d_a * act, own_TR)
                    d_a = d_a * other
                first.add(slope(d_a)[0], own_TR)
        others = (None, None, None) if second is None else (second.d_frozen, second.d_low, second.d_B)
        d_weights_TK = torch.stack(d_weights, dim=1).to(p.dtype)
        return (
            None, None, None, None, first.d_frozen, others[0], first.d_low, first.d_B, *others[1:], d_A3, d_weights_TK,
            None,
        )  # fmt: skip


def _gated(act: Tensor, other: Tensor | None) -> Tensor:
    return act if other is None else act * other


class _Half:
    """One pre-activation (T, F), and the gradients of what it is made of, summed up slot by slot."""

    def __init__(self, frozen_TF: Tensor, low_TR: Tensor | None, B_FR: Tensor | None) -> None:
        self.frozen, self.low, self.B = frozen_TF, low_TR, B_FR
        self.d_frozen: Tensor | None = None
        self.d_low: Tensor | None = None
        self.d_B: Tensor | None = None

    def rows(self, own_TR: Tensor) -> Tensor:
        """(T, F) with the updates of the experts that ``own_TR`` marks."""
        if self.low is None or self.B is None:
            return self.frozen
        return torch.addmm(self.frozen, self.low * own_TR, self.B.T)

    def add(self, d_rows_TF: Tensor, own_TR: Tensor) -> None:
        """Add the gradient of :meth:`rows`."""
        if self.low is not None and self.B is not None:
            d_B, d_low = d_rows_TF.T @ (self.low * own_TR), (d_rows_TF @ self.B) * own_TR
            self.d_B = d_B if self.d_B is None else self.d_B.add_(d_B)
            self.d_low = d_low if self.d_low is None else self.d_low.add_(d_low)
        self.d_frozen = d_rows_TF if self.d_frozen is None else self.d_frozen.add_(d_rows_TF)
