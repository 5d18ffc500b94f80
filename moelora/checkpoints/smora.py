"""The layout of SMoRA's authors; see :class:`SMoRALayout`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..config import MixtureConfig, SiteConfig
from .by_module import PEFT_PREFIX, ByModule, Places, columns, cut_modules, modules_of, rows
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Architecture, Content, Layout
from .peft_files import AdapterConfig, against_linears, common_keys, refuse_unwritable, write_adapter
from .reading import parse, parse_known

PEFT_TYPE = "SRMOLE"
# The rate that their layer has and their configuration cannot change.
BIAS_RATE = 1e-5
_NAMED = ".default"
_KEY = re.compile(
    r"base_model\.model\.(?P<path>[\w.]+)\.(?P<tail>lora_(?:A|B|router)(?:\.default)?\.weight|lora_biases(?:\.default)?)"
)


class SMoRAAdapter(AdapterConfig):
    """``adapter_config.json`` of SMoRA."""

    peft_type: Literal["SRMOLE"]  # type: ignore[assignment]
    activate_r: Annotated[int, Field(gt=0)] = 8
    rank_partition: Annotated[int, Field(gt=0)] = 1
    epsilon_greedy: bool = False
    dense_compute: bool = False
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    megatron_core: str | None = None


@dataclass
class SMoRAStored(ByModule):
    """A checkpoint of SMoRA's authors.

    Attributes:
        named: what their keys have after ``lora_A``: the name of the adapter, or nothing.
    """

    layout: ClassVar[str] = "smora"
    named: str = ""

    def places(self, site: str) -> Places:
        return _places(self.mixture.sites[0], self.named)


def _places(site: SiteConfig, named: str = "") -> Places:
    rank, router = site.experts.total_rank, site.router
    assert router is not None
    return {
        "lora_A": [(f"lora_A{named}.weight", rows(0, rank))],
        "lora_B": [(f"lora_B{named}.weight", columns(0, rank))],
        "router.weight": [(f"lora_router{named}.weight", rows(0, rank // router.partition))],
        "router.bias": [(f"lora_biases{named}", rows(0, rank))],
    }


@LAYOUTS.register("smora")
class SMoRALayout(Layout):
    """What the fork of PEFT of SMoRA's authors writes (arXiv 2501.15103; StyxXuan/smora 7e7ada1, PEFT 0.12.1.dev0).

    ``adapter_config.json`` (indent 2, keys sorted)
        all of PEFT's LoRA with peft_type "SRMOLE", and activate_r (8), the ranks of a token; rank_partition (1), how
        many neighbouring ranks share a row of the router; epsilon_greedy and dense_compute, which change nothing.
        Scale is lora_alpha / activate_r; use_rslora has no effect in their code, and init_lora_weights none on what is
        stored. How far a bias moves (1e-5) is not stored. Their loader takes no keys but these.
    ``adapter_model.safetensors`` or ``adapter_model.bin``
        for each adapted linear, after ``base_model.model.<path>.``: ``lora_A.weight`` (r, in), ``lora_B.weight``
        (out, r), ``lora_router.weight`` (r / rank_partition, in), ``lora_biases`` (r). Their saver strips the name of
        the adapter; a state dict that was saved as it is has it: ``lora_A.default.weight``, ``lora_biases.default``.
        Both are read, the first is written.

    Told by the tensors named ``lora_biases``. The gates of a token are sigmoid(x W) + bias of the chosen ranks, over
    their sum; see router ``smora``.

    Quirks: in training their router sees the input after dropout, here before it. ``rank_pattern`` and the like, which
    their code takes and does not use, are refused.
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS)

    def detect(self, folder: Folder) -> str | None:
        pair = folder.adapter()
        if pair is None or not any(".lora_biases" in key for key in pair[1].headers):
            return None
        return "it has tensors named lora_biases"

    def read(self, folder: Folder) -> SMoRAStored:
        path = folder.path / ADAPTER_CONFIG
        config = parse_known(SMoRAAdapter, folder.mapping(ADAPTER_CONFIG), path)
        file = folder.tensors(*ADAPTER_TENSORS)
        sites = list(modules_of(file, _KEY))
        mixture = {
            "target": sites,
            "experts": {
                "kind": "lora",
                "num_experts": 1,
                "r": config.r,
                "alpha": config.lora_alpha,
                "dropout": config.lora_dropout,
            },
            "router": {
                "kind": "smora",
                "top_k": config.activate_r,
                "partition": config.rank_partition,
                "bias_rate": BIAS_RATE,
            },
        }
        stored = SMoRAStored(
            folder=folder.path,
            backbone=config.backbone(),
            architecture=Architecture(),
            mixture=parse(MixtureConfig, {"sites": [mixture]}, path),
            file=file,
            prefix=PEFT_PREFIX,
            groups=[sites],
            named=_NAMED if any(_NAMED in key for key in file.headers) else "",
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        refuse_unwritable("smora", _against(content))
        site = content.mixture.sites[0]
        router: Any = site.router
        config = {
            **common_keys(content, site),
            "peft_type": PEFT_TYPE,
            "activate_r": router.top_k,
            "rank_partition": router.partition,
            "epsilon_greedy": False,
            "dense_compute": False,
        }
        write_adapter(folder, config, cut_modules(content, PEFT_PREFIX, lambda _: _places(site)), pickled=False)


def _against(content: Content) -> Iterator[str]:
    """What the layout cannot express of a mixture."""
    yield from against_linears(content, ["lora"], ["smora"])
    for site in content.mixture.sites:
        if site.experts.num_experts > 1:
            yield f"it has one expert, whose ranks are routed, found {site.experts.num_experts}"
        for option, only in (("score", "sigmoid"), ("bias_in_value", True)):
            if (found := getattr(site.router, option, only)) != only:
                yield f"its code has router.{option} {only}, found {found}"
