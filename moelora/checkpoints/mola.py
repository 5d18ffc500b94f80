"""The layout of MoLA's authors; see :class:`MoLALayout`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from ..config import MixtureConfig, SiteConfig
from ..errors import CheckpointError
from .by_module import PEFT_PREFIX, ByModule, Places, columns, cut_modules, modules_of, rows
from .checks import against_gaps, refuse_excess, refuse_gaps, tell_lost
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Architecture, Content, Layout, Shape
from .peft_files import AdapterConfig, common_keys, refuse_unwritable, write_adapter
from .reading import parse, parse_known

logger = logging.getLogger(__name__)

_KEY = re.compile(
    r"base_model\.model\.(?P<path>model\.layers\.[0-9]{1,6}\.[\w.]+?)\.(?P<tail>router\.router\.weight|lora_[AB]_[0-9]{1,4}\.weight)"
)
_SITE = re.compile(r"model\.layers\.([0-9]{1,6})\..+")
_PUBLISHED_TOP_K = 2

Positive = Annotated[int, Field(gt=0)]


class MoLAConfig(AdapterConfig):
    """``adapter_config.json`` of MoLA."""

    r: list[Positive]  # type: ignore[assignment]
    fan_in_fan_out: Literal[False] = False
    init_lora_weights: bool = True
    layers_pattern: str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: None = None
    number_experts: list[Positive] | None = None
    top_k: list[Positive] | None = None


class _Layer(NamedTuple):
    """What the layers of one site configuration have in common."""

    experts: int
    rank: int
    top_k: int


@dataclass
class MoLAStored(ByModule):
    """A checkpoint of MoLA's authors; a site configuration for each kind of layer."""

    layout: ClassVar[str] = "mola"

    def places(self, site: str) -> Places:
        return _places(self._config[site])

    @cached_property
    def _config(self) -> dict[str, SiteConfig]:
        groups = zip(self.groups, self.mixture.sites, strict=True)
        return {site: config for group, config in groups for site in group}


def _places(site: SiteConfig) -> Places:
    rank = site.experts.ranks[0]
    each = range(site.experts.num_experts)
    return {
        "lora_A": [(f"lora_A_{e}.weight", rows(e, rank)) for e in each],
        "lora_B": [(f"lora_B_{e}.weight", columns(e, rank)) for e in each],
        "router.weight": [("router.router.weight", rows(0, len(each)))],
    }


