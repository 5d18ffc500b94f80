"""What acts: a trunk that all tasks share, and an encoder, an embedding of actions and heads for each of them.

Source: UniZero (arXiv 2406.10667) and ScaleZero (arXiv 2509.07945), whose heads are not shared between tasks and whose
trunk is told nothing of the task. A trajectory is read as the tokens z_0 a_0 z_1 a_1 ..., with z the latent of an
observation. The hidden state at z_t tells policy and value, that at a_t the reward and the next latent.

Where the papers leave the small networks open, they are plain: for vectors a perceptron of one hidden layer, for frames
the three convolutions of DQN (Nature 2015), for each head a perceptron of one hidden layer whose last linear starts at
zero, so that a fresh agent acts at random and expects nothing. Scalars are told as in MuZero (1911.08265, appendix F):
h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x, as a distribution over whole numbers, two of which share each target.

Shapes: N trajectories, C observations of each, D dim, A actions, U values of the support.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, UserError
from ..registry import closest
from .model_config import AgentConfig
from .trunk import Memory, Trunk

_CURVE = 0.001


@dataclass(frozen=True)
class TaskShape:
    """What the agent has to know of a task.

    Attributes:
        observation_shape: ``(numbers,)`` of a vector, or ``(channels, height, width)`` of frames, 36 pixels or more
            each way.
        num_actions: of its discrete actions.
    """

    observation_shape: tuple[int, ...]
    num_actions: int


@dataclass(frozen=True)
class Context:
    """The last observations of N trajectories, the newest last.

    Attributes:
        observations: (N, C, ...) float32. actions: (N, C - 1) int64, those between them.
        mask: (N, C) bool, false for what lies before the start of an episode; the newest is always real.
    """

    observations: Tensor
    actions: Tensor
    mask: Tensor

    def at(self, rows: Tensor | slice) -> Context:
        """Some of the trajectories."""
        return Context(self.observations[rows], self.actions[rows], self.mask[rows])

    @classmethod
    def of(cls, observations: Tensor) -> Context:
        """Of observations (N, ...) without any past."""
        N = len(observations)
        device = observations.device
        actions = torch.zeros(N, 0, dtype=torch.int64, device=device)
        return cls(observations[:, None], actions, torch.ones(N, 1, dtype=torch.bool, device=device))


class Support(nn.Module):
    """Scalars as distributions over the whole numbers from ``-size`` to ``size``, after h."""

    points: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("points", torch.arange(-size, size + 1.0), persistent=False)

    def scalar(self, logits: Tensor) -> Tensor:
        """(...) expected values of ``logits`` (..., U), float32."""
        x = (logits.float().softmax(-1) * self.points).sum(-1)
        root = (torch.sqrt(1 + 4 * _CURVE * (x.abs() + 1 + _CURVE)) - 1) / (2 * _CURVE)
        return x.sign() * (root**2 - 1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """(...) cross entropy of ``logits`` (..., U) against scalars ``target`` (...), cut to the ends."""
        x = target.sign() * (torch.sqrt(target.abs() + 1) - 1) + _CURVE * target
        x = x.clamp(-self.size, self.size)
        share = x - x.floor()
        low = x.nan_to_num().floor().long() + self.size  # a target that is no number makes a loss that is none
        log_probs = logits.float().log_softmax(-1)
        lower = log_probs.gather(-1, low[..., None])[..., 0]
        upper = log_probs.gather(-1, (low + 1).clamp(max=2 * self.size)[..., None])[..., 0]
        return -((1 - share) * lower + share * upper)


class LatentNorm(nn.Module):
    """SimNorm, a softmax within each group of numbers, or LayerNorm without parameters."""

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.group_size = config.group_size if config.latent_norm == "simnorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.group_size is None:
            return F.layer_norm(x, x.shape[-1:])
        normed: Tensor = x.unflatten(-1, (-1, self.group_size)).softmax(-1).flatten(-2)
        return normed

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """(...) how far latents (..., D) are from their targets.

        With SimNorm the Kullback-Leibler divergence of a group, UniZero's ``group_kl``, with LayerNorm the squared
        difference, ``mse``; the mean over groups, or over numbers.
        """
        if self.group_size is None:
            return (predicted - target).square().mean(-1)
        groups = (-1, self.group_size)
        predicted, target = predicted.unflatten(-1, groups), target.unflatten(-1, groups)
        floor = torch.finfo(predicted.dtype).tiny
        excess: Tensor = target * (target.clamp(min=floor).log() - predicted.clamp(min=floor).log())
        return excess.sum(-1).mean(-1)


def _perceptron(inputs: int, inner: int, outputs: int, *, silent: bool) -> nn.Sequential:
    """A hidden layer with norm; ``silent`` starts it at zero."""
    last = nn.Linear(inner, outputs)
    if silent:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, inner), nn.LayerNorm(inner), nn.GELU(), last)


def _encoder(shape: TaskShape, config: AgentConfig) -> nn.Module:
    sizes, dim = shape.observation_shape, config.trunk.dim
    if len(sizes) == 1:
        return _perceptron(sizes[0], config.head_dim, dim, silent=False)
    convolutions = nn.Sequential(
        nn.Conv2d(sizes[0], 32, 8, stride=4), nn.GELU(), nn.Conv2d(32, 64, 4, stride=2), nn.GELU(), nn.Conv2d(64, 64, 3)
    )
    height, width = (((size - 4) // 4 - 2) // 2 - 2 for size in sizes[1:])
    return nn.Sequential(convolutions, nn.GELU(), nn.Flatten(), nn.Linear(64 * height * width, dim))


class TaskPart(nn.Module):
    """What one task has of its own."""

    def __init__(self, shape: TaskShape, config: AgentConfig) -> None:
        super().__init__()
        dim, inner, scalar = config.trunk.dim, config.head_dim, 2 * config.support + 1
        self.shape = shape
        self.support = Support(config.support)
        self.norm = LatentNorm(config)
        self.encoder = _encoder(shape, config)
        self.actions = nn.Embedding(shape.num_actions, dim)
        nn.init.normal_(self.actions.weight, std=1 / math.sqrt(dim))
        self.policy_head = _perceptron(dim, inner, shape.num_actions, silent=True)
        self.value_head = _perceptron(dim, inner, scalar, silent=True)
        self.reward_head = _perceptron(dim, inner, scalar, silent=True)
        self.latent_head = _perceptron(dim, inner, dim, silent=False)

    def encode(self, observations: Tensor) -> Tensor:
        """(..., D) latents of observations (..., *observation_shape).

        Raises:
            UserError: they are of another shape.
        """
        count = len(self.shape.observation_shape)
        if observations.shape[-count:] != self.shape.observation_shape:
            raise UserError(
                f"observations of shape {tuple(observations.shape)} do not end in {self.shape.observation_shape}, the "
                "observation_shape of the task: give those of this task"
            )
        flat = observations.reshape(-1, *self.shape.observation_shape)
        latents: Tensor = self.norm(self.encoder(flat))
        return latents.reshape(*observations.shape[:-count], -1)

    def next_latent(self, hidden: Tensor) -> Tensor:
        """(..., D) the latent that follows an action, from the hidden state at it."""
        return cast(Tensor, self.norm(self.latent_head(hidden)))


class Agent(nn.Module):
    """The trunk and the parts of all tasks.

    Args:
        tasks: by name: :class:`TaskShape`, or the pair of its numbers. A name has no dot.

    Attributes:
        trunk: put stages on it. parts: :class:`TaskPart` by name, outside of the trunk.

    Raises:
        ConfigError: no tasks, a name with a dot, or a shape that no encoder is for.
    """

    def __init__(
        self, tasks: Mapping[str, TaskShape | tuple[tuple[int, ...], int]], config: AgentConfig | None = None
    ) -> None:
        super().__init__()
        self.config = AgentConfig() if config is None else config
        if not tasks:
            raise ConfigError("tasks is empty: name at least one")
        self.trunk = Trunk(self.config.trunk)
        self.parts = nn.ModuleDict()
        for name, shape in tasks.items():
            shape = shape if isinstance(shape, TaskShape) else TaskShape(*shape)
            _check(name, shape)
            self.parts[name] = TaskPart(shape, self.config)

    def part(self, task: str) -> TaskPart:
        """What a task has of its own.

        Raises:
            UserError: no such task.
        """
        if task not in self.parts:
            known = list(self.parts)
            raise UserError(f"task {task!r}: there are {', '.join(known)}{closest(task, known)}")
        return cast(TaskPart, self.parts[task])

    def freeze_task(self, task: str) -> None:
        """Train the task's own part no more, as when it is solved. Its gradients are dropped as well, so that an
        optimizer leaves it alone.
        """
        for parameter in self.part(task).parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    def thaw_task(self, task: str) -> None:
        """Train the task's own part again, as when it is opened anew."""
        self.part(task).requires_grad_(True)

    def copy_task(self, task: str) -> TaskPart:
        """A frozen copy of the task's own part as it is now; assign it to ``parts[task]`` to act with it."""
        return copy.deepcopy(self.part(task)).requires_grad_(False)

    def tokens(self, task: str, context: Context) -> tuple[Tensor, Tensor]:
        """(N, 2 C - 1, D) tokens of a context, and (N, 2 C - 1) bool which of them are real."""
        part = self.part(task)
        N, C = context.mask.shape
        latents = part.encode(context.observations)
        tokens = latents.new_empty(N, 2 * C - 1, latents.shape[-1])
        tokens[:, ::2], tokens[:, 1::2] = latents, part.actions(context.actions)
        mask = context.mask.repeat_interleave(2, dim=1)[:, :-1]  # an action is as real as the observation before it
        return tokens, mask

    def read(self, task: str, context: Context) -> tuple[Tensor, Memory]:
        """(N, D) hidden states at the newest observations, and the memory of all tokens."""
        hidden, memory = self.trunk(*self.tokens(task, context))
        return hidden[:, -1], memory

    def policy_value(self, task: str, context: Context) -> tuple[Tensor, Tensor]:
        """(N, A) logits of the policy and (N, U) of the value, at the newest observations."""
        hidden, _ = self.read(task, context)
        part = self.part(task)
        return part.policy_head(hidden), part.value_head(hidden)


