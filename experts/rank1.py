"""A growing bank of rank-1 experts for continual learning: each task adds atoms, and those of older tasks are frozen.

Source: MoRAM (arXiv 2506.21035; Artificer-AI-Lab/MoRAM aaa51d8), see router ``moram``. An atom is a row of ``lora_A``
with a column of ``lora_B``. Each task brings r of them; here the atoms of one task are one expert of rank r, so that
``num_experts`` is the number of tasks so far, and what works for experts (run-time factors, reports) works for tasks.

Difference from the released code: there the language variant loses its scale alpha / r for old atoms with each new
task, and keeps a set of atoms that no task trained. Here old atoms keep their scale, and the newest are the last.

Shapes: D in, O out, R atoms of all tasks, r of the newest, Q of all older.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..registry import EXPERTS
from .bank import ExpertBank, ExpertsConfig, PositiveFloat, PositiveInt
from .lora import LoRAConfig


class Rank1Config(LoRAConfig):
    """Options of ``rank1``; the scale is alpha / r.

    Attributes:
        num_experts: tasks so far; grows by one with each ``begin_task()``.
        r: atoms of each task, or one number for each. alpha: r gives the scale 1 of the authors' vision code.
    """

    kind: str = "rank1"
    num_experts: PositiveInt = 1
    r: PositiveInt | list[PositiveInt] = 8
    alpha: PositiveFloat | list[PositiveFloat] = 16.0

    def next_task(self) -> Self:
        """The configuration with one task more, which has the rank and the alpha of the last one."""
        options = self.to_dict()
        more = {name: longer(value) for name, value in options.items() if isinstance(value, list)}
        for pattern in ("rank_pattern", "alpha_pattern"):
            more[pattern] = {name: longer(value) for name, value in options[pattern].items()}
        return self.parse({**options, **more, "num_experts": self.num_experts + 1})


def longer(value: Any) -> Any:
    """A list with its last entry once more; anything else as it is."""
    return [*value, value[-1]] if isinstance(value, list) else value


@EXPERTS.register("rank1")
class Rank1Experts(ExpertBank):
    """``alpha / r * B_t A_t x`` for each task t so far. In a fresh bank older tasks are zero until they are loaded.

    Parameters:
        lora_A: (r, D), lora_B: (O, r) atoms of the newest task. old_lora_A: (Q, D), old_lora_B: (O, Q) those of all
            older tasks, not trained; absent in the first task.
    """

    Config = Rank1Config
    grows = True

    old_lora_A: nn.Parameter | None
    old_lora_B: nn.Parameter | None

    def __init__(self, config: Rank1Config, in_features: int, out_features: int, name: str = "") -> None:
        super().__init__(config, in_features, out_features, name)
        self.register_parameter("old_lora_A", None)
        self.register_parameter("old_lora_B", None)
        old = sum(self.ranks[:-1])
        if old:
            self.lora_B = nn.Parameter(self.lora_B.new_zeros(out_features, self.ranks[-1]))
            self._keep(self.lora_A.new_zeros(old, in_features), self.lora_B.new_zeros(out_features, old))

    @property
    def down_ranks(self) -> tuple[int, ...]:
        return self.ranks[-1:]

    def down(self) -> Tensor:
        return self.lora_A if self.old_lora_A is None else torch.cat([self.old_lora_A, self.lora_A])

    def up(self) -> Tensor:
        return self.lora_B if self.old_lora_B is None else torch.cat([self.old_lora_B, self.lora_B], dim=1)

    @torch.no_grad()
    def begin_task(self, config: ExpertsConfig) -> None:
        """Freeze what there is, and add fresh atoms: A drawn, B zero."""
        self._keep(self.down(), self.up())
        self.config, self.ranks = config, config.ranks
        rank = self.ranks[-1]
        self.lora_A = nn.Parameter(self.lora_A.new_empty(rank, self.lora_A.shape[1]))
        self.lora_B = nn.Parameter(self.lora_B.new_empty(self.lora_B.shape[0], rank))
        self.reset_parameters()

    def _keep(self, A: Tensor, B: Tensor) -> None:
        self.old_lora_A = nn.Parameter(A.detach().clone(), requires_grad=False)
        self.old_lora_B = nn.Parameter(B.detach().clone(), requires_grad=False)
