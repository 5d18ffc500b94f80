"""The parts of a mixture, built for a backbone and not yet in it: containers, and modules that are trained whole."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .config import MixtureConfig, SiteConfig
from .experts import Container, SavedModule, build
from .routers.base import Router
from .scoring import refuse_unscorable
from .sites import (
    layer_of,
    match_saved,
    match_sites,
    refuse_idle_patterns,
    refuse_overlaps,
    refuse_twins,
    sharing_key,
)
from .slot import RoutingSlot

Part = Container | SavedModule


def build_parts(backbone: PreTrainedModel, mixture: MixtureConfig, slot: RoutingSlot) -> dict[str, Part]:
    """All parts of a mixture by the path where each belongs: containers in the order of the backbone, then modules.

    Args:
        backbone: without experts; it is left as it is. slot: the parts share it.

    Raises:
        ConfigError: a target matches nothing, a module is claimed twice or sits at two places, or a matched module
            cannot carry experts.
    """
    refuse_unscorable(backbone, mixture)
    matched = [match_sites(backbone, site) for site in mixture.sites]
    for site, paths in zip(mixture.sites, matched, strict=True):
        refuse_idle_patterns(site, paths)
    whole = match_saved(backbone, mixture.modules_to_save)
    refuse_overlaps({f"sites.{i}": paths for i, paths in enumerate(matched)} | {"modules_to_save": whole})
    refuse_twins(backbone, [path for paths in (*matched, whole) for path in paths])
    containers: dict[str, Container] = {}
    for group, (site, paths) in enumerate(zip(mixture.sites, matched, strict=True)):
        containers.update(_build_group(backbone, site, paths, slot, group))
    parts: dict[str, Part] = {path: containers[path] for path, _ in backbone.named_modules() if path in containers}
    return parts | {path: SavedModule(backbone.get_submodule(path), path, slot) for path in whole}


def _build_group(
    backbone: PreTrainedModel, site: SiteConfig, paths: list[str], slot: RoutingSlot, group: int
) -> dict[str, Container]:
    """The containers of one site configuration, by path; those that share a router are told of each other."""
    share = "module" if site.router is None else site.router.share
    shared = {path: sharing_key(path, share) for path in paths}
    routers: dict[str, Router[Any]] = {}
    containers: dict[str, Container] = {}
    for path in paths:
        key = shared[path]
        container = build(
            backbone.get_submodule(path),
            site,
            name=path,
            layer=layer_of(path),
            slot=slot,
            group=group,
            router=routers.get(key),
            members=[other for other in paths if shared[other] == key],
            hidden_size=getattr(backbone.config.get_text_config(), "hidden_size", None),
        )
        if container.router is not None:
            routers[key] = container.router
        containers[path] = container
    return containers
