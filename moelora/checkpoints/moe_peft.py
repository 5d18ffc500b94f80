"""The layouts of MoE-PEFT's LoRAMoE and MoLA; see :class:`MoEPEFTLayout`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..config import BackboneConfig, MixtureConfig, SiteConfig
from ..errors import CheckpointError
from .by_module import ByModule, Places, columns, cut_modules, modules_of, rows
from .checks import against_gaps, refuse_excess, refuse_gaps, tell_lost
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Architecture, Content, Layout, Part, Shape
from .moe_peft_config import (
    ATTENTION,
    DORA,
    FFN,
    HEAD_KEY,
    HEAD_TENSOR,
    TASK_TYPES,
    Lora,
    LoraOptions,
    experts_of,
    saved_modules,
    task_of,
    write_pair,
)
from .peft_files import refuse_unwritable
from .reading import parse, parse_known

_KEY = (
    r"{prefix}\.(?P<path>layers\.[0-9]{{1,6}}\.(?:self_attn|mlp)\.[a-z0-9_]+)\."
    r"(?P<tail>moe_gate\.weight|(?:experts\.[0-9]{{1,4}}\.)?lora_[AB]\.weight)"
)
_WRITTEN = re.compile(
    r"(?P<module>.+?)\.(?:(?P<gate>moe_gate)|experts\.(?P<expert>[0-9]+)\.(?P<which>.+)|lora_[AB])\.weight"
)
_SITE = re.compile(r"model\.layers\.([0-9]{1,6})\.(?:self_attn|mlp)\.(?P<name>[a-z0-9_]+)")


class MoEPEFTConfig(LoraOptions):
    """The file, with the defaults of the reference loader for what is absent."""

    peft_type: Literal["LORAMOE", "MOLA"]
    task_type: str | None
    base_model_name_or_path: str
    target_modules: list[str] | dict[str, bool]
    routing_strategy: str
    num_experts: Annotated[int, Field(gt=0)]
    top_k: Annotated[int, Field(gt=0)] = 2
    router_init_range: float = 5.0
    router_loss: bool = False
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.001
    name: str | None = None
    task_name: str | None = None

    @property
    def prefix(self) -> str:
        """What the keys of its tensors start with."""
        return self.peft_type.lower()

    def targets(self) -> list[str]:
        """Names of the target modules."""
        if isinstance(self.target_modules, dict):
            return [name for name, on in self.target_modules.items() if on]
        return self.target_modules

    def wrong(self) -> list[str]:
        """What cannot be represented, a line each."""
        allowed = {
            "bias": ("none",),
            "routing_strategy": (self.prefix,),
            "lora_init": ("original", "gaussian"),
            "task_type": TASK_TYPES,
        }
        lines = [
            f"{key}: expected {' or '.join(repr(value) for value in values)}, found {getattr(self, key)!r}"
            for key, values in allowed.items()
            if getattr(self, key) not in values
        ]
        known = {*ATTENTION, *FFN}
        lines += [f"target_modules: {name!r} is not known" for name in self.targets() if name not in known]
        return [*lines, DORA] if self.use_dora else lines


@dataclass
class MoEPEFTStored(ByModule):
    """A checkpoint of MoE-PEFT's trainer; names of modules are those of ``model.layers.N``."""

    layout: ClassVar[str] = "moe_peft"

    def key(self, site: str, tail: str) -> str:
        return f"{self.prefix}.{site.removeprefix('model.')}.{tail}"

    def places(self, site: str) -> Places:
        routed = self.mixture.sites[0]
        return _places(routed if site in routed.target else self.mixture.sites[-1])

    def declared(self) -> dict[str, Shape]:
        head = self.file.headers.get(HEAD_KEY)
        own = {HEAD_TENSOR: head.shape if head is not None else (0, 0)} if self.mixture.modules_to_save else {}
        return super().declared() | own

    def parts(self, declared: Mapping[str, Shape]) -> dict[str, list[Part]]:
        own = {name: [Part(HEAD_KEY, shape)] for name, shape in declared.items() if name == HEAD_TENSOR}
        return super().parts({name: shape for name, shape in declared.items() if name not in own}) | own


def _places(site: SiteConfig) -> Places:
    rank, count = site.experts.ranks[0], site.experts.num_experts
    if site.router is None:
        return {"lora_A": [("lora_A.weight", rows(0, rank))], "lora_B": [("lora_B.weight", columns(0, rank))]}
    return {
        "router.weight": [("moe_gate.weight", rows(0, count))],
        "lora_A": [(f"experts.{e}.lora_A.weight", rows(e, rank)) for e in range(count)],
        "lora_B": [(f"experts.{e}.lora_B.weight", columns(e, rank)) for e in range(count)],
    }


