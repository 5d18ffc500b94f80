"""What every implementation of a block site is given.

Shapes: T tokens, D width of the block, F width between the projections, I in, O out, K slots per token, R stacked rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Formula = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Activation:
    """The nonlinearity between the projections.

    Attributes:
        function: elementwise. formula: which one it is, where a compiled kernel knows it.
    """

    function: Callable[[Tensor], Tensor]
    formula: Formula | None = None


@dataclass(frozen=True)
class LowRank:
    """The experts of one projection, stacked: ``scale * B (A x)``.

    Attributes:
        hidden_TI: what A reads, after dropout; ``None`` for the down projection, whose A reads the activations.
        A_RI, B_OR: the factors. scale: factor of all ranks, or (R,).
    """

    hidden_TI: Tensor | None
    A_RI: Tensor
    B_OR: Tensor
    scale: float | Tensor

    def low(self) -> Tensor:
        """(T, R) the scaled low-rank activations of all experts."""
        assert self.hidden_TI is not None
        low: Tensor = F.linear(self.hidden_TI, self.A_RI) * self.scale
        return low

    def scale_R(self) -> Tensor:
        """(R,) the factor of each rank."""
        if isinstance(self.scale, Tensor):
            return self.scale.to(self.A_RI)
        return self.A_RI.new_full((self.A_RI.shape[0],), self.scale)


@dataclass(frozen=True)
class BlockInputs:
    """What a block is computed from, all in one dtype; ``None`` where a projection has no experts.

    Attributes:
        activated_TF: frozen pre-activation that goes through the nonlinearity.
        multiplied_TF: frozen second half of a gated FFN, or ``None`` for a plain one.
        activated, multiplied, down: the experts of the three projections.
        weights_TK: weight of each slot.
        keep_TF: dropout mask (0 or 1/(1-p)) on what the experts of the down projection read.
    """

    activated_TF: Tensor
    multiplied_TF: Tensor | None
    activated: LowRank | None
    multiplied: LowRank | None
    down: LowRank | None
    weights_TK: Tensor
    keep_TF: Tensor | None

    @property
    def projections(self) -> tuple[LowRank | None, LowRank | None, LowRank | None]:
        return self.activated, self.multiplied, self.down

    def tensors(self) -> list[Tensor | None]:
        """All tensors in one order, for autograd functions, which take them one by one; scales not among them."""
        flat: list[Tensor | None] = [self.activated_TF, self.multiplied_TF]
        for low in self.projections:
            flat += [None, None, None] if low is None else [low.hidden_TI, low.A_RI, low.B_OR]
        return [*flat, self.weights_TK, self.keep_TF]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], scales: Sequence[float | Tensor | None]) -> BlockInputs:
        """The inverse of :meth:`tensors`; scales of the three projections."""
        p, u, *factors, weights, keep = tensors
        lows: list[LowRank | None] = []
        for index, scale in enumerate(scales):
            hidden, A, B = factors[3 * index : 3 * index + 3]
            lows.append(None if A is None or B is None or scale is None else LowRank(hidden, A, B, scale))
        assert p is not None and weights is not None
        activated, multiplied, down = lows
        return cls(p, u, activated, multiplied, down, weights, keep)

    @property
    def total_rank(self) -> int:
        """R, 0 where no projection has experts."""
        return max((low.A_RI.shape[0] for low in self.projections if low is not None), default=0)


def columns_of(ranks: tuple[int, ...]) -> list[slice]:
    """The slice of the stacked rank that belongs to each expert."""
    return [slice(a, b) for a, b in pairwise(accumulate(ranks, initial=0))]


def frozen(inputs: BlockInputs, activation: Activation) -> Tensor:
    """(T, F) the frozen activation, in a tensor of its own."""
    a = activation.function(inputs.activated_TF)
    if inputs.multiplied_TF is not None:
        return a * inputs.multiplied_TF
    return a.clone() if a is inputs.activated_TF else a


def changes(inputs: BlockInputs) -> bool:
    """Whether any expert changes a pre-activation; reads a flag back to the host."""
    halves = (inputs.activated, inputs.multiplied)
    return any(bool(low.A_RI.any()) and bool(low.B_OR.any()) for low in halves if low is not None)


def differentiable(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``function(x)`` and the map from its gradient to that of ``x``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = function(leaf)
    return y.detach(), lambda grad: torch.autograd.grad(y, leaf, grad)[0]


def weight_gradient(d_weight_N: Tensor, weights_TK: Tensor, slot_N: Tensor, normalized: bool) -> Tensor:
    """Gradients of the occupied slots, put into place (T, K).

    The weights of a token that always sum to 1 have no gradient along that sum. The part of it is taken off here, where
    the precision is full: experts that hardly differ yet would otherwise leave nothing but rounding to the router.
    """
    d_weights = d_weight_N.new_zeros(weights_TK.shape)
    d_weights.view(-1)[slot_N] = d_weight_N
    if normalized:
        d_weights -= (d_weights * weights_TK).sum(-1, keepdim=True)
    return d_weights.to(weights_TK.dtype)
