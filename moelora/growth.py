"""Continual learning: one more task for the banks that grow, and the model as it was at the end of an older stage."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from .config import SiteConfig
from .errors import ConfigError
from .experts.staged import StagedExperts, showing
from .model import MoELoRAModel

logger = logging.getLogger(__name__)


def begin_task(model: MoELoRAModel) -> None:
    """Freeze the experts of the growing banks (kinds ``rank1`` and ``staged``) and add fresh ones for the next task.

    Parameters are replaced, so make a new optimizer, or a new Trainer, afterwards. Everything that tells how many
    experts there are follows, and the model is saved and loaded as any other. An error leaves the model as it was.

    Raises:
        ConfigError: no bank grows, its router has tensors that were made for the experts there are, or several adapters
            are active.
    """
    adapter = model.active_adapter
    growing = {
        name: container
        for name, container in model.containers().items()
        if any(bank.grows for bank in container.banks())
    }
    if not growing:
        kinds = sorted({site.experts.kind for site in model.mixture.sites})
        raise ConfigError(
            f"no experts of this mixture grow (they are of kind {', '.join(kinds)}): take kind 'rank1' or 'staged'"
        )
    for name, container in growing.items():
        if container.router is not None and container.router.state_dict():
            raise ConfigError(
                f"site {name!r}: router {container.router.kind!r} has tensors for the experts there are, so they "
                "cannot become more: take router 'moram', 'mask', or 'static' with weights 'ones'"
            )
    sites = list(model.mixture.sites)
    for group in sorted({container.group for container in growing.values()}):
        site = sites[group]
        sites[group] = SiteConfig.parse({**site.to_dict(), "experts": site.experts.next_task()})
    grown: set[int] = set()  # a router that sites share grows once
    for container in growing.values():
        config = container.config = sites[container.group].at(container.site.path)
        changed = {"ranks": config.experts.ranks, "scales": config.experts.scales}
        container.site = replace(container.site, **changed)
        if container.router is not None and id(container.router) not in grown:
            container.router.grow(config.experts.ranks, config.experts.scales)
            grown.add(id(container.router))
        for bank in container.banks():
            bank.begin_task(config.experts)
    model.mixture = model.mixture.model_copy(update={"sites": sites})
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    done = "a new task of adapter %r at %d sites: %d parameters are trainable; make a new optimizer"
    logger.info(done, adapter, len(growing), count)


def staged_banks(model: MoELoRAModel) -> list[StagedExperts]:
    """The experts of kind ``staged``, of all sites."""
    return [bank for each in model.containers().values() for bank in each.banks() if isinstance(bank, StagedExperts)]


@contextmanager
def at_stage(model: MoELoRAModel, stage: int) -> Iterator[None]:
    """Within the block the experts of kind ``staged`` are what they were at the end of a stage, bit for bit.

    It holds for the whole model where nothing else was trained since: other experts, or modules that are saved whole.

    Args:
        stage: 0 for the backbone, k for the end of the k-th task; the newest is as it is now.

    Raises:
        ConfigError: the model has no such experts.
        UserError: no such stage.
    """
    banks = staged_banks(model)
    if not banks:
        kinds = sorted({site.experts.kind for site in model.mixture.sites})
        raise ConfigError(
            f"no experts of this mixture have stages (they are of kind {', '.join(kinds)}): take 'staged'"
        )
    with showing(banks, stage):
        yield
