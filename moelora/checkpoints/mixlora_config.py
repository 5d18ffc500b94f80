"""``adapter_config.json`` of MixLoRA and our configuration, from one to the other."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..config import MixtureConfig, SiteConfig
from ..errors import CheckpointError
from .layout import Content
from .moe_peft_config import ATTENTION, DORA, FFN, TASK_TYPES, Lora, LoraOptions, experts_of, saved_modules, task_of
from .reading import load_mapping, parse, parse_known

logger = logging.getLogger(__name__)

_OLD_TARGETS = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_KINDS = {
    "mixlora": "topk",
    "mixtral": "topk",
    "mixlora-dynamic": "topp",
    "mixlora-switch": "switch",
    "switch": "switch",
}
_STRATEGIES = {"topk": "mixlora", "topp": "mixlora-dynamic", "switch": "mixlora-switch"}
_PROJECTION = re.compile(r".*\.mlp\.([^.]+)\.lora_A")
_SITE = re.compile(r"(?:.*?\.)?([0-9]+)\.(.+)")


class AdapterConfig(LoraOptions):
    """The file, with the defaults of the reference loader for what is absent."""

    peft_type: str
    task_type: str | None
    base_model_name_or_path: str
    target_modules: list[str] | dict[str, bool]
    expert_lora: dict[str, Any] | None = None
    routing_strategy: str
    num_experts: Annotated[int, Field(gt=0)]
    act_fn: str | None = None
    top_k: int = 2
    top_p: float = 0.8
    temperature: float = 0.0
    expert_capacity: int = 32
    sparse_step: int | None = None
    ffn_dropout: float = 0.0
    router_loss: bool = True
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.001
    router_init_range: float | None = None
    jitter_noise: float | None = None

    def targets(self) -> list[str]:
        """Names of the target modules, as the file has them."""
        if isinstance(self.target_modules, dict):
            return [name for name, on in self.target_modules.items() if on]
        return self.target_modules


def read_config(path: Path) -> AdapterConfig:
    """The file, checked.

    Raises:
        CheckpointError: a key is missing, unknown, or has a value that means nothing or cannot be represented.
    """
    config = parse_known(AdapterConfig, load_mapping(path), path)
    allowed = {
        "peft_type": ("MIXLORA",),
        "bias": ("none",),
        "routing_strategy": tuple(_KINDS),
        "lora_init": ("original", "gaussian"),
        "task_type": TASK_TYPES,
    }
    wrong = [
        f"{key}: expected {' or '.join(repr(value) for value in values)}, found {getattr(config, key)!r}"
        for key, values in allowed.items()
        if getattr(config, key) not in values
    ]
    known = {*ATTENTION, *FFN, *_OLD_TARGETS}
    wrong += [
        f"target_modules: expected names among {', '.join(sorted(known))}, found {name!r}"
        for name in config.targets()
        if name not in known
    ]
    if not {_OLD_TARGETS.get(name, name) for name in config.targets()} & set(FFN):
        wrong.append(f"target_modules: expected at least one of {', '.join(FFN)}, found {config.targets()}")
    if config.use_dora or (config.expert_lora or {}).get("use_dora"):
        wrong.append(DORA)
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}; this checkpoint cannot be read as MixLoRA")
    return config


def mixture_of(config: AdapterConfig, path: Path) -> MixtureConfig:
    """The mixture that the file describes: the FFN blocks, routed, and plain LoRA on attention.

    Raises:
        CheckpointError: values that do not hold together.
    """
    if config.ffn_dropout:
        logger.warning("%s: ffn_dropout %s has no counterpart here; training goes on without", path, config.ffn_dropout)
    plain = {name: getattr(config, name) for name in LoraOptions.model_fields}
    replaced = config.expert_lora or {}
    ignored = [key for key in replaced if key not in plain]
    if ignored:
        logger.warning("%s: keys of expert_lora that MixLoRA does not have are ignored: %s", path, ", ".join(ignored))
    special = {key: value for key, value in replaced.items() if key in plain}
    experts = parse(LoraOptions, {**plain, **special}, path)
    targets = {_OLD_TARGETS.get(name, name) for name in config.targets()}
    sites: list[dict[str, Any]] = [
        {
            "target": "mlp",
            "projections": [name for name in FFN if name in targets],
            "experts": experts_of(experts, config.num_experts),
            "router": _router(config),
        }
    ]
    attention = [name for name in ATTENTION if name in targets]
    if attention:
        main = parse(LoraOptions, plain, path)
        sites.append({"target": attention, "experts": experts_of(main, 1)})
    return parse(MixtureConfig, {"sites": sites, "modules_to_save": saved_modules(config.task_type)}, path)


def _router(config: AdapterConfig) -> dict[str, Any]:
    kind = _KINDS[config.routing_strategy]
    router: dict[str, Any] = {
        "kind": kind,
        "aux_loss_coef": config.router_aux_loss_coef if config.router_loss else 0.0,
    }
    if config.router_init_range is not None:
        router["init_std"] = config.router_init_range
    if config.jitter_noise is not None:
        router["jitter"] = config.jitter_noise
    if kind == "topk":
        router["top_k"] = config.top_k
    elif kind == "topp":
        router.update(top_p=config.top_p, temperature=config.temperature)
    else:
        router.update(
            expert_capacity=config.expert_capacity,
            z_loss_coef=config.router_z_loss_coef if config.router_loss else 0.0,
        )
    return router


def adapter_config(content: Content) -> dict[str, Any]:
    """The file for a mixture, keys in the published order.

    Raises:
        CheckpointError: MixLoRA cannot express the mixture; every reason is named.
    """
    reasons: list[str] = []
    task_type = task_of(content, reasons)
    routed, plain = _roles(content, reasons)
    main = Lora.of(plain[0]) if plain else Lora.of(routed)
    special = Lora.of(routed)
    adapted = {name.rpartition(".")[2] for names in content.sites for name in names}
    adapted |= {match[1] for name in content.tensors if (match := _PROJECTION.fullmatch(name))}
    values: dict[str, Any] = {"use_rslora": True} if main.rslora else {}
    values |= {"bias": "none", "peft_type": "MIXLORA", **main.numbers()}
    values["target_modules"] = [name for name in (*ATTENTION, *FFN) if name in adapted]
    if special != main:
        flags = {"use_rslora": special.rslora} if special.rslora != main.rslora else {}
        values["expert_lora"] = {**flags, "bias": "none", **special.numbers()}
        logger.warning("the published loader of MixLoRA ignores expert_lora: it gives the experts attention's options")
    if 0.0 in (main.dropout, special.dropout):
        logger.warning("the published loader of MixLoRA refuses lora_dropout 0.0: it wants a number above 0 there")
    assert routed.router is not None
    return values | {
        "routing_strategy": _STRATEGIES[routed.router.kind],
        "num_experts": routed.experts.num_experts,
        "act_fn": content.architecture.hidden_act,
        **_router_values(routed.router),
        "base_model_name_or_path": content.backbone.name,
        "task_type": task_type,
    }


def _roles(content: Content, reasons: list[str]) -> tuple[SiteConfig, list[SiteConfig]]:
    """The site configuration of the FFN blocks and those of attention, after checking that both can be expressed."""
    routed: list[SiteConfig] = []
    plain: list[SiteConfig] = []
    layers: dict[str, set[int]] = {}
    for site, names in zip(content.mixture.sites, content.sites, strict=True):
        matches = [_SITE.fullmatch(name) for name in names]
        inner = {match[2] if match else name for match, name in zip(matches, names, strict=True)}
        for match in matches:
            if match:
                layers.setdefault(match[2], set()).add(int(match[1]))
        if inner == {"mlp"}:
            routed.append(site)
            reasons += _router_reasons(site)
        elif inner <= {f"self_attn.{name}" for name in ATTENTION}:
            plain.append(site)
            if site.experts.num_experts > 1 or site.router is not None:
                reasons.append("it has plain LoRA on attention, this mixture has routed experts there")
        else:
            reasons.append(f"it has no place for {sorted(inner)}")
        reasons += _expert_reasons(site)
    if len(routed) != 1:
        reasons.append(f"it needs one site configuration on the FFN blocks (mlp), this mixture has {len(routed)}")
    count = content.architecture.num_hidden_layers or 1 + max((max(each) for each in layers.values()), default=0)
    for name, each in layers.items():
        if each != set(range(count)):
            reasons.append(f"it adapts every one of the {count} layers, this mixture has {name} in {len(each)}")
    if content.architecture.hidden_act is None:
        reasons.append("it records the backbone's nonlinearity (act_fn), which this checkpoint does not")
    if not reasons and len({Lora.of(site) for site in plain}) > 1:
        reasons.append("it has one kind, r, alpha and dropout for all of attention, this mixture has several")
    if reasons:
        unique = "; ".join(dict.fromkeys(reasons))
        raise CheckpointError(f"MixLoRA's layout cannot express this mixture: {unique}. Keep the native layout")
    return routed[0], plain


def _expert_reasons(site: SiteConfig) -> list[str]:
    reasons = []
    if site.experts.kind not in ("lora", "rslora"):
        reasons.append(f"it has experts of the kinds lora and rslora, found {site.experts.kind}")
    elif len(set(site.experts.ranks)) > 1 or len(set(site.experts.alphas)) > 1:
        reasons.append("its experts all have the same r and alpha, found several")
    if site.experts.rank_pattern or site.experts.alpha_pattern:
        reasons.append("it has no r and no alpha for single layers, found rank_pattern or alpha_pattern")
    return reasons


def _router_reasons(site: SiteConfig) -> list[str]:
    router = site.router
    if router is None:
        return ["its FFN blocks have a router, found none"]
    if router.kind not in _STRATEGIES:
        return [f"its routers are {', '.join(_STRATEGIES)}, found {router.kind}"]
    reasons = []
    if router.kind == "topk" and not router.normalize:
        reasons.append("its top-k weights are normalised, found normalize: false")
    if router.kind == "topp" and router.normalize:
        reasons.append("its top-p weights are not normalised, found normalize: true")
    if router.kind == "switch" and router.expert_capacity is None:
        reasons.append("its switch router has an expert_capacity, found none")
    return reasons


def _router_values(router: Any) -> dict[str, Any]:
    """The router's options; those that the reference does not write only where they differ from its defaults."""
    values: dict[str, Any]
    optional = {"router_aux_loss_coef": (router.aux_loss_coef, 0.001)}
    lost = []
    if router.kind == "topk":
        values = {"top_k": router.top_k}
    elif router.kind == "topp":
        values = {"top_p": router.top_p, "temperature": router.temperature}
    else:
        values = {"expert_capacity": router.expert_capacity, "sparse_step": None}
    switch = router.kind == "switch"
    optional["router_init_range"] = (router.init_std, 1.0 if switch else 0.02)
    if switch:
        optional["router_z_loss_coef"] = (router.z_loss_coef, 0.001)
    elif router.z_loss_coef:
        lost.append("z_loss_coef")
    if router.kind != "topk":
        optional["jitter_noise"] = (router.jitter, 0.01 if switch else 0.0)
    elif router.jitter:
        lost.append("jitter (the published loader would apply it in inference too)")
    if lost:
        logger.warning("options of training that MixLoRA's layout does not keep: %s", ", ".join(lost))
    return values | {key: value for key, (value, default) in optional.items() if value != default}
