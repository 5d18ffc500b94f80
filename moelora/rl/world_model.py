"""A world model of latents: what it learns from segments of trajectories, and how a search uses it.

Source: UniZero (arXiv 2406.10667), as ScaleZero (arXiv 2509.07945) trains it; MuZero (1911.08265) for the targets. A
segment o_0 a_0 r_0 o_1 ... o_T is read as z_0 a_0 z_1 a_1 ... z_T, each z from its own observation. At z_t the policy
learns the visit shares of the search, and the value the n-step return that ends in the target network's value; at a_t
the reward is learnt, and the next latent, which the target network's encoder makes of o_{t+1}. The target network
follows the trained one slowly. In a search latents are those that the model predicts, and every node keeps its keys and
values: a node sees the context of the root and the nodes on the way to it.

Where the sources are silent, or ours differs: a task's loss is the mean over its real steps, and the whole is the mean
over tasks (LightZero computes weights of tasks, and does not use them). The value of the last observation of an episode
that terminated is trained to be zero; nothing behind it is trained. A search whose model should know more about the end
gets it from segments that go on with steps of no reward. Value targets of a segment look no further than its end.

Shapes: B segments, T steps, D dim, A actions; N roots, L layers, H heads, d dim of a head, M tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TrainingError, UserError
from .agent import Agent, Context
from .model_config import SearchConfig, WorldModelConfig
from .search import Found, Ints, SearchResult, search
from .trunk import Memory


@dataclass(frozen=True)
class Segments:
    """Stretches of trajectories of one task; none goes over the end of an episode.

    Attributes:
        observations: (B, T + 1, ...); T + 1 is what followed the last step, truly, and not after a reset.
        actions: (B, T) int64. rewards: (B, T) float32. policies: (B, T, A), visit shares of the search.
        mask: (B, T) bool, whether a step is real: true up to the end of the segment. What is behind is not looked at.
        terminated: (B,) bool, whether the episode terminated with the last real step.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    policies: Tensor
    mask: Tensor
    terminated: Tensor

    def __post_init__(self) -> None:
        B, T = self.actions.shape
        fits = self.observations.shape[:2] == (B, T + 1) and self.policies.shape[:2] == (B, T)
        if not fits or self.rewards.shape != (B, T) or self.mask.shape != (B, T) or self.terminated.shape != (B,):
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in vars(self).items())
            raise UserError(
                f"segments: expected observations (B, T + 1, ...), policies (B, T, A), terminated (B,) and (B, T) of "
                f"all others, got {shapes}"
            )
        if not bool(self.mask[:, 0].all()) or bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any()):
            raise UserError("segments: each row of mask must be true for its first steps, one or more, then false")

    @property
    def ends(self) -> Tensor:
        """(B, T) bool, true at the last real step of each."""
        later = torch.cat([self.mask[:, 1:], torch.zeros_like(self.mask[:, :1])], dim=1)
        return self.mask & ~later

    def cleared(self) -> Segments:
        """With zeros in the place of what is not real, so that not even a NaN can get through."""
        shown = torch.cat([torch.ones_like(self.mask[:, :1]), self.mask], dim=1)
        wide = shown.view(*shown.shape, *[1] * (self.observations.dim() - 2))
        return Segments(
            self.observations.where(wide, 0),
            self.actions.where(self.mask, 0),
            self.rewards.where(self.mask, 0),
            self.policies.where(self.mask[..., None], 0),
            self.mask,
            self.terminated,
        )


def n_step_targets(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, discount: float, steps: int
) -> Tensor:
    """(B, T) returns of ``steps`` rewards and the value after them.

    A terminated step is the end: nothing follows it. A truncated one, and the last, end the rewards as well, but the
    value of what followed counts.

    Args:
        rewards, next_values: (B, T), the latter of the observation that followed each step, truly.
        terminated, truncated: (B, T) bool.
    """
    T = rewards.shape[1]
    bootstrap = next_values.masked_fill(terminated, 0)
    stopped = terminated | truncated
    columns = []
    for start in range(T):
        total, scale = torch.zeros_like(rewards[:, 0]), 1.0
        going = torch.ones_like(stopped[:, 0])
        last = min(start + steps, T) - 1
        for step in range(start, last + 1):
            ends = going & (stopped[:, step] | (step == last))
            total = total + scale * rewards[:, step].where(going, 0)
            scale *= discount
            total = total + scale * bootstrap[:, step].where(ends, 0)
            going = going & ~ends
        columns.append(total)
    return torch.stack(columns, dim=1)


