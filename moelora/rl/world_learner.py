"""Learns a world model of what was played, and acts by searching in it.

Source: UniZero (arXiv 2406.10667) and ScaleZero (2509.07945), on the losses of ``world_model.py``. Unlike in LightZero
all copies of a task step together, value targets come from the target network when a segment is drawn, and nothing is
searched again for it (no reanalysis); segments are drawn alike, without priorities.

Shapes: N copies of a task, A actions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..modes import evaluation_mode
from .agent import Agent, Context
from .checks import TaskError
from .environments import Step, TaskEnvironments
from .learners import LEARNERS, Learner, LearnerConfig, PositiveInt
from .model_config import PositiveFloat, SearchConfig, WorldModelConfig
from .replay import Replay
from .world_model import WorldModel


class WorldModelLearnerConfig(LearnerConfig):
    """Options of ``world_model``.

    Attributes:
        model, search: their discounts are the same.
        buffer: steps that are kept of each task, of all copies together. segment: steps of what is learnt from at once.
        absorbing: steps that a segment goes on behind the end of an episode that terminated, with no reward.
        batch: segments of each task in an update. updates: steps of the optimizer in an iteration.
        temperature: of acting in training; the lower, the more often the action visited most.
        max_grad_norm: gradients are scaled down to this norm.
    """

    kind: str = "world_model"
    model: WorldModelConfig = WorldModelConfig()
    search: SearchConfig = SearchConfig()
    buffer: PositiveInt = 20_000
    segment: PositiveInt = 10
    absorbing: Annotated[int, Field(ge=0)] = 5
    batch: PositiveInt = 32
    updates: PositiveInt = 32
    temperature: PositiveFloat = 1.0
    max_grad_norm: PositiveFloat = 5.0

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if self.model.discount != self.search.discount:
            raise ValueError(
                f"model.discount {self.model.discount} and search.discount {self.search.discount} differ: set both"
            )
        if self.buffer < self.copies:
            raise ValueError(f"buffer {self.buffer} has no room for a step of each of the {self.copies} copies")
        return self


@LEARNERS.register("world_model")
class WorldModelLearner(Learner[WorldModelLearnerConfig]):
    """Acts by search, keeps what was played, and learns the model from it.

    Attributes:
        world: the model around the agent. replays: what was played, by task. chance: draws the noise of searches and
            the actions in training; batches are drawn by ``generator``.
    """

    Config = WorldModelLearnerConfig

    def __init__(
        self, config: WorldModelLearnerConfig, agent: Agent, environments: Mapping[str, TaskEnvironments], seed: int
    ) -> None:
        super().__init__(config, agent, environments, seed)
        self.world = WorldModel(agent, config.model)
        self.chance = np.random.default_rng(seed)
        rows = config.buffer // config.copies
        self.replays = {
            task: Replay(rows, config.copies, each.observation_shape, each.num_actions)
            for task, each in environments.items()
        }

    def begin(self, tasks: Sequence[str]) -> None:
        self._shares: dict[str, Tensor] = {}

    def collect(self, tasks: Sequence[str], fail: Callable[[str, TaskError], None]) -> dict[str, int]:
        with evaluation_mode(self.agent):
            spent = super().collect(tasks, fail)
        for replay in self.replays.values():
            replay.settle()
        return spent

    def choose(self, task: str, context: Context) -> Tensor:
        return torch.from_numpy(self.world.plan(task, context, self.config.search).best())

    def choose_all(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        actions = {}
        for task in tasks:
            result = self.world.plan(task, self.contexts[task], self.config.search, self.chance)
            self._shares[task] = torch.from_numpy(result.shares).float()
            actions[task] = torch.from_numpy(result.sample(self.chance, self.config.temperature))
        return actions

    def keep(self, task: str, context: Context, actions: Tensor, step: Step) -> None:
        self.replays[task].keep(context.observations[:, -1], actions, self._shares[task], step)

    def update(self, optimizer: torch.optim.Optimizer, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        config = self.config
        told: dict[str, dict[str, list[float]]] = {task: defaultdict(list) for task in tasks}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.world.renew_target()
        for _ in range(config.updates):
            drawn = {
                task: self.replays[task].draw(config.batch, config.segment, config.absorbing, self.generator)
                for task in tasks
            }
            loss, parts = self.world.loss(drawn)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            self.world.update_target()
            for task, losses in parts.items():
                for name, value in losses.items():
                    told[task][name].append(value.item())
        return {task: {name: float(np.mean(values)) for name, values in parts.items()} for task, parts in told.items()}

    def state_dict(self) -> dict[str, Any]:
        """As of all learners; and the target network, what was played, and how chance goes on."""
        return {
            **super().state_dict(),
            "target": self.world.target.state_dict(),
            "replays": {task: replay.state_dict() for task, replay in self.replays.items()},
            "chance": self.chance.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the agent as it was then.

        Raises:
            CheckpointError: an environment does not lead where it did, or what was played does not fit a task.
        """
        super().load_state_dict(state)
        self.world.load_target(state["target"])
        for task, replay in self.replays.items():
            replay.load_state_dict(state["replays"][task])
        self.chance.bit_generator.state = state["chance"]
