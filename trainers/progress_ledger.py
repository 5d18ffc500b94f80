"""What a run of several tasks spent on each, when it was done with it, and what became of it later; as JSON.

Solved tasks leave the training (pruning), and stages add adapters. The first alone saves interactions, so a saving is
told only beside that of a run that prunes and has no stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from .. import files
from ..checkpoints.reading import load_mapping
from ..errors import CheckpointError, ConfigError, DataError, UserError
from ..schema import explain
from .progress import Decision, ProgressConfig

CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)
When = Literal["solve", "stage", "end"]


@checked(config=CLOSED)
class Solve:
    """A task met its target: the step, the stage of then, and what had been spent on the task."""

    step: int
    stage: int
    interactions: int


@checked(config=CLOSED)
class Switch:
    """A stage ended: the step, the stage that began, and why."""

    step: int
    stage: int
    reason: str


@checked(config=CLOSED)
class Retention:
    """A task evaluated after (or when) it was solved.

    Attributes:
        when: at the ``solve``, at the end of a ``stage``, or at the ``end`` of the run.
        metric: with the model of then. prefix: with the stages up to that of its solve alone.
    """

    step: int
    when: When
    metric: float
    prefix: float | None = None


@checked(config=CLOSED)
class TaskRecord:
    """One task of a run; ``stopped`` says why it was given up."""

    interactions: int = 0
    solves: list[Solve] = Field(default_factory=list)
    reopened: list[int] = Field(default_factory=list)
    stopped: str | None = None
    retention: list[Retention] = Field(default_factory=list)


@checked(config=CLOSED)
class _Content:
    """The file of a ledger."""

    progress: dict[str, Any]
    prunes: bool
    grows: bool
    seed: int
    unit: str
    tasks: dict[str, TaskRecord]
    switches: list[Switch]


class Ledger:
    """The account of one run.

    Args:
        config: rules of the run. prunes: whether solved tasks leave the training. grows: whether stages add adapters.
            Neither is the joint run that others are held against. seed: of the run. unit: what an interaction is.

    Attributes:
        tasks: by name. switches: in their order.
    """

    def __init__(
        self,
        config: ProgressConfig | Mapping[str, Any],
        *,
        prunes: bool = True,
        grows: bool = True,
        seed: int = 0,
        unit: str = "interactions",
    ) -> None:
        self.config = ProgressConfig.parse(config, "progress")
        self.prunes, self.grows, self.seed, self.unit = prunes, grows, seed, unit
        self.tasks = {task: TaskRecord() for task in self.config.targets}
        self.switches: list[Switch] = []

    @property
    def arm(self) -> str:
        """What kind of run this is: ``joint``, ``prune``, ``adapters`` or ``dps``."""
        return {(False, False): "joint", (True, False): "prune", (False, True): "adapters", (True, True): "dps"}[
            self.prunes, self.grows
        ]

    def spend(self, task: str, count: int) -> None:
        """Count interactions of a task.

        Raises:
            UserError: a negative count. ConfigError: there is no such task.
        """
        if count < 0:
            raise UserError(f"task {task!r}: {count} interactions cannot be spent; give what was used, 0 or more")
        self._of(task).interactions += count

    def record(self, decision: Decision) -> None:
        """Write down what a scheduler decided; to be called after the interactions before it were counted."""
        # A switch of this very decision ends the stage in which the tasks were solved.
        stage = decision.stage - decision.switched
        for task in decision.solved:
            record = self._of(task)
            record.solves.append(Solve(step=decision.step, stage=stage, interactions=record.interactions))
        for task in decision.reopened:
            self._of(task).reopened.append(decision.step)
        for task, why in decision.stopped.items():
            self._of(task).stopped = why
        if decision.switched:
            self.switches.append(Switch(step=decision.step, stage=decision.stage, reason=decision.reason))

    def retain(self, task: str, when: When, metric: float, step: int, prefix: float | None = None) -> None:
        """Write down an evaluation of a task that was solved; see :class:`Retention`.

        Raises:
            DataError: the task was never solved, or a number is not finite.
        """
        record = self._of(task)
        if not record.solves:
            raise DataError(f"task {task!r} was not solved, so there is nothing that it could have kept")
        if not (math.isfinite(metric) and math.isfinite(0.0 if prefix is None else prefix)):
            raise DataError(f"task {task!r}: its metric is {metric}, with the prefix {prefix}: not a finite number")
        record.retention.append(Retention(step=step, when=when, metric=metric, prefix=prefix))

    def solved(self, task: str) -> Solve | None:
        """Where a task was solved for the last time; ``None`` if it was not, was opened again since, or stopped."""
        record = self._of(task)
        open_again = len(record.reopened) >= len(record.solves)
        return None if open_again or record.stopped is not None else record.solves[-1]

    @property
    def complete(self) -> bool:
        """Whether every task is solved."""
        return all(self.solved(task) is not None for task in self.tasks)

    @property
    def interactions(self) -> int:
        """Over all tasks."""
        return sum(record.interactions for record in self.tasks.values())

    def below_target(self, prefix: bool = False) -> tuple[str, ...]:
        """Tasks that were solved and, evaluated at the end of the run, are below their target.

        Args:
            prefix: look at the values with the prefix of their stage.

        Raises:
            DataError: a task that was solved was not evaluated so at the end.
        """
        below = []
        for task, record in self.tasks.items():
            if not record.solves or record.stopped is not None:
                continue
            last = next((entry for entry in reversed(record.retention) if entry.when == "end"), None)
            value = None if last is None else last.prefix if prefix else last.metric
            if value is None:
                how = " with its prefix" if prefix else ""
                raise DataError(f"task {task!r} was not evaluated{how} at the end of the run: call retain first")
            if value < self.config.targets[task]:
                below.append(task)
        return tuple(below)

    def _of(self, task: str) -> TaskRecord:
        if task not in self.tasks:
            raise ConfigError(f"task {task!r} has no target: targets has {', '.join(self.tasks)}")
        return self.tasks[task]

    # -- JSON ----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON types; :meth:`from_dict` reads them."""
        return {
            "progress": self.config.to_dict(),
            "prunes": self.prunes,
            "grows": self.grows,
            "seed": self.seed,
            "unit": self.unit,
            "tasks": {task: asdict(record) for task, record in self.tasks.items()},
            "switches": [asdict(switch) for switch in self.switches],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str = "ledger") -> Ledger:
        """The ledger that :meth:`to_dict` wrote.

        Raises:
            CheckpointError: it is none, or names other tasks than its targets.
        """
        try:
            content = TypeAdapter(_Content).validate_python(dict(value))
        except ValidationError as error:
            raise CheckpointError(explain(error, ProgressConfig, where)) from None
        ledger = cls(content.progress, prunes=content.prunes, grows=content.grows, seed=content.seed, unit=content.unit)
        if set(content.tasks) != set(ledger.tasks):
            raise CheckpointError(f"{where}: its tasks are not those of its targets, {', '.join(ledger.tasks)}")
        ledger.tasks = {task: content.tasks[task] for task in ledger.tasks}
        ledger.switches = content.switches
        return ledger

    def save(self, path: str | Path) -> None:
        """Write the JSON file in one piece.

        Raises:
            CheckpointError: it cannot be written; what was there stands.
        """
        files.replace_text(Path(path), json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read a file of :meth:`save`; see :meth:`from_dict` for what is raised."""
        return cls.from_dict(load_mapping(Path(path)), str(path))


@dataclass(frozen=True)
class Ratio:
    """Interactions of some runs over those of the joint runs, and of the prune-only runs over the same.

    Attributes:
        arm: of the runs. value, prune: the two ratios, each over the sum of all seeds. seeds: of all three.
        sign, prune_sign: ``=``; ``>=`` where a run did not solve every task, so that it would have taken more; ``<=``
            where a joint run did not; ``?`` where both did not.
    """

    arm: str
    value: float
    prune: float
    sign: str
    prune_sign: str
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"interactions over those of the joint runs ({len(self.seeds)} seeds): {self.arm} {self.sign} "
            f"{self.value:.3f}; pruning alone {self.prune_sign} {self.prune:.3f}"
        )


def ratio(runs: Sequence[Ledger], reference: Sequence[Ledger], prune: Sequence[Ledger]) -> Ratio:
    """How many of the interactions of the joint runs some runs took, beside what pruning alone took.

    Args:
        runs: of one arm, one for each seed. reference: joint runs. prune: runs that prune and have no stages.

    Raises:
        ConfigError: the prune-only runs are missing; runs are not of the arm they stand for; targets, rules of solving,
            units or seeds differ; or nothing was spent in the joint runs.
    """
    if not prune:
        raise ConfigError(
            "prune: no runs that prune and have no stages were given: solved tasks leaving the training saves "
            "interactions by itself, so a saving says nothing about stages without them: run that arm too"
        )
    arms = {"runs": runs, "reference": reference, "prune": prune}
    wanted = {"reference": "joint", "prune": "prune"}
    if missing := next((name for name, ledgers in arms.items() if not ledgers), None):
        raise ConfigError(f"{missing}: no runs were given")
    for name, ledgers in arms.items():
        expected = wanted.get(name, ledgers[0].arm)
        wrong = next((ledger.arm for ledger in ledgers if ledger.arm != expected), None)
        if wrong is not None:
            raise ConfigError(f"{name}: a run of the arm {wrong!r} is among them, expected {expected!r} alone")
        _comparable(name, ledgers, reference)
    spent = {name: sum(ledger.interactions for ledger in ledgers) for name, ledgers in arms.items()}
    if spent["reference"] == 0:
        raise ConfigError("reference: the joint runs spent no interactions, so nothing can be held against them")
    return Ratio(
        arm=runs[0].arm,
        value=spent["runs"] / spent["reference"],
        prune=spent["prune"] / spent["reference"],
        sign=_sign(runs, reference),
        prune_sign=_sign(prune, reference),
        seeds=tuple(sorted(ledger.seed for ledger in reference)),
    )


def _comparable(name: str, ledgers: Sequence[Ledger], reference: Sequence[Ledger]) -> None:
    """See that runs have what they are held against: the same tasks, solved by the same rule, once for each seed."""
    for key in ("targets", "passes", "standard_errors", "hysteresis", "unit"):
        found = [getattr(ledger if key == "unit" else ledger.config, key) for ledger in (reference[0], *ledgers)]
        other = next((value for value in found if value != found[0]), None)
        if other is not None:
            raise ConfigError(
                f"{name}: {key} is {other!r} in a run of {ledgers[0].arm!r} and {found[0]!r} in the reference: "
                "interactions to other targets cannot be compared; run both with the same"
            )
    seeds, wanted = (sorted(ledger.seed for ledger in group) for group in (ledgers, reference))
    if seeds != wanted or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{name}: seeds {seeds}, and those of the reference are {wanted}: give one run for each seed")


def _sign(runs: Sequence[Ledger], reference: Sequence[Ledger]) -> str:
    whole = all(ledger.complete for ledger in runs), all(ledger.complete for ledger in reference)
    return {(True, True): "=", (False, True): ">=", (True, False): "<=", (False, False): "?"}[whole]
