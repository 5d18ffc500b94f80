"""Tasks of a sequence, what makes them consistent, and the registry of sequences.

A sequence that is inconsistent is refused when it is built, so before anything is trained.
"""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar, get_args

from ..config import SequenceData
from ..errors import ConfigError, DataError
from ..registry import Registry, closest
from ..sequence_config import TaskMetric
from .example import Example, mix

logger = logging.getLogger(__name__)

Orders = Mapping[str, tuple[str, ...]]

SEQUENCES: Registry[Any] = Registry("task sequence", "moelora.data.sequences")
METRICS: tuple[str, ...] = get_args(TaskMetric)
SPLITS = ("train", "val", "test")
# A label is right or wrong; a text can be near to another one.
OF_TEXTS = ("rouge_l", "edit_similarity", "sari")
HELD_OUT = 0.1


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Attributes:
        train, val, test: examples; no question is in two of them.
        metric: a name in :data:`~moelora.evaluation.task_metrics.TASK_METRICS`.
        classes: the words of the labels, where an answer is one of few; the examples then have them as ``choices``, so
            that answers may be chosen by likelihood.
        epochs: over ``train`` in the published recipe; ``None`` where none is known.
        max_new_tokens: of an answer that a model writes, as published; ``None`` where nothing is known.

    Raises:
        DataError: a split is empty, two splits share a question, an example is of another task, the metric is unknown
            or does not fit the examples, or an answer is none of the classes.
    """

    name: str
    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]
    metric: str
    classes: tuple[str, ...] = ()
    epochs: int | None = None
    max_new_tokens: int | None = None

    @property
    def splits(self) -> dict[str, tuple[Example, ...]]:
        """The examples by the name of the split."""
        return {"train": self.train, "val": self.val, "test": self.test}

    def __post_init__(self) -> None:
        self._check_metric()
        self._check_classes()
        for split, examples in self.splits.items():
            if not examples:
                raise DataError(f"task {self.name!r}: the split {split!r} has no examples")
            other = next((example.task for example in examples if example.task != self.name), None)
            if other is not None:
                raise DataError(f"task {self.name!r}: the split {split!r} has an example of the task {other!r}")
        for one, two in combinations(SPLITS, 2):
            shared = {example.question for example in self.splits[one]} & {e.question for e in self.splits[two]}
            if shared:
                raise DataError(
                    f"task {self.name!r}: {len(shared)} questions are in {one!r} and in {two!r}, such as "
                    f"{_short(min(text for _, text in shared))}: take them out of one of the two"
                )

    def _check_metric(self) -> None:
        if self.metric not in METRICS:
            raise DataError(
                f"task {self.name!r}: unknown metric {self.metric!r}: known are {', '.join(METRICS)}"
                f"{closest(self.metric, list(METRICS))}"
            )
        if self.metric in OF_TEXTS and self.classes:
            raise DataError(
                f"task {self.name!r}: the metric {self.metric!r} compares texts, but the answers are the labels "
                f"{', '.join(self.classes)}: take accuracy, or drop the classes"
            )
        bare = any("source_dataset" not in example.metadata for part in self.splits.values() for example in part)
        if self.metric == "gym_score" and bare:
            raise DataError(f"task {self.name!r}: the metric 'gym_score' is of tasks of reasoning-gym; take accuracy")

    def _check_classes(self) -> None:
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if twice:
            raise DataError(f"task {self.name!r}: the class {twice[0]!r} is there twice")
        if len(self.classes) == 1:
            raise DataError(f"task {self.name!r}: {self.classes[0]!r} is the only class; give at least two, or none")
        for split, examples in self.splits.items() if self.classes else ():
            for example in examples:
                if example.answer not in self.classes:
                    raise DataError(
                        f"task {self.name!r}: the split {split!r} has the answer {_short(example.answer)}, which is "
                        f"none of the classes {', '.join(map(repr, self.classes))}"
                    )


@dataclass(frozen=True)
class TaskSequence:
    """Tasks to learn one after another, in one of several orders.

    Attributes:
        version: changes when a task or an order does.
        orders: names of tasks by the name of the order. An order may leave tasks out.

    Raises:
        DataError: no tasks, two of one name, no order, or one with an unknown task, with a task twice, or with none.
    """

    name: str
    version: str
    tasks: tuple[Task, ...]
    orders: Orders

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            what = f"two tasks have the name {twice[0]!r}" if twice else "there are no tasks"
            raise DataError(f"sequence {self.name!r}: {what}")
        check_orders(self.name, self.orders, names)

    def ordered(self, order: str | None = None) -> list[Task]:
        """The tasks in an order, the first one where none is named.

        Raises:
            ConfigError: there is no such order.
        """
        tasks = {task.name: task for task in self.tasks}
        return [tasks[name] for name in chosen_order(self.name, self.orders, order)]


class SequenceReader(ABC):
    """What knows a named sequence: its orders, and how a task is read. A subclass is registered by its name.

    Attributes:
        version: of the tasks and orders.
    """

    kind: ClassVar[str]
    version: str = "1"

    def __init__(self, config: SequenceData) -> None:
        self.config = config

    @abstractmethod
    def orders(self) -> Orders:
        """All orders by name, the default first."""

    @abstractmethod
    def task(self, name: str) -> Task:
        """Read a task.

        Raises:
            DataError: its files are missing or inconsistent.
        """


def chosen_order(sequence: str, orders: Orders, order: str | None) -> tuple[str, ...]:
    """The names of the tasks of an order; of the first one for ``None``.

    Raises:
        ConfigError: there is no such order.
    """
    if order is None:
        return next(iter(orders.values()))
    if order not in orders:
        raise ConfigError(
            f"data.order: sequence {sequence!r} has no order {order!r}: orders are {', '.join(orders)}"
            f"{closest(order, list(orders))}"
        )
    return orders[order]


def check_orders(sequence: str, orders: Orders, tasks: Sequence[str]) -> None:
    """See that orders name these tasks, each once.

    Raises:
        DataError: not so; the message names the order and the task.
    """
    if not orders:
        raise DataError(f"sequence {sequence!r} has no order of its tasks {', '.join(tasks)}: give it one")
    for order, names in orders.items():
        if not names:
            raise DataError(f"sequence {sequence!r}: the order {order!r} has no tasks")
        for name in names:
            if name not in tasks:
                raise DataError(
                    f"sequence {sequence!r}: the order {order!r} has the unknown task {name!r}: tasks are "
                    f"{', '.join(tasks)}{closest(name, list(tasks))}"
                )
            if names.count(name) > 1:
                raise DataError(f"sequence {sequence!r}: the order {order!r} has the task {name!r} twice")


def make_task(
    config: SequenceData,
    name: str,
    train: Iterable[Example],
    val: Iterable[Example],
    test: Iterable[Example],
    *,
    metric: str,
    classes: Sequence[str] = (),
    epochs: int | None = None,
    max_new_tokens: int | None = None,
) -> Task:
    """A task of all that was read, checked, and then cut to the sizes of the configuration.

    The training examples that remain depend on the seed, those of the other splits do not.

    Raises:
        DataError: as :class:`Task`; or a class that is no answer.
    """
    options, task_type = tuple(classes), (config.task_types or {}).get(name)

    def labelled(examples: Iterable[Example]) -> tuple[Example, ...]:
        return tuple(replace(example, choices=options, task_type=task_type) for example in examples)

    task = Task(name, labelled(train), labelled(val), labelled(test), metric, options, epochs, max_new_tokens)
    answers = {example.answer for part in task.splits.values() for example in part}
    for label in task.classes:
        if label not in answers:
            raise DataError(
                f"task {name!r}: no answer is the class {label!r}; drop it, or read the examples that have it"
            )
    return replace(
        task,
        train=tuple(mix(task.train, config.seed)[: config.train_size]),
        val=_sample(task.val, config.val_size),
        test=_sample(task.test, config.test_size),
    )


def apart(name: str, splits: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """Released splits without the questions that another one has too, the first ones given keeping theirs.

    The releases of the benchmarks share some: those of TRACE's FOMC, for one, have 16 of 100 in two of them. A question
    that is several times in one split stays.
    """
    seen: set[tuple[str | None, str]] = set()
    kept: dict[str, list[Example]] = {}
    for split, examples in splits.items():
        kept[split] = [example for example in examples if example.question not in seen]
        dropped = len(examples) - len(kept[split])
        if dropped:
            logger.warning("%s: %d examples of %r left out: another split has their questions", name, dropped, split)
        seen.update(example.question for example in kept[split])
    return kept


def hold_out(examples: Sequence[Example], size: int | None) -> tuple[list[Example], list[Example]]:
    """Training examples, and those held out of them to validate on: ``size``, or a tenth, of all different questions.

    For releases that have no validation examples of their own. The choice depends on the examples alone.
    """
    questions = list(dict.fromkeys(example.question for example in mix(examples, 0)))
    held = set(questions[: size or max(1, round(HELD_OUT * len(questions)))])
    train = [example for example in examples if example.question not in held]
    return train, [example for example in examples if example.question in held]


def _sample(examples: tuple[Example, ...], size: int | None) -> tuple[Example, ...]:
    """At most ``size`` examples, in their order; files may be sorted by label, so not the first ones."""
    if size is None or size >= len(examples):
        return examples
    return tuple(examples[index] for index in sorted(random.Random(0).sample(range(len(examples)), size)))  # noqa: S311


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) < 80 else f"{shown[:77]}..."
