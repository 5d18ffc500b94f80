"""What the two layouts of X-LoRA share: the options of the classifier, and a checkpoint of it with its adapters.

Source: EricLBuehler/xlora 8217992; huggingface/peft 0.21.2, tuners/xlora.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..config import BackboneConfig, Closed, MixtureConfig
from ..errors import CheckpointError
from .by_module import in_order
from .folder import Folder
from .layout import LAYOUTS, Part, Shape, Stored, inspect, refuse
from .peft_files import UNKNOWN
from .peft_patterns import most_common, site_patterns
from .reading import parse
from .tensor_file import JoinedFile, TensorFile

logger = logging.getLogger(__name__)

Positive = Annotated[int, Field(gt=0)]

# Their names of our router's options.
NAMES = {
    "depth": "xlora_depth",
    "size": "xlora_size",
    "dropout": "xlora_dropout_p",
    "layerwise": "layerwise_scalings",
    "softmax": "enable_softmax",
    "temperature": "softmax_temperature",
    "top_k": "top_k_lora",
    "softmax_topk": "enable_softmax_topk",
    "scaling_pass_value": "scaling_pass_value",
    "global_scaling_weight": "global_scaling_weight",
}
ROUTER = ".router.layers."


class XLoRAOptions(Closed):
    """What both configuration files say of the classifier, with the defaults of the code that reads them."""

    hidden_size: Positive
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: Annotated[int, Field(gt=0, le=100)] = 1
    xlora_size: Positive = 2048
    xlora_dropout_p: Annotated[float, Field(ge=0, lt=1)] = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k_lora: Positive | None = None
    scaling_pass_value: float | None = 0.0
    global_scaling_weight: float = 1.0

    @property
    def relu(self) -> bool:
        """Whether there is a ReLU between the linears."""
        return True

    @property
    def bias(self) -> bool:
        """Whether the linears have one."""
        return True

    def router(self) -> dict[str, Any]:
        """Our router with these options."""
        return {
            "kind": "xlora",
            "relu": self.relu,
            "bias": self.bias,
            **{ours: getattr(self, theirs) for ours, theirs in NAMES.items()},
        }


@dataclass(frozen=True)
class Factor:
    """The two matrices of one adapter at one linear: their keys in the joined file, their shapes, and the numerator of
    their scale.
    """

    A: str
    B: str
    rank: int
    widths: tuple[int, int]
    alpha: float


@dataclass(frozen=True)
class Expert:
    """A finished adapter in a folder of its own, of which the headers have been read.

    Attributes:
        label: where it lies, seen from the checkpoint. scaling: ``lora`` or ``rslora``. factors: by module.
    """

    label: str
    file: TensorFile
    backbone: BackboneConfig
    scaling: str
    dropout: float
    factors: Mapping[str, Factor]


def read_expert(folder: Folder, label: str) -> Expert:
    """Read and check an adapter in PEFT's layout.

    Raises:
        CheckpointError: it is damaged, or no plain LoRA, which is all that is mixed.
    """
    stored = LAYOUTS.create("peft").read(folder)
    site = stored.mixture.sites[0]
    reasons = [f"experts of kind {site.experts.kind}"] if site.experts.kind not in ("lora", "rslora") else []
    reasons += ["modules that are saved whole"] if stored.mixture.modules_to_save else []
    reasons += ["linears of several kinds"] if len(stored.mixture.sites) > 1 else []
    if reasons:
        raise CheckpointError(
            f"{folder.path}: expected a plain LoRA adapter, which is all that is mixed here, found "
            f"{' and '.join(reasons)}: take another adapter"
        )
    declared = stored.declared()
    parts = stored.parts(declared)
    factors = {}
    for path in stored.sites()[0]:
        (A,), (B,) = parts[f"{path}.lora_A"], parts[f"{path}.lora_B"]
        alpha = site.experts.at(path).alphas[0]
        factors[path] = Factor(A.key, B.key, A.shape[0], (A.shape[1], B.shape[0]), alpha)
    return Expert(label, stored.file, stored.backbone, site.experts.kind, site.experts.dropout, factors)


@dataclass
class XLoRAStored(Stored):
    """A classifier over finished adapters; the tensors of each adapter stand under its label in the joined file.

    Attributes:
        options: of the classifier. linears: names of its linears in the file, first to last.
        experts: the adapters, in the order of the classifier's rows.
    """

    options: XLoRAOptions
    linears: Sequence[str]
    experts: Sequence[Expert]

    @cached_property
    def order(self) -> list[str]:
        """Paths of all linears that an adapter has something at; within a layer not in the order of the backbone."""
        return union(self.experts)

    def sites(self) -> list[list[str]]:
        return [self.order]

    def declared(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for path in self.order:
            there = [expert.factors[path] for expert in self.experts if path in expert.factors]
            total, widths = sum(factor.rank for factor in there), there[0].widths
            shapes |= {f"{path}.lora_A": (total, widths[0]), f"{path}.lora_B": (widths[1], total)}
        for index, (before, after) in enumerate(pairwise(self._widths())):
            # The classifier belongs to all sites, and is named after the first.
            name = f"{self.order[0]}{ROUTER}{index}"
            shapes |= {f"{name}.weight": (after, before), **({f"{name}.bias": (after,)} if self.options.bias else {})}
        return shapes

    def parts(self, declared: Mapping[str, Shape]) -> dict[str, list[Part]]:
        return {name: self._parts(name, shape) for name, shape in declared.items()}

    def check(self) -> None:
        """Compare the headers of all files with what the configuration promises.

        Raises:
            CheckpointError: they do not agree; the message says what is wrong, where.
        """
        key, wanted = f"{self.linears[-1]}.weight", self._widths()[-1]
        header = self.file.headers.get(key)
        if header is not None and header.shape[:1] != (wanted,):
            linears = f" for each of the {len(self.order)} linears that they adapt"
            raise CheckpointError(
                f"{self.file.path}: {self.file.named(key)}: expected {wanted} rows, one for each of the "
                f"{len(self.experts)} adapters"
                f"{linears if self.options.layerwise_scalings else ''}, found the shape {header.shape}: these are not "
                "the adapters that the classifier was trained with, or the configuration was edited; give it those"
            )
        parts = self.parts(self.declared())
        problems, _ = inspect(self.file, [part for each in parts.values() for part in each])
        refuse(self.file.path, problems, self.backbone.name)

    def _widths(self) -> list[int]:
        outputs = len(self.experts) * (len(self.order) if self.options.layerwise_scalings else 1)
        return [self.options.hidden_size, *[self.options.xlora_size] * (self.options.xlora_depth - 1), outputs]

    def _parts(self, name: str, shape: Shape) -> list[Part]:
        path, _, tail = name.rpartition(ROUTER)
        if path:
            index, _, which = tail.partition(".")
            return [Part(f"{self.linears[int(index)]}.{which}", shape)]
        path, _, which = name.rpartition(".")
        result, start = [], 0
        for expert in self.experts:
            factor = expert.factors.get(path)
            if factor is None:
                continue
            piece = slice(start, start + factor.rank)
            start += factor.rank
            if which == "lora_A":
                result.append(Part(f"{expert.label}/{factor.A}", (factor.rank, shape[1]), (piece,)))
            else:
                result.append(Part(f"{expert.label}/{factor.B}", (shape[0], factor.rank), (slice(None), piece)))
        return result


def union(experts: Iterable[Expert]) -> list[str]:
    """Paths of all linears that an adapter has something at, in the order of layers."""
    return sorted(dict.fromkeys(path for expert in experts for path in expert.factors), key=in_order)


def experts_of(experts: Sequence[Expert], trained: bool = False) -> dict[str, Any]:
    """Our options of these adapters, for the sites of :func:`union`.

    Args:
        trained: not kind ``frozen`` where all of them adapt every linear and are scaled in one way.
    """
    usual = [most_common([factor.alpha for factor in expert.factors.values()]) for expert in experts]
    ranks, alphas = {}, {}
    for site in union(experts):
        factors = [expert.factors.get(site) for expert in experts]
        ranks[site] = [0 if factor is None else factor.rank for factor in factors]
        alphas[site] = [given if factor is None else factor.alpha for factor, given in zip(factors, usual, strict=True)]
    r, alpha = (list(most_common([tuple(value) for value in each.values()])) for each in (ranks, alphas))
    scalings = [expert.scaling for expert in experts]
    dropout = max(expert.dropout for expert in experts)
    whole = all(0 not in each for each in ranks.values()) and len(set(scalings)) == 1
    values: dict[str, Any] = {
        "kind": scalings[0] if trained and whole else "frozen",
        "num_experts": len(experts),
        "r": r if len(set(r)) > 1 else r[0],
        "alpha": alpha if len(set(alpha)) > 1 else alpha[0],
        "rank_pattern": site_patterns(ranks, r),
        "alpha_pattern": site_patterns(alphas, alpha),
        "dropout": dropout,
        "expert_dropout": "separate" if dropout > 0 else "shared",
    }
    if values["kind"] == "frozen":
        values["scaling"] = scalings[0] if len(set(scalings)) == 1 else scalings
        values["names"] = _names(experts)
    return values


def mixture_of(options: XLoRAOptions, experts: Sequence[Expert], path: Path) -> MixtureConfig:
    """The mixture of these adapters under a classifier with these options.

    Args:
        path: of the configuration, for messages.

    Raises:
        CheckpointError: the options do not hold together.
    """
    sites = union(experts)
    values = experts_of(experts, options.use_trainable_adapters)
    _warn(options, experts, sites)
    mixture = {"target": sites, "experts": values, "router": options.router()}
    return parse(MixtureConfig, {"sites": [mixture]}, path)


def _names(experts: Sequence[Expert]) -> list[str] | None:
    """The names of the adapters' folders, where each has one of its own that fits."""
    from ..experts.frozen import FrozenConfig

    names = [expert.label.rpartition("/")[2] for expert in experts]
    try:
        return FrozenConfig.parse({"num_experts": len(names), "names": names}).names
    except ValueError:
        return None


