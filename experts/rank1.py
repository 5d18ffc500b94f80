"""A growing bank of rank-1 experts for continual learning: each task adds atoms, and those of older tasks are frozen.

Source: MoRAM (arXiv 2506.21035; Artificer-AI-Lab/MoRAM aaa51d8), see router ``moram``. An atom is a row of ``lora_A``
with a column of ``lora_B``. Each task brings r of them; here the atoms of one task are one expert of rank r, so that
``num_experts`` is the number of tasks so far, and what works for experts (run-time factors, reports) works for tasks.

Difference from the released code: there the language variant loses its scale alpha / r for old atoms with each new
task, and keeps a set of atoms that no task trained. Here old atoms keep their scale, and the newest are the last.

Shapes: D in, O out, R atoms of all tasks, r of the newest, Q of all older.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config import fits
from ..registry import EXPERTS
from .bank import ExpertBank, ExpertsConfig, PositiveFloat, PositiveInt
from .lora import LoRAConfig

Kept = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Rank1Config(LoRAConfig):
    """Options of ``rank1``; the scale is alpha / r, also of a task that was pruned.

    Attributes:
        num_experts: tasks so far; grows by one with each ``begin_task()``.
        r: atoms that each task brings, or one number for each. alpha: r gives the scale 1 of the authors' vision code.
        kept: how many atoms of each task are left after pruning; ``None`` means all.
        kept_pattern: ``kept`` of single sites, as in ``rank_pattern``; ``moelora.pruning`` writes it.
    """

    kind: str = "rank1"
    num_experts: PositiveInt = 1
    r: PositiveInt | list[PositiveInt] = 8
    alpha: PositiveFloat | list[PositiveFloat] = 16.0
    kept: Kept | None = None
    kept_pattern: dict[str, Kept] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _no_more_than_drawn(self) -> Self:
        for name, kept in (*self.kept_pattern.items(), ("", self.kept)):
            where = f"kept_pattern.{name}" if name else "kept"
            drawn = self._whole_at(name).drawn if name else self.drawn
            if kept is not None and len(kept) != self.num_experts:
                raise ValueError(f"{where} lists {len(kept)} values for {self.num_experts} tasks: give one each")
            if kept is not None and (not any(kept) or any(k > r for k, r in zip(kept, drawn, strict=True))):
                raise ValueError(
                    f"{where} is {kept}, but the tasks brought {list(drawn)} atoms: keep 0 to that many, and one in all"
                )
        return self

    @property
    def drawn(self) -> tuple[int, ...]:
        """Atoms that each task brought."""
        return super().ranks

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.drawn if self.kept is None else tuple(self.kept)

    @property
    def total_rank(self) -> int:
        return super().total_rank if self.kept is None else sum(self.kept)

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(alpha / rank for alpha, rank in zip(self.alphas, self.drawn, strict=True))

    def at(self, site: str) -> Self:
        if not self.kept_pattern:
            return super().at(site)
        kept = next((value for name, value in self.kept_pattern.items() if fits(site, name)), self.kept)
        return self.parse({**self._whole_at(site).to_dict(), "kept": kept})

    def _whole_at(self, site: str) -> Self:
        """The options of one site as if nothing had been pruned."""
        return LoRAConfig.at(self.model_copy(update={"kept": None, "kept_pattern": {}}), site)

    def next_task(self) -> Self:
        """The configuration with one task more: with the rank and the alpha of the last one, and all of its atoms."""
        more = one_more(self)
        more["kept"] = None if self.kept is None else [*self.kept, self.drawn[-1]]
        more["kept_pattern"] = {
            name: [*kept, self._whole_at(name).drawn[-1]] for name, kept in self.kept_pattern.items()
        }
        return self.parse({**self.to_dict(), **more})


def one_more(config: ExpertsConfig) -> dict[str, Any]:
    """The options that say how many experts there are, for one more with the rank and the alpha of the last one."""
    options = config.to_dict()
    more: dict[str, Any] = {name: longer(options[name]) for name in ("r", "alpha")}
    for pattern in ("rank_pattern", "alpha_pattern"):
        more[pattern] = {name: longer(value) for name, value in options[pattern].items()}
    return {**more, "num_experts": config.num_experts + 1}


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

    @torch.no_grad()
    def keep_atoms(self, config: ExpertsConfig, atoms: Tensor) -> None:
        """Leave these atoms alone, bit for bit; parameters are replaced.

        Args:
            config: says in ``ranks`` how many of them each task has. atoms: (R,) int64 places of them, rising.
        """
        A, B = self.down()[atoms], self.up()[:, atoms]
        self.config, self.ranks = config, config.ranks
        old, trained = sum(self.ranks[:-1]), self.lora_A.requires_grad
        self.lora_A = nn.Parameter(A[old:].clone(), requires_grad=trained)
        self.lora_B = nn.Parameter(B[:, old:].clone(), requires_grad=trained)
        self.old_lora_A = self.old_lora_B = None
        if old:
            self._keep(A[:old], B[:, :old])

    def _keep(self, A: Tensor, B: Tensor) -> None:
        self.old_lora_A = nn.Parameter(A.detach().clone(), requires_grad=False)
        self.old_lora_B = nn.Parameter(B.detach().clone(), requires_grad=False)
