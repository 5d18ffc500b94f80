"""How an agent collects steps of its tasks and learns from them: one class for each objective.

Shapes: N copies of a task, T steps of each, C observations of a context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..registry import Registry
from ..schema import Pluggable
from .agent import Agent, Context, Window
from .checks import TaskError
from .environments import Step, TaskEnvironments
from .evaluating import Act
from .model_config import PPOConfig
from .ppo import Acted, PPOBatch, act, act_together, advantages, ppo_update

PositiveInt = Annotated[int, Field(ge=1)]

LEARNERS: Registry[Any] = Registry("learner of reinforcement learning", "moelora.rl.world_learner")


class LearnerConfig(Pluggable):
    """Options of a learner.

    Attributes:
        copies: environments of each task. horizon: steps of each copy in an iteration.
        context: observations that the agent acts upon, the newest and those before it in the episode.
    """

    copies: PositiveInt = 8
    horizon: PositiveInt = 128
    context: PositiveInt = 1


ConfigT = TypeVar("ConfigT", bound=LearnerConfig)


class Learner(ABC, Generic[ConfigT]):
    """Collects and learns, for tasks by their names.

    Args:
        environments: of each task, with ``config.copies`` copies.
    """

    kind: ClassVar[str]
    Config: ClassVar[type[LearnerConfig]]

    def __init__(self, config: ConfigT, agent: Agent, environments: Mapping[str, TaskEnvironments], seed: int) -> None:
        self.config: ConfigT = config
        self.agent = agent
        self.environments = environments
        self.generator = torch.Generator().manual_seed(seed)
        self.windows = {task: self._window(task, config.copies) for task in environments}
        self.contexts = {
            task: window.push(torch.from_numpy(environments[task].observations))
            for task, window in self.windows.items()
        }

    def _window(self, task: str, copies: int) -> Window:
        return Window(copies, self.config.context, self.environments[task].observation_shape)

    @abstractmethod
    def begin(self, tasks: Sequence[str]) -> None:
        """An iteration begins, with these tasks."""

    @abstractmethod
    def choose_all(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """(N,) int64 actions of every copy of these tasks, in training."""

    @abstractmethod
    def keep(self, task: str, context: Context, actions: Tensor, step: Step) -> None:
        """Take in what a step of a task came to."""

    def collect(self, tasks: Sequence[str], fail: Callable[[str, TaskError], None]) -> dict[str, int]:
        """Play ``horizon`` steps of every copy of these tasks, all side by side, and keep what is learnt from.

        Args:
            fail: is told of a task that cannot be played on; the others are.

        Returns:
            How many steps that were, by task.
        """
        going = list(tasks)
        spent = dict.fromkeys(tasks, 0)
        self.begin(tasks)
        for _ in range(self.config.horizon):
            for task, actions in self.choose_all(going).items() if going else ():
                try:
                    step = self.environments[task].step(actions.numpy())
                except TaskError as error:
                    going.remove(task)
                    fail(task, error)
                    continue
                spent[task] += self.config.copies
                self.keep(task, self.contexts[task], actions, step)
                reset = torch.from_numpy(step.terminated | step.truncated)
                self.contexts[task] = self.windows[task].push(torch.from_numpy(step.observations), actions, reset)
        return spent

    @abstractmethod
    def update(self, optimizer: torch.optim.Optimizer, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        """Learn from what was collected of these tasks; means of the parts of each task's loss.

        Raises:
            TrainingError: a loss is not finite; names the task.
        """

    @abstractmethod
    def choose(self, task: str, context: Context) -> Tensor:
        """(N,) int64 the actions of an evaluation, without chance."""

    def acting(self, task: str) -> Act:
        """What plays whole episodes of a task, from their start, without chance; for one evaluation."""
        window: Window | None = None
        last: Tensor | None = None

        def play(observations: np.ndarray) -> np.ndarray:
            nonlocal window, last
            window = window or self._window(task, len(observations))
            last = self.choose(task, window.push(torch.from_numpy(observations), last))
            return last.numpy()

        return play

    def state_dict(self) -> dict[str, Any]:
        """All but the agent's weights: tensors, and JSON types."""
        return {
            "generator": self.generator.get_state(),
            "windows": {task: window.state_dict() for task, window in self.windows.items()},
            "environments": {task: each.state_dict() for task, each in self.environments.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            CheckpointError: an environment does not lead where it did.
        """
        self.generator.set_state(state["generator"])
        for task, environments in self.environments.items():
            environments.load_state_dict(state["environments"][task])
            window = self.windows[task]
            window.load_state_dict(state["windows"][task])
            self.contexts[task] = Context(window.observations, window.actions, window.mask)


class PPOLearnerConfig(LearnerConfig, PPOConfig):
    """Options of ``ppo``: those of collecting, and of :class:`~moelora.rl.model_config.PPOConfig`."""

    kind: str = "ppo"


@dataclass(frozen=True)
class _Kept:
    """One step of a task: ``last`` (N,) are the values of the true last observations of truncated episodes."""

    context: Context
    acted: Acted
    step: Step
    last: Tensor


@LEARNERS.register("ppo")
class PPOLearner(Learner[PPOLearnerConfig]):
    """Proximal policy optimisation on what was just collected; see ``ppo.py``."""

    Config = PPOLearnerConfig

    def begin(self, tasks: Sequence[str]) -> None:
        self._kept: dict[str, list[_Kept]] = {task: [] for task in tasks}

    def choose(self, task: str, context: Context) -> Tensor:
        return act(self.agent, task, context).actions

    def choose_all(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        self._acted = act_together(self.agent, {task: self.contexts[task] for task in tasks}, self.generator)
        return {task: acted.actions for task, acted in self._acted.items()}

    def keep(self, task: str, context: Context, actions: Tensor, step: Step) -> None:
        ended = torch.from_numpy(step.truncated)  # behind a termination there is no value
        last = torch.zeros(len(ended))
        if ended.any():
            after = self.windows[task].look(torch.from_numpy(step.final_observations), actions).at(ended)
            last[ended] = act(self.agent, task, after).values
        self._kept[task].append(_Kept(context, self._acted[task], step, last))

    def _batch(self, task: str) -> PPOBatch:
        kept = self._kept[task]
        values = [each.acted.values for each in kept]
        ahead = [*values[1:], act(self.agent, task, self.contexts[task]).values]
        cut = [torch.from_numpy(each.step.truncated) for each in kept]
        following = [torch.where(t, each.last, v) for t, each, v in zip(cut, kept, ahead, strict=True)]
        gains, returns = advantages(
            _columns([torch.from_numpy(each.step.rewards) for each in kept]),
            _columns(values),
            _columns(following),
            _columns([torch.from_numpy(each.step.terminated) for each in kept]),
            _columns(cut),
            self.config,
        )
        names = ("observations", "actions", "mask")
        whole = Context(*(torch.cat([getattr(each.context, name) for each in kept]) for name in names))
        actions, log_probs = (
            torch.cat([getattr(each.acted, name) for each in kept]) for name in ("actions", "log_probs")
        )
        # Step by step, as the contexts are.
        return PPOBatch(whole, actions, log_probs, gains.T.reshape(-1), returns.T.reshape(-1))

    def update(self, optimizer: torch.optim.Optimizer, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        batches = {task: self._batch(task) for task in tasks}
        self._kept = {}
        return ppo_update(self.agent, optimizer, batches, self.config, self.generator)


def _columns(each: Sequence[Tensor]) -> Tensor:
    """(N, T) of (N,) for each of T steps."""
    return torch.stack(list(each), dim=1)
