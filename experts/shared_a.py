"""Experts that share ``lora_A``: HydraLoRA's one way down and several ways up.

Source: Tian et al. 2024 (arXiv 2404.19245), Clin0212/HydraLoRA afb693b: ``y = W x + s sum_e w_e B_e A x``. The
released code draws a dropout mask for each expert, ``expert_dropout: separate`` here; by default one mask serves all of
them, and then ``A x`` is computed once.

Shapes: D in, O out, E experts, r rank of each, R = E·r.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from ..dispatch.linear import Gate
from ..registry import EXPERTS
from .bank import ExpertBank, ExpertsConfig


class SharedAConfig(ExpertsConfig):
    """Options of ``shared_a``; the scale is alpha / r. ``r`` is one number, as all experts have the same A."""

    kind: str = "shared_a"

    @model_validator(mode="after")
    def _one_rank(self) -> Self:
        if isinstance(self.r, list) and len(set(self.r)) > 1:
            raise ValueError(f"experts.r is {self.r}, but experts that share lora_A have one rank: give one number")
        return self

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(alpha / rank for alpha, rank in zip(self.alphas, self.ranks, strict=True))


@EXPERTS.register("shared_a")
class SharedAExperts(ExpertBank):
    """``scale * B_e A x``.

    Parameters:
        lora_A: (r, D), of all experts. lora_B: (O, R) stacked.
    """

    Config = SharedAConfig

    @property
    def down_ranks(self) -> tuple[int, ...]:
        return self.ranks[:1]

    def down(self) -> Tensor:
        """(R, D) the shared matrix, once for each expert."""
        return self.lora_A.repeat(len(self.ranks), 1)

    def low(self, hidden_states: Tensor) -> Tensor:
        """(..., R) ``dropout(x) A^T``, not scaled yet, once for each expert."""
        A = self.lora_A.to(hidden_states.dtype)
        if self.separate_masks:
            return torch.cat([F.linear(self.dropped(hidden_states), A) for _ in self.ranks], dim=-1)
        low = F.linear(self.dropped(hidden_states), A)
        return low.unsqueeze(-2).expand(*low.shape[:-1], len(self.ranks), -1).flatten(-2)

    def add_to(self, out: Tensor, hidden_states: Tensor, low: Tensor | None, gate: Gate, base: nn.Module) -> Tensor:
        return super().add_to(out, hidden_states, self.low(hidden_states) if low is None else low, gate, base)
