"""Block site: the weighted mix of the experts' activations inside an FFN, before its down projection.

Every expert e of a token computes ``a_e = act(p + dp_e) * (u + du_e)`` where p and u are the frozen pre-activations and
dp_e, du_e the expert's low-rank updates. The down projection is linear, so the block needs

* ``mix = sum_e w_e a_e`` (T, F), to which the frozen down projection is applied once, whatever K is;
* ``low = w_e (a_e A_down,e^T)`` (T, R), to which the stacked ``lora_B`` of the down projection is applied once.

Both implementations return these two. ``sorted`` keeps only tensors of size T for the backward pass and recomputes each
expert's rows chunk by chunk; ``reference`` is plain autograd over a loop of experts.

Shapes: T tokens, F width between the projections, E experts, K slots per token, R stacked rank, N = occupied slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

# Rows of one expert that are worked on at once. On a CPU a chunk of 256 rows of a 1536-wide FFN stays in the cache.
CPU_CHUNK = 256

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlockInputs:
    """What the mix is computed from; ``None`` where a projection has no experts or the FFN has no such half.

    Attributes:
        activated_TF: frozen pre-activation that goes through the nonlinearity.
        multiplied_TF: frozen second half of a gated FFN, or ``None`` for a plain one.
        low_activated_TR, low_multiplied_TR: ``scale * x A^T`` of all experts for the two halves.
        B_activated_FR, B_multiplied_FR: the stacked ``lora_B`` of the two halves.
        A_down_RF: the stacked ``lora_A`` of the down projection.
        weights_TK: weight of each slot, in the dtype of the activations.
        keep_TF: dropout mask (0 or 1/(1-p)) on the input of ``A_down_RF``.
    """

    activated_TF: Tensor
    multiplied_TF: Tensor | None
    low_activated_TR: Tensor | None
    B_activated_FR: Tensor | None
    low_multiplied_TR: Tensor | None
    B_multiplied_FR: Tensor | None
    A_down_RF: Tensor | None
    weights_TK: Tensor
    keep_TF: Tensor | None


@dataclass(frozen=True)
class Plan:
    """Slots grouped by expert.

    Attributes:
        slot_N: position of each occupied slot in the flattened (T·K) slots, sorted by expert, stable.
        token_N: the token of each. chunks: (expert, rows) with rows a slice of N of at most one chunk.
        columns: the slice of the stacked rank that belongs to each expert.
    """

    slot_N: Tensor
    token_N: Tensor
    chunks: list[tuple[int, slice]]
    columns: list[slice]

    @classmethod
    def make(cls, indices_TK: Tensor, ranks: Sequence[int]) -> Plan:
        """Group the slots of (T, K) expert indices; -1 marks an empty slot. Reads the E counts back to the host."""
        num_experts, slots = len(ranks), indices_TK.shape[1]
        flat = indices_TK.reshape(-1)
        key = torch.where(flat < 0, num_experts, flat)
        counts = torch.bincount(key, minlength=num_experts + 1).tolist()
        slot_N = torch.argsort(key, stable=True)[: sum(counts[:num_experts])]
        size = CPU_CHUNK if indices_TK.device.type == "cpu" else max(flat.numel(), 1)
        chunks, start = [], 0
        for expert in range(num_experts):
            stop = start + counts[expert]
            chunks += [(expert, slice(at, min(at + size, stop))) for at in range(start, stop, size)]
            start = stop
        edges = [0]
        for rank in ranks:
            edges.append(edges[-1] + rank)
        columns = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        return cls(slot_N, torch.div(slot_N, slots, rounding_mode="floor"), chunks, columns)


def reference(
    inputs: BlockInputs, indices_TK: Tensor, ranks: Sequence[int], activation: Activation, normalized: bool
) -> tuple[Tensor, Tensor | None]:
    """The mix (T, F) and the weighted low-rank activations (T, R) by plain autograd; see the module's text."""
    x = inputs
    mix = torch.zeros_like(x.activated_TF)
    low = None if x.A_down_RF is None else x.activated_TF.new_zeros(mix.shape[0], x.A_down_RF.shape[0])
    for expert, columns in enumerate(Plan.make(indices_TK, ranks).columns):
        weight = ((indices_TK == expert) * x.weights_TK).sum(-1, keepdim=True)
        a = activation(_plus(x.activated_TF, x.low_activated_TR, x.B_activated_FR, columns))
        if x.multiplied_TF is not None:
            a = a * _plus(x.multiplied_TF, x.low_multiplied_TR, x.B_multiplied_FR, columns)
        mix = mix + weight * a
        if low is not None and x.A_down_RF is not None:
            kept = a if x.keep_TF is None else a * x.keep_TF
            low = torch.cat(
                [low[:, : columns.start], weight * (kept @ x.A_down_RF[columns].T), low[:, columns.stop :]], dim=1
            )
    if normalized:
        base = activation(x.activated_TF)
        base = base if x.multiplied_TF is None else base * x.multiplied_TF
        mix = base + (mix - x.weights_TK.sum(-1, keepdim=True) * base)
    return mix, low


