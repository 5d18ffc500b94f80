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
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Rows of one expert that are worked on at once: with 128 rows of a 1536-wide FFN the buffers stay near the core.
CPU_CHUNK = 128

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
        columns = [slice(a, b) for a, b in pairwise(edges)]
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

    With ``normalized`` the weights of every token sum to 1: while no expert changes anything, the mix is then the
    frozen activation itself, bit for bit, rather than a sum that rounds to it.
    """
    plan = Plan.make(indices_TK, ranks)
    tensors = [getattr(inputs, field.name) for field in fields(BlockInputs)]
    mix, low = _SortedMix.apply(plan, activation, normalized, *tensors)  # type: ignore[no-untyped-call]
    return mix, low


class _SortedMix(torch.autograd.Function):
    """One autograd node; saves tensors of size T only, and recomputes the experts' rows in the backward pass.

    With d_mix and d_low the gradients of the two outputs, the gradient of expert e's activation is ``w_e v`` where
    ``v = d_mix + d_low A_down,e``, and that of its weight is the inner product of v and a_e, low-rank part included.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, activation: Activation, normalized: bool, *tensors: Tensor | None) -> Any:
        x = BlockInputs(*tensors)  # type: ignore[arg-type]
        with torch.autocast(x.activated_TF.device.type, enabled=False):
            weight_N1 = x.weights_TK.reshape(-1)[plan.slot_N].unsqueeze(1)
            still = normalized and not _any_update(x)
            mix = _frozen(x, activation) if still else torch.zeros_like(x.activated_TF)
            low = None if x.A_down_RF is None else mix.new_zeros(mix.shape[0], x.A_down_RF.shape[0])
            rows = _Rows(x, plan, buffers=3)
            for expert, part in plan.chunks:
                token, weight, columns = plan.token_N[part], weight_N1[part], plan.columns[expert]
                a = activation(rows.half("activated", token, columns))
                if x.multiplied_TF is not None:
                    a = torch.mul(a, rows.half("multiplied", token, columns), out=rows.buffer(2, token))
                if low is not None and x.A_down_RF is not None:
                    kept = a if x.keep_TF is None else a * x.keep_TF.index_select(0, token)
                    low[:, columns].index_copy_(0, token, (kept @ x.A_down_RF[columns].T).mul_(weight))
                if not still:
                    mix.index_add_(0, token, torch.mul(a, weight, out=rows.buffer(2, token)))
        ctx.save_for_backward(*tensors, weight_N1)
        ctx.plan, ctx.activation, ctx.normalized = plan, activation, normalized
        return mix, low

    @staticmethod
    def backward(ctx: Any, d_mix: Tensor, d_low: Tensor | None) -> Any:
        *tensors, weight_N1 = ctx.saved_tensors
        x, plan = BlockInputs(*tensors), ctx.plan
        grads = _Gradients(x)
        exact = torch.promote_types(weight_N1.dtype, torch.float32)
        d_weight_N1 = torch.zeros_like(weight_N1, dtype=exact)
        with torch.autocast(x.activated_TF.device.type, enabled=False):
            rows = _Rows(x, plan, buffers=4)
            for expert, part in plan.chunks:
                token, weight, columns = plan.token_N[part], weight_N1[part], plan.columns[expert]
                p = rows.half("activated", token, columns)
                act, act_backward = _activate(ctx.activation, p)
                a, u = act, None
                if x.multiplied_TF is not None:
                    u = rows.half("multiplied", token, columns)
                    a = torch.mul(act, u, out=rows.buffer(2, token))
                v = rows.gather(d_mix, token, 3)
                if x.A_down_RF is not None and d_low is not None:
                    d_part = d_low[:, columns].index_select(0, token)
                    keep = None if x.keep_TF is None else x.keep_TF.index_select(0, token)
                    grads.add_A_down(columns, d_part * weight, a if keep is None else a * keep)
                    if keep is None:
                        v.addmm_(d_part, x.A_down_RF[columns])
                    else:
                        v.addcmul_(d_part @ x.A_down_RF[columns], keep)
                d_weight_N1[part] = torch.mul(a, v, out=rows.buffer(2, token)).sum(1, keepdim=True, dtype=exact)
                d_a = v.mul_(weight)
                if u is not None:
                    grads.add_half("multiplied", token, columns, torch.mul(act, d_a, out=rows.buffer(2, token)))
                    d_a = d_a.mul_(u)
                grads.add_half("activated", token, columns, act_backward(d_a))
        grads.weights_TK = _weight_gradient(d_weight_N1, x.weights_TK, plan, ctx.normalized)
        return None, None, None, *grads.in_order()


