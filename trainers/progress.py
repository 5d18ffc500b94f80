"""When a run of several tasks is done with one of them, and when it goes on to its next stage.

Source: online Dynamic Parameter Scaling of ScaleZero (arXiv 2509.07945) and its controller in LightZero (commit
9f717c80). Tasks that are solved leave the training, which is what saves interactions; a stage ends when enough of them
were solved in it (quota) or when it has lasted long enough (budget). Nothing here knows what is trained, or with what:
steps may be optimizer steps, environment steps or tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ..errors import CheckpointError, ConfigError, DataError, UserError
from ..registry import closest
from ..schema import Closed, explain

Reason = Literal["quota", "budget", "both", "none"]


class ProgressConfig(Closed):
    """What counts as solved, and what ends a stage.

    LightZero's rules are ``measured: zero, passes: 1, standard_errors: 0, hysteresis: null``: one evaluation decides,
    and for good.

    Attributes:
        targets: the metric at which each task is solved; more is better.
        num_stages: S, of which the first, 0, has no adapter; so there are at most S - 1 switches.
        t_min: steps that a stage lasts at least. t_max: steps after which it ends, whatever was solved.
        measured: ``stage`` counts both from the start of each stage, and never switches when no task is left to solve.
            ``zero`` is LightZero's clock: ``t_min`` holds in stage 0 alone, counted from step 0, and the end of the
            training's tasks does not keep the budget from switching.
        quota: tasks solved in a stage that end it; ``None`` means those still unsolved over the switches that are left,
            rounded up, at least 1. As what was solved counts on one side and lacks on the other, that is an even share
            of the tasks over the stages left, this one included.
        passes: evaluations in a row that must reach the target.
        standard_errors: an evaluation of several episodes passes when its mean less so many standard errors reaches
            the target; 0 looks at the mean alone.
        hysteresis: how far below its target the mean of a solved task must fall for it to be trained again; one number,
            one for each task, or ``None``: solved is solved.
        unit: what a step is, for reports.
    """

    targets: Annotated[dict[str, float], Field(min_length=1)]
    num_stages: Annotated[int, Field(ge=1)] = 5
    t_min: Annotated[int, Field(ge=0)] = 10_000
    t_max: Annotated[int, Field(gt=0)] = 20_000
    measured: Literal["stage", "zero"] = "stage"
    quota: Annotated[int, Field(ge=1)] | None = None
    passes: Annotated[int, Field(ge=1)] = 2
    standard_errors: Annotated[float, Field(ge=0)] = 0.0
    hysteresis: Annotated[float, Field(ge=0)] | dict[str, Annotated[float, Field(ge=0)]] | None = 0.0
    unit: Annotated[str, Field(min_length=1)] = "steps"

    @model_validator(mode="after")
    def _room_for_the_quota(self) -> Self:
        if self.measured == "stage" and self.t_max <= self.t_min:
            raise ValueError(
                f"t_max is {self.t_max} and t_min {self.t_min}: every stage would end by its budget at t_min, and what "
                "is solved would never decide: raise t_max above t_min, or set measured: zero for LightZero's clock"
            )
        return self

    @model_validator(mode="after")
    def _hysteresis_of_all(self) -> Self:
        if isinstance(self.hysteresis, dict) and set(self.hysteresis) != set(self.targets):
            raise ValueError(
                f"hysteresis is about {', '.join(sorted(self.hysteresis))}, but the tasks are "
                f"{', '.join(sorted(self.targets))}: give each task its own, or one number for all"
            )
        return self

    def floor(self, task: str) -> float:
        """Below this mean a solved task is trained again."""
        if self.hysteresis is None:
            return -math.inf
        width = self.hysteresis[task] if isinstance(self.hysteresis, dict) else self.hysteresis
        return self.targets[task] - width


@dataclass(frozen=True)
class Decision:
    """What holds after one look at the tasks; all tuples are in the order of the targets.

    Attributes:
        step: of the look. stage: from here on. quota: how many tasks had to be solved in the stage for it to end.
        solved, reopened: tasks that became so since the last look. stopped: such that were stopped since, with why.
        active: tasks to go on with.
        reason: for which a stage ended; ``none``: none did.
    """

    step: int
    stage: int
    quota: int
    solved: tuple[str, ...]
    reopened: tuple[str, ...]
    stopped: dict[str, str]
    active: tuple[str, ...]
    reason: Reason

    @property
    def switched(self) -> bool:
        """Whether a stage ended here and the next one begins."""
        return self.reason != "none"


class _State(Closed):
    """All that a scheduler remembers; JSON types."""

    config: dict[str, Any]
    stage: Annotated[int, Field(ge=0)]
    since: int
    step: int
    streaks: dict[str, Annotated[int, Field(ge=0)]]
    solved: list[str]
    before: list[str]
    reported: list[str]
    stopped: dict[str, str]
    told: list[str]


class ProgressScheduler:
    """Takes evaluations, and says who is trained on and in which stage; it draws nothing at random.

    Args:
        config: rules; a mapping is checked. start: the step at which stage 0 begins, for ``measured: stage``.

    Attributes:
        stage: of now. solved: all tasks that count as solved, in the order of the targets. stopped: tasks that were
            given up, with why.
    """

    def __init__(self, config: ProgressConfig | Mapping[str, Any], start: int = 0) -> None:
        self.config = ProgressConfig.parse(config, "progress")
        self.stage = 0
        self.stopped: dict[str, str] = {}
        self._since = start if self.config.measured == "stage" else 0  # when the stage began
        self._step = start  # the latest that was heard of
        self._streaks = dict.fromkeys(self.config.targets, 0)
        self._solved: set[str] = set()
        self._before: set[str] = set()  # solved when the stage began
        self._reported: set[str] = set()  # solved at the last decision
        self._told: set[str] = set()  # stopped at the last decision

    @property
    def solved(self) -> tuple[str, ...]:
        return self._ordered(self._solved)

    @property
    def active(self) -> tuple[str, ...]:
        """Tasks that are neither solved nor stopped."""
        return self._ordered(set(self.config.targets) - self._solved - set(self.stopped))

    @property
    def quota(self) -> int:
        """How many tasks must be solved in this stage for it to end; at least 1."""
        if self.config.quota is not None:
            return self.config.quota
        return max(1, math.ceil(len(self.active) / max(self._switches_left, 1)))

    @property
    def newly(self) -> int:
        """Tasks solved in this stage. LightZero takes the difference of two counts, which may be negative."""
        if self.config.measured == "zero":
            return len(self._solved) - len(self._before)
        return len(self._solved - self._before)

    def observe(self, task: str, metric: float | Iterable[float], step: int) -> None:
        """Take in one evaluation of a task, active or solved.

        A number that is not finite stops the task: it counts neither as solved nor as one to wait for, and later
        evaluations of it change nothing.

        Args:
            metric: its result, or those of its episodes.

        Raises:
            ConfigError: there is no such task.
            DataError: no episodes, or one where its standard error is asked for.
            UserError: the step is before one that was seen.
        """
        if task not in self.config.targets:
            known = list(self.config.targets)
            raise ConfigError(f"task {task!r} has no target: targets has {', '.join(known)}{closest(task, known)}")
        self._advance(step)
        values = tuple(map(float, metric)) if isinstance(metric, Iterable) else (float(metric),)
        if not values:
            raise DataError(f"task {task!r}: an evaluation at {self._at(step)} without results: give at least one")
        if task in self.stopped:
            return
        bad = next((number for number, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            of = f" (result {bad + 1} of {len(values)})" if len(values) > 1 else ""
            self.stopped[task] = f"task {task!r}: its metric is {values[bad]} at {self._at(step)}{of}"
            self._solved.discard(task)
            self._before.discard(task)
            return
        self._judge(task, values)

    def _judge(self, task: str, values: tuple[float, ...]) -> None:
        mean = math.fsum(values) / len(values)
        passed = mean - self._margin(task, values) >= self.config.targets[task]
        self._streaks[task] = self._streaks[task] + 1 if passed else 0
        if self._streaks[task] >= self.config.passes:
            self._solved.add(task)
        elif mean < self.config.floor(task):
            self._solved.discard(task)

    def _margin(self, task: str, values: tuple[float, ...]) -> float:
        if self.config.standard_errors == 0:
            return 0.0
        if len(values) < 2:
            raise DataError(
                f"task {task!r}: one result has no standard error, and standard_errors is "
                f"{self.config.standard_errors:g}: evaluate several episodes, or set it to 0"
            )
        return self.config.standard_errors * statistics.stdev(values) / math.sqrt(len(values))

    def decide(self, step: int) -> Decision:
        """Look at what was observed: who goes on, and whether the stage ends here.

        Raises:
            UserError: the step is before one that was seen.
        """
        self._advance(step)
        quota, reason = self.quota, self._reason(step)
        if reason != "none":
            self.stage += 1
            self._since, self._before = step, set(self._solved)
        decision = Decision(
            step=step,
            stage=self.stage,
            quota=quota,
            solved=self._ordered(self._solved - self._reported),
            reopened=self._ordered(self._reported - self._solved - set(self.stopped)),
            stopped={task: why for task, why in self.stopped.items() if task not in self._told},
            active=self.active,
            reason=reason,
        )
        self._reported, self._told = set(self._solved), set(self.stopped)
        return decision

    def _reason(self, step: int) -> Reason:
        config, spent = self.config, step - self._since
        if self._switches_left == 0:
            return "none"
        if config.measured == "stage":
            early = spent < config.t_min or not self.active
        else:
            early = self.stage == 0 and step < config.t_min
        if early:
            return "none"
        quota, budget = self.newly >= self.quota, spent >= config.t_max
        if quota and budget:
            return "both"
        return "quota" if quota else "budget" if budget else "none"

    @property
    def _switches_left(self) -> int:
        return self.config.num_stages - 1 - self.stage

    def _ordered(self, tasks: set[str]) -> tuple[str, ...]:
        return tuple(task for task in self.config.targets if task in tasks)

    def _at(self, step: int) -> str:
        return f"{step} {self.config.unit}"

    def _advance(self, step: int) -> None:
        if step < self._step:
            raise UserError(
                f"{self._at(step)} were given after {self._at(self._step)}: steps only grow; after a resume load the "
                "state of the scheduler that was saved with the weights"
            )
        self._step = step

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, in JSON types; a scheduler that loads it goes on as if it had not stopped."""
        return _State(
            config=self.config.to_dict(),
            stage=self.stage,
            since=self._since,
            step=self._step,
            streaks=dict(self._streaks),
            solved=list(self.solved),
            before=list(self._ordered(self._before)),
            reported=list(self._ordered(self._reported)),
            stopped=dict(self.stopped),
            told=list(self._ordered(self._told)),
        ).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            CheckpointError: it is no such state, or one under other rules; this scheduler is then as it was.
        """
        try:
            new = _State.model_validate(state)
        except ValidationError as error:
            raise CheckpointError(explain(error, _State, "state of the progress scheduler")) from None
        now = self.config.to_dict()
        other = sorted(key for key in now.keys() | new.config.keys() if now.get(key) != new.config.get(key))
        if other:
            what = "; ".join(f"{key} was {new.config.get(key)!r} and is {now.get(key)!r}" for key in other)
            raise CheckpointError(f"state of the progress scheduler: {what}: resume with the rules it was saved under")
        tasks = set(self.config.targets)
        named = {*new.streaks, *new.solved, *new.before, *new.reported, *new.stopped, *new.told}
        if named != tasks or set(new.streaks) != tasks or new.stage >= self.config.num_stages:
            raise CheckpointError(
                f"state of the progress scheduler: its stage {new.stage} or its tasks, {', '.join(sorted(named))}, are "
                f"not those of its own rules ({self.config.num_stages} stages; {', '.join(sorted(tasks))}): the file "
                "is damaged, take an older checkpoint"
            )
        self.stage, self._since, self._step = new.stage, new.since, new.step
        self._streaks = {task: new.streaks[task] for task in self.config.targets}
        self._solved, self._before, self._reported = set(new.solved), set(new.before), set(new.reported)
        self.stopped, self._told = dict(new.stopped), set(new.told)
