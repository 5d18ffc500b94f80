"""The state of the copies of a task, as it is saved: no arrays and no pickle, but how to get there again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, ValidationError

from ..errors import CheckpointError
from ..schema import Closed, explain
from .checks import Array
from .config import TaskConfig

Natural = Annotated[int, Field(ge=0)]
FREE = {"name", "target", "reward_scale"}  # keys of a task that do not change its episodes


class CopyState(Closed):
    """Where a copy is: how its episode began, what was done since, and what must come of that."""

    episode: Natural
    seed: Natural
    actions: list[Natural]
    total: float
    digest: str


class State(Closed):
    """What :meth:`TaskEnvironments.state_dict` writes."""

    task: TaskConfig
    seed: Natural
    steps: Natural
    restarts: Natural
    copies: list[CopyState]

    @classmethod
    def read(cls, state: Mapping[str, Any], task: TaskConfig, num_copies: int, num_actions: int) -> Self:
        """Check a state that was saved against the copies that are to go on from it.

        Raises:
            CheckpointError: it is damaged, or of another task, number of copies or actions.
        """
        try:
            saved = cls.model_validate(dict(state))
        except ValidationError as error:
            raise CheckpointError(f"task {task.name}: state of its environments: {explain(error, cls)}") from None
        here, there = task.to_dict(), saved.task.to_dict()
        wrong = [
            f"{key} {there[key]!r}, here {here[key]!r}" for key in here if key not in FREE and here[key] != there[key]
        ]
        if len(saved.copies) != num_copies:
            wrong.append(f"{len(saved.copies)} copies, here {num_copies}")
        if any(action >= num_actions for copy in saved.copies for action in copy.actions):
            wrong.append(f"actions that are not among the {num_actions} here")
        if wrong:
            raise CheckpointError(f"task {task.name}: the state of its environments has {'; '.join(wrong)}")
        return saved


def digest(observation: Array) -> str:
    """A name for the exact numbers of an observation."""
    return hashlib.sha256(np.ascontiguousarray(observation, "<f4").tobytes()).hexdigest()
