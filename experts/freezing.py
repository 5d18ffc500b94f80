"""LoRA experts of which single ones are frozen, for tasks that come one after another and share experts.

Source: the activate-freeze strategy of MoE-Adapters (Yu et al. 2024, arXiv 2403.11549), see
``trainers/continual_moe_adapter.py``. What is frozen lies in parameters of its own, without gradient, so that no
gradient, weight decay or moment of an optimizer can move it.

Shapes: D in, O out, R stacked rank of all experts, F of those that are frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config import fits
from ..registry import EXPERTS
from .bank import ExpertBank
from .lora import LoRAConfig

Frozen = list[Annotated[int, Field(ge=0)]]


class FreezingConfig(LoRAConfig):
    """Options of ``freezing``.

    Attributes:
        frozen: the experts that are not trained.
        frozen_pattern: ``frozen`` of single sites, as in ``rank_pattern``; the method ``moe_adapter`` writes it.
    """

    kind: str = "freezing"
    frozen: Frozen = Field(default_factory=list)
    frozen_pattern: dict[str, Frozen] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _experts_that_are(self) -> Self:
        for where, frozen in {"frozen": self.frozen, **self.frozen_pattern}.items():
            if len(set(frozen)) != len(frozen) or any(expert >= self.num_experts for expert in frozen):
                where = where if where == "frozen" else f"frozen_pattern.{where}"
                raise ValueError(f"{where} is {frozen}: name each of 0..{self.num_experts - 1} at most once")
        return self

    def at(self, site: str) -> Self:
        if not self.frozen_pattern:
            return super().at(site)
        frozen = next((value for name, value in self.frozen_pattern.items() if fits(site, name)), self.frozen)
        return LoRAConfig.at(self.model_copy(update={"frozen": frozen, "frozen_pattern": {}}), site)

    def freezing(self, sites: Mapping[str, Sequence[int]]) -> Self:
        """The configuration with these experts frozen at these sites, by their paths."""
        return self.parse({**self.to_dict(), "frozen_pattern": {**self.frozen_pattern, **sites}})


@EXPERTS.register("freezing")
class FreezingExperts(ExpertBank):
    """``alpha / r * B_e A_e x`` for each expert e. In a fresh bank the frozen ones are zero until they are loaded.

    Parameters:
        lora_A: (R - F, D), lora_B: (O, R - F) of the trained experts, in their order. old_lora_A: (F, D),
            old_lora_B: (O, F) of those that are frozen; absent where none is.
    """

    Config = FreezingConfig
    config: FreezingConfig

    old_lora_A: nn.Parameter | None
    old_lora_B: nn.Parameter | None

    def __init__(self, config: FreezingConfig, in_features: int, out_features: int, name: str = "") -> None:
        super().__init__(config, in_features, out_features, name)
        self.register_parameter("old_lora_A", None)
        self.register_parameter("old_lora_B", None)
        trained, frozen = sum(self.down_ranks), sum(self._ranks(True))
        if frozen:
            self.lora_B = nn.Parameter(self.lora_B.new_zeros(out_features, trained))
            self._keep(self.lora_A.new_zeros(frozen, in_features), self.lora_B.new_zeros(out_features, frozen))

    def _ranks(self, frozen: bool) -> tuple[int, ...]:
        """Ranks of the experts that are frozen, or of the others."""
        return tuple(rank for expert, rank in enumerate(self.ranks) if (expert in self.config.frozen) == frozen)

    @property
    def down_ranks(self) -> tuple[int, ...]:
        return self._ranks(False)

    def down(self) -> Tensor:
        return self._in_order(self.lora_A, self.old_lora_A, 0)

    def up(self) -> Tensor:
        return self._in_order(self.lora_B, self.old_lora_B, 1)

    def _in_order(self, trained: Tensor, frozen: Tensor | None, dim: int) -> Tensor:
        """All experts along ``dim``."""
        if frozen is None:
            return trained
        parts = {True: iter(frozen.split(self._ranks(True), dim)), False: iter(trained.split(self.down_ranks, dim))}
        return torch.cat([next(parts[expert in self.config.frozen]) for expert in range(len(self.ranks))], dim)

    @torch.no_grad()
    def freeze(self, config: FreezingConfig) -> None:
        """Freeze those experts that ``config`` says, bit for bit as they are; parameters are replaced."""
        parts_A, parts_B = self.down().split(self.ranks), self.up().split(self.ranks, dim=1)
        self.config = config
        trained = [expert for expert in range(len(self.ranks)) if expert not in config.frozen]
        none_A, none_B = self.lora_A[:0], self.lora_B[:, :0]  # there may be no experts of a sort
        self.lora_A = nn.Parameter(torch.cat([none_A, *(parts_A[e] for e in trained)]))
        self.lora_B = nn.Parameter(torch.cat([none_B, *(parts_B[e] for e in trained)], dim=1))
        self.old_lora_A = self.old_lora_B = None
        if frozen := sorted(config.frozen):
            self._keep(torch.cat([parts_A[e] for e in frozen]), torch.cat([parts_B[e] for e in frozen], dim=1))

    def _keep(self, A: Tensor, B: Tensor) -> None:
        self.old_lora_A = nn.Parameter(A, requires_grad=False)
        self.old_lora_B = nn.Parameter(B, requires_grad=False)
