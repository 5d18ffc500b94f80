"""The options of the trainer ``continual``; see ``trainers/continual.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator
from transformers import TrainingArguments

from ..schema import Plugged
from .continual_methods import CONTINUAL_METHODS
from .sft import LENGTHS, SFTConfig, known_arguments

if TYPE_CHECKING:
    from ..data.sequences import Task


class ContinualConfig(SFTConfig):
    """Options of ``continual``, beside those of ``sft``; ``args`` hold for every task.

    Attributes:
        method: how tasks are learnt one after another, and its options; see ``trainers/continual_methods.py``.
        per_task: by the name of a task, what differs from ``args`` while it is learnt, such as ``num_train_epochs``.
            Where neither says how long to train, a task with published epochs is trained for those.
        max_new_tokens: of an answer, where a task is scored by what the model writes. Without it, as the task was
            published, or 16.
        answers: how questions of language are scored. ``written``: by the task's metric, of what the model writes, or
            of the likeliest of the task's classes. ``forced``: 1 where greedy decoding would write the reference token
            for token, else 0, found in one pass over it, which with ``remember_mib`` is many times quicker.
        eval_batch_size: questions that are answered at once.
    """

    kind: str = "continual"
    method: Annotated[Any, Plugged(CONTINUAL_METHODS, default="moram")] = Field(default_factory=dict)
    per_task: dict[str, dict[str, Any]] = Field(default_factory=dict)
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    answers: Literal["written", "forced"] = "written"
    eval_batch_size: Annotated[int, Field(gt=0)] = 16

    @field_validator("per_task")
    @classmethod
    def _known_per_task(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {task: known_arguments(own) for task, own in value.items()}

    def arguments_of(self, tasks: Sequence[Task], folder: str | Path, seed: int) -> TrainingArguments:
        """The whole arguments of a stage on these tasks; ``max_steps`` are of each task."""
        own: dict[str, Any] = {}
        if len(tasks) == 1:
            own = {**self.per_task.get(tasks[0].name, {})}
            if tasks[0].epochs is not None and not any(name in {**self.args, **own} for name in LENGTHS):
                own["num_train_epochs"] = tasks[0].epochs
        args = self.arguments_with(own, folder, seed)
        if args.max_steps > 0:
            args.max_steps *= len(tasks)
        return args
