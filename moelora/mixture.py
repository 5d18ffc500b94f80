"""A mixture from a backbone and a configuration, or from a checkpoint; and the tape of what it decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .config import BackboneConfig, MixtureConfig, Recipe, SiteConfig, load_recipe
from .errors import ConfigError
from .experts import Container, build
from .losses import StepLoad as StepLoad
from .model import MoELoRAModel as MoELoRAModel
from .routers.base import Router
from .routing import RoutingRecord, SiteInfo, Tape
from .scoring import refuse_unscorable
from .sites import layer_of, match_sites, refuse_overlaps, refuse_twins, sharing_key
from .slot import RoutingSlot


def attach(backbone: PreTrainedModel, mixture: MixtureConfig | Recipe | Mapping[str, Any] | str | Path) -> MoELoRAModel:
    """Freeze ``backbone`` and put containers at the sites that ``mixture`` names. Changes ``backbone`` in place.

    All of it is frozen, the head of a classifier too, which is no part of a checkpoint: train that first.

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
    refuse_overlaps(matched)
    refuse_twins(backbone, [path for paths in matched for path in paths])
    slot = RoutingSlot()
    # All are built before the first is put in place, so that an error leaves the backbone as it was.
    containers: dict[str, Container] = {}
    for group, (site, paths) in enumerate(zip(config.sites, matched, strict=True)):
        containers.update(_build_group(backbone, site, paths, slot, group))
    backbone.requires_grad_(False)
    for path, container in containers.items():
        parent, _, child = path.rpartition(".")
        setattr(backbone.get_submodule(parent), child, container)
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
            checkpoint gives. ``None`` does so only for the backbone that ships with moelora: a file does not get to
            choose what is downloaded.
        quantization, dtype, device_map: for loading the backbone; by default as in the checkpoint.
        **hub: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, as in transformers.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or does not fit the backbone.
        ConfigError: the checkpoint names a backbone that was not asked for.
    """
    from . import checkpoints
    from .backbone import DEFAULT_BACKBONE, load_backbone

    stored = checkpoints.read(path, **hub)
    tokenizer = None
    if not isinstance(backbone, PreTrainedModel):
        named = stored.backbone.name
        if backbone is None and named != DEFAULT_BACKBONE:
            raise ConfigError(
                f"{path} was trained on {named!r}: pass backbone={named!r} (or backbone='auto') to load it, or another "
                "folder or hub id with the same weights"
            )
        changes: dict[str, Any] = {"name": named if backbone in (None, "auto") else backbone}
        if changes["name"] != named:
            changes.update(revision=None, subfolder=None)
        if quantization is not None:
            changes["quantization"] = quantization
        if dtype is not None:
            changes["dtype"] = dtype
        config = BackboneConfig.parse({**stored.backbone.to_dict(), **changes})
        backbone, tokenizer = load_backbone(config, device_map=device_map)
    stored.check_backbone(backbone.config)
    model = attach(backbone, stored.to_attach())
    declared = {name: tuple(value.shape) for name, value in model.adapter_tensors().items()}
    model.load_adapter_state(stored.tensors(declared))
    model.tokenizer = tokenizer
    model.train(False)
    return model


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
