"""Train a mixture whose routers sample: several selections of experts for one batch, and the surrogate of their losses.

See ``routers/rloo.py`` for the estimator, ``routers/remix.py`` for the method and ``trainers/remix.py`` for a trainer.
Each selection has a seed, or one for each example, from which every router draws its experts; so the same selections
come about one after the other, as copies of the batch in one forward, and in a recomputation.

Shapes: B batch, S sequence, M selections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .losses import Heard
from .model import MoELoRAModel
from .routers import rloo
from .routing import RoutingContext

Seed = int | Sequence[int]


@dataclass(frozen=True)
class Objective:
    """What the selections of a batch are judged by.

    Attributes:
        per_example: see :func:`~moelora.routers.rloo.advantages`.
        weights: (B,) part of each example's loss in the task loss; ``None`` makes that the mean over examples.
        aux_weight: factor of the auxiliary losses, beside their coefficients.
        call: what runs the forward, such as the model within DistributedDataParallel; ``None`` means the model itself.
    """

    per_example: bool = True
    weights: Tensor | None = None
    aux_weight: float | Tensor = 1.0
    call: Callable[..., Any] | None = None


DEFAULT = Objective()


@dataclass(frozen=True)
class PolicyLoss:
    """What several selections made of one batch.

    Attributes:
        surrogate: scalar to minimise, auxiliary losses included; its value is of no meaning.
        losses: (M, B) mean token loss of each example, without graph. log_prob: (M, B) of what was drawn for it.
        aux_total: scalar, the auxiliary losses times their coefficients. aux_losses: each by name, unscaled. Both
            are means over selections, without graph.
    """

    surrogate: Tensor
    losses: Tensor
    log_prob: Tensor
    aux_total: Tensor
    aux_losses: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def spread(self) -> Tensor:
        """Scalar: standard deviation over selections of an example's loss, the signal that the routers learn from."""
        return self.losses.std(dim=0).mean()


@dataclass(frozen=True)
class _Part:
    """One forward of copies of the batch: (M, B) losses and log-probabilities, scalar auxiliary losses."""

    losses: Tensor
    log_prob: Tensor
    aux_total: Tensor
    aux_losses: Mapping[str, Tensor]


def policy_loss(
    model: MoELoRAModel,
    batch: Mapping[str, Any],
    seeds: Sequence[Seed],
    objective: Objective = DEFAULT,
    *,
    batched: bool = False,
) -> PolicyLoss:
    """Loss and surrogate of a batch under M = ``len(seeds)`` selections; call ``surrogate.backward()``.

    An example's loss is the mean over its labelled tokens, and the task loss the weighted sum over examples, averaged
    over selections.

    Args:
        model: in training mode. batch: arguments of the model's call, ``labels`` (B, S) among them.
        seeds: for each selection one, or one for each example; other numbers in every step, and on every rank.
        batched: one forward of M copies of the batch, instead of M forwards. Both hold M graphs at once; see
            :func:`policy_backward` for one at a time. Losses that balance the load of other sites then see all copies
            as one batch.

    Raises:
        ValueError: fewer than two seeds.
        UserError: no router sampled, or sites that share a router decided differently.
    """
    groups = [seeds] if batched else [[seed] for seed in seeds]
    whole = _joined([_select(model, batch, group, objective) for group in groups])
    surrogate = rloo.surrogate(whole.losses, whole.log_prob, objective.per_example, objective.weights)
    return _found(surrogate + objective.aux_weight * whole.aux_total, whole)


def policy_backward(
    model: MoELoRAModel, batch: Mapping[str, Any], seeds: Sequence[Seed], objective: Objective = DEFAULT
) -> PolicyLoss:
    """Add the gradients of :func:`policy_loss` to those of the model, with the memory of a single selection.

    Two forwards and one backward pass for each selection: the first, without graph, tells the losses that all
    selections are compared by. Dropout is the same in both.
    """
    found, parts = policy_parts(model, batch, seeds, objective)
    for part in parts:
        part.backward()
    return found


