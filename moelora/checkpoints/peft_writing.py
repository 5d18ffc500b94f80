"""A mixture as a LoRA adapter of PEFT: what PEFT can express, and how; see ``peft.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..config import SiteConfig, fits
from .by_module import PEFT_PREFIX
from .layout import Content
from .peft_files import UNKNOWN
from .peft_patterns import most_common

KINDS = ("lora", "rslora", "dora", "frozen")
MAGNITUDE = "lora_magnitude_vector"
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings")

_TENSOR = re.compile(r"(?P<module>.+)\.(?P<name>lora_A|lora_B|magnitude)")
_TAILS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": MAGNITUDE}
# Models whose linears are transformers' Conv1D, with the weight the other way round.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Update:
    """The scale of one module's expert, as its configuration says it."""

    rank: int
    alpha: float
    scale: float
    style: str

    @property
    def sign(self) -> int:
        """Of the scale: -1, 0 or 1."""
        return (self.scale > 0) - (self.scale < 0)

    @classmethod
    def of(cls, site: SiteConfig, path: str) -> Update:
        """Of the first expert of a site."""
        experts = site.experts.at(path)
        style = experts.kind
        if style == "frozen":
            given = experts.scaling[0] if isinstance(experts.scaling, list) else experts.scaling
            style = given if isinstance(given, str) else "number"
        return cls(experts.ranks[0], experts.alphas[0], experts.scales[0], style)


class WrittenAdapter:
    """The two files of an adapter, from a mixture.

    Attributes:
        modules: of every adapted linear, in the order of the sites; a block has several. saved: names of the tensors of
            modules that are saved whole. left: tensors that have no place.
    """

    def __init__(self, content: Content) -> None:
        self.content = content
        owners = {
            name: site for site, names in zip(content.mixture.sites, content.sites, strict=True) for name in names
        }
        self.modules: dict[str, Update] = {}
        self.saved: list[str] = []
        self.left: list[str] = []
        for name in content.tensors:
            match = _TENSOR.fullmatch(name)
            owner = (
                None if match is None else next((each for each in _upwards(match["module"]) if each in owners), None)
            )
            if match is not None and owner is not None:
                if match["module"] not in self.modules:
                    self.modules[match["module"]] = Update.of(owners[owner], owner)
            elif any(fits(path, saved) for path in _upwards(name) for saved in content.mixture.modules_to_save):
                self.saved.append(name)
            else:
                self.left.append(name)

    @cached_property
    def adapted(self) -> dict[str, Update]:
        """The modules without those of rank 0, where nothing is added."""
        return {module: update for module, update in self.modules.items() if update.rank}

    @cached_property
    def style(self) -> str:
        """How the file states scales: ``lora``, ``rslora``, ``dora``, or ``mixed`` for scales times rank."""
        styles = {update.style for update in self.adapted.values()}
        return styles.pop() if len(styles) == 1 and not styles & {"number"} else "mixed"

    def reasons(self) -> list[str]:
        """All that stands against writing this mixture."""
        reasons = []
        for site in self.content.mixture.sites:
            if site.experts.kind not in KINDS:
                reasons.append(f"its experts are {' or '.join(KINDS)}, found {site.experts.kind}")
            if site.router is not None:
                reasons.append(f"its experts are always on, found router {site.router.kind}")
            if site.experts.num_experts > 1:
                reasons.append(f"it has one expert at each module, found {site.experts.num_experts}")
        dropouts = sorted({site.experts.dropout for site in self.content.mixture.sites})
        if len(dropouts) > 1:
            reasons.append(f"it has one dropout, found {dropouts}")
        if not reasons:
            reasons += [f"it has no place for {name}" for name in self.left[:20]]
            if not self.adapted:
                reasons.append("it has at least one expert of a rank above 0, found none")
            if len(styles := {update.style for update in self.adapted.values()}) > 1 and "dora" in styles:
                reasons.append("either all its modules have magnitudes or none, found both")
        return reasons

    def alphas(self) -> dict[str, float]:
        """lora_alpha of each module."""
        if self.style != "mixed":
            return {name: each.alpha for name, each in self.adapted.items()}
        return {name: abs(each.scale) * each.rank or float(each.rank) for name, each in self.adapted.items()}

    def config(self) -> dict[str, Any]:
        """The contents of ``adapter_config.json``."""
        content, backbone = self.content, self.content.backbone
        ranks, alphas = {name: update.rank for name, update in self.adapted.items()}, self.alphas()
        r, alpha = most_common(ranks.values()), most_common(alphas.values())
        return {
            "peft_type": "LORA",
            "task_type": self._task_type(),
            "base_model_name_or_path": None if backbone.name == UNKNOWN else backbone.name,
            "revision": backbone.revision,
            "inference_mode": True,
            "r": r,
            "lora_alpha": _number(alpha),
            "lora_dropout": content.mixture.sites[0].experts.dropout,
            "rank_pattern": {_escaped(name): rank for name, rank in ranks.items() if rank != r},
            "alpha_pattern": {_escaped(name): _number(each) for name, each in alphas.items() if each != alpha},
            "target_modules": self._targets(),
            "modules_to_save": self._saved_names() or None,
            "use_rslora": self.style == "rslora",
            "use_dora": self.style == "dora",
            "bias": "none",
            "fan_in_fan_out": content.architecture.model_type in _CONV1D,
            "init_lora_weights": True,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The contents of ``adapter_model.safetensors``."""
        given = self.content.tensors
        result: dict[str, Tensor] = {}
        for module, update in self.adapted.items():
            for ours, tail in _TAILS.items():
                if (value := given.get(f"{module}.{ours}")) is None:
                    continue
                if ours == "lora_B" and update.sign < 1:  # lora_alpha is above zero
                    value = value * update.sign
                result[f"{PEFT_PREFIX}{module}.{tail}"] = value[0] if ours == "magnitude" else value
        return result | {PEFT_PREFIX + name: given[name] for name in self.saved}

    def _targets(self) -> list[str]:
        """Names that fit the adapted modules and no others of the backbone.

        A target of ours fits a module where one of PEFT does; any other choice is only certain as full paths.
        """
        targets: dict[str, None] = {}
        for site, names in zip(self.content.mixture.sites, self.content.sites, strict=True):
            by_name = site.layers is None and not any(target.startswith("re:") for target in site.target)
            if by_name and all(name in self.adapted for name in names):
                targets |= dict.fromkeys(site.target)
            else:
                inside = tuple(f"{name}." for name in names)
                targets |= dict.fromkeys(m for m in self.adapted if m in names or m.startswith(inside))
        return list(targets)

    def _saved_names(self) -> list[str]:
        """Paths of the modules that are saved whole."""
        names = self.content.mixture.modules_to_save
        found = (
            next(path for path in reversed(list(_upwards(tensor))) if any(fits(path, name) for name in names))
            for tensor in self.saved
        )
        return list(dict.fromkeys(found))

    def _task_type(self) -> str | None:
        """The task decides which class PEFT wraps around the backbone; null fits every one."""
        model_type = self.content.architecture.model_type
        heads = [name for name in self._saved_names() if name.rpartition(".")[2] not in EMBEDDINGS]
        causal = model_type is None or model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return "CAUSAL_LM" if causal and not heads else None


def _upwards(path: str) -> Iterator[str]:
    """A path and those of the modules around it, innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _escaped(path: str) -> str:
    """A key of a pattern that fits this path alone, in PEFT's way of escaping."""
    return f"^{re.escape(path)}"


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
