"""What the two containers share: the frozen base, the router, the slot, and the names of the adapter's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SiteConfig
from ..dispatch.gate import autocasts
from ..errors import ConfigError
from ..registry import EXPERTS, ROUTERS
from ..routers.base import Router
from ..routing import RouteInput, RoutingRecord, SiteInfo
from ..slot import RoutingSlot
from .bank import ExpertBank


class Container(nn.Module):
    """A frozen base layer with a bank of experts and a router in its place in the backbone.

    Attributes:
        base: the layer that was there, untouched; where several adapters are active, it may be the container of
            another, and outside the backbone there is none. experts: the bank, or the banks by projection.
        router: ``None`` for a single expert that is always on; may be one that other containers have as well.
        slot: shared by all containers of a mixture; see :class:`~moelora.routing.RoutingSlot`.
        group: index of the site configuration that this container came from; containers of one group share the
            configuration of their router, and its losses are pooled over them.
    """

    base: nn.Module
    experts: nn.Module
    router: Router[Any] | None

    def __init__(
        self,
        base: nn.Module,
        config: SiteConfig,
        site: SiteInfo,
        slot: RoutingSlot,
        group: int,
        router: Router[Any] | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.site = site
        self.slot = slot
        self.group = group
        if router is None and config.router is not None:
            router = ROUTERS.create(config.router.kind, config.router, site)
        elif router is not None:
            _refuse_unlike(site, router)
        self.router = router

    def new_bank(self, in_features: int, out_features: int, projection: str = "") -> ExpertBank:
        name = f"{self.site.name}.{projection}" if projection else self.site.name
        experts = self.config.experts
        bank: ExpertBank = EXPERTS.create(experts.kind, experts, in_features, out_features, name)
        return bank

    def decide(self, hidden_states: Tensor, activations: Tensor | None = None) -> RoutingRecord | None:
        """Route, and publish the record to whoever listens; ``None`` without a router."""
        if self.router is None:
            return None
        context = self.slot.context.of(hidden_states)
        replay = self.slot.next_replay()
        # Autocast would turn the router's float32 products back into half precision. To switch it off costs as much as
        # several products of one token, so only where it is on.
        device = hidden_states.device.type
        with torch.autocast(device, enabled=False) if autocasts(device) else nullcontext():
            record = self.router.route(RouteInput(hidden_states, activations, context, self.site, replay))
        if (mask := context.mask_of(hidden_states.shape[:-1])) is not None:
            record.mask = mask
        record.owner = self.router.site.name or None
        self.slot.publish(self.site, record)
        return record

    @property
    def active(self) -> bool:
        """Whether the experts take part in this forward; in a scoring pass only those that will be weighed by it do."""
        scores = self.router is not None and self.router.needs_scoring
        return self.slot.enabled and (scores or not self.slot.context.scoring_pass)

    @property
    def factors(self) -> Mapping[int, float]:
        """Run-time factors of single experts; a site without a router has no experts to tell apart."""
        return {} if self.router is None else self.slot.expert_scale

    def banks(self) -> Iterator[ExpertBank]:
        """The expert banks of this site."""
        for module in self.experts.modules():
            if isinstance(module, ExpertBank):
                yield module

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by checkpoint name: ``lora_A``, ``up_proj.lora_B``, ``router.weight``."""
        parts: list[tuple[str, nn.Module]] = [("", self.experts)]
        if self.router is not None:
            parts.append(("router.", self.router))
        return {
            prefix + name: value
            for prefix, module in parts
            for name, value in module.state_dict(keep_vars=True).items()
        }

    def fit_router(self) -> None:
        """Hand the experts to the router; see :meth:`~moelora.routers.Router.fit`.

        Raises:
            ConfigError: a block has several banks.
        """
        banks = list(self.banks())
        assert self.router is not None
        if len(banks) == 1:
            bank = banks[0]
            self.router.fit(bank.down().detach(), bank.up().detach(), bank.ranks)
        elif type(self.router).fit is not Router.fit:
            raise ConfigError(
                f"site {self.site.name!r}: router {self.router.kind!r} follows from the experts of one projection, but "
                f"this block has {len(banks)}: set projections to one of them, or target its linears by name"
            )

    def extra_repr(self) -> str:
        return f"site={self.site.name!r}"


def _refuse_unlike(site: SiteInfo, router: Router[Any]) -> None:
    """Raise where a site cannot use the router of another one."""
    theirs = router.site
    same_width = router.needs_scoring or router.any_width or site.in_features == theirs.in_features
    same_units = site.ranks == theirs.ranks if router.level == "rank" else len(site.ranks) == len(theirs.ranks)
    if not same_width or not same_units:
        raise ConfigError(
            f"site {site.name!r} ({site.in_features} features in, ranks {list(site.ranks)}) cannot share the router of "
            f"{theirs.name!r} ({theirs.in_features}, {list(theirs.ranks)}): name the two in different sites, or set "
            "router.share to 'module'"
        )
