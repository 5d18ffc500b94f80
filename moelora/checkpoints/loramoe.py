"""The layout of LoRAMoE's authors; see :class:`LoRAMoELayout`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..config import MixtureConfig, SiteConfig
from .by_module import PEFT_PREFIX, ByModule, Places, columns, cut_modules, modules_of, rows
from .checks import against_gaps, against_their_llama, refuse_excess, refuse_gaps, tell_lost
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Architecture, Content, Layout
from .peft_files import AdapterConfig, against_linears, common_keys, refuse_unwritable, write_adapter
from .reading import parse, parse_known

_KEY = re.compile(r"base_model\.model\.(?P<path>[\w.]+)\.(?P<tail>lora_(?:route|[AB]\d{1,4})\.weight)")


class LoRAMoEConfig(AdapterConfig):
    """``adapter_config.json`` of LoRAMoE."""

    lora_nums: Annotated[int, Field(gt=0)]
    blc_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    blc_weight: Annotated[float, Field(ge=0)] | None = None
    enable_lora: None = None
    fan_in_fan_out: Literal[False] = False
    merge_weights: bool = False
    modules_to_save: None = None


@dataclass
class LoRAMoEStored(ByModule):
    """A checkpoint of LoRAMoE's authors."""

    layout: ClassVar[str] = "loramoe"

    def places(self, site: str) -> Places:
        return _places(self.mixture.sites[0])


def _places(site: SiteConfig) -> Places:
    rank = site.experts.ranks[0]
    each = range(site.experts.num_experts)
    return {
        "router.weight": [("lora_route.weight", rows(0, site.experts.num_experts))],
        "lora_A": [(f"lora_A{e}.weight", rows(e, rank)) for e in each],
        "lora_B": [(f"lora_B{e}.weight", columns(e, rank)) for e in each],
    }


@LAYOUTS.register("loramoe")
class LoRAMoELayout(Layout):
    """What the authors of LoRAMoE write (arXiv 2312.09979; Ablustrund/LoRAMoE 1177288, a modified PEFT 0.3.0).

    ``adapter_config.json`` (indent 2, keys sorted)
        peft_type "LORA", although PEFT cannot load it; r, lora_alpha, lora_dropout, lora_nums (experts), blc_alpha (our
        ``delta``) and blc_weight (our ``aux_loss_coef``), 0 in the released script; target_modules;
        base_model_name_or_path; task_type; bias "none"; enable_lora and modules_to_save null; fan_in_fan_out false;
        merge_weights; inference_mode. Scale is lora_alpha / r.
    ``adapter_model.bin``
        ``torch.save`` of a flat dict, float32 or the dtype of training (bfloat16 in the released run). For each adapted
        linear, after ``base_model.model.<path>.``: ``lora_route.weight`` (N, in), then for each expert i
        ``lora_A{i}.weight`` (r, in) and ``lora_B{i}.weight`` (out, r). ``adapter_model.safetensors`` with the same keys
        is read where it is there.

    Told by its keys: ``lora_route`` and ``lora_A0``. Every linear has a router of its own, dense softmax.

    Quirks: their loader ignores missing and unknown keys, here both are errors. Their Llama runs only with experts at
    all three of gate_proj, up_proj and down_proj; with a single target module their code sets enable_lora and breaks.
    blc_alpha and blc_weight may be null, which means 0 as far as anything runs; with a blc_weight the number of experts
    has to be even, as each of two types has one half of them. They draw a dropout mask for each expert; here training
    goes on with one (``expert_dropout``). A checkpoint of their trainer lies in ``checkpoint-<step>/sft_lora_model``.
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS)

    def detect(self, folder: Folder) -> str | None:
        pair = folder.adapter()
        if pair is None or not any(key.endswith(".lora_A0.weight") for key in pair[1].headers):
            return None
        return "its tensors are named lora_A0, lora_B0 and so on"

    def read(self, folder: Folder) -> LoRAMoEStored:
        path = folder.path / ADAPTER_CONFIG
        config = parse_known(LoRAMoEConfig, folder.mapping(ADAPTER_CONFIG), path)
        file = folder.tensors(*ADAPTER_TENSORS)
        refuse_excess(path, file, lora_nums=config.lora_nums, r=config.r)
        sites = list(modules_of(file, _KEY))
        refuse_gaps(file.path, sites, config.target_modules)
        mixture = {
            "target": sites,
            "experts": {
                "kind": "lora",
                "num_experts": config.lora_nums,
                "r": config.r,
                "alpha": config.lora_alpha,
                "dropout": config.lora_dropout,
            },
            "router": {"kind": "softmax", "aux_loss_coef": config.blc_weight or 0.0, "delta": config.blc_alpha or 0.0},
        }
        stored = LoRAMoEStored(
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
        reasons = against_linears(content, ["lora"], ["softmax"])
        refuse_unwritable("loramoe", reasons + against_gaps(content) + against_their_llama("loramoe", content))
        site = content.mixture.sites[0]
        assert site.router is not None
        tell_lost("loramoe", _lost(site))
        config = {
            **common_keys(content, site),
            "lora_nums": site.experts.num_experts,
            "blc_alpha": site.router.delta,
            "blc_weight": site.router.aux_loss_coef,
            "enable_lora": None,
            "merge_weights": False,
            "modules_to_save": None,
        }
        tensors = cut_modules(content, PEFT_PREFIX, lambda _: _places(site))
        write_adapter(folder, config, _published(tensors), pickled=True)


def _lost(site: SiteConfig) -> Iterator[str]:
    """What the balance loss of their code does not do, where it is switched on."""
    router, count = site.router, site.experts.num_experts
    if router is None or not router.aux_loss_coef:
        return
    if router.form != "released":
        yield f"form {router.form}"
    if router.types_of(count) != router.model_copy(update={"expert_types": None}).types_of(count):
        yield f"expert_types {router.expert_types}"


def _published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the order in which their code has them: expert after expert, in each module."""
    modules: dict[str, int] = {}

    def place(key: str) -> tuple[int, int, str]:
        path, _, tail = key.removesuffix(".weight").rpartition(".lora_")
        return modules.setdefault(path, len(modules)), -1 if tail == "route" else int(tail[1:]), tail[0]

    return {key: tensors[key] for key in sorted(tensors, key=place)}
