"""Examples of procedural tasks, from the ``reasoning-gym`` package."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from ..config import ReasoningGymData
from ..errors import DataError
from ..registry import closest
from .example import Example, Question, Splits, fresh, mix

logger = logging.getLogger(__name__)

# Small task spaces repeat themselves: how many candidates to draw for each example wanted.
DRAWS = 8


def generate(config: ReasoningGymData) -> Splits:
    """The examples of all tasks; see :func:`~moelora.data.load_examples`."""
    train: list[Example] = []
    test: list[Example] = []
    dropped = 0
    for task, options in config.tasks.items():
        # Test questions come first, so that they stay the same whatever the training size.
        seen: set[Question] = set()
        for size, seed, into in ((config.test_size, config.test_seed, test), (config.train_size, config.seed, train)):
            candidates = _candidates(task, options, size * DRAWS, seed, config)
            kept, passed = fresh(candidates, seen, size)
            dropped += passed
            if not kept:
                raise DataError(
                    f"data.tasks.{task}: no question is left to train on, because the test examples hold every one of "
                    f"the {len(seen)} that were found; choose options that allow more, or lower data.test_size"
                )
            if len(kept) < size:
                logger.warning("%s has %d different questions where %d were asked for", task, len(kept), size)
            into += kept
    return Splits(mix(train, config.seed), test, dropped)


def gym_dataset(task: str, options: Mapping[str, Any], size: int = 1, seed: int = 0) -> Any:
    """A data set of ``reasoning_gym``, which also scores answers.

    Raises:
        DataError: the package is missing, the task unknown, or an option refused.
    """
    try:
        import_module("reasoning_gym")
        factory = import_module("reasoning_gym.factory")
    except ImportError as error:
        raise DataError(
            f"data of kind reasoning_gym needs the package reasoning-gym ({error}): pip install 'moelora[quickstart]'"
        ) from error
    names = sorted(factory.DATASETS)
    if task not in names:
        raise DataError(
            f"data.tasks: reasoning-gym has no task {task!r}{closest(task, names)}; it has {', '.join(names)}"
        )
    try:
        return factory.create_dataset(task, **{**options, "size": size, "seed": seed})
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"data.tasks.{task}: reasoning-gym refuses the options {dict(options)}: {error}") from error


def _candidates(
    task: str, options: Mapping[str, Any], size: int, seed: int, config: ReasoningGymData
) -> Iterable[Example]:
    source = gym_dataset(task, options, size, seed)
    system, task_type = config.system, None if config.task_types is None else config.task_types[task]
    for index in range(size):
        entry = source[index]
        if not str(entry["answer"] or "").strip():
            raise DataError(
                f"data.tasks.{task}: this task of reasoning-gym gives no answers to learn from; take another"
            )
        yield Example(
            str(entry["question"]).strip(),
            str(entry["answer"]),
            task,
            system,
            entry["metadata"],
            options,
            task_type=task_type,
        )
