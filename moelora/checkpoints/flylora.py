"""The layout of FlyLoRA's authors; see :class:`FlyLoRALayout`."""

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

BIAS = "lora_topk_bias"
_KEY = re.compile(rf"base_model\.model\.(?P<path>[\w.]+)\.(?P<tail>lora_[AB]\.weight|{BIAS})")


class FlyLoRAAdapter(AdapterConfig):
    """``adapter_config.json`` of FlyLoRA's fork of PEFT."""

    top_k: Annotated[int, Field(gt=0)] = 8
    bias_u: Annotated[float, Field(ge=0)] = 0.01
    init_lora_weights: Literal["sparse", "gaussian"] | bool = True
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    megatron_core: str | None = None


@dataclass
class FlyLoRAStored(ByModule):
    """A checkpoint of FlyLoRA's authors."""

    layout: ClassVar[str] = "flylora"

    def places(self, site: str) -> Places:
        return _places(self.mixture.sites[0])


def _places(site: SiteConfig) -> Places:
    rank = site.experts.total_rank
    return {
        "lora_A": [("lora_A.weight", rows(0, rank))],
        "lora_B": [("lora_B.weight", columns(0, rank))],
        "router.bias": [(BIAS, rows(0, rank))],
    }


@LAYOUTS.register("flylora")
class FlyLoRALayout(Layout):
    """What the fork of PEFT of FlyLoRA's authors writes (arXiv 2510.08396; gfyddha/FlyLoRA 91d9e36, PEFT 0.15.2.dev0).

    ``adapter_config.json`` (indent 2, keys sorted)
        all of PEFT's LoRA, peft_type "LORA" included, although PEFT itself cannot load it; and top_k (8), the ranks
        that a token is routed to, bias_u (0.01; the released script has 0.001), how far a rank's bias moves, and
        init_lora_weights "sparse". The number of non-zero entries in a row of ``lora_A`` is in // (r // top_k).
        Scale is lora_alpha / r. What PEFT can do besides (use_rslora, use_dora, patterns) is refused.
    ``adapter_model.safetensors``, or ``adapter_model.bin`` of their merging script
        for each adapted linear, after ``base_model.model.<path>.``: ``lora_A.weight`` (r, in), stored dense,
        ``lora_B.weight`` (out, r), ``lora_topk_bias`` (r).

    Told by ``lora_topk_bias``. A token is routed to the ranks with the largest A x + bias, signs included (the router's
    ``select: signed``); training goes on with their gradient, which stops at A (``stop_gradient``).

    Quirks: their code moves the bias in evaluation too, so a stored bias is that of the last forward before saving.
    Their 8-bit linears know no top_k: an adapter trained on them was dense, and its biases are all 0. For a plain
    linear their code fails before training. Their merged adapters are the average of A, B and bias of several.
    Only ``select: signed`` can be written; ``task_seed`` and ``nnz``, which a trained adapter needs no more, are not.
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS)

    def detect(self, folder: Folder) -> str | None:
        pair = folder.adapter()
        if pair is None or not any(key.endswith(f".{BIAS}") for key in pair[1].headers):
            return None
        return f"it has tensors named {BIAS}"

    def read(self, folder: Folder) -> FlyLoRAStored:
        path = folder.path / ADAPTER_CONFIG
        config = parse_known(FlyLoRAAdapter, folder.mapping(ADAPTER_CONFIG), path)
        file = folder.tensors(*ADAPTER_TENSORS)
        sites = list(modules_of(file, _KEY))
        mixture = {
            "target": sites,
            "experts": {
                "kind": "sparse_projection",
                "num_experts": 1,
                "r": config.r,
                "alpha": config.lora_alpha,
                "dropout": config.lora_dropout,
                "density": 1 / max(1, config.r // config.top_k),
                "stop_gradient": True,
            },
            "router": {"kind": "flylora", "top_k": config.top_k, "select": "signed", "bias_rate": config.bias_u},
        }
        stored = FlyLoRAStored(
            folder=folder.path,
            backbone=config.backbone(),
            architecture=Architecture(),
            mixture=parse(MixtureConfig, {"sites": [mixture]}, path),
            file=file,
            prefix=PEFT_PREFIX,
            groups=[sites],
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        refuse_unwritable("flylora", _against(content))
        site = content.mixture.sites[0]
        router: Any = site.router
        config = {
            **common_keys(content, site),
            "init_lora_weights": "sparse",
            "top_k": router.top_k,
            "bias_u": router.bias_rate,
        }
        write_adapter(folder, config, cut_modules(content, PEFT_PREFIX, lambda _: _places(site)), pickled=False)


def _against(content: Content) -> Iterator[str]:
    """What the layout cannot express of a mixture."""
    yield from against_linears(content, ["sparse_projection"], ["flylora"])
    for site in content.mixture.sites:
        if site.experts.num_experts > 1:
            yield f"it has one expert, whose ranks are routed, found {site.experts.num_experts}"
        if (select := getattr(site.router, "select", "signed")) != "signed":
            yield f"its code chooses ranks by A x + bias (router.select: signed), found {select}"