class Hidden:
    """What the trunk says about segments: hidden states (B, T + 1, D) at observations and (B, T, D) at actions."""

    def __init__(self, agent: Agent, task: str, segments: Segments) -> None:
        self.part = agent.part(task)
        self.latents = self.part.encode(segments.observations)
        B, T = segments.actions.shape
        tokens = self.latents.new_empty(B, 2 * T + 1, self.latents.shape[-1])
        tokens[:, ::2], tokens[:, 1::2] = self.latents, self.part.actions(segments.actions)
        hidden, _ = agent.trunk(tokens)
        self.at_observations, self.at_actions = hidden[:, ::2], hidden[:, 1::2]


class WorldModel(nn.Module):
    """An agent, its target network, and the losses.

    Attributes:
        agent: trains. target: its slow copy, which does not.
    """

    def __init__(self, agent: Agent, config: WorldModelConfig | None = None) -> None:
        super().__init__()
        self.config = WorldModelConfig() if config is None else config
        self.agent = agent
        self.target = self._copy()

    def _copy(self) -> Agent:
        target = copy.deepcopy(self.agent).requires_grad_(False)
        target.zero_grad()
        return target

    def _fits(self, target: Mapping[str, Tensor]) -> bool:
        """Whether a target network is of the stage that the agent is in."""
        ours, theirs = ({key: value.shape for key, value in each.items()} for each in (self.agent.state_dict(), target))
        return ours == theirs

    def renew_target(self) -> bool:
        """Where the agent went on to another stage, the target network becomes a copy of it; whether it did."""
        if self._fits(self.target.state_dict()):
            return False
        self.target = self._copy()
        return True

    @torch.no_grad()
    def update_target(self) -> None:
        """Let the target network follow. When the agent went on to another stage, it becomes a copy of it."""
        if self.renew_target():
            return
        old = self.target.state_dict()
        for key, value in self.agent.state_dict().items():
            if value.is_floating_point():
                old[key].lerp_(value, self.config.target_momentum)
            else:
                old[key].copy_(value)

    def load_target(self, state: Mapping[str, Tensor]) -> None:
        """Take the target network from a checkpoint, whose agent is loaded already.

        One that is of the stage before the agent's, saved between a switch and the next update, is renewed, as that
        update would do.
        """
        self.target = self._copy()
        if self._fits(state):
            self.target.load_state_dict(state)

    @torch.no_grad()
    def value_targets(self, task: str, segments: Segments) -> Tensor:
        """(B, T) n-step returns with the target network's values."""
        segments = segments.cleared()
        hidden = Hidden(self.target, task, segments)
        values = hidden.part.support.scalar(hidden.part.value_head(hidden.at_observations))
        ends = segments.ends
        over = ends & segments.terminated[:, None]
        return n_step_targets(
            segments.rewards, values[:, 1:], over, ends & ~over, self.config.discount, self.config.n_steps
        )

    def losses(self, task: str, segments: Segments) -> dict[str, Tensor]:
        """``policy``, ``value``, ``reward`` and ``latent``, each the mean over real steps, without coefficients.

        Raises:
            UserError: segments of another task's shape.
        """
        policies = segments.policies.shape[-1]
        if policies != self.agent.part(task).shape.num_actions:
            raise UserError(
                f"task {task!r} has {self.agent.part(task).shape.num_actions} actions, but policies are of {policies}"
            )
        segments = segments.cleared()
        hidden = Hidden(self.agent, task, segments)
        part = hidden.part
        with torch.no_grad():
            next_latents = self.target.part(task).encode(segments.observations[:, 1:])
        log_policy = part.policy_head(hidden.at_observations[:, :-1]).float().log_softmax(-1)
        values = part.value_head(hidden.at_observations)
        steps = {
            "policy": -(segments.policies * log_policy).sum(-1),
            "value": part.support.loss(values[:, :-1], self.value_targets(task, segments)),
            "reward": part.support.loss(part.reward_head(hidden.at_actions), segments.rewards),
            "latent": part.norm.loss(part.next_latent(hidden.at_actions), next_latents),
        }
        real = segments.mask
        losses = {name: loss.where(real, 0).sum() / real.sum() for name, loss in steps.items()}
        over = segments.ends & segments.terminated[:, None]
        nothing = part.support.loss(values[:, 1:], torch.zeros_like(segments.rewards))
        count = real.sum() + over.sum()
        losses["value"] = (losses["value"] * real.sum() + nothing.where(over, 0).sum()) / count
        return losses

    def loss(self, batch: Mapping[str, Segments]) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """The mean over tasks of their losses with coefficients, and the losses of each.

        Raises:
            UserError: no tasks. TrainingError: a loss is not finite; names the task.
        """
        if not batch:
            raise UserError("the batch has no tasks: stop training when all are solved")
        config = self.config
        total, told = [], {}
        for task, segments in batch.items():
            losses = self.losses(task, segments)
            for name, value in losses.items():
                if not bool(value.isfinite()):
                    raise TrainingError(
                        f"task {task!r}: the {name} loss is {value.item()}: lower the learning rate, or check rewards "
                        "and observations"
                    )
            total.append(
                config.policy_coef * losses["policy"]
                + config.value_coef * losses["value"]
                + config.reward_coef * losses["reward"]
                + config.latent_coef * losses["latent"]
            )
            told[task] = {name: value.detach() for name, value in losses.items()}
        return torch.stack(total).mean(), told

    def plan(
        self, task: str, context: Context, config: SearchConfig, noise: np.random.Generator | None = None
    ) -> SearchResult:
        """Search from the newest observations of N trajectories; see :func:`~moelora.rl.search.search`.

        Wrap it in ``staged.at(k)`` to plan with what the trunk was at the end of a stage.
        """
        return search(Imagined(self.agent, task, context), config, noise)


