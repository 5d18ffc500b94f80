"""A mixture from a backbone and a configuration, or from a checkpoint; and the tape of what it decides."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from .config import BackboneConfig, MixtureConfig, Recipe, SiteConfig, load_recipe
from .errors import ConfigError
from .experts import Container, SavedModule, build
from .losses import StepLoad as StepLoad
from .model import MoELoRAModel as MoELoRAModel
from .routers.base import Router
from .routing import RoutingRecord, SiteInfo, Tape
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

if TYPE_CHECKING:
    from .checkpoints import Stored

logger = logging.getLogger(__name__)


def attach(backbone: PreTrainedModel, mixture: MixtureConfig | Recipe | Mapping[str, Any] | str | Path) -> MoELoRAModel:
    """Freeze ``backbone`` and put containers at the sites that ``mixture`` names. Changes ``backbone`` in place.

    All of it is frozen, the head of a classifier too: name that in ``modules_to_save`` to train and save it.

    Args:
        mixture: a configuration, a mapping, a recipe, a model card's name, or the path of a recipe.

    Raises:
        ConfigError: a target matches nothing, a module is claimed twice or sits at two places, a matched module cannot
            carry experts, or the backbone carries some already; the backbone is then as it was.
    """
    if isinstance(mixture, str | Path):
        mixture = load_recipe(mixture)
    if isinstance(mixture, Recipe):
        mixture = mixture.mixture
    config = mixture if isinstance(mixture, MixtureConfig) else MixtureConfig.parse(mixture)
    if not isinstance(backbone, PreTrainedModel):
        raise ConfigError(
            f"attach takes a transformers model, got {type(backbone).__name__}; for another module build containers "
            "one by one with moelora.experts.build"
        )
    taken = next((name for name, module in backbone.named_modules() if isinstance(module, Container)), None)
    if taken is not None:
        raise ConfigError(
            f"this {type(backbone).__name__} already carries experts (at {taken!r}): call unload() of its mixture "
            "first, or name all sites in one mixture"
        )
    refuse_unscorable(backbone, config)
    matched = [match_sites(backbone, site) for site in config.sites]
    for site, paths in zip(config.sites, matched, strict=True):
        refuse_idle_patterns(site, paths)
    whole = match_saved(backbone, config.modules_to_save)
    refuse_overlaps({f"sites.{i}": paths for i, paths in enumerate(matched)} | {"modules_to_save": whole})
    refuse_twins(backbone, [path for paths in (*matched, whole) for path in paths])
    slot = RoutingSlot()
    # All are built before the first is put in place, so that an error leaves the backbone as it was.
    parts: dict[str, Container | SavedModule] = {}
    for group, (site, paths) in enumerate(zip(config.sites, matched, strict=True)):
        parts.update(_build_group(backbone, site, paths, slot, group))
    for path in whole:
        parts[path] = SavedModule(backbone.get_submodule(path), path, slot)
    backbone.requires_grad_(False)
    for path, part in parts.items():
        parent, _, child = path.rpartition(".")
        setattr(backbone.get_submodule(parent), child, part)
    return MoELoRAModel(backbone, config, slot)


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


def from_pretrained(
    path: str | Path,
    backbone: PreTrainedModel | str | None = None,
    quantization: str | None = None,
    dtype: str | None = None,
    device_map: Any = None,
    **hub: Any,
) -> MoELoRAModel:
    """Load a mixture in any layout that ``moelora.checkpoints`` reads, on its backbone.

    Args:
        path: a folder or a hub id.
        backbone: a loaded model, or a name for :func:`~moelora.load_backbone`; ``"auto"`` takes the name that the
            checkpoint gives. ``None`` does so only for the backbone that ships with moelora, and for a layout that
            keeps the backbone in the same files: a file does not get to choose what is downloaded.
        quantization, dtype, device_map: for loading the backbone; by default as in the checkpoint.
        **hub: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, as in transformers.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or does not fit the backbone, which is then as it was.
        ConfigError: the checkpoint names a backbone that was not asked for.
    """
    from . import checkpoints

    stored = checkpoints.read(path, **hub)
    tokenizer = None
    if not isinstance(backbone, PreTrainedModel):
        backbone, tokenizer = _backbone_of(stored, backbone, quantization, dtype, device_map)
    model = put_on(backbone, stored)
    model.tokenizer = tokenizer
    return model


def put_on(backbone: PreTrainedModel, stored: Stored) -> MoELoRAModel:
    """Attach what a checkpoint describes and fill it with its numbers; the model is in evaluation mode.

    Raises:
        CheckpointError, ConfigError: it does not fit or is damaged; the backbone is then as it was.
    """
    stored.check_backbone(backbone.config)
    stored.check_weights(backbone)
    model = attach(backbone, stored.to_attach())
    try:
        declared = {name: tuple(value.shape) for name, value in model.adapter_tensors().items()}
        model.load_adapter_state(stored.stream(declared))
    except Exception:
        model.unload()
        raise
    if saved := model.saved_modules():
        logger.warning("%s replaces whole modules of the backbone: %s", stored.folder, ", ".join(saved))
    model.train(False)
    return model


def _backbone_of(
    stored: Stored, backbone: str | None, quantization: str | None, dtype: str | None, device_map: Any
) -> tuple[PreTrainedModel, Any]:
    """The backbone that the caller named, or allowed the checkpoint to name, and its tokenizer."""
    from .backbone import DEFAULT_BACKBONE, load_backbone

    if backbone is None and (own := stored.own_backbone(quantization, dtype, device_map)) is not None:
        return own
    named = stored.backbone.name
    if backbone is None and named != DEFAULT_BACKBONE:
        raise ConfigError(
            f"{stored.folder} was trained on {named!r}: pass backbone={named!r} (or backbone='auto') to load it, or "
            "another folder or hub id with the same weights"
        )
    changes: dict[str, Any] = {"name": named if backbone in (None, "auto") else backbone}
    if changes["name"] != named:
        changes.update(revision=None, subfolder=None)
    if quantization is not None:
        changes["quantization"] = quantization
    if dtype is not None:
        changes["dtype"] = dtype
    return load_backbone(BackboneConfig.parse({**stored.backbone.to_dict(), **changes}), device_map=device_map)


@contextmanager
def trace(model: nn.Module) -> Iterator[Tape]:
    """Within the block the records of every container in ``model`` go onto the tape, by site name.

    Records keep their graph where gradients are on: trace evaluation under ``torch.no_grad()``.
    """
    tape = Tape()

    def listener(site: SiteInfo, record: RoutingRecord) -> None:
        tape.add(site.name, record)

    slots = {id(m.slot): m.slot for m in model.modules() if isinstance(m, Container)}
    with ExitStack() as stack:
        for slot in slots.values():
            stack.enter_context(slot.using(listener=listener))
        yield tape