@LAYOUTS.register("mola")
class MoLALayout(Layout):
    """What the authors of MoLA write (arXiv 2402.08562; GCYZSL/MoLA 01785c8, changed copies of files of PEFT 0.4.0).

    ``adapter_config.json`` (indent 2, keys sorted)
        peft_type "LORA", although PEFT cannot load it; r, a list with the rank of each layer of the backbone;
        lora_alpha and lora_dropout, numbers for all; target_modules; base_model_name_or_path; task_type; bias "none";
        init_lora_weights; inference_mode; fan_in_fan_out false; null: auto_mapping, layers_pattern,
        layers_to_transform, modules_to_save, revision. The scale of a layer is lora_alpha / its rank.
    ``adapter_model.bin``
        ``torch.save`` of a flat dict of tensors. For each adapted linear, after ``base_model.model.<path>.``: for each
        expert i ``lora_A_{i}.weight`` (r, in), then ``lora_B_{i}.weight`` (out, r), then ``router.router.weight``
        (E, in). E is the same within a layer and differs between layers: 2, 4, 6 and 8 in the quarters of the released
        script. ``adapter_model.safetensors`` with the same keys is read where it is there, as their loader does.

    Told by its keys: ``lora_A_0``. Router ``mola``: softmax in float32, the k largest, renormalised.

    What the file does not say: k, which has to be given when it is loaded, as the numbers of experts have to be, and
    whether the balance loss was on. Read as k = 2, the only one in their scripts, with a warning, and the loss off, as
    by default. Where ``top_k``, a list with a number for each layer, is in ``adapter_config.json``, it holds; we write
    it and ``number_experts``, which their loader passes over.

    Quirks: their loader ignores missing and unknown keys, here both are errors. With a bias other than "none" their
    saver loses the routers. Only Llama, as the layer's number is the third part of a module's path. The
    ``pytorch_model.bin`` of their trainer's checkpoints holds the whole model and is not read.
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS)

    def detect(self, folder: Folder) -> str | None:
        pair = folder.adapter()
        if pair is None or not any(key.endswith(".lora_A_0.weight") for key in pair[1].headers):
            return None
        return "its tensors are named lora_A_0, lora_B_0 and so on"

    def read(self, folder: Folder) -> MoLAStored:
        path = folder.path / ADAPTER_CONFIG
        config = parse_known(MoLAConfig, folder.mapping(ADAPTER_CONFIG), path)
        file = folder.tensors(*ADAPTER_TENSORS)
        refuse_excess(path, file, r=max(config.r, default=0))
        modules = modules_of(file, _KEY)
        refuse_gaps(file.path, list(modules), config.target_modules)
        groups: dict[_Layer, list[str]] = {}
        for site, tensors in modules.items():
            groups.setdefault(_layer(path, config, site, tensors), []).append(site)
        if config.top_k is None:
            logger.warning(
                "%s: does not say how many experts a token gets, which MoLA's own code is told when it loads: %d are "
                "taken, as in its scripts; if it was trained otherwise, add top_k, a list with a number for each layer",
                path,
                _PUBLISHED_TOP_K,
            )
        sites = [_site(config, layer, names) for layer, names in groups.items()]
        stored = MoLAStored(
            folder=folder.path,
            backbone=config.backbone(),
            architecture=Architecture(),
            mixture=parse(MixtureConfig, {"sites": sites}, path),
            file=file,
            prefix=PEFT_PREFIX,
            groups=list(groups.values()),
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        layers, reasons = _layers(content)
        refuse_unwritable("mola", [*reasons, *against_gaps(content)])
        each = [layers[index] for index in sorted(layers)]
        losses = {site.router.aux_loss_coef for site in content.mixture.sites if site.router is not None}
        tell_lost("mola", [f"aux_loss_coef {value}" for value in sorted(losses - {0.0})])
        config = {
            **common_keys(content, content.mixture.sites[0]),
            "auto_mapping": None,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "modules_to_save": None,
            "number_experts": [layer.experts for layer in each],
            "r": [layer.rank for layer in each],
            "revision": None,
            "top_k": [layer.top_k for layer in each],
        }
        configs = _configs(content)
        tensors = cut_modules(content, PEFT_PREFIX, lambda site: _places(configs[site]))
        write_adapter(folder, config, tensors, pickled=True)


def _layer(path: Path, config: MoLAConfig, site: str, tensors: Mapping[str, Shape]) -> _Layer:
    """What the configuration and the tensors of a module say of its layer.

    Raises:
        CheckpointError: a list of the configuration ends before the layer, or says another number of experts.
    """
    index = int(site.split(".")[2])
    experts = sum(tail.startswith("lora_A_") for tail in tensors)
    lists: dict[str, Sequence[int] | None] = {
        "r": config.r,
        "top_k": config.top_k,
        "number_experts": config.number_experts,
    }
    for key, values in lists.items():
        if values is not None and len(values) <= index:
            raise CheckpointError(
                f"{path}: {key}: expected a number for each layer, as there are tensors of layer {index}, found "
                f"{len(values)} numbers: restore the file"
            )
    if config.number_experts is not None and config.number_experts[index] != experts:
        raise CheckpointError(
            f"{path}: number_experts: expected {experts} for layer {index}, as {site} has, found "
            f"{config.number_experts[index]}: restore the file"
        )
    top_k = min(_PUBLISHED_TOP_K, max(experts, 1)) if config.top_k is None else config.top_k[index]
    return _Layer(experts, config.r[index], top_k)


def _site(config: MoLAConfig, layer: _Layer, names: Sequence[str]) -> dict[str, Any]:
    return {
        "target": names,
        "experts": {
            "kind": "lora",
            "num_experts": layer.experts,
            "r": layer.rank,
            "alpha": config.lora_alpha,
            "dropout": config.lora_dropout,
        },
        "router": {"kind": "mola", "top_k": layer.top_k, "aux_loss_coef": 0.0},
    }


def _configs(content: Content) -> dict[str, SiteConfig]:
    """The configuration of each site, patterns resolved."""
    groups = zip(content.mixture.sites, content.sites, strict=True)
    return {name: config.at(name) for config, names in groups for name in names}


def _layers(content: Content) -> tuple[dict[int, _Layer], list[str]]:
    """What each layer has, and the reasons against writing it."""
    reasons = ["it has no modules that are saved whole"] if content.mixture.modules_to_save else []
    layers: dict[int, _Layer] = {}
    alphas, dropouts = set(), set()
    for name, site in _configs(content).items():
        experts, router, match = site.experts, site.router, _SITE.fullmatch(name)
        alphas |= set(experts.alphas)
        dropouts.add(experts.dropout)
        if match is None or f"{name}.lora_B" not in content.tensors:
            reasons.append(f"its sites are linears of model.layers, found {name!r}")
        elif experts.kind != "lora":
            reasons.append(f"its experts are lora, found {experts.kind}")
        elif router is None or router.kind != "mola" or router.share != "module":
            reasons.append(f"each site has a router mola of its own, found {router.kind if router else 'none'}")
        elif len(set(experts.ranks)) > 1:
            reasons.append("the experts of a layer have one r, found several")
        else:
            layer = _Layer(experts.num_experts, experts.ranks[0], router.top_k)
            other = layers.setdefault(int(match[1]), layer)
            if other != layer:
                reasons.append(
                    f"all of a layer has one num_experts, r and top_k, found {other} and {layer} in layer {match[1]}"
                )
    if len(alphas) > 1 or len(dropouts) > 1:
        reasons.append(f"it has one alpha and one dropout, found {sorted(alphas)} and {sorted(dropouts)}")
    return layers, reasons
