"""What goes into an environment and what comes out of it, checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import TrainingError, UserError
from .config import TaskConfig

Array = npt.NDArray[Any]
Outcome = tuple[
    Array, float, bool, bool
]  # observation, reward, terminated, truncated; a reset has no reward and no end


class TaskError(TrainingError):
    """A task that cannot go on: its environment failed, or gave a number that is not finite."""


class Crashed(Exception):
    """The process of a copy has died."""


@contextmanager
def named(task: TaskConfig, where: str) -> Iterator[None]:
    """Turn what an environment raises into a :class:`TaskError` that says which task, and where."""
    try:
        yield
    except Crashed:
        raise
    except Exception as error:
        raise TaskError(f"task {task.name}: {task.id} failed ({where}): {error!r}") from error


def chosen(task: TaskConfig, actions: Any, rows: int, num_actions: int) -> list[int]:
    """Actions as Python's whole numbers.

    Raises:
        UserError: they are not ``rows`` whole numbers from 0 to ``num_actions - 1``.
    """
    array = np.asarray(actions)
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise UserError(
            f"task {task.name}: actions have shape {array.shape} and dtype {array.dtype}: {rows} whole numbers are "
            "needed, one for each row of the observations"
        )
    wrong = array[(array < 0) | (array >= num_actions)]
    if wrong.size:
        raise UserError(f"task {task.name}: there is no action {wrong[0]}: actions are 0 to {num_actions - 1}")
    whole: list[int] = array.tolist()
    return whole


def finite(task: TaskConfig, outcome: Outcome, where: str) -> Outcome:
    """The outcome as it is, when all its numbers are finite.

    Args:
        where: which copy or seed, and which step.

    Raises:
        TaskError: they are not.
    """
    observation, reward, _, _ = outcome
    if not np.isfinite(reward):
        raise TaskError(f"task {task.name}: {task.id} gave the reward {reward} ({where})")
    if not np.isfinite(observation).all():
        places = np.flatnonzero(~np.isfinite(observation))
        raise TaskError(
            f"task {task.name}: {task.id} gave an observation that is not finite at {places[:5].tolist()} ({where})"
        )
    return outcome
