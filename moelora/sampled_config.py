"""The data section of a recipe whose rankings are sampled from the backbone; :mod:`moelora.data_config` has it too."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from .registry import closest
from .schema import Closed


class SampledTasks(Closed):
    """One category of sampled preferences.

    Attributes:
        tasks: names of reasoning-gym data sets; per-task generator options may follow as a mapping.
        capabilities: properties of an answer by which it is ranked under a capability of that name, see
            ``moelora/data/properties.py``.
    """

    tasks: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    capabilities: Annotated[list[str], Field(min_length=1)]

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return {task: {} for task in value} if isinstance(value, list) else value

    @field_validator("capabilities")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        from .data.properties import PROPERTIES

        for name in value:
            if name not in PROPERTIES:
                known = ", ".join(PROPERTIES)
                raise ValueError(
                    f"{name!r} is no property of an answer: known are {known}{closest(name, [*PROPERTIES])}"
                )
            if value.count(name) > 1:
                raise ValueError(f"{name!r} is there twice")
        return value


class SampledPreferenceData(Closed):
    """Rankings made without people: the backbone answers procedural tasks several times, and the tasks' scorers judge.

    The gold score of an answer is ``correctness + property_weight * mean(other capabilities of its category)``, see
    ``moelora/data/properties.py``. Answers are kept in a file in ``output_dir`` and sampled once.

    Attributes:
        categories: groups of tasks, by name.
        train_size, test_size: questions of each task. No question is in both.
        temperatures: of each answer to a question: as many answers as entries.
        worked_examples: other questions of the task, with answers, that the model is shown before each question. The
            rankings have the question alone.
        top_p: of nucleus sampling. max_new_tokens: of an answer; a longer one is cut off, which ``form`` counts.
        property_weight: what all properties but correctness count together.
        batch_size: questions that are answered together. Answers depend on it.
        system: system message of every question; ``None`` leaves it to the backbone's chat template.
        seed: of training questions and of all draws. test_seed: of test questions.
    """

    kind: Literal["sampled_preferences"] = "sampled_preferences"
    categories: Annotated[dict[str, SampledTasks], Field(min_length=1)]
    train_size: Annotated[int, Field(gt=0)] = 24
    test_size: Annotated[int, Field(gt=0)] = 12
    temperatures: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=2)] = (0.7, 0.7, 1.2, 1.2)
    worked_examples: Annotated[int, Field(ge=0)] = 2
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_new_tokens: Annotated[int, Field(gt=0)] = 24
    property_weight: Annotated[float, Field(ge=0)] = 0.25
    batch_size: Annotated[int, Field(gt=0)] = 32
    system: str | None = "Answer briefly."
    seed: int = 0
    test_seed: int = 1_000_003

    @model_validator(mode="after")
    def _one_category_each(self) -> Self:
        if self.seed == self.test_seed:
            raise ValueError(f"seed and test_seed are both {self.seed}: training and test questions would coincide")
        names = [task for group in self.categories.values() for task in group.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is in several categories: a task belongs to one")
        return self

    @property
    def has_task_types(self) -> bool:
        """Rankings have none."""
        return False
