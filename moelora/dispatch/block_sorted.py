"""Block site in torch, tokens grouped by expert: the fast path on a CPU where the compiled kernels are not there.

One autograd node. It keeps its inputs only, and recomputes each expert's rows chunk by chunk in the backward pass, the
low-rank activations included: nothing depends on the number of slots, and little on the number of experts.

Shapes: T tokens, D width of the block, F width between the projections, E experts, K slots per token, R stacked rank,
r rank of one expert, N occupied slots, n rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_inputs import Activation, BlockInputs, LowRank, changes, columns_of, differentiable, frozen, weight_gradient

# Rows of one expert that are worked on at once: with 128 rows of a 1536-wide FFN the buffers stay near the core.
CPU_CHUNK = 128


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
        token_N = torch.div(slot_N, slots, rounding_mode="floor")
        return cls(slot_N, token_N, chunks, columns_of(tuple(ranks)))


def sorted_(
    inputs: BlockInputs, indices_TK: Tensor, ranks: Sequence[int], activation: Activation, normalized: bool
) -> tuple[Tensor, Tensor | None]:
    """The mix (T, F) and the update of the output (T, O), tokens grouped by expert; see block.py.

    With ``normalized``, while no expert changes anything, the mix is the frozen activation itself, bit for bit, rather
    than a sum that rounds to it.
    """
    scales = [None if low is None else low.scale for low in inputs.projections]
    call = _Call(Plan.make(indices_TK, ranks), activation, normalized, scales)
    mix, update = _Sorted.apply(call, *inputs.tensors())  # type: ignore[no-untyped-call]
    return mix, update


@dataclass
class _Call:
    """What does not change between forward and backward; the scales are those of the three projections."""

    plan: Plan
    activation: Activation
    normalized: bool
    scales: list[float | Tensor | None]


class _Sorted(torch.autograd.Function):
    """One node for the whole block, frozen projections aside.

    With d_mix and d_update the gradients of the two outputs, the gradient of expert e's activation is ``w_e v`` where
    ``v = d_mix + A_e^T (s B_e^T d_update)`` for the down projection's A and B, and that of its weight is the inner
    product of v and a_e.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> Any:
        x = BlockInputs.of(tensors, call.scales)
        plan = call.plan
        with torch.autocast(x.activated_TF.device.type, enabled=False):
            weight_N1 = x.weights_TK.reshape(-1)[plan.slot_N].unsqueeze(1)
            still = call.normalized and not changes(x)
            mix = frozen(x, call.activation) if still else torch.zeros_like(x.activated_TF)
            update = None if x.down is None else mix.new_zeros(mix.shape[0], x.down.B_OR.shape[0])
            rows = _Rows(x, plan, buffers=3)
            for expert, part in plan.chunks:
                token, weight, columns = plan.token_N[part], weight_N1[part], plan.columns[expert]
                p, u, _ = rows.pre_activations(token, columns)
                a = call.activation.function(p)
                if u is not None:
                    a = torch.mul(a, u, out=rows.buffer(2, token))
                if x.down is not None and update is not None and columns.start < columns.stop:
                    kept = a if x.keep_TF is None else a * x.keep_TF.index_select(0, token)
                    low = _low(x.down, kept, columns).mul_(weight)
                    update.index_add_(0, token, low @ x.down.B_OR[:, columns].T)
                if not still:
                    mix.index_add_(0, token, torch.mul(a, weight, out=rows.buffer(2, token)))
        ctx.save_for_backward(*tensors, weight_N1)
        ctx.call = call
        return mix, update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mix: Tensor, d_update: Tensor | None) -> Any:
        *tensors, weight_N1 = ctx.saved_tensors
        call: _Call = ctx.call
        x, plan = BlockInputs.of(tensors, call.scales), call.plan
        first, second, down = (None if low is None else _Gradients(low) for low in x.projections)
        d_p, d_u = torch.zeros_like(d_mix), None if x.multiplied_TF is None else torch.zeros_like(d_mix)
        d_weight_N1 = torch.zeros_like(weight_N1, dtype=torch.promote_types(weight_N1.dtype, torch.float32))
        with torch.autocast(d_mix.device.type, enabled=False):
            rows = _Rows(x, plan, buffers=4)
            for expert, part in plan.chunks:
                token, weight, columns = plan.token_N[part], weight_N1[part], plan.columns[expert]
                p, u, lows = rows.pre_activations(token, columns)
                act, act_backward = differentiable(call.activation.function, p)
                a = act if u is None else torch.mul(act, u, out=rows.buffer(2, token))
                v = rows.gather(d_mix, token, 3)
                if down is not None and d_update is not None and columns.start < columns.stop:
                    down.add_down(v, d_update.index_select(0, token), a, weight, x.keep_TF, token, columns)
                product = torch.mul(a, v, out=rows.buffer(2, token))
                d_weight_N1[part] = product.sum(1, keepdim=True, dtype=d_weight_N1.dtype)
                d_a = v.mul_(weight)
                if u is not None and d_u is not None:
                    d_rows = torch.mul(act, d_a, out=rows.buffer(2, token))
                    d_u.index_add_(0, token, d_rows)
                    if second is not None:
                        second.add(d_rows, lows[1], token, columns)
                    d_a = d_a.mul_(u)
                d_rows = act_backward(d_a)
                d_p.index_add_(0, token, d_rows)
                if first is not None:
                    first.add(d_rows, lows[0], token, columns)
        d_weights = weight_gradient(d_weight_N1.squeeze(1), x.weights_TK, plan.slot_N, call.normalized)
        factors = [t for each in (first, second, down) for t in (each.found() if each is not None else (None,) * 3)]
        return None, d_p, d_u, *factors, d_weights, None


