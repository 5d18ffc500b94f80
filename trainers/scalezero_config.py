"""The options of ``ScaleZero``; see ``trainers/scalezero.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..experts.staged import StagedConfig
from ..rl.config import SIX_TASKS, TaskConfig
from ..rl.learners import LEARNERS
from ..rl.model_config import AgentConfig
from ..rl.trunk import Trunk
from ..schema import Closed, Plugged
from .progress import ProgressConfig

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
# Solved is solved, as in LightZero; a stage is at most 30 iterations.
PROGRESS = {"num_stages": 4, "t_min": 25, "t_max": 30, "passes": 1, "hysteresis": None}


class StagesConfig(StagedConfig):
    """Adapters of the trunk; see :class:`~moelora.experts.staged.StagedConfig`.

    Attributes:
        targets: names of linears in the trunk; those of attention, and of every expert.
    """

    targets: list[str] = Field(default_factory=lambda: list(Trunk.LINEARS))
    alpha: PositiveFloat | list[PositiveFloat] = 8.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ScaleZeroConfig(Closed):
    """A run on several tasks of reinforcement learning.

    Attributes:
        tasks: with the returns at which they count as solved.
        learner: what is learnt, and from how much.
        agent: the shared trunk, and the parts of the tasks.
        stages: adapters that the trunk gets, a stage after the other; ``None`` leaves it as it is.
        prune: whether a solved task is no longer played and learnt, and its own part is frozen.
        answer: what a solved task is evaluated with later: the agent of then (``live``), or with the trunk of the stage
            in which it was solved (``prefix``).
        progress: when tasks are solved and stages end, see :class:`~moelora.trainers.ProgressConfig`, without
            ``targets``; a step is an iteration. Without ``stages`` its ``num_stages`` is 1.
        learning_rate: of Adam. eval_every: iterations between evaluations. eval_episodes: of each task, always from the
            same seeds.
        max_env_steps: of all tasks together; the run ends at the iteration that reaches them.
        save_every: iterations between checkpoints, of which the newest is kept.
    """

    tasks: Annotated[list[TaskConfig], Field(min_length=1)] = Field(default_factory=lambda: list(SIX_TASKS))
    learner: Annotated[Any, Plugged(LEARNERS, default="ppo")] = Field(default_factory=dict)
    agent: AgentConfig = AgentConfig()
    stages: StagesConfig | None = StagesConfig()
    prune: bool = True
    answer: Literal["live", "prefix"] = "live"
    progress: dict[str, Any] = Field(default_factory=lambda: dict(PROGRESS))
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    eval_every: PositiveInt = 5
    eval_episodes: PositiveInt = 20
    max_env_steps: PositiveInt = 1_000_000
    save_every: PositiveInt = 20
    output_dir: str = "runs/scalezero"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: {', '.join(names)}: each needs a name of its own")
        if "targets" in self.progress:
            raise ValueError("progress.targets: the targets are those of the tasks, leave it out")
        if self.answer == "prefix" and self.stages is None:
            raise ValueError("answer: without stages there is no prefix, set it to 'live'")
        self.rules  # noqa: B018 - raises where they do not hold together
        return self

    @property
    def rules(self) -> ProgressConfig:
        """What the scheduler goes by."""
        stages = {} if self.stages is not None else {"num_stages": 1}
        targets = {task.name: task.target for task in self.tasks}
        return ProgressConfig.parse({**self.progress, **stages, "targets": targets, "unit": "iterations"}, "progress")