def policy_parts(
    model: MoELoRAModel, batch: Mapping[str, Any], seeds: Sequence[Seed], objective: Objective = DEFAULT
) -> tuple[PolicyLoss, Iterator[Tensor]]:
    """:func:`policy_backward` for those who call ``backward`` themselves.

    Returns:
        What was found by the forwards without graph, with the value of the surrogate; and M scalars that sum to it,
        each with the graph of its own forward, which runs when the scalar is asked for.
    """
    with torch.no_grad(), _same_randomness(model):
        whole = _joined([_select(model, batch, [seed], objective) for seed in seeds])
    per_example, weights = objective.per_example, objective.weights
    advantages = rloo.advantages(whole.losses, per_example, weights)
    value = rloo.surrogate(whole.losses, whole.log_prob, per_example, weights) + objective.aux_weight * whole.aux_total

    def parts() -> Iterator[Tensor]:
        for advantage_B, seed in zip(advantages, seeds, strict=True):
            own = _select(model, batch, [seed], objective)
            losses_B = own.losses[0]
            loss = losses_B.mean() if weights is None else (losses_B * weights).sum()
            yield (loss + objective.aux_weight * own.aux_total) / len(seeds) + (advantage_B * own.log_prob[0]).sum()

    return _found(value, whole), parts()


def _found(surrogate: Tensor, whole: _Part) -> PolicyLoss:
    losses = {name: value.detach() for name, value in whole.aux_losses.items()}
    return PolicyLoss(surrogate, whole.losses.detach(), whole.log_prob.detach(), whole.aux_total.detach(), losses)


def _joined(parts: Sequence[_Part]) -> _Part:
    """Selections of several forwards together; auxiliary losses are averaged."""
    losses, log_prob = (torch.cat([getattr(part, name) for part in parts]) for name in ("losses", "log_prob"))
    total = torch.stack([part.aux_total for part in parts]).mean()
    named = {name: torch.stack([p.aux_losses[name] for p in parts]).mean() for name in parts[0].aux_losses}
    return _Part(losses, log_prob, total, named)


def _same_randomness(model: MoELoRAModel) -> AbstractContextManager[None]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    return torch.random.fork_rng(devices=list(devices), device_type=kind)


def _select(model: MoELoRAModel, batch: Mapping[str, Any], seeds: Sequence[Seed], objective: Objective) -> _Part:
    """One forward of a copy of the batch for each selection."""
    copies, size = len(seeds), len(batch["labels"])

    def copied(value: Any) -> Any:
        per_example = isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
        return value.repeat(copies, *[1] * (value.dim() - 1)) if per_example else value

    before = model.slot.context
    inputs = {name: getattr(before, name) for name in (*RoutingContext.PER_SEQUENCE, "phase")} | dict(batch)
    inputs = {name: copied(value) for name, value in inputs.items()}
    labels = inputs.pop("labels")
    known = {name: inputs.pop(name) for name in (*RoutingContext.PER_SEQUENCE, "phase")}
    known |= {"selection_seeds": _flat(seeds), "prompt_mask": rloo.before_the_answer(labels)}
    heard: Heard = []
    with model.routing_context(**known):
        with model.slot.using(listener=lambda site, record: heard.append((site, record))):
            output = (objective.call or model)(**inputs, with_log_prob=True)
        named, total = model.aux_losses(heard)
    losses = rloo.example_losses(output["logits"], labels, causal=not model.config.is_encoder_decoder)
    log_prob = output["log_prob"].view(copies, size).to(losses.device)
    return _Part(losses.view(copies, size), log_prob, total.to(losses.device), named)


def _flat(seeds: Sequence[Seed]) -> tuple[int, ...]:
    """One seed for each block of rows: for a copy of the batch, or for each of its examples."""
    return tuple(each for seed in seeds for each in ((seed,) if isinstance(seed, int) else seed))
