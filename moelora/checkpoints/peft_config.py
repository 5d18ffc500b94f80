"""``adapter_config.json`` of a LoRA adapter of PEFT, and what of it changes the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..config import fits
from ..errors import CheckpointError
from .layout import Shape
from .peft_files import AdapterConfig
from .peft_patterns import most_common, parse_pattern, possible, site_patterns, told_by_rank
from .reading import parse_known

Rank = Annotated[int, Field(gt=0)]

# Keys whose every value other than "nothing" changes what the tensors mean.
_REFUSED = {
    "bias": "biases of the backbone were trained too, which experts do not have",
    "lora_bias": "lora_B has a bias, which experts do not have",
    "layer_replication": "layers of the backbone are used several times",
    "target_parameters": "tensors that are no weight of a linear are adapted",
    "trainable_token_indices": "single rows of the embeddings were trained",
    "alora_invocation_tokens": "the adapter is off until certain tokens have come",
    "use_qalora": "the input is pooled before lora_A",
    "use_bdlora": "the factors are stored as blocks of larger ones",
    "kasa_config": "the backbone's weights are changed, and singular values stand between the factors",
    "monteclora_config": "the factors are drawn anew for each forward",
    "megatron_config": "the linears are those of Megatron",
    "arrow_config": "a router chooses among other adapters: give the folder of the router, see layout peft_arrow",
}
# Initialisations that leave the backbone's weights as they are.
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Modules that PEFT's classes for a task add to modules_to_save, whether the backbone has them or not.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class PeftConfig(AdapterConfig):
    """The keys of ``LoraConfig`` of peft 0.21.2. Those that are of no matter for the numbers are of any type."""

    bias: Any = "none"
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str = True
    # Which modules and how they started, and a backward pass of their own (VeLoRA).
    exclude_modules: Any = None
    layers_pattern: Any = None
    loftq_config: Any = None
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    runtime_config: Any = None
    megatron_core: Any = None
    qalora_group_size: Any = None
    # Refused unless they say nothing.
    lora_bias: Any = None
    layer_replication: Any = None
    target_parameters: Any = None
    trainable_token_indices: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: Any = None
    use_bdlora: Any = None
    kasa_config: Any = None
    monteclora_config: Any = None
    megatron_config: Any = None
    arrow_config: Any = None

    @property
    def kind(self) -> str:
        """Of the experts."""
        return "dora" if self.use_dora else "rslora" if self.use_rslora else "lora"

    def optional_heads(self) -> tuple[str, ...]:
        """Those of ``modules_to_save`` that the backbone may lack."""
        return _HEADS.get(self.task_type or "", ())


def read_config(values: Mapping[str, Any], path: Path) -> PeftConfig:
    """Check the contents of ``adapter_config.json``.

    Raises:
        CheckpointError: it is damaged, or has keys that change what the tensors mean in a way that experts cannot.
    """
    reasons = [
        f"{key}: {json.dumps(values[key])[:80]}: {why}"
        for key, why in _REFUSED.items()
        if values.get(key) not in (None, False, "none", [], {})
    ]
    config = parse_known(PeftConfig, {key: value for key, value in values.items() if key != "runtime_config"}, path)
    if config.init_lora_weights not in _INITS:
        reasons.append(
            f"init_lora_weights: {json.dumps(config.init_lora_weights)}: it took a part out of the backbone's weights, "
            "so the factors belong to weights that are not saved; save the adapter again from PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    if config.ensure_weight_tying and config.modules_to_save:
        reasons.append("ensure_weight_tying: true: modules that are saved whole share a weight")
    if reasons:
        raise CheckpointError(
            f"{path}: this adapter is more than low-rank factors of linears, so it cannot be read as experts: "
            f"{'; '.join(reasons)}. Merge it into its backbone with PEFT, or train without these options"
        )
    return config


def experts_of(config: PeftConfig, ranks: Mapping[str, int], path: Path) -> dict[str, Any]:
    """Our options of one expert at each module.

    Args:
        ranks: of every module, from its tensors.

    Raises:
        CheckpointError: ``rank_pattern`` says otherwise, or a regular expression decides on alpha.
    """
    alphas = _alphas(config, ranks, path)
    if config.use_dora and config.use_rslora:
        # The scale of kind dora is alpha / r.
        alphas = {module: alpha * math.sqrt(ranks[module]) for module, alpha in alphas.items()}
    r, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "kind": config.kind,
        "num_experts": 1,
        "r": r,
        "alpha": alpha,
        "dropout": config.lora_dropout,
        "rank_pattern": site_patterns(ranks, r),
        "alpha_pattern": site_patterns(alphas, alpha),
    }


def _alphas(config: PeftConfig, ranks: Mapping[str, int], path: Path) -> dict[str, float]:
    rank_pattern, alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    told = told_by_rank(alpha_pattern, rank_pattern, config.r)
    alphas: dict[str, float] = {}
    for module, rank in ranks.items():
        allowed = possible(module, rank, rank_pattern, config.r, {})
        if rank not in allowed:
            raise CheckpointError(
                f"{path}: rank_pattern: gives {module!r} the rank {allowed[-1]}, its tensors have {rank}; PEFT could "
                "not load it: restore the configuration"
            )
        values = set(possible(module, rank, alpha_pattern, config.lora_alpha, told))
        if len(values) > 1:
            keys = [key for key in alpha_pattern if parse_pattern(key) is None and key not in told]
            raise CheckpointError(
                f"{path}: alpha_pattern: {', '.join(map(repr, keys))}: regular expressions from a file are not run, "
                f"and the alpha of {module!r} depends on them (one of {sorted(values)}); write the paths of the "
                "modules in their place"
            )
        alphas[module] = values.pop()
    return alphas


def check_targets(config: PeftConfig, modules: Iterable[str], path: Path) -> None:
    """Compare the names of ``target_modules`` with the modules that have tensors.

    A regular expression, ``"all-linear"`` and null name nothing that could be compared.

    Raises:
        CheckpointError: PEFT would leave out a module, or one that it would expect has no tensors.
    """
    modules = list(modules)
    problems = []
    if isinstance(config.target_modules, list):
        names = config.target_modules
        problems += [f"{m!r} has tensors, but no name fits it" for m in modules if not any(fits(m, n) for n in names)]
        problems += [f"{n!r} fits no module with tensors" for n in names if not any(fits(m, n) for m in modules)]
    if config.layers_to_transform is not None:
        layers = config.layers_to_transform
        wanted = {str(layer) for layer in (layers if isinstance(layers, list) else [layers])}
        problems += [
            f"{m!r} has tensors, but layers_to_transform is {layers}" for m in modules if not wanted & set(m.split("."))
        ]
    if problems:
        raise CheckpointError(
            f"{path}: target_modules: does not agree with the tensors: {'; '.join(problems[:20])}; copy the adapter "
            "again, or correct target_modules"
        )


def saved_modules(config: PeftConfig, keys: Iterable[str], path: Path) -> dict[str, list[str]]:
    """The tensors of the modules that are saved whole, by the path of the module; PEFT compares ends of paths.

    Args:
        keys: names of tensors without the prefix, and without those of LoRA.

    Raises:
        CheckpointError: a module of ``modules_to_save`` has no tensors.
    """
    names = config.modules_to_save or []
    found: dict[str, list[str]] = {}
    for key in keys:
        parts = key.split(".")
        paths = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        module = next((each for each in paths if any(each.endswith(name) for name in names)), None)
        if module is not None:
            found.setdefault(module, []).append(key)
    missing = [name for name in names if not any(module.endswith(name) for module in found)]
    if missing := [name for name in missing if name not in config.optional_heads()]:
        raise CheckpointError(
            f"{path}: modules_to_save: {', '.join(map(repr, missing))}: no tensors of such a module beside it: copy "
            "the adapter again, or take the name out"
        )
    return found


def misshapen(modules: Mapping[str, Mapping[str, Shape]], prefix: str) -> list[str]:
    """A line for each tensor whose shape is not that of a linear's factors: A (r, in), B (out, r), magnitude (out,)."""
    problems = []
    for module, tensors in modules.items():
        A, B = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
        if A is not None and (len(A) != 2 or not A[0]):
            problems.append(f"misshapen: {prefix}{module}.lora_A.weight: expected (r, in) of a linear, found {A}")
        elif B is not None and (len(B) != 2 or (A is not None and B[1] != A[0])):
            wanted = "(out, r)" if A is None else f"(out, {A[0]})"
            problems.append(f"misshapen: {prefix}{module}.lora_B.weight: expected {wanted}, found {B}")
        for name, shape in tensors.items():
            if name.startswith("lora_magnitude_vector") and B is not None and shape != B[:1]:
                problems.append(f"misshapen: {prefix}{module}.{name}: expected {B[:1]}, found {shape}")
    return problems
