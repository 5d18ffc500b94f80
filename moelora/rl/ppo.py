"""Proximal policy optimisation on the same agent, as the control of the world model.

Source: PPO (arXiv 1707.06347) with generalised advantage estimation (1506.02438). The policy and the value are those of
the agent at the newest observation of a context; heads of reward and latent are not used. The plain form: the clipped
ratio, advantages normalised within a minibatch of a task, an entropy bonus, and no clipping of the value. The value is
told as a distribution, as in the world model, so its loss is a cross entropy and not a squared error. The loss is the
mean over tasks, each of which is as long in a minibatch as its batch is among the batches.

Shapes: N copies of a task, T steps of each, B = N T.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainingError, UserError
from .agent import Agent, Context
from .model_config import PPOConfig


@dataclass(frozen=True)
class PPOBatch:
    """Steps of one task.

    Attributes:
        context: of B steps. actions: (B,) int64. log_probs: (B,) of the actions, when they were taken.
        advantages, returns: (B,), of :func:`advantages`.
    """

    context: Context
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor

    def at(self, rows: Tensor) -> PPOBatch:
        """Some of the steps."""
        return PPOBatch(
            self.context.at(rows), self.actions[rows], self.log_probs[rows], self.advantages[rows], self.returns[rows]
        )


class Acted(NamedTuple):
    """(N,) actions of one task, their log probabilities, and the values of the newest observations."""

    actions: Tensor
    log_probs: Tensor
    values: Tensor


@torch.no_grad()
def act_together(
    agent: Agent, contexts: Mapping[str, Context], generator: torch.Generator | None = None
) -> dict[str, Acted]:
    """What to do in several tasks, whose tokens go through the trunk in one pass.

    Args:
        contexts: by task; all of the same C. generator: draws the actions, on the device of the agent; without it each
            is the likeliest, as in evaluation.
    """
    read = {task: agent.tokens(task, context) for task, context in contexts.items()}
    tokens, masks = zip(*read.values(), strict=True)
    hidden, _ = agent.trunk(torch.cat(tokens), torch.cat(masks))
    found = {}
    for task, own in zip(read, hidden[:, -1].split([len(each) for each in tokens]), strict=True):
        part = agent.part(task)
        log_probs = part.policy_head(own).float().log_softmax(-1)
        if generator is None:
            actions = log_probs.argmax(-1)
        else:
            actions = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
        chosen = log_probs.gather(-1, actions[:, None])[:, 0]
        found[task] = Acted(actions, chosen, part.support.scalar(part.value_head(own)))
    return found


def act(agent: Agent, task: str, context: Context, generator: torch.Generator | None = None) -> Acted:
    """:func:`act_together` for one task."""
    return act_together(agent, {task: context}, generator)[task]


def advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    config: PPOConfig,
) -> tuple[Tensor, Tensor]:
    """(N, T) generalised advantages, and the returns that values learn: advantage and value.

    Args:
        rewards, values: (N, T). next_values: (N, T) of the observation that followed each step, truly: where an episode
            was truncated that is its last, and not the one after the reset.
        terminated, truncated: (N, T) bool. After the former nothing follows; the latter only cuts the sum.
    """
    errors = rewards + config.discount * next_values.masked_fill(terminated, 0) - values
    going = (~(terminated | truncated)).to(rewards.dtype)
    result = torch.zeros_like(rewards)
    later = torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        later = errors[:, step] + config.discount * config.gae_lambda * going[:, step] * later
        result[:, step] = later
    return result, result + values


def ppo_loss(agent: Agent, task: str, batch: PPOBatch, config: PPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some steps of a task, and its parts: ``policy``, ``value``, ``entropy`` and the share ``clipped``."""
    logits, value_logits = agent.policy_value(task, batch.context)
    log_probs = logits.float().log_softmax(-1)
    ratio = (log_probs.gather(-1, batch.actions[:, None])[:, 0] - batch.log_probs).exp()
    gain = batch.advantages
    if len(gain) > 1:
        gain = (gain - gain.mean()) / (gain.std() + 1e-8)
    policy = -torch.min(ratio * gain, ratio.clamp(1 - config.clip, 1 + config.clip) * gain).mean()
    value = agent.part(task).support.loss(value_logits, batch.returns).mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    parts = {
        "policy": policy.detach(),
        "value": value.detach(),
        "entropy": entropy.detach(),
        "clipped": ((ratio - 1).abs() > config.clip).float().mean(),
    }
    return policy + config.value_coef * value - config.entropy_coef * entropy, parts


def ppo_update(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    batches: Mapping[str, PPOBatch],
    config: PPOConfig,
    generator: torch.Generator | None = None,
) -> dict[str, dict[str, float]]:
    """Some epochs over the batches of all tasks, a step of the optimizer for each minibatch.

    Args:
        generator: shuffles, on the CPU.

    Returns:
        The means of each task's parts of the loss.

    Raises:
        UserError: no tasks. TrainingError: a loss is not finite; names the task, and nothing was stepped for it.
    """
    if not batches:
        raise UserError("there are no tasks to update on: stop training when all are solved")
    told: dict[str, dict[str, list[float]]] = {task: defaultdict(list) for task in batches}
    count = max(math.ceil(len(batch.actions) / config.minibatch) for batch in batches.values())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for _ in range(config.epochs):
        orders = {
            task: torch.randperm(len(batch.actions), generator=generator).tensor_split(count)
            for task, batch in batches.items()
        }
        for number in range(count):
            optimizer.zero_grad()
            for task, batch in batches.items():
                rows = orders[task][number]
                if not len(rows):  # a batch of fewer steps than there are minibatches
                    continue
                loss, parts = ppo_loss(agent, task, batch.at(rows), config)
                if not bool(loss.isfinite()):
                    raise TrainingError(
                        f"task {task!r}: the loss of PPO is {loss.item()}: lower the learning rate, or check rewards"
                    )
                (loss / len(batches)).backward()
                for name, value in parts.items():
                    told[task][name].append(value.item())
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
    return {task: {name: float(np.mean(values)) for name, values in parts.items()} for task, parts in told.items()}