def _warn(options: XLoRAOptions, experts: Sequence[Expert], sites: Sequence[str]) -> None:
    """Say what of the checkpoint is not as it looks."""
    dropouts = {expert.label: expert.dropout for expert in experts}
    if len(set(dropouts.values())) > 1:
        logger.warning("the adapters have different lora_dropout, training goes on with the largest: %s", dropouts)
    partial = [expert.label for expert in experts if len(expert.factors) < len(sites)]
    if partial:
        logger.warning(
            "%s adapt fewer linears than the %d that all adapters together have, and add nothing elsewhere; old PEFT "
            "fails on such a mixture (its issue 2485)",
            ", ".join(partial),
            len(sites),
        )
    if options.top_k_lora is not None and options.scaling_pass_value != 0:
        logger.warning(
            "scaling_pass_value %s with top_k_lora %s: here every adapter has that weight in the first pass, in the "
            "published code only top_k_lora of them, whichever come first: results may differ",
            options.scaling_pass_value,
            options.top_k_lora,
        )


def join(path: Path, classifier: TensorFile, experts: Sequence[Expert]) -> JoinedFile:
    """The classifier's file and those of the adapters as one."""
    files: dict[str, tuple[str, TensorFile]] = {classifier.path.name: ("", classifier)}
    return JoinedFile(path, {**files, **{each.label: (f"{each.label}/", each.file) for each in experts}})


def backbone_of(name: str | None, revision: str | None, experts: Sequence[Expert]) -> BackboneConfig:
    """The backbone that the configuration names, else the one that the adapters name."""
    if name is not None:
        return BackboneConfig(name=name, quantization=None, revision=revision)
    named = [expert.backbone for expert in experts if expert.backbone.name != UNKNOWN]
    return most_common(named) if named else experts[0].backbone
