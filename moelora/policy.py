"""Train a mixture whose routers sample: several selections of experts for one batch, and the surrogate of their losses.

See ``routers/rloo.py`` for the estimator and ``routers/remix.py`` for the method. Each selection has a seed, from which
every router draws its experts; so the same selections come about one after the other, as copies of the batch in one
forward, and in a recomputation.

Shapes: B batch, S sequence, M selections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .losses import Heard
from .model import MoELoRAModel
from .routers import rloo
from .routing import RoutingContext


@dataclass(frozen=True)
class PolicyLoss:
    """What several selections made of one batch.

    Attributes:
        surrogate: scalar to minimise, auxiliary losses included; its value is of no meaning.
        losses: (M, B) mean token loss of each example, without graph. log_prob: (M, B) of what was drawn for it.
    """

    surrogate: Tensor
    losses: Tensor
    log_prob: Tensor

    @property
    def spread(self) -> Tensor:
        """Scalar: standard deviation over selections of an example's loss, the signal that the routers learn from."""
        return self.losses.std(dim=0).mean()


def policy_loss(
    model: MoELoRAModel,
    batch: Mapping[str, Any],
    seeds: Sequence[int],
    *,
    batched: bool = False,
    per_example: bool = True,
) -> PolicyLoss:
    """Loss and surrogate of a batch under M = ``len(seeds)`` selections; call ``surrogate.backward()``.

    An example's loss is the mean over its labelled tokens, and the task loss the mean over examples and selections.

    Args:
        model: in training mode. batch: arguments of the model's call, ``labels`` (B, S) among them.
        seeds: one for each selection; other numbers in every step, and on every rank.
        batched: one forward of M copies of the batch, instead of M forwards. Both hold M graphs at once; see
            :func:`policy_backward` for one at a time.
        per_example: see :func:`~moelora.routers.rloo.advantages`.

    Raises:
        ValueError: fewer than two seeds.
        UserError: no router sampled, or sites that share a router decided differently.
    """
    groups = [seeds] if batched else [[seed] for seed in seeds]
    parts = [_select(model, batch, group) for group in groups]
    losses, log_prob, aux = (torch.cat(values) for values in zip(*parts, strict=True))
    surrogate = rloo.surrogate(losses, log_prob, per_example) + aux.mean()
    return PolicyLoss(surrogate, losses.detach(), log_prob.detach())


def policy_backward(
    model: MoELoRAModel, batch: Mapping[str, Any], seeds: Sequence[int], *, per_example: bool = True
) -> PolicyLoss:
    """Add the gradients of :func:`policy_loss` to those of the model, with the memory of a single selection.

    Two forwards and one backward pass for each selection: the first, without graph, tells the losses that all
    selections are compared by. Dropout is the same in both.
    """
    with torch.no_grad(), torch.random.fork_rng():
        losses, log_prob, _ = (torch.cat(v) for v in zip(*(_select(model, batch, [s]) for s in seeds), strict=True))
    advantages = rloo.advantages(losses, per_example)
    value = losses.new_zeros(())
    for advantage, seed in zip(advantages, seeds, strict=True):
        own, chance, aux = _select(model, batch, [seed])
        part = (own.mean() + aux.mean()) / len(seeds) + (advantage * chance).sum()
        part.backward()
        value = value + part.detach()
    return PolicyLoss(value, losses, log_prob)


def _select(model: MoELoRAModel, batch: Mapping[str, Any], seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(M, B) losses, (M, B) log-probabilities and (1,) auxiliary losses of one forward of M copies of the batch."""
    copies, size = len(seeds), len(batch["labels"])

    def copied(value: Any) -> Any:
        per_example = isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
        return value.repeat(copies, *[1] * (value.dim() - 1)) if per_example else value

    before = model.slot.context
    inputs = {name: getattr(before, name) for name in (*RoutingContext.PER_SEQUENCE, "phase")} | dict(batch)
    inputs = {name: copied(value) for name, value in inputs.items()}
    labels = inputs.pop("labels")
    known = {name: inputs.pop(name) for name in (*RoutingContext.PER_SEQUENCE, "phase")}
    known |= {"selection_seeds": tuple(seeds), "prompt_mask": rloo.before_the_answer(labels)}
    heard: Heard = []
    with model.routing_context(**known):
        with model.slot.using(listener=lambda site, record: heard.append((site, record))):
            logits = model(**inputs).logits
        log_prob = rloo.example_log_prob((record for _, record in heard), copies * size)
        aux = model.aux_losses(heard)[1]
    losses = rloo.example_losses(logits, labels, causal=not model.config.is_encoder_decoder)
    return losses.view(copies, size), log_prob.view(copies, size).to(losses.device), aux.reshape(1).to(losses.device)
