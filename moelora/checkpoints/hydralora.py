"""The layout of HydraLoRA's authors; see :class:`HydraLoRALayout`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ..config import MixtureConfig, SiteConfig
from .by_module import PEFT_PREFIX, ByModule, Places, columns, cut_modules, modules_of, rows
from .checks import against_gaps, against_their_llama, refuse_excess, refuse_gaps, tell_lost
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Architecture, Content, Layout
from .peft_files import AdapterConfig, against_linears, common_keys, refuse_unwritable, write_adapter
from .reading import parse, parse_known

_KEY = re.compile(r"base_model\.model\.(?P<path>[\w.]+)\.(?P<tail>lora_(?:route|A|B\d{1,4})\.weight)")


class HydraLoRAConfig(AdapterConfig):
    """``adapter_config.json`` of HydraLoRA."""

    lora_nums: Annotated[int, Field(gt=0)]
    enable_lora: None = None
    fan_in_fan_out: Literal[False] = False
    merge_weights: bool = False
    modules_to_save: None = None


@dataclass
class HydraLoRAStored(ByModule):
    """A checkpoint of HydraLoRA's authors."""

    layout: ClassVar[str] = "hydralora"

    def places(self, site: str) -> Places:
        return _places(self.mixture.sites[0])


def _places(site: SiteConfig) -> Places:
    rank = site.experts.ranks[0]
    return {
        "router.weight": [("lora_route.weight", rows(0, site.experts.num_experts))],
        "lora_A": [("lora_A.weight", rows(0, rank))],
        "lora_B": [(f"lora_B{e}.weight", columns(e, rank)) for e in range(site.experts.num_experts)],
    }


@LAYOUTS.register("hydralora")
class HydraLoRALayout(Layout):
    """What the authors of HydraLoRA write (arXiv 2404.19245; Clin0212/HydraLoRA afb693b, a modified PEFT 0.3.0).

    ``adapter_config.json`` (indent 2, keys sorted)
        peft_type "LORA", although PEFT cannot load it; r, lora_alpha, lora_dropout, lora_nums (heads B; 4 in the
        released script); target_modules; base_model_name_or_path; task_type; bias "none"; enable_lora and
        modules_to_save null; fan_in_fan_out false; merge_weights; inference_mode. Scale is lora_alpha / r.
    ``adapter_model.bin``
        ``torch.save`` of a flat dict of tensors, in the dtype of training (bfloat16 in the released run). For each
        adapted linear, after ``base_model.model.<path>.``: ``lora_route.weight`` (N, in), ``lora_A.weight`` (r, in),
        the one matrix A, then for each head i ``lora_B{i}.weight`` (out, r). ``adapter_model.safetensors`` with the
        same keys is read where it is there.

    Told by its keys: ``lora_B0`` beside one ``lora_A`` without a number. Every linear has a router of its own, dense
    softmax in float32, and there is no balance loss: its forward returns a zero in its place.

    Quirks: their loader ignores missing and unknown keys, here both are errors. Their Llama runs only with experts at
    all three of gate_proj, up_proj and down_proj; with a single target module their configuration breaks. A checkpoint
    of their trainer lies in ``checkpoint-<step>/sft_lora_model``; the ``pytorch_model.bin`` above it has the same
    tensors. They draw a dropout mask for each head; here training goes on with one (``expert_dropout``). The layer for
    LLaVA in the same repository (MLLM-HydraLoRA) is another one and is not read: one router with a bias for a block,
    its options in a pickle of arbitrary objects.
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS)

    def detect(self, folder: Folder) -> str | None:
        pair = folder.adapter()
        if pair is None:
            return None
        keys = pair[1].headers
        if not any(key.endswith(".lora_B0.weight") for key in keys) or any(".lora_A0." in key for key in keys):
            return None
        return "it has several lora_B, lora_B0 and so on, to one lora_A"

    def read(self, folder: Folder) -> HydraLoRAStored:
        path = folder.path / ADAPTER_CONFIG
        config = parse_known(HydraLoRAConfig, folder.mapping(ADAPTER_CONFIG), path)
        file = folder.tensors(*ADAPTER_TENSORS)
        refuse_excess(path, file, lora_nums=config.lora_nums, r=config.r)
        sites = list(modules_of(file, _KEY))
        refuse_gaps(file.path, sites, config.target_modules)
        mixture = {
            "target": sites,
            "experts": {
                "kind": "shared_a",
                "num_experts": config.lora_nums,
                "r": config.r,
                "alpha": config.lora_alpha,
                "dropout": config.lora_dropout,
            },
            "router": {"kind": "softmax", "aux_loss_coef": 0.0},
        }
        stored = HydraLoRAStored(
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
        reasons = against_linears(content, ["shared_a"], ["softmax"])
        refuse_unwritable("hydralora", reasons + against_gaps(content) + against_their_llama("hydralora", content))
        site = content.mixture.sites[0]
        assert site.router is not None
        if site.router.aux_loss_coef:
            tell_lost("hydralora", [f"aux_loss_coef {site.router.aux_loss_coef}"])
        config = {
            **common_keys(content, site),
            "lora_nums": site.experts.num_experts,
            "enable_lora": None,
            "merge_weights": False,
            "modules_to_save": None,
        }
        tensors = cut_modules(content, PEFT_PREFIX, lambda _: _places(site))
        write_adapter(folder, config, tensors, pickled=True)
