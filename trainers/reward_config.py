"""The options of the trainer ``reward``; see ``trainers/reward.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedModel, TrainingArguments

from ..config import MixtureConfig
from ..mixture import MoELoRAModel
from ..reward.config import RewardConfig
from ..reward.model import RewardModel
from .sft import SFTConfig, known_arguments

PhaseName = Literal["base", "capability", "aggregate", "category"]

# An aggregator learns from stored states, so that an epoch costs next to nothing. With few rankings it soon knows them
# by heart: see model_cards/dmoerm.md for how this rate was found.
OWN: dict[str, dict[str, Any]] = {
    "aggregate": {"learning_rate": 1e-4, "num_train_epochs": 10, "include_num_input_tokens_seen": "no"}
}


class RewardTrainerConfig(SFTConfig, RewardConfig):
    """Options of ``reward``, beside those of ``sft`` and of the reward model; ``args`` hold for all phases.

    Attributes:
        first_share: the part of the rankings, by prompt, that the base and the capabilities learn from; the rest is the
            aggregator's, which so sees states of texts that no expert was trained on. Published: 0.6.
        phases: for each of ``base``, ``capability``, ``aggregate`` and ``category`` what differs from ``args`` in it,
            such as ``learning_rate`` or ``max_steps``.
        label_smoothing: the probability that a comparison is the wrong way round, for annotators who err.
        center_coef: factor of the squared sum of two compared rewards, which holds rewards near zero.
    """

    kind: str = "reward"
    first_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    phases: dict[PhaseName, dict[str, Any]] = Field(default_factory=dict)
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    center_coef: Annotated[float, Field(ge=0)] = 0.0

    @field_validator("phases")
    @classmethod
    def _known_phase_arguments(cls, value: dict[PhaseName, dict[str, Any]]) -> dict[PhaseName, dict[str, Any]]:
        for args in value.values():
            known_arguments(args)
        return value

    @model_validator(mode="after")
    def _experts_stay(self) -> Self:
        for name, args in [("args", self.args), *self.phases.items()]:
            if args.get("weight_decay") and name != "aggregate":
                raise ValueError(
                    f"weight_decay in {name}: experts that a phase leaves alone lie in one tensor with those that it "
                    "trains, and would decay: leave it out, or set it in phases.aggregate"
                )
        return self

    @property
    def reward(self) -> RewardConfig:
        """The configuration of the reward model."""
        return RewardConfig.parse({name: getattr(self, name) for name in RewardConfig.model_fields})

    @property
    def phase_names(self) -> list[PhaseName]:
        """The phases of this reward model, in their order."""
        if not self.categories:
            return ["base"]
        names: list[PhaseName] = ["base", "capability"]
        if self.aggregator != "mean":  # which has nothing to learn
            names.append("aggregate")
        return [*names, "category"] if len(self.categories) > 1 else names

    def arguments_of(self, number: int, folder: str | Path, seed: int) -> TrainingArguments:
        """The whole arguments of a phase, counted from 1. A length that it names takes the place of the common one."""
        name = self.phase_names[number - 1]
        own = {**OWN.get(name, {}), **self.phases.get(name, {})}
        return self.arguments_with(own, folder, seed + number - 1)

    def attach(self, backbone: PreTrainedModel, mixture: MixtureConfig) -> MoELoRAModel:
        return RewardModel.attach(backbone, self.reward, mixture)
