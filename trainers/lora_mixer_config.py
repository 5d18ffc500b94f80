"""The options of the staged trainer ``lora_mixer``; see ``trainers/lora_mixer.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from transformers import TrainingArguments

from ..config import Closed
from .sft import SFTConfig, known_arguments

Phase = Literal["hard", "soft"]
Experts = Literal["frozen", "trained"]


class Stage(Closed):
    """One stage of ``lora_mixer``.

    Attributes:
        phase: ``hard`` goes by the label of each sequence and leaves the router alone; ``soft`` trains the router.
        experts: in the soft stage ``frozen``, or ``trained`` beside the router. The hard stage trains them.
        preserve_coef: beta, factor of the squared distance of trained experts from where the stage began.
        samples: at most so many training examples, the first of the mixed ones; about 2000 are enough for a router.
        args: what differs from the trainer's ``args`` in this stage, such as ``learning_rate`` or ``max_steps``.
    """

    phase: Phase
    experts: Experts = "frozen"
    preserve_coef: Annotated[float, Field(ge=0)] = 0.0
    samples: Annotated[int, Field(gt=0)] | None = None
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _hard_trains_experts(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("phase") == "hard":
            return {"experts": "trained", **value}
        return value

    @field_validator("args")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return known_arguments(value)

    @model_validator(mode="after")
    def _something_moves(self) -> Stage:
        if self.phase == "hard" and self.experts == "frozen":
            raise ValueError("a hard stage with frozen experts trains nothing: leave out experts")
        if self.preserve_coef > 0 and (self.phase, self.experts) != ("soft", "trained"):
            raise ValueError(
                f"preserve_coef is {self.preserve_coef}, but a {self.phase} stage with {self.experts} experts has no "
                "use for it: it keeps experts near that a soft stage trains (experts: trained)"
            )
        return self


class LoRAMixerTrainerConfig(SFTConfig):
    """Options of ``lora_mixer``, beside those of ``sft``; ``args`` hold for all stages.

    Attributes:
        stages: in their order.
        adapters: folders or hub ids of finished LoRAs, the experts of a mixture with ``experts: {kind: frozen}``.
    """

    kind: str = "lora_mixer"
    stages: list[Stage] = Field(
        min_length=1, default_factory=lambda: [Stage(phase="hard"), Stage(phase="soft", samples=2000)]
    )
    adapters: Annotated[list[str], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _finished_adapters_stay(self) -> LoRAMixerTrainerConfig:
        if self.adapters is not None:
            for number, stage in enumerate(self.stages, 1):
                if stage.experts == "trained":
                    raise ValueError(
                        f"stage {number} ({stage.phase}) would train the experts, but adapters are finished: leave it "
                        "out, or set experts: frozen"
                    )
        return self

    def arguments_of(self, number: int, folder: str | Path, seed: int) -> TrainingArguments:
        """The whole arguments of a stage, counted from 1. A length that it names takes the place of the common one."""
        return self.arguments_with(self.stages[number - 1].args, folder, seed + number - 1)