def _plus(frozen: Tensor, low: Tensor | None, lora_B: Tensor | None, columns: slice) -> Tensor:
    if low is None or lora_B is None:
        return frozen
    return frozen + low[:, columns] @ lora_B[:, columns].T


def sorted_(
    inputs: BlockInputs, indices_TK: Tensor, ranks: Sequence[int], activation: Activation, normalized: bool
) -> tuple[Tensor, Tensor | None]:
    """The mix (T, F) and the weighted low-rank activations (T, R), tokens grouped by expert; see the module's text.

    With ``normalized`` the mix is taken as ``a_0 + sum_e w_e (a_e - a_0)`` around the frozen activation a_0, which is
    the same number where the weights sum to 1, and is a_0 itself bit for bit while the updates are zero.
    """
    plan = Plan.make(indices_TK, ranks)
    tensors = [getattr(inputs, field.name) for field in fields(BlockInputs)]
    mix, low = _SortedMix.apply(plan, activation, normalized, *tensors)  # type: ignore[no-untyped-call]
    return mix, low


class _SortedMix(torch.autograd.Function):
    """One autograd node; saves tensors of size T only, and recomputes the experts' rows in the backward pass."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, activation: Activation, normalized: bool, *tensors: Tensor | None) -> Any:
        x = BlockInputs(*tensors)  # type: ignore[arg-type]
        with torch.autocast(x.activated_TF.device.type, enabled=False):
            weight_N1 = x.weights_TK.reshape(-1)[plan.slot_N].unsqueeze(1)
            if normalized:
                mix = activation(x.activated_TF)
                mix = mix.clone() if x.multiplied_TF is None else mix.mul_(x.multiplied_TF)
            else:
                mix = torch.zeros_like(x.activated_TF)
            low = unweighted = None
            if x.A_down_RF is not None:
                low = mix.new_zeros(mix.shape[0], x.A_down_RF.shape[0])
                unweighted = torch.zeros_like(low)
            for expert, rows in plan.chunks:
                token, weight, columns = plan.token_N[rows], weight_N1[rows], plan.columns[expert]
                half = _Rows(x, token, columns)
                a = activation(half.activated)
                if half.multiplied is not None:
                    a = a * half.multiplied
                if low is not None and unweighted is not None and x.A_down_RF is not None:
                    kept = a if x.keep_TF is None else a * x.keep_TF.index_select(0, token)
                    part = kept @ x.A_down_RF[columns].T
                    unweighted[:, columns].index_copy_(0, token, part)
                    low[:, columns].index_copy_(0, token, part * weight)
                if normalized:
                    a = a - _frozen_rows(x, token, activation)
                mix.index_add_(0, token, a * weight)
        ctx.save_for_backward(*tensors, weight_N1, unweighted)
        ctx.plan, ctx.activation = plan, activation
        return mix, low

    @staticmethod
    def backward(ctx: Any, d_mix: Tensor, d_low: Tensor | None) -> Any:  # type: ignore[override]
        *tensors, weight_N1, unweighted = ctx.saved_tensors
        x, plan = BlockInputs(*tensors), ctx.plan
        grads = {f.name: _zeros(t) for f, t in zip(fields(BlockInputs), tensors, strict=True) if f.name != "keep_TF"}
        d_weight_N1 = torch.zeros_like(weight_N1)
        with torch.autocast(x.activated_TF.device.type, enabled=False):
            for expert, rows in plan.chunks:
                token, weight, columns = plan.token_N[rows], weight_N1[rows], plan.columns[expert]
                half = _Rows(x, token, columns)
                d_mix_rows = d_mix.index_select(0, token)
                act, act_backward = _activate(ctx.activation, half.activated)
                a = act if half.multiplied is None else act * half.multiplied
                d_weight_N1[rows] = (d_mix_rows * a).sum(1, keepdim=True)
                d_a = d_mix_rows * weight
                if x.A_down_RF is not None and d_low is not None:
                    d_part = d_low[:, columns].index_select(0, token)
                    seen = unweighted[:, columns].index_select(0, token)
                    d_weight_N1[rows] += (d_part * seen).sum(1, keepdim=True)
                    d_part = d_part * weight
                    keep = None if x.keep_TF is None else x.keep_TF.index_select(0, token)
                    grads["A_down_RF"][columns].addmm_(d_part.T, a if keep is None else a * keep)
                    back = d_part @ x.A_down_RF[columns]
                    d_a = d_a.add_(back if keep is None else back * keep)
                if half.multiplied is not None:
                    half.add_gradient("multiplied", d_a * act, grads)
                    d_a = d_a * half.multiplied
                half.add_gradient("activated", act_backward(d_a), grads)
        d_weights = torch.zeros_like(x.weights_TK)
        d_weights.view(-1)[plan.slot_N] = d_weight_N1.squeeze(1)
        grads["weights_TK"] = d_weights
        return None, None, None, *(grads.get(field.name) for field in fields(BlockInputs))


class _Rows:
    """The two pre-activations of one expert for one chunk of its tokens, and the way back from their gradients."""

    def __init__(self, x: BlockInputs, token: Tensor, columns: slice) -> None:
        self.x, self.token, self.columns = x, token, columns
        self.activated = self._half(x.activated_TF, x.low_activated_TR, x.B_activated_FR)
        self.multiplied = None
        if x.multiplied_TF is not None:
            self.multiplied = self._half(x.multiplied_TF, x.low_multiplied_TR, x.B_multiplied_FR)

    def _half(self, frozen: Tensor, low: Tensor | None, lora_B: Tensor | None) -> Tensor:
        rows = frozen.index_select(0, self.token)
        if low is None or lora_B is None:
            return rows
        return rows.addmm_(low[:, self.columns].index_select(0, self.token), lora_B[:, self.columns].T)

    def add_gradient(self, name: str, d_rows: Tensor, grads: dict[str, Any]) -> None:
        """Add the gradient (n, F) of one half to the gradients of what it was made of."""
        grads[f"{name}_TF"].index_add_(0, self.token, d_rows)
        low, lora_B = getattr(self.x, f"low_{name}_TR"), getattr(self.x, f"B_{name}_FR")
        if low is not None:
            seen = low[:, self.columns].index_select(0, self.token)
            grads[f"B_{name}_FR"][:, self.columns].addmm_(d_rows.T, seen)
            grads[f"low_{name}_TR"][:, self.columns].index_copy_(0, self.token, d_rows @ lora_B[:, self.columns])


def _frozen_rows(x: BlockInputs, token: Tensor, activation: Activation) -> Tensor:
    a = activation(x.activated_TF.index_select(0, token))
    return a if x.multiplied_TF is None else a * x.multiplied_TF.index_select(0, token)


def _zeros(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)


def _activate(activation: Activation, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``activation(x)`` and the map from its gradient to that of ``x``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = activation(leaf)
    return y.detach(), lambda grad: torch.autograd.grad(y, leaf, grad)[0]


Mix = Callable[[BlockInputs, Tensor, Sequence[int], Activation, bool], tuple[Tensor, Tensor | None]]
IMPLEMENTATIONS: dict[str, Mix] = {"sorted": sorted_, "reference": reference}
