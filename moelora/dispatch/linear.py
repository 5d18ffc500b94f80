"""Linear site: ``B ((A x) * g)``, with the experts of a site stacked on the rank axis.

Shapes: T tokens, D in, O out, R stacked rank (sum of the experts' ranks).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def stacked(hidden_TD: Tensor, lora_A_RD: Tensor, lora_B_OR: Tensor, gate_TR: Tensor | float) -> Tensor:
    """(T, O) update of all experts at once: two GEMMs with the gate between them.

    Args:
        hidden_TD: input after dropout. lora_A_RD, lora_B_OR: stacked experts.
        gate_TR: rank gate with the experts' scales multiplied in, or one number for all.
    """
    dtype = hidden_TD.dtype
    low_TR = F.linear(hidden_TD, lora_A_RD.to(dtype))
    gate = gate_TR.to(low_TR.dtype) if isinstance(gate_TR, Tensor) else gate_TR
    return F.linear(low_TR * gate, lora_B_OR.to(dtype))


def reference(hidden_TD: Tensor, lora_A_RD: Tensor, lora_B_OR: Tensor, gate_TR: Tensor, ranks: Sequence[int]) -> Tensor:
    """(T, O) the same as :func:`stacked`, one expert after the other; for tests."""
    out_TO = hidden_TD.new_zeros(hidden_TD.shape[0], lora_B_OR.shape[0])
    start = 0
    for rank in ranks:
        part = slice(start, start + rank)
        low = hidden_TD @ lora_A_RD[part].T
        out_TO = out_TO + (low * gate_TR[:, part]) @ lora_B_OR[:, part].T
        start += rank
    assert start == lora_A_RD.shape[0], f"ranks {ranks} do not add up to {lora_A_RD.shape[0]}"
    return torch.as_tensor(out_TO)