def _weight_gradient(d_weight_N1: Tensor, weights_TK: Tensor, plan: Plan, normalized: bool) -> Tensor:
    """Gradients of the occupied slots, put into place (T, K).

    The weights of a token that always sum to 1 have no gradient along that sum. The part of it is taken off here, where
    the precision is full: experts that hardly differ yet would otherwise leave nothing but rounding to the router.
    """
    d_weights = d_weight_N1.new_zeros(weights_TK.shape)
    d_weights.view(-1)[plan.slot_N] = d_weight_N1.squeeze(1)
    if normalized:
        d_weights -= (d_weights * weights_TK).sum(-1, keepdim=True)
    return d_weights.to(weights_TK.dtype)


class _Rows:
    """Rows of one expert for one chunk of its tokens, in buffers that all chunks share."""

    def __init__(self, x: BlockInputs, plan: Plan, buffers: int) -> None:
        self.x = x
        longest = max((part.stop - part.start for _, part in plan.chunks), default=0)
        self.buffers = [x.activated_TF.new_empty(longest, x.activated_TF.shape[1]) for _ in range(buffers)]

    def buffer(self, index: int, token: Tensor) -> Tensor:
        return self.buffers[index][: token.shape[0]]

    def gather(self, source: Tensor, token: Tensor, index: int) -> Tensor:
        """(n, F) the rows of ``source`` in buffer ``index``."""
        return torch.index_select(source, 0, token, out=self.buffer(index, token))

    def half(self, name: str, token: Tensor, columns: slice) -> Tensor:
        """(n, F) one pre-activation with the expert's update, in buffer 0 or 1."""
        rows = self.gather(getattr(self.x, f"{name}_TF"), token, int(name == "multiplied"))
        low, lora_B = getattr(self.x, f"low_{name}_TR"), getattr(self.x, f"B_{name}_FR")
        if low is None or lora_B is None:
            return rows
        return rows.addmm_(low[:, columns].index_select(0, token), lora_B[:, columns].T)


class _Gradients:
    """Gradients of the block's inputs, summed up chunk by chunk; those of ``lora_B`` transposed, which is faster."""

    def __init__(self, x: BlockInputs) -> None:
        self.x = x
        self.weights_TK: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        for name in ("activated", "multiplied"):
            frozen, low, lora_B = (getattr(x, key.format(name)) for key in ("{}_TF", "low_{}_TR", "B_{}_FR"))
            if frozen is not None:
                self.sums[f"{name}_TF"] = torch.zeros_like(frozen)
            if low is not None and lora_B is not None:
                self.sums[f"low_{name}_TR"] = torch.zeros_like(low)
                self.sums[f"B_{name}_FR"] = lora_B.new_zeros(lora_B.shape[1], lora_B.shape[0])
        if x.A_down_RF is not None:
            self.sums["A_down_RF"] = torch.zeros_like(x.A_down_RF)

    def add_A_down(self, columns: slice, d_part: Tensor, a: Tensor) -> None:
        self.sums["A_down_RF"][columns].addmm_(d_part.T, a)

    def add_half(self, name: str, token: Tensor, columns: slice, d_rows: Tensor) -> None:
        """Add the gradient (n, F) of one pre-activation to the gradients of what it was made of."""
        self.sums[f"{name}_TF"].index_add_(0, token, d_rows)
        low, lora_B = getattr(self.x, f"low_{name}_TR"), getattr(self.x, f"B_{name}_FR")
        if low is not None and lora_B is not None:
            self.sums[f"B_{name}_FR"][columns].addmm_(low[:, columns].index_select(0, token).T, d_rows)
            self.sums[f"low_{name}_TR"][:, columns].index_copy_(0, token, d_rows @ lora_B[:, columns])

    def in_order(self) -> list[Tensor | None]:
        """In the order of the fields of :class:`BlockInputs`."""
        found: dict[str, Tensor | None] = {**self.sums, "weights_TK": self.weights_TK}
        for name in ("B_activated_FR", "B_multiplied_FR"):
            if name in self.sums:
                found[name] = self.sums[name].T
        return [found.get(field.name) for field in fields(BlockInputs)]


def _any_update(x: BlockInputs) -> bool:
    """Whether any expert changes a pre-activation; reads one flag back to the host."""
    halves = ((x.low_activated_TR, x.B_activated_FR), (x.low_multiplied_TR, x.B_multiplied_FR))
    flags = [low.any() & lora_B.any() for low, lora_B in halves if low is not None and lora_B is not None]
    return bool(flags) and bool(torch.stack(flags).any())


def _frozen(x: BlockInputs, activation: Activation) -> Tensor:
    a = activation(x.activated_TF)
    return a.clone() if x.multiplied_TF is None else a * x.multiplied_TF


def _activate(activation: Activation, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``activation(x)`` and the map from its gradient to that of ``x``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = activation(leaf)
    return y.detach(), lambda grad: torch.autograd.grad(y, leaf, grad)[0]


Mix = Callable[[BlockInputs, Tensor, Sequence[int], Activation, bool], tuple[Tensor, Tensor | None]]
IMPLEMENTATIONS: dict[str, Mix] = {"sorted": sorted_, "reference": reference}