class Window:
    """Keeps the last C observations of N copies of a task, which is what one acts upon.

    Push once for each step: the observations to act upon, what was done before them, and which copies were reset.
    """

    def __init__(self, copies: int, length: int, observation_shape: tuple[int, ...]) -> None:
        self.observations = torch.zeros(copies, length, *observation_shape)
        self.actions = torch.zeros(copies, length - 1, dtype=torch.int64)
        self.mask = torch.zeros(copies, length, dtype=torch.bool)

    def push(self, observations: Tensor, actions: Tensor | None = None, reset: Tensor | None = None) -> Context:
        """The context with the newest observations, which is kept. Arguments as in :meth:`look`."""
        context = self.look(observations, actions, reset)
        self.observations, self.actions, self.mask = context.observations, context.actions, context.mask
        return context

    def look(self, observations: Tensor, actions: Tensor | None = None, reset: Tensor | None = None) -> Context:
        """The context with the newest observations, which is not kept: so the last ones of an episode are looked at.

        Args:
            observations: (N, ...). actions: (N,), that led to them; ``None`` at the start of all.
            reset: (N,) bool, which observations are the first of an episode; all are at the start.
        """
        before = torch.zeros_like(self.mask[:, 1:]) if actions is None else self.mask[:, 1:]
        if reset is not None:
            before = before & ~reset[:, None]
        mask = torch.cat([before, torch.ones_like(self.mask[:, :1])], dim=1)
        newest = observations.to(self.observations)[:, None]
        led = self.actions
        if actions is not None:
            led = torch.cat([led, actions.to(led)[:, None]], dim=1)[:, 1:]
        return Context(torch.cat([self.observations[:, 1:], newest], dim=1), led, mask)

    def state_dict(self) -> dict[str, Tensor]:
        """All that it keeps."""
        return {"observations": self.observations, "actions": self.actions, "mask": self.mask}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what another kept."""
        self.observations, self.actions, self.mask = state["observations"], state["actions"], state["mask"]


def _check(name: str, shape: TaskShape) -> None:
    if not name or "." in name:
        raise ConfigError(f"task {name!r}: parameters are named after it, so it needs a name without dots")
    sizes = shape.observation_shape
    if len(sizes) not in (1, 3) or min(sizes) < 1 or (len(sizes) == 3 and min(sizes[1:]) < 36):
        raise ConfigError(
            f"task {name!r}: observation_shape {sizes} is neither (numbers,) nor (channels, height, width) of 36 "
            "pixels or more: flatten, or enlarge it"
        )
    if shape.num_actions < 1:
        raise ConfigError(f"task {name!r}: num_actions {shape.num_actions}, expected 1 or more: discretise its actions")
