"""The layout of MeteoRA's authors; see :class:`MeteoRALayout`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ..config import MixtureConfig
from ..errors import CheckpointError
from ..experts.frozen import Name
from .by_module import PEFT_PREFIX, Places, cut_modules, modules_of
from .folder import ADAPTER_CONFIG, MODEL_FILES, Folder
from .layout import LAYOUTS, Architecture, Content, Layout, Shape
from .peft_config import PeftConfig, read_config
from .peft_files import against_linears, common_keys, refuse_unwritable
from .reading import parse
from .tensor_file import SelectedFile
from .whole_model import WHOLE_MODEL_FILES, WithModel, config_in
from .xlora_writing import write_tensors

logger = logging.getLogger(__name__)

_GATE = "moe_gate.weight"
_KEY = re.compile(r"base_model\.model\.(?P<path>[\w.]+)\.(?P<tail>(?:moe_gate|lora_[AB])\.weight)")
# Not a key of the authors': it says what their code has in constants and names of folders.
_OWN_KEYS = ("top_k", "temperature", "names")


class MeteoRAConfig(PeftConfig):
    """``adapter_config.json`` of one of the adapters, with what the authors' code has in constants."""

    top_k: Annotated[int, Field(gt=0)] = 2
    temperature: Annotated[float, Field(gt=0)] = 1.0
    names: list[Name] | None = None


@dataclass
class MeteoRAStored(WithModel):
    """A checkpoint of MeteoRA's authors."""

    layout: ClassVar[str] = "meteora"

    def places(self, site: str) -> Places:
        experts = self.mixture.sites[0].experts
        return _places(experts.num_experts, experts.ranks[0])


def _places(experts: int, rank: int) -> Places:
    return {
        "router.weight": [(_GATE, (slice(0, experts),))],
        "lora_A": [("lora_A.weight", (slice(0, experts * rank),))],
        "lora_B": [("lora_B.weight", (slice(None), slice(0, experts * rank)))],
    }


@LAYOUTS.register("meteora")
class MeteoRALayout(Layout):
    """What the authors of MeteoRA publish (arXiv 2405.13053; NJUDeepEngine/meteora 2d192ad, read for its names alone).

    ``model.safetensors``, or shards with ``model.safetensors.index.json``
        the state dict of the whole wrapped model, bfloat16: 17.3 GB for Llama-3-8B with 28 adapters. For each adapted
        linear, after ``base_model.model.<path>.``: ``moe_gate.weight`` (E, in); ``lora_A.weight`` (E r, in), the rows
        of adapter 0 first; ``lora_B.weight`` (out, E r), its columns first; ``base_layer.weight`` (out, in), the
        backbone's. Beside them the backbone's embeddings, norms and head, ``base_model.model.<their name>``.
    ``adapter_config.json``
        not among the published files, and needed here, since the tensors have no scale: the one of any of the adapters
        that went in (``<model>_peft/<task>`` in the same repository), which all have one r and one lora_alpha. Three
        keys may be added that the authors keep in constants: top_k (2), the adapters of a token, in the name of the
        published folder (``top_1``, ``top_2``); temperature (1; their advice for prompts with 3, 5, 10 tasks is 15, 20,
        30); names of the adapters, first to last.
    ``config.json``
        the backbone's, not among the published files. Where it is there, the backbone of the same files can be had.

    Read as ``frozen`` experts under router ``meteora``. The weights of the backbone are not loaded with it: the
    backbone is the caller's, whose weights are compared with them where it is not quantised, or, where there is a
    ``config.json`` and no other was asked for, a model made of them.

    Written is the adapter alone: gates and factors under the authors' keys, which their model takes over one that has
    its backbone already (``load_state_dict(..., strict=False)``), and ``adapter_config.json`` with the three keys.
    The options of training (``gate_loss_coef`` and so on) have no place in it.

    Quirks: the order of the adapters is that of folders in a directory at the time of training; no file has it. The
    released script trains gates and factors, the paper the gates alone.
    """

    files = (ADAPTER_CONFIG,)
    model_files = WHOLE_MODEL_FILES

    def further_files(self, folder: Folder) -> tuple[str, ...]:
        _need_config(folder)  # before 17 GB are fetched
        return ()

    def detect(self, folder: Folder) -> str | None:
        file = folder.model()
        if file is None or not any(_KEY.fullmatch(key) and key.endswith(_GATE) for key in file.headers):
            return None
        return f"its tensors are named {_GATE}, lora_A.weight and so on"

    def read(self, folder: Folder) -> MeteoRAStored:
        whole = folder.model()
        assert whole is not None  # see detect
        file = SelectedFile(whole, _of_adapter)
        modules = modules_of(file, _KEY)
        experts = _experts(modules, whole.path)
        config = _config(folder)
        if config.names is None:
            logger.warning(
                "%s: the names of the adapters are not in the file: they are called expert_00 and so on, in the order "
                "of training; add names: [...] to %s to have others",
                folder.path,
                ADAPTER_CONFIG,
            )
        stored = MeteoRAStored(
            folder=folder.path,
            backbone=config.backbone(),
            architecture=Architecture(),
            mixture=_mixture(config, experts, list(modules), folder.path / ADAPTER_CONFIG),
            file=file,
            detail="with a backbone" if file.others else "without a backbone",
            prefix=PEFT_PREFIX,
            groups=[list(modules)],
            source=whole,
            names={key.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): key for key in file.others},
            model_config=config_in(folder),
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        site = content.mixture.sites[0]
        reasons = against_linears(content, ["frozen", "lora", "rslora"], ["meteora"])
        scaling = getattr(site.experts, "scaling", site.experts.kind)
        if isinstance(scaling, list):
            reasons.append("all its experts have one scale, lora_alpha / r")
        refuse_unwritable("meteora", reasons)
        assert site.router is not None
        config = {
            **common_keys(content, site),
            "use_rslora": scaling == "rslora",
            "top_k": site.router.top_k,
            "temperature": site.router.temperature,
            "names": getattr(site.experts, "names", None),
        }
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        places = _places(site.experts.num_experts, site.experts.ranks[0])
        write_tensors(
            folder / MODEL_FILES[0], cut_modules(content, PEFT_PREFIX, lambda _: places), folder / ADAPTER_CONFIG
        )


