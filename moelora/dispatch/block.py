"""Block site: the weighted mix of the experts' activations inside an FFN, around its frozen down projection.

Every expert e of a token computes ``a_e = act(p + dp_e) * (u + du_e)`` where p and u are the frozen pre-activations and
dp_e, du_e the expert's low-rank updates. The down projection is linear, so the block needs

* ``mix = sum_e w_e a_e`` (T, F), to which the frozen down projection is applied once, whatever K is;
* ``update = sum_e w_e s B_e A_e a_e`` (T, O), with the experts of the down projection, which is added to its output.

Every implementation returns these two from the same arguments: ``inputs``; ``indices_TK``, (T, K) int64 experts, -1 for
an empty slot; ``ranks`` of the experts, 0 for one that changes nothing; ``activation``; and ``normalized``, that the
weights of every token sum to 1 by construction, so that the frozen block comes out bit for bit while no expert changes
anything. All of them compute in the dtype of the inputs.

* ``compiled``: kernels for float32 on a CPU, where a compiler is found (extension.py); SiLU and GELU.
* ``sorted``: torch, tokens grouped by expert; reads the counts of the experts back to the host.
* ``masked``: torch, without sorting and without reading anything back; for GPUs and for torch.compile.
* ``reference``: plain autograd over a loop of experts, for tests.

Shapes: T tokens, D width of the block, F width between the projections, E experts, K slots per token, R stacked rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .block_compiled import compiled, usable
from .block_inputs import Activation, BlockInputs, Formula, LowRank, columns_of
from .block_masked import masked
from .block_sorted import sorted_

__all__ = [
    "IMPLEMENTATIONS",
    "Activation",
    "BlockInputs",
    "Formula",
    "Implementation",
    "LowRank",
    "choose",
    "reference",
]

Implementation = Literal["auto", "compiled", "sorted", "masked", "reference"]


# Below this many tokens sorting them costs more than it saves.
FEW_TOKENS = 32


def choose(inputs: BlockInputs, activation: Activation) -> Implementation:
    """The implementation that is fastest for these inputs, without looking at their values."""
    # Measured with 8 experts of rank 8, two per token, in a 576/1536 block on one core, as a multiple of the frozen
    # block. Training, 2048 tokens: compiled 1.3, sorted 1.7, masked 2.2. No gradients: 1 token 2.3, 2.9, 2.5; 16 tokens
    # 1.6, 2.3, 1.8; 128 tokens 1.3, 1.5, 1.9.
    tokens = inputs.activated_TF.shape[0]
    if inputs.activated_TF.device.type != "cpu" or torch.compiler.is_compiling():
        return "masked"
    if usable(inputs, activation):
        return "compiled"
    return "masked" if tokens <= FEW_TOKENS else "sorted"


def reference(
    inputs: BlockInputs, indices_TK: Tensor, ranks: Sequence[int], activation: Activation, normalized: bool
) -> tuple[Tensor, Tensor | None]:
    """The mix and the update by plain autograd; see the module's text."""
    x = inputs
    mix = torch.zeros_like(x.activated_TF)
    update = None if x.down is None else mix.new_zeros(mix.shape[0], x.down.B_OR.shape[0])
    for expert, columns in enumerate(columns_of(tuple(ranks))):
        weight = ((indices_TK == expert) * x.weights_TK).sum(-1, keepdim=True)
        a = activation.function(_plus(x.activated_TF, x.activated, columns))
        if x.multiplied_TF is not None:
            a = a * _plus(x.multiplied_TF, x.multiplied, columns)
        mix = mix + weight * a
        if update is not None and x.down is not None:
            kept = a if x.keep_TF is None else a * x.keep_TF
            update = update + weight * _update(x.down, kept, columns)
    if normalized:
        base = activation.function(x.activated_TF)
        base = base if x.multiplied_TF is None else base * x.multiplied_TF
        mix = base + (mix - x.weights_TK.sum(-1, keepdim=True) * base)
    return mix, update


def _update(low: LowRank, x_TI: Tensor, columns: slice) -> Tensor:
    """(T, O) what one expert adds for inputs (T, I)."""
    scale = low.scale[columns] if isinstance(low.scale, Tensor) else low.scale
    update: Tensor = (x_TI @ low.A_RI[columns].T * scale) @ low.B_OR[:, columns].T
    return update


def _plus(frozen: Tensor, low: LowRank | None, columns: slice) -> Tensor:
    if low is None or low.hidden_TI is None:
        return frozen
    return frozen + _update(low, low.hidden_TI, columns)


Mix = Callable[[BlockInputs, Tensor, Sequence[int], Activation, bool], tuple[Tensor, Tensor | None]]
IMPLEMENTATIONS: dict[str, Mix] = {
    "compiled": compiled,
    "sorted": sorted_,
    "masked": masked,
    "reference": reference,
}
