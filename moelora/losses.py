"""Auxiliary losses of a mixture: each group of sites pools the records of one forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from .experts import Container
from .routing import RoutingContext, RoutingRecord, SiteInfo

EXTRAS = ("task_loss", "aux_losses", "aux_share", "aux_loss", "log_prob")
Heard = list[tuple[SiteInfo, RoutingRecord]]


@dataclass(frozen=True)
class StepLoad:
    """Routing totals of a whole optimizer step, measured before its backward passes.

    With them the load-balance loss of an accumulated or data-parallel step is that of one large batch.

    Attributes:
        share: (E,) selections per real token of each site group, over all micro-batches and ranks.
        tokens: real tokens of the step, over all micro-batches and ranks.
    """

    share: Mapping[int, Tensor]
    tokens: float


def aux_losses(
    groups: Mapping[int, list[Container]], heard: Heard, context: RoutingContext, step_load: StepLoad | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Unscaled auxiliary losses by name, and the sum of each times its coefficient.

    With several routed groups a name is preceded by the index of its site configuration, ``sites.1.load_balance``.

    Args:
        groups: containers with a router, by the index of their site configuration.
        heard: the records of one forward, in the order in which they were made; at least one.
    """
    group_of = {container.site.name: index for index, members in groups.items() for container in members}
    records: dict[int, list[RoutingRecord]] = {}
    for site, record in heard:
        records.setdefault(group_of[site.name], []).append(record)
    losses: dict[str, Tensor] = {}
    total = heard[0][1].weights.new_zeros(())
    for index, members in groups.items():
        if index not in records:  # a part of the backbone that this forward did not pass through
            continue
        router = members[0].router
        assert router is not None
        share = None if step_load is None else step_load.share.get(index)
        coefficients = router.config.coefficients()
        with torch.autocast(total.device.type, enabled=False):
            values = router.losses(records[index], replace(context, load_share=share))
        for name, value in values.items():
            losses[name if len(groups) == 1 else f"sites.{index}.{name}"] = value
            if coefficients[name] != 0:
                total = total + coefficients[name] * value.to(total.device)
    return losses, total


def real_tokens(heard: Heard) -> Tensor | float:
    """Number of real tokens of the forward that made these records."""
    record = heard[0][1]
    if record.mask is not None:
        return record.mask.sum()
    return float(record.weights[..., 0].numel())


# torch.compile cannot trace how a class is made: it calls this once, when it compiles.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def output_class(backbone_class: type[ModelOutput]) -> type[ModelOutput]:
    """The class of the backbone's output with fields for the losses: data parallelism builds outputs anew from it."""
    return _extended(backbone_class)


@cache
def _extended(backbone_class: type[ModelOutput]) -> type[ModelOutput]:
    fields = [(name, Any, field(default=None)) for name in EXTRAS]
    namespace = {"__module__": __name__, "__reduce__": lambda self: (_rebuilt, (backbone_class, dict(self)))}
    return make_dataclass(f"Mixture{backbone_class.__name__}", fields, bases=(backbone_class,), namespace=namespace)


def _rebuilt(backbone_class: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    """What a pickled output becomes again; its class exists only where it was made."""
    return _extended(backbone_class)(**values)