def _scale(low: LowRank, columns: slice) -> float | Tensor:
    return low.scale[columns] if isinstance(low.scale, Tensor) else low.scale


def _low(low: LowRank, x_nI: Tensor, columns: slice) -> Tensor:
    """(n, r) the scaled low-rank activations of one expert."""
    return (x_nI @ low.A_RI[columns].T).mul_(_scale(low, columns))


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

    def pre_activations(self, token: Tensor, columns: slice) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """(n, F) the two halves with the expert's updates, in buffers 0 and 1, and the low-rank activations (n, r)."""
        x = self.x
        halves: list[Tensor | None] = []
        lows: list[Tensor | None] = []
        for index, (source, low) in enumerate(((x.activated_TF, x.activated), (x.multiplied_TF, x.multiplied))):
            half = None if source is None else self.gather(source, token, index)
            h = None
            if half is not None and low is not None and columns.start < columns.stop:
                assert low.hidden_TI is not None
                h = _low(low, low.hidden_TI.index_select(0, token), columns)
                half.addmm_(h, low.B_OR[:, columns].T)
            halves.append(half)
            lows.append(h)
        assert halves[0] is not None
        return halves[0], halves[1], lows


class _Gradients:
    """Gradients of one projection's experts, summed up chunk by chunk; that of ``B`` transposed, which is faster."""

    def __init__(self, low: LowRank) -> None:
        self.low = low
        self.hidden_TI = None if low.hidden_TI is None else torch.zeros_like(low.hidden_TI)
        self.A_RI = torch.zeros_like(low.A_RI)
        self.B_RO = low.B_OR.new_zeros(low.B_OR.shape[1], low.B_OR.shape[0])

    def add(self, d_rows_nO: Tensor, low_nr: Tensor | None, token: Tensor, columns: slice) -> None:
        """From the gradient of a pre-activation."""
        low = self.low
        if low_nr is None:
            return
        assert low.hidden_TI is not None and self.hidden_TI is not None
        self.B_RO[columns].addmm_(low_nr.T, d_rows_nO)
        d_low = (d_rows_nO @ low.B_OR[:, columns]).mul_(_scale(low, columns))
        self.A_RI[columns].addmm_(d_low.T, low.hidden_TI.index_select(0, token))
        self.hidden_TI.index_add_(0, token, d_low @ low.A_RI[columns])

    def add_down(
        self,
        v_nF: Tensor,
        d_update_nO: Tensor,
        a_nF: Tensor,
        weight_n1: Tensor,
        keep_TF: Tensor | None,
        token: Tensor,
        columns: slice,
    ) -> None:
        """From the gradient of the update; adds to ``v`` (n, F) what reaches the activation ``a`` through it."""
        low = self.low
        keep = None if keep_TF is None else keep_TF.index_select(0, token)
        kept = a_nF if keep is None else a_nF * keep
        d_low = (d_update_nO @ low.B_OR[:, columns]).mul_(_scale(low, columns))
        if keep is None:
            v_nF.addmm_(d_low, low.A_RI[columns])
        else:
            v_nF.addcmul_(d_low @ low.A_RI[columns], keep)
        self.B_RO[columns].addmm_((_low(low, kept, columns) * weight_n1).T, d_update_nO)
        self.A_RI[columns].addmm_((d_low * weight_n1).T, kept)

    def found(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of the input, of A and of B."""
        return self.hidden_TI, self.A_RI, self.B_RO.T