def _of_adapter(key: str) -> bool:
    """Whether a key is the adapter's, or none that the authors' model has."""
    return not key.startswith(PEFT_PREFIX) or ".lora_" in key or ".moe_" in key


def _experts(modules: Mapping[str, Mapping[str, Shape]], path: Path) -> int:
    shapes = {module: tensors[_GATE] for module, tensors in modules.items() if _GATE in tensors}
    for module, shape in shapes.items():
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(
                f"{path}: {PEFT_PREFIX}{module}.{_GATE}: expected a row for each adapter, found the shape {shape}: "
                "copy the checkpoint again"
            )
    return next(iter(shapes.values()))[0]


def _need_config(folder: Folder) -> None:
    if not folder.has(ADAPTER_CONFIG):
        raise CheckpointError(
            f"{folder.path / ADAPTER_CONFIG}: missing; the tensors of MeteoRA have no scale, so the configuration of "
            "one of the adapters that went in is needed (all have the same r and lora_alpha): copy its file of that "
            "name here (in the published repositories <model>_peft/<task>/adapter_config.json), or write one with "
            'peft_type "LORA", r, lora_alpha and base_model_name_or_path; top_k, temperature and names may be added'
        )


def _config(folder: Folder) -> MeteoRAConfig:
    _need_config(folder)
    path = folder.path / ADAPTER_CONFIG
    values = folder.mapping(ADAPTER_CONFIG)
    plain = read_config({key: value for key, value in values.items() if key not in _OWN_KEYS}, path)
    config = parse(MeteoRAConfig, {**plain.to_dict(), **_only(values, _OWN_KEYS)}, path)
    reasons = [
        f"{key}: {json.dumps(getattr(config, key))}"
        for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora")
        if getattr(config, key)
    ]
    if reasons:
        raise CheckpointError(
            f"{path}: expected plain LoRA with one r and one lora_alpha, which is all that MeteoRA's layers hold, "
            f"found {'; '.join(reasons)}: give the configuration of an adapter that went in"
        )
    return config


def _only(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def _mixture(config: MeteoRAConfig, experts: int, sites: list[str], path: Path) -> MixtureConfig:
    values = {
        "target": sites,
        "experts": {
            "kind": "frozen",
            "num_experts": experts,
            "r": config.r,
            "alpha": config.lora_alpha,
            "scaling": "rslora" if config.use_rslora else "lora",
            "dropout": config.lora_dropout,
            "names": config.names or [f"expert_{index:02}" for index in range(experts)],
        },
        "router": {"kind": "meteora", "top_k": config.top_k, "temperature": config.temperature},
    }
    return parse(MixtureConfig, {"sites": [values]}, path)
