"""Build the container that fits a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SiteConfig
from ..routers.base import Router
from ..routing import SiteInfo
from ..slot import RoutingSlot
from .block import BlockContainer
from .container import Container
from .ffn import is_linear, linear_shape, trace_ffn
from .linear import LinearContainer


def build(
    base: nn.Module,
    config: SiteConfig | dict[str, Any],
    *,
    name: str = "",
    layer: int | None = None,
    slot: RoutingSlot | None = None,
    group: int = 0,
    router: Router[Any] | None = None,
    members: Sequence[str] = (),
    hidden_size: int | None = None,
) -> Container:
    """Put experts and a router around ``base``: a linear becomes a linear site, an FFN block a block site.

    The new tensors are float32 on the device of ``base``; where that is ``meta``, on torch's default device. ``base``
    itself is left as it is: freeze it, or not.

    Args:
        config: the site; ``target`` and ``layers`` are of no matter here.
        name, layer: where the container will sit. slot: shared with the other containers of a mixture.
        router: a router that another container has already; by default a new one is made.
        members, hidden_size: as in :class:`~moelora.routing.SiteInfo`.

    Raises:
        ConfigError: the options do not hold together, or ``base`` is neither a linear nor an FFN block.
    """
    if not isinstance(config, SiteConfig):
        config = SiteConfig.parse(config)
    config = config.at(name)
    slot = RoutingSlot() if slot is None else slot
    experts = config.experts
    if is_linear(base):
        widths = linear_shape(base)
        site = SiteInfo(name, layer, *widths, experts.ranks, experts.scales, tuple(members), hidden_size)
        container: Container = LinearContainer(base, config, site, slot, group, router)
    else:
        spec = trace_ffn(base, name)
        width = spec.hidden_size
        site = SiteInfo(name, layer, width, width, experts.ranks, experts.scales, tuple(members), hidden_size)
        container = BlockContainer(base, config, site, slot, group, router, spec)
    device = device_of(base)
    container.experts.to(device)
    if container.router is not None:
        container.router.to(device)
    container.train(base.training)
    return container


def device_of(base: nn.Module) -> torch.device:
    """Where a module's parameters are; torch's default device where it has none, or none with numbers (``meta``)."""
    tensor: Tensor | None = next(base.parameters(), None)
    return torch.get_default_device() if tensor is None or tensor.is_meta else tensor.device