@LAYOUTS.register("moe_peft")
class MoEPEFTLayout(Layout):
    """LoRAMoE and MoLA as MoE-PEFT has them (TUDB-Labs/MoE-PEFT 40f8cb7): its own layers, not those of the authors.

    ``adapter_config.json`` (indent 4)
        optional use_rslora; bias "none"; peft_type "LORAMOE" or "MOLA"; r, lora_alpha, lora_dropout; target_modules, a
        list or a mapping of name to bool; routing_strategy "loramoe" or "mola"; num_experts; top_k (2; MoLA only);
        base_model_name_or_path; task_type: CAUSAL_LM, QUESTION_ANS, SEQ_CLS or null. Read where they are there:
        lora_init; for MoLA router_loss (false) and router_aux_loss_coef (0.001), which its trainer does not write and
        we do where the loss is on; name and task_name, which say nothing of the tensors. Scale is lora_alpha / r, with
        use_rslora lora_alpha / sqrt(r).
    ``adapter_model.bin``
        ``torch.save`` of a flat dict of float32 ``nn.Parameter``. ``classifier`` (labels, hidden) for SEQ_CLS; then for
        each layer l and each target, attention first, with ``<p>`` for ``loramoe`` or ``mola``:
        ``<p>.layers.{l}.{self_attn,mlp}.{projection}.moe_gate.weight`` (E, in) and, for each expert e,
        ``….experts.{e}.lora_A.weight`` (r, in), ``….experts.{e}.lora_B.weight`` (out, r). Every layer is adapted.
        LoRAMoE has experts in the FFN only: on attention it is plain LoRA, ``….lora_A.weight``, ``….lora_B.weight``.
        ``adapter_model.safetensors`` with the same keys is read where it is there.

    Told by peft_type. Routers: LoRAMoE ``softmax``, dense and without a loss; MoLA ``mola`` with the pooled balance
    loss, off by default. Plain LoRA of the same trainer has PEFT's layout, MixLoRA its own.

    ``classifier`` is the weight of a head without a bias that looks at the last real token: the ``score`` of
    transformers' sequence classification models, so load it on one with as many labels. MoE-PEFT's own loader builds it
    only where the configuration has a task_name, and else goes on with the language model's head without a word.

    Quirks: its loader takes random numbers for a tensor that is missing, here that is an error. use_dora is refused:
    the trained magnitudes were never saved. It draws a dropout mask for each expert; here training goes on with one
    (``expert_dropout``).
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS)

    def detect(self, folder: Folder) -> str | None:
        if not folder.has(ADAPTER_CONFIG):
            return None
        kind = folder.mapping(ADAPTER_CONFIG).get("peft_type")
        return f"{ADAPTER_CONFIG} has peft_type {kind!r}" if kind in ("LORAMOE", "MOLA") else None

    def read(self, folder: Folder) -> MoEPEFTStored:
        path = folder.path / ADAPTER_CONFIG
        config = parse_known(MoEPEFTConfig, folder.mapping(ADAPTER_CONFIG), path)
        if wrong := config.wrong():
            raise CheckpointError(f"{path}: {'; '.join(wrong)}; this checkpoint cannot be read as MoE-PEFT's")
        file = folder.tensors(*ADAPTER_TENSORS)
        refuse_excess(path, file, num_experts=config.num_experts, r=config.r)
        pattern = re.compile(_KEY.format(prefix=config.prefix))
        modules = [f"model.{module}" for module in modules_of(file, pattern)]
        refuse_gaps(file.path, modules, [f".{name}" for name in config.targets()])
        plain = [name for name in modules if config.peft_type == "LORAMOE" and ".self_attn." in name]
        groups = [group for group in ([name for name in modules if name not in plain], plain) if group]
        stored = MoEPEFTStored(
            folder=folder.path,
            backbone=BackboneConfig(name=config.base_model_name_or_path, quantization=None),
            architecture=Architecture(),
            mixture=_mixture(config, groups, plain, path),
            file=file,
            detail=config.peft_type,
            prefix=config.prefix,
            groups=groups,
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        reasons: list[str] = []
        task_type = task_of(content, reasons)
        refuse_unwritable("moe_peft", [*reasons, *_reasons(content), *against_gaps(content)])
        routed = next(site for site in content.mixture.sites if site.router is not None)
        router, lora = routed.router, Lora.of(routed)
        assert router is not None
        prefix = {"softmax": "loramoe", "mola": "mola"}[router.kind]
        names = {name.rpartition(".")[2] for each in content.sites for name in each}
        config: dict[str, Any] = {"use_rslora": True} if lora.rslora else {}
        config |= {"bias": "none", "peft_type": prefix.upper(), **lora.numbers()}
        config["target_modules"] = [name for name in (*ATTENTION, *FFN) if name in names]
        config |= {"routing_strategy": prefix, "num_experts": routed.experts.num_experts, **_router_values(router)}
        config |= {"base_model_name_or_path": content.backbone.name, "task_type": task_type}
        write_pair(folder, config, _tensors(content, prefix))


def _mixture(config: MoEPEFTConfig, groups: Sequence[list[str]], plain: list[str], path: Path) -> MixtureConfig:
    router: dict[str, Any] = {"kind": "softmax", "aux_loss_coef": 0.0}
    if config.peft_type == "MOLA":
        loss = config.router_aux_loss_coef if config.router_loss else 0.0
        router = {"kind": "mola", "top_k": config.top_k, "balance": "pooled", "aux_loss_coef": loss}
    sites = [
        {"target": group, "experts": experts_of(config, 1)}
        if group is plain
        else {"target": group, "experts": experts_of(config, config.num_experts), "router": router}
        for group in groups
    ]
    return parse(MixtureConfig, {"sites": sites, "modules_to_save": saved_modules(config.task_type)}, path)


def _reasons(content: Content) -> list[str]:
    """All that stands against writing a mixture."""
    reasons, routed, options = [], set(), set()
    for site, names in zip(content.mixture.sites, content.sites, strict=True):
        experts, router = site.experts, site.router
        options.add(Lora.of(site))
        kind = None if router is None else router.kind
        if router is not None:
            routed.add((experts.num_experts, str(router.to_dict())))
        if experts.kind not in ("lora", "rslora"):
            reasons.append(f"its experts are lora or rslora, found {experts.kind}")
        if kind not in ("softmax", "mola", None) or (router is not None and router.share != "module"):
            reasons.append(f"each site has a router softmax or mola of its own, or none, found {kind}")
        if (
            len({*experts.ranks, *map(str, experts.rank_pattern)}) > 1
            or len(set(experts.alphas)) > 1
            or experts.alpha_pattern
        ):
            reasons.append("it has one r and one alpha, found several")
        for name in names:
            match = _SITE.fullmatch(name)
            attention = ".self_attn." in name
            if match is None or match["name"] not in (ATTENTION if attention else FFN):
                reasons.append(f"it has no place for {name!r}: its modules are linears of self_attn and mlp")
            elif kind == "softmax" and attention:
                reasons.append("with the router softmax it has plain LoRA on attention, found experts there")
            elif kind is None and not attention:
                reasons.append("its FFN is routed, found plain LoRA there")
    if len(options) > 1:
        reasons.append("it has one kind, r, alpha and dropout for all, found several")
    if len(routed) != 1:
        reasons.append(f"it has one num_experts and one router for all, found {len(routed)}")
    elif any("'mola'" in kind for _, kind in routed) and any(site.router is None for site in content.mixture.sites):
        reasons.append("with the router mola all its sites are routed, found plain LoRA")
    return reasons


def _router_values(router: Any) -> dict[str, Any]:
    """The router's options; those that the reference does not write only where they differ from its defaults."""
    if router.kind == "softmax":
        tell_lost("moe_peft", [f"aux_loss_coef {router.aux_loss_coef}"] if router.aux_loss_coef else [])
        return {}
    values = {"top_k": router.top_k}
    if router.aux_loss_coef and router.balance == "pooled":
        return values | {"router_loss": True, "router_aux_loss_coef": router.aux_loss_coef}
    tell_lost("moe_peft", [f"aux_loss_coef {router.aux_loss_coef} per layer"] if router.aux_loss_coef else [])
    return values


def _tensors(content: Content, prefix: str) -> dict[str, Tensor]:
    """The tensors in the published order: layer, attention before FFN, projection, the gate, then each expert."""
    configs = {name: site for site, names in zip(content.mixture.sites, content.sites, strict=True) for name in names}
    own = {name: value for name, value in content.tensors.items() if name != HEAD_TENSOR}
    inner = Content(content.backbone, content.architecture, content.mixture, content.sites, own)
    cut = cut_modules(inner, "", lambda name: _places(configs[name]))
    tensors = {f"{prefix}.{key.removeprefix('model.')}": value for key, value in cut.items()}
    head = {HEAD_KEY: content.tensors[HEAD_TENSOR].clone()} if HEAD_TENSOR in content.tensors else {}
    return head | {key: tensors[key] for key in sorted(tensors, key=_place)}


def _place(key: str) -> tuple[Any, ...]:
    """Sort key that gives the published order."""
    match = _WRITTEN.fullmatch(key)
    assert match is not None
    _, _, layer, block, projection = match["module"].split(".")
    names = ATTENTION if block == "self_attn" else FFN
    expert = -1 if match["expert"] is None else int(match["expert"])
    return (int(layer), block == "mlp", names.index(projection), expert, match["which"] or key)
