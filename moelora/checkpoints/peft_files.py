"""PEFT's pair of files, ``adapter_config.json`` and ``adapter_model.*``, in which many authors have own keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import files
from ..config import BackboneConfig, Closed, SiteConfig
from ..errors import CheckpointError
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS
from .layout import Content

UNKNOWN = "unknown"  # the backbone of a file that names none


class AdapterConfig(Closed):
    """The keys of ``adapter_config.json`` that all have; a layout adds its own, and narrows those that it restricts."""

    peft_type: Literal["LORA"]
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = True
    r: Annotated[int, Field(gt=0)]
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | str | None = None
    bias: Literal["none"] = "none"
    fan_in_fan_out: bool = False

    def backbone(self) -> BackboneConfig:
        """What the file says of the backbone; nothing is loaded because of it."""
        return BackboneConfig(name=self.base_model_name_or_path or UNKNOWN, quantization=None, revision=self.revision)


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, pickled: bool) -> None:
    """Write the pair into an empty folder.

    Args:
        config: of the JSON file, sorted by key as PEFT does. tensors: of the other file, in this order.
        pickled: write ``adapter_model.bin``, for readers that know no other; else ``adapter_model.safetensors``.

    Raises:
        OSError: writing failed.
    """
    # What lies inside keeps its order, which may mean something: the number of an X-LoRA expert is its place.
    text = json.dumps(dict(sorted(config.items())), indent=2)
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    values = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    path = folder / ADAPTER_TENSORS[1 if pickled else 0]
    try:
        if pickled:
            torch.save({key: nn.Parameter(value) for key, value in values.items()}, path)
        else:
            save_file(values, path, metadata={"format": "pt"})
            path.chmod((folder / ADAPTER_CONFIG).stat().st_mode)  # safetensors makes a file for its owner only
    except (RuntimeError, SafetensorError) as error:  # how the two report a full disk
        raise files.os_error(error, path) from error


def common_keys(content: Content, site: SiteConfig) -> dict[str, Any]:
    """What :class:`AdapterConfig` holds, for the experts of one site configuration."""
    alpha = site.experts.alphas[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": content.backbone.name,
        "inference_mode": True,
        "r": site.experts.ranks[0],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": site.experts.dropout,
        "target_modules": endings(name for names in content.sites for name in names),
        "bias": "none",
        "fan_in_fan_out": False,
    }


def endings(paths: Iterable[str]) -> list[str]:
    """The last names of module paths, each once."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def refuse_unwritable(layout: str, reasons: Iterable[str]) -> None:
    """Raise :class:`CheckpointError` with all that stands against writing a mixture in a layout, if anything does."""
    unique = "; ".join(dict.fromkeys(reasons))
    if unique:
        raise CheckpointError(f"layout {layout!r} cannot express this mixture: {unique}. Keep the native layout")


def against_linears(content: Content, kinds: Iterable[str], routers: Iterable[str | None]) -> list[str]:
    """Reasons against a layout that has one kind of site: linears with experts and routers of one configuration.

    Args:
        kinds: of experts. routers: kinds of routers, ``None`` for an expert that is always on.
    """
    kinds, routers = list(kinds), list(routers)
    reasons = []
    sites = content.mixture.sites
    if content.mixture.modules_to_save:
        reasons.append("it has no modules that are saved whole")
    settings = [(site.experts.to_dict(), None if site.router is None else site.router.to_dict()) for site in sites]
    if any(setting != settings[0] for setting in settings):
        reasons.append("it has one configuration of experts and router for all sites, this mixture has several")
    for site in sites:
        router = None if site.router is None else site.router.kind
        if site.experts.kind not in kinds:
            reasons.append(f"its experts are {' or '.join(kinds)}, found {site.experts.kind}")
        if router not in routers:
            named = " or ".join("always on" if kind is None else kind for kind in routers)
            reasons.append(f"its routers are {named}, found {router or 'none'}")
        if len({*site.experts.ranks, *site.experts.rank_pattern}) > 1 or len(set(site.experts.alphas)) > 1:
            reasons.append("all its experts have one r and one alpha, found several")
        if site.experts.alpha_pattern:
            reasons.append("it has no alpha for single sites")
        if site.router is not None and site.router.share != "module":
            reasons.append(f"each site has its own router, found share: {site.router.share}")
    if blocks := [name for names in content.sites for name in names if f"{name}.lora_B" not in content.tensors]:
        reasons.append(f"its sites are linears, {blocks[0]!r} is an FFN block")
    return reasons
