"""A mixture without its backbone: its experts by the linear that they belong to, and weights that hold for all tokens.

Shapes: O out, D in, E experts, R stacked rank, U weights of a router (E, or R for a router of single ranks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoints
from ..checkpoints import Architecture
from ..checkpoints.layout import Content
from ..config import SiteConfig
from ..errors import ConfigError
from ..experts import ExpertBank
from ..experts.frozen import FrozenConfig
from ..experts.staged import StagedExperts
from ..model import MoELoRAModel
from ..registry import EXPERTS, ROUTERS
from ..routers.base import Router
from ..routing import RoutingContext, SiteInfo
from ..sites import layer_of, sharing_key


@dataclass(frozen=True)
class Site:
    """One site of a mixture.

    Attributes:
        path: of the linear or the block. config: of the site, without patterns. banks: by the path of the linear.
        router: ``None`` where the weights of the experts depend on the tokens, whatever the context, and where there is
            none. group: index of the site configuration.
    """

    path: str
    config: SiteConfig
    banks: Mapping[str, ExpertBank]
    router: Router[Any] | None
    group: int

    @property
    def is_block(self) -> bool:
        """Whether there is a nonlinearity between its linears."""
        return list(self.banks) != [self.path]

    @property
    def mixes_factors(self) -> bool:
        """Whether weights mix the factors of experts instead of what they add."""
        router = self.config.router
        return router is not None and router.to_dict().get("mix") == "factors"

    def constant_weights(self, context: RoutingContext) -> Tensor | None:
        """(U,) float32 the weights of every token, or ``None`` where tokens differ."""
        if self.config.router is None:
            return torch.ones(self.config.experts.num_experts)
        return None if self.router is None else self.router.constant_weights(context)


@dataclass(frozen=True)
class Detached:
    """A mixture without its backbone.

    Attributes:
        source: what messages and cards call it. layout: in which it was stored, or ``"memory"``.
        saved: tensors of the modules that are saved whole. has_backbone: its backbone lies in the same files.
    """

    source: str
    layout: str
    content: Content
    sites: list[Site]
    saved: Mapping[str, Tensor]
    has_backbone: bool = False

    @property
    def num_experts(self) -> int:
        """The most that a site has."""
        return max(int(site.config.experts.num_experts) for site in self.sites)

    def names(self) -> list[str]:
        """What the experts are called: by the adapters that they come from, or else ``expert_00`` and so on."""
        for site in self.sites:
            experts = site.config.experts
            if isinstance(experts, FrozenConfig) and experts.names and len(experts.names) == self.num_experts:
                return list(experts.names)
        return [f"expert_{index:02}" for index in range(self.num_experts)]


def detach(source: MoELoRAModel | str | Path, **hub: Any) -> Detached:
    """Take a mixture apart, from a checkpoint in any layout or from a model, which stays as it is.

    Args:
        **hub: as in :func:`moelora.from_pretrained`, for a path.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: several adapters are active in the model.
    """
    inside = False
    if isinstance(source, MoELoRAModel):
        content, name, layout = _content(source), "a model in memory", "memory"
    else:
        stored = checkpoints.read(source, **hub)
        tensors = stored.tensors(stored.declared())
        content = Content(stored.backbone, stored.architecture, stored.mixture, stored.sites(), tensors)
        local = Path(source).expanduser()
        # A card is made to be published: it does not say where on this machine the mixture lies.
        name, layout = local.resolve().name if local.exists() else str(source), stored.layout
        inside = Path(stored.backbone.name).expanduser().resolve() == stored.folder.resolve()
    by_site: dict[str, dict[str, Tensor]] = {path: {} for paths in content.sites for path in paths}
    saved: dict[str, Tensor] = {}
    for key, value in content.tensors.items():
        owner = key
        while owner and owner not in by_site:
            owner = owner.rpartition(".")[0]
        (by_site[owner] if owner else saved)[key.removeprefix(f"{owner}.")] = value
    sites = [
        site
        for group, (config, paths) in enumerate(zip(content.mixture.sites, content.sites, strict=True))
        for site in _group(group, config, list(paths), by_site, content.architecture.hidden_size)
    ]
    return Detached(name, layout, content, sites, saved, inside)


def _content(model: MoELoRAModel) -> Content:
    """What a checkpoint of the model's active adapter would hold."""
    name = model.active_adapter
    groups: list[list[str]] = [[] for _ in model.mixture.sites]
    for container in model.containers().values():
        groups[container.group].append(container.site.path)
    tensors = {key: value.cpu() for key, value in model.adapter_state(None, name).items()}
    return Content(model.backbone_config, Architecture.of(model.config), model.mixture, groups, tensors)


def _group(
    group: int, config: SiteConfig, paths: list[str], tensors: Mapping[str, Mapping[str, Tensor]], width: int | None
) -> list[Site]:
    """The sites of one site configuration."""
    share = "module" if config.router is None else config.router.share
    routers: dict[str, Router[Any] | None] = {}
    sites = []
    for path in paths:
        site, own = config.at(path), tensors[path]
        banks = _banks(path, site, {key: value for key, value in own.items() if not key.startswith("router.")})
        key = sharing_key(path, share)
        if key not in routers:
            members = tuple(other for other in paths if sharing_key(other, share) == key)
            routers[key] = _router(path, site, banks, members, own, width)
        sites.append(Site(path, site, banks, routers[key], group))
    return sites


def _banks(path: str, site: SiteConfig, tensors: Mapping[str, Tensor]) -> dict[str, ExpertBank]:
    """The expert banks of a site, by the path of the linear."""
    parts: dict[str, dict[str, Tensor]] = {}
    linear_site = "lora_A" in tensors
    for key, value in tensors.items():
        projection, _, name = ("", "", key) if linear_site else key.partition(".")
        parts.setdefault(projection, {})[name] = value
    banks = {}
    for projection, own in parts.items():
        linear = f"{path}.{projection.replace('__', '.')}" if projection else path
        experts = site.experts
        bank: ExpertBank = EXPERTS.create(experts.kind, experts, own["lora_A"].shape[1], own["lora_B"].shape[0], linear)
        bank.load_state_dict(own, assign=True)
        if not bank.mergeable:
            raise ConfigError(f"{linear}: what experts of kind {experts.kind!r} add is no matrix, so it is no LoRA")
        if isinstance(bank, StagedExperts) and bank.rescales:
            raise ConfigError(
                f"{linear}: policy {experts.policy!r} of experts {experts.kind!r} scales the frozen weight as well, "
                "which no LoRA does: merge the model instead"
            )
        banks[linear] = bank.requires_grad_(False)
    return banks


def _router(
    path: str,
    site: SiteConfig,
    banks: Mapping[str, ExpertBank],
    members: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    width: int | None,
) -> Router[Any] | None:
    """The router of a site, if there is a context in which its weights are the same for all tokens."""
    if site.router is None or ROUTERS.get(site.router.kind).constant_weights is Router.constant_weights:
        return None
    first = next(iter(banks.values()))
    features = first.down().shape[1], first.up().shape[0]
    if list(banks) != [path] and width is not None:
        features = width, width
    experts = site.experts
    info = SiteInfo(path, layer_of(path), *features, experts.ranks, experts.scales, members, width)
    router: Router[Any] = ROUTERS.create(site.router.kind, site.router, info)
    own = {key.removeprefix("router."): value for key, value in tensors.items() if key.startswith("router.")}
    router.load_state_dict(own)
    return router.requires_grad_(False).eval()
