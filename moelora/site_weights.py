"""The weights of experts that hold for every token: known beforehand, named by the router's source, or a mean.

They are what a mixture is merged with, or exported as one LoRA.

Shapes: E experts, R stacked rank, U weights of a router (E, or R for a router of single ranks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .dispatch.linear import over_ranks
from .errors import ConfigError
from .experts import BlockContainer, Container
from .model import MoELoRAModel
from .modes import evaluation_mode
from .routing import RoutingContext, RoutingRecord, SiteInfo

Batches = list[Mapping[str, Any]]


def context_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the routing context as a forward takes them; a number holds for every sequence."""
    return {name: torch.tensor([value]) if isinstance(value, int) else value for name, value in fields.items()}


@torch.no_grad()
def site_weights(
    model: MoELoRAModel, approximate: bool, batches: Batches, fields: Mapping[str, Any]
) -> tuple[dict[str, Tensor], set[str]]:
    """(U,) weights to merge each site with, by name, run-time factors included; and where merging is exact with them.

    Args:
        approximate, batches: as in :func:`moelora.merging.merge`. fields: as of :func:`context_fields`.

    Raises:
        ConfigError: a site has no such weights and ``approximate`` is not set, there are no batches for its mean, or
            run-time factors stand beside a router that mixes factors.
    """
    containers = model.containers()
    context = replace(model.slot.context, **fields)
    weights, exact = _constant(containers, context)
    unknown = [name for name in containers if name not in exact]
    if unknown and not approximate:
        _refuse_inexact(containers, unknown)
    weights |= _named_weights(containers, unknown, context)
    if missing := [name for name in unknown if name not in weights]:
        weights |= _mean_weights(model, missing, batches, fields)
    return {name: _with_factors(container, weights[name]) for name, container in containers.items()}, exact


def only_one(weights: Tensor) -> bool:
    """Whether one expert has the weight 1 and all others 0."""
    return sorted(weights.tolist()) == [0.0] * (len(weights) - 1) + [1.0]


def _refuse_inexact(containers: Mapping[str, Container], unknown: list[str]) -> None:
    kinds = {router.kind for name in unknown if (router := containers[name].router) is not None}
    blocks = any(isinstance(containers[name], BlockContainer) for name in unknown)
    raise ConfigError(
        f"{len(unknown)} of {len(containers)} sites, {unknown[0]!r} first, cannot be merged exactly: routers "
        f"{sorted(kinds)} weigh experts by the token, or need a field of the context that is not given (task_ids=...)"
        f"{', or mix several experts around the nonlinearity of a block' if blocks else ''}. Pass approximate=True "
        "with batches to merge with mean weights and measure the error"
    )


def _constant(containers: Mapping[str, Container], context: RoutingContext) -> tuple[dict[str, Tensor], set[str]]:
    """Weights of sites by name where they are the same for every token, and the names of sites where that is all."""
    weights: dict[str, Tensor] = {}
    exact: set[str] = set()
    for name, container in containers.items():
        found: Tensor | None = torch.ones(container.site.num_experts)
        if container.router is not None:
            found = container.router.constant_weights(context)
        if found is None:
            continue
        weights[name] = found
        # A block has a nonlinearity between its projections: only one expert with the weight 1 is itself a block.
        if not isinstance(container, BlockContainer) or only_one(found):
            exact.add(name)
    return weights, exact


def _named_weights(containers: Mapping[str, Container], names: list[str], context: RoutingContext) -> dict[str, Tensor]:
    """The weights that routers name for merging where the routing depends on the tokens, by site."""
    weights: dict[str, Tensor] = {}
    for name in names:
        router = containers[name].router
        known = None if router is None else router.approximate_weights(context)
        if known is not None:
            weights[name] = known
    return weights


def _with_factors(container: Container, weights: Tensor) -> Tensor:
    """(U,) weights on the CPU, times the run-time factors of single experts."""
    each = torch.tensor([container.factors.get(expert, 1.0) for expert in range(container.site.num_experts)])
    weights = weights.float().cpu()
    if container.router is not None and container.router.mix == "factors" and bool((each != 1).any()):
        raise ConfigError(
            f"site {container.site.name!r}: its router mixes factors, where expert_scale multiplies B alone and no "
            "weights of experts say that: leave the block of expert_scale first, or set mix to 'outputs'"
        )
    return weights * (each if len(weights) == len(each) else over_ranks(each, container.site.ranks))


def _mean_weights(
    model: MoELoRAModel, names: list[str], batches: Batches, fields: Mapping[str, Any]
) -> dict[str, Tensor]:
    """(U,) mean weights over the real tokens of the batches, by site."""
    if not batches:
        raise ConfigError(f"site {names[0]!r} is merged with its mean weights: pass batches to take the mean over")
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def listener(site: SiteInfo, record: RoutingRecord) -> None:
        rows = record.dense_weights().double().reshape(-1, record.num_experts)
        real = torch.ones_like(rows[:, :1]) if record.mask is None else record.mask.reshape(-1, 1).double()
        sums[site.name] = sums.get(site.name, 0) + (rows * real).sum(0)
        counts[site.name] = counts.get(site.name, 0) + real.sum()

    with model.slot.using(listener=listener):
        run_batches(model, batches, fields)
    if absent := [name for name in names if name not in sums]:
        raise ConfigError(f"no batch reaches the site {absent[0]!r}: give batches that do, or leave the site out")
    return {name: (sums[name] / counts[name]).float().cpu() for name in names}


def run_batches(model: MoELoRAModel, batches: Batches, fields: Mapping[str, Any]) -> None:
    """Run forwards in evaluation mode, for those who listen."""
    with evaluation_mode(model), model.routing_context(**fields):
        for batch in batches:
            model(**batch)
