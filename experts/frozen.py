"""Frozen experts: adapters that were trained elsewhere, for routers that compose them.

MeteoRA, Arrow, PHATGOOSE, CAT and X-LoRA start from finished LoRA adapters and train a router over them, or nothing.
Adapters from different places differ in rank and scale, so both may be given for each expert. The factors are
parameters without gradient: they are moved, saved and loaded like all others, and no optimizer sees them.

Shapes: D in, O out, r rank of one expert.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import ConfigError
from ..registry import EXPERTS
from .bank import ExpertBank, ExpertsConfig, PositiveInt

Scaling = Literal["lora", "rslora"]
Rank = Annotated[int, Field(ge=0)]
# Fit to be the name of a file.
Name = Annotated[str, Field(pattern=r"^\w[\w .+-]{0,99}$")]


class FrozenConfig(ExpertsConfig):
    """Options of ``frozen``.

    Attributes:
        r: rank of every expert, or one rank per expert; 0 for an adapter that has nothing at a site.
        scaling: ``lora`` scales each update by alpha / r, ``rslora`` by alpha / sqrt(r); a list says so for each
            expert, or gives its factor itself, and ``alpha`` is then of no matter for it.
        names: of the adapters that the experts come from, for reports, model cards and exports.
    """

    kind: str = "frozen"
    r: PositiveInt | list[Rank] = 16
    rank_pattern: dict[str, PositiveInt | list[Rank]] = Field(default_factory=dict)
    scaling: Scaling | Annotated[list[Scaling | float], Field(min_length=1)] = "lora"
    names: list[Name] | None = None

    @model_validator(mode="after")
    def _one_name_per_expert(self) -> Self:
        if self.names is not None and not len(self.names) == len(set(self.names)) == self.num_experts:
            raise ValueError(f"names lists {self.names} for {self.num_experts} experts: give each one of its own")
        return self

    @model_validator(mode="after")
    def _one_scale_per_expert(self) -> Self:
        if isinstance(self.scaling, list) and len(self.scaling) != self.num_experts:
            raise ValueError(f"scaling lists {len(self.scaling)} values for {self.num_experts} experts: give one each")
        return self

    @property
    def scales(self) -> tuple[float, ...]:
        each = self.scaling if isinstance(self.scaling, list) else [self.scaling] * self.num_experts
        return tuple(_scale(*one) for one in zip(each, self.alphas, self.ranks, strict=True))


def _scale(scaling: Scaling | float, alpha: float, rank: int) -> float:
    if not isinstance(scaling, str):
        return scaling
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank) if rank else 1.0


@EXPERTS.register("frozen")
class FrozenExperts(ExpertBank):
    """``scale * B_e A_e x`` with A_e and B_e from :meth:`load_expert`; zero until then, and never trained."""

    Config = FrozenConfig

    def __init__(self, config: FrozenConfig, in_features: int, out_features: int, name: str = "") -> None:
        super().__init__(config, in_features, out_features, name)
        self.lora_A.requires_grad_(False)
        self.lora_B.requires_grad_(False)

    @torch.no_grad()
    def load_expert(self, index: int, A: Tensor, B: Tensor) -> None:
        """Copy the factors of one adapter into their place.

        Args:
            index: the expert. A: (r, D), B: (O, r) as PEFT names them; its scale is the configuration's, not theirs.

        Raises:
            ConfigError: no such expert, or the shapes are not its own.
        """
        if not 0 <= index < len(self.ranks):
            raise ConfigError(f"site {self.name!r}: there is no expert {index}: this bank has 0..{len(self.ranks) - 1}")
        rank, start = self.ranks[index], sum(self.ranks[:index])
        wanted = {"A": (rank, self.lora_A.shape[1]), "B": (self.lora_B.shape[0], rank)}
        for name, factor in {"A": A, "B": B}.items():
            if tuple(factor.shape) != wanted[name]:
                raise ConfigError(
                    f"site {self.name!r}, expert {index}: {name} has the shape {tuple(factor.shape)}, expected "
                    f"{wanted[name]}: the rank of this expert is {rank}; set experts.r to the ranks of the adapters, "
                    "in the order of the experts"
                )
        self.lora_A[start : start + rank] = A.to(self.lora_A)
        self.lora_B[:, start : start + rank] = B.to(self.lora_B)
