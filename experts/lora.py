"""LoRA experts, and their rank-stabilised variant.

Sources: Hu et al. 2021 (arXiv 2106.09685), scale alpha / r; Kalajdzievski 2023 (arXiv 2312.03732), alpha / sqrt(r).
"""

from __future__ import annotations

import math

from ..registry import EXPERTS
from .bank import ExpertBank, ExpertsConfig


class LoRAConfig(ExpertsConfig):
    """LoRA experts with scale alpha / r."""

    kind: str = "lora"

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(alpha / rank for alpha, rank in zip(self.alphas, self.ranks, strict=True))


class RankStabilizedLoRAConfig(ExpertsConfig):
    """LoRA experts with scale alpha / sqrt(r)."""

    kind: str = "rslora"

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(alpha / math.sqrt(rank) for alpha, rank in zip(self.alphas, self.ranks, strict=True))


@EXPERTS.register("lora")
class LoRAExperts(ExpertBank):
    """``scale * B_e A_e x`` with scale alpha / r."""

    Config = LoRAConfig


@EXPERTS.register("rslora")
class RankStabilizedLoRAExperts(ExpertBank):
    """``scale * B_e A_e x`` with scale alpha / sqrt(r)."""

    Config = RankStabilizedLoRAConfig