class Imagined:
    """The model of a search: the agent's own predictions from the newest observations of a context."""

    def __init__(self, agent: Agent, task: str, context: Context) -> None:
        self.agent, self.task, self.context = agent, task, context
        self.part = agent.part(task)

    @torch.no_grad()
    def start(self, nodes: int) -> Found:
        """As :class:`~moelora.rl.search.SearchModel`. Sets up the memory: first the context, then two for each node."""
        hidden, memory = self.agent.read(self.task, self.context)
        L, N, H, M, d = memory.keys.shape
        self.first, self.known = M, 1
        room = M + 2 * (nodes - 1)
        self.keys, self.values = (memory.keys.new_zeros(L, N, H, room, d) for _ in range(2))
        self.keys[:, :, :, :M], self.values[:, :, :, :M] = memory.keys, memory.values
        # (N, nodes, room): what each node sees, itself included.
        self.seen = torch.zeros(N, nodes, room, dtype=torch.bool, device=memory.mask.device)
        self.seen[:, 0, :M] = memory.mask
        self.rows = torch.arange(N, device=memory.mask.device)
        return self._found(hidden, np.zeros(N))

    @torch.no_grad()
    def expand(self, parents: Ints, actions: Ints) -> Found:
        """As :class:`~moelora.rl.search.SearchModel`."""
        used = self.first + 2 * (self.known - 1)
        device = self.rows.device
        seen = self.seen[self.rows, torch.from_numpy(parents).to(device)]
        at_action = self._step(self.part.actions(torch.from_numpy(actions).to(device)), seen, used)
        seen[:, used] = True
        at_latent = self._step(self.part.next_latent(at_action), seen, used + 1)
        seen[:, used + 1] = True
        self.seen[:, self.known] = seen
        self.known += 1
        rewards = self.part.support.scalar(self.part.reward_head(at_action))
        return self._found(at_latent, rewards.cpu().numpy())

    def _step(self, token: Tensor, seen: Tensor, used: int) -> Tensor:
        """(N, D) the hidden state at one token (N, D), whose keys and values are kept at ``used``."""
        memory = Memory(self.keys[:, :, :, :used], self.values[:, :, :, :used], seen[:, :used])
        hidden, new = self.agent.trunk(token[:, None], memory=memory)
        self.keys[:, :, :, used : used + 1], self.values[:, :, :, used : used + 1] = new.keys, new.values
        last: Tensor = hidden[:, 0]
        return last

    def _found(self, hidden: Tensor, rewards: np.ndarray) -> Found:
        values = self.part.support.scalar(self.part.value_head(hidden))
        logits = self.part.policy_head(hidden).float()
        return Found(rewards, logits.cpu().numpy(), values.cpu().numpy())
