"""The data section of a recipe that learns tasks one after another; :mod:`moelora.data_config` has it too."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .schema import Closed

TaskMetric = Literal[
    "accuracy", "exact", "exact_match", "first_character", "rouge_l", "edit_similarity", "sari", "gym_score"
]
Size = Annotated[int, Field(gt=0)]


class SequenceData(Closed):
    """Tasks that are learnt one after another: a named sequence, or a folder of the user's own.

    Attributes:
        name: of the sequence, such as ``reasoning-gym-8``, or ``folder``; see ``moelora/data/sequences.py``.
        order: of the tasks, one that the sequence has by name; ``None`` is its first.
        train_size, val_size, test_size: at most this many examples of each task; ``None`` leaves it to the sequence,
            which is all there are where it is read from files.
        seed: of the choice and the order of the training examples. Those of the other splits do not depend on it.
        path: where the files are: a local folder, or the id of a hub data set that has the same files.
        system: system message of every prompt; ``None`` leaves it to the sequence.
        task_types: the type of each task, 0 or 1, for routers that balance experts by it.
    """

    kind: Literal["sequence"] = "sequence"
    name: str
    order: str | None = None
    train_size: Size | None = None
    val_size: Size | None = None
    test_size: Size | None = None
    seed: int = 0
    path: str | None = None
    system: str | None = None
    task_types: dict[str, Literal[0, 1]] | None = None

    @property
    def has_task_types(self) -> bool:
        """Whether every example has a type."""
        return self.task_types is not None
