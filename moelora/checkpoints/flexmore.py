"""The layout of FlexMoRE; see :class:`FlexMoRELayout`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import FlexOlmoConfig, Olmo2Config

from ..backbone import explained
from ..config import BackboneConfig, Closed, MixtureConfig
from ..errors import CheckpointError
from .by_module import Places, Where, cut_modules, modules_of
from .folder import MODEL_FILES, Folder
from .layout import LAYOUTS, Architecture, Content, Layout
from .peft_files import UNKNOWN, refuse_unwritable
from .reading import parse
from .tensor_file import Header, SelectedFile, TensorFile
from .whole_model import CONFIG, WHOLE_MODEL_FILES, WithModel
from .xlora_writing import write_tensors

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_KEY = re.compile(
    r"(?P<path>model\.layers\.\d{1,6}\.mlp)\."
    r"(?P<tail>gate\.weight|experts\.[1-9]\d{0,5}\.(?:gate|up|down)_proj_[ab]\.weight)"
)
_FULL = re.compile(r"(?P<block>.+\.mlp\.experts)\.(?P<expert>[1-9]\d*)\.(?P<projection>(?:gate|up|down)_proj)\.weight")
_FIRST = re.compile(r"(?P<block>.+\.mlp)\.experts\.0\.(?P<projection>(?:gate|up|down)_proj)\.weight")
# What a FlexOlmo has and a dense model has not.
_ONLY_SPARSE = (
    "architectures",
    "expert_ranks",
    "model_type",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
)


class FlexMoREConfig(Closed):
    """What ``config.json`` says of the experts, with the defaults of transformers' FlexOlmo."""

    model_type: str
    expert_ranks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=10_000)]
    num_experts: int
    num_experts_per_tok: Annotated[int, Field(gt=0)] = 5
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.01


@dataclass
class FlexMoREStored(WithModel):
    """A checkpoint of FlexMoRE, or a FlexOlmo."""

    layout: ClassVar[str] = "flexmore"

    def places(self, site: str) -> Places:
        return _places(self.mixture.sites[0].experts.ranks)


def _places(ranks: Sequence[int]) -> Places:
    starts = [sum(ranks[:expert]) for expert in range(len(ranks))]
    places: dict[str, list[tuple[str, Where]]] = {"router.weight": [("gate.weight", (slice(0, len(ranks)),))]}
    for projection in _PROJECTIONS:
        for side, whole in (("a", ()), ("b", (slice(None),))):
            places[f"{projection}.lora_{side.upper()}"] = [
                (f"experts.{expert}.{projection}_{side}.weight", (*whole, slice(start, start + rank)))
                for expert, (start, rank) in enumerate(zip(starts, ranks, strict=True))
                if rank
            ]
    return places


@LAYOUTS.register("flexmore")
class FlexMoRELayout(Layout):
    """What FlexMoRE's converter saves (arXiv 2602.08818; schneiderkamplab/FlexMoRE 2debb726), and FlexOlmo.

    ``config.json``
        model_type "flexmore", which only the authors' transformers knows; expert_ranks, for each expert its rank, 0 for
        a full one, which expert 0 always is; the rest as of FlexOlmo (arXiv 2507.07024; transformers 5.23):
        num_experts, num_experts_per_tok (5), norm_topk_prob (false), router_aux_loss_coef (0.01), which is of effect
        with output_router_logits (false) alone, and the sizes.
    ``model.safetensors``, or shards with ``model.safetensors.index.json``
        for each layer l, after ``model.layers.{l}.mlp.``: ``gate.weight`` (E, D); for each full expert e
        ``experts.{e}.{gate,up,down}_proj.weight`` (out, in); for each other
        ``experts.{e}.{gate,up,down}_proj_a.weight`` (r, in) and ``_b.weight`` (out, r), whose product is the difference
        from the weight of expert 0; scale 1. Attention, norms, embeddings and head as of FlexOlmo.

    Read as block sites with ``low_rank`` experts, rank 0 for expert 0, under router ``topk``. The backbone is in the
    same files: FlexOlmo with one dense FFN in each layer is OLMo 2 (norms after attention and FFN, norms of queries and
    keys), letter by letter in transformers, so it is built as one, quantised if asked for, with expert 0 as its FFN.
    Another OLMo 2 may be given, whose weights are compared with these.

    A full expert beside expert 0, and all of a FlexOlmo's (model_type "flex_olmo"), are read as the difference from
    expert 0 times the identity: exact, of rank min(D, I), in 1 + D / I times the memory where D is less than I.

    Written is the adapter alone: routers and factors under these keys, and a ``config.json`` with what is known; who
    has the weights of the dense model adds them. Alpha must be 1, expert 0 of rank 0 and no other. The options of
    training have no place in it.

    Quirks: a mixture that is saved natively names this folder as its backbone, which no other program can load; load it
    with ``moelora.from_pretrained(folder).unload()``, or save that with ``save_pretrained`` once.
    """

    files = (CONFIG,)
    model_files = WHOLE_MODEL_FILES

    def detect(self, folder: Folder) -> str | None:
        kind = folder.mapping(CONFIG).get("model_type") if folder.has(CONFIG) else None
        return f"{CONFIG} has model_type {kind!r}" if kind in ("flexmore", "flex_olmo") else None

    def read(self, folder: Folder) -> FlexMoREStored:
        path = folder.path / CONFIG
        values = folder.mapping(CONFIG)
        whole = folder.model()
        if whole is None:
            raise CheckpointError(f"{folder.path}: {MODEL_FILES[0]}: missing; copy the whole checkpoint folder")
        config = _config(values, path)
        selected = SelectedFile(whole, lambda key: ".mlp." in key and _FIRST.fullmatch(key) is None)
        file = _FullAsLowRank(selected, whole)
        names = {_FIRST.sub(r"\g<block>.\g<projection>.weight", key): key for key in selected.others}
        known = ("hidden_size", "num_hidden_layers", "hidden_act")
        architecture = {"model_type": "olmo2", **{key: values[key] for key in known if key in values}}
        sites = list(modules_of(file, _KEY))
        stored = FlexMoREStored(
            folder=folder.path,
            backbone=_backbone(values, names, folder),
            architecture=parse(Architecture, architecture, path),
            mixture=_mixture(config, _ranks(config, values, path), sites, path),
            file=file,
            detail=f"{'with' if names else 'without'} a backbone, {config.model_type}",
            prefix="",
            groups=[sites],
            source=whole,
            names=names,
            model_config=_dense(values, folder.path) if names else None,
        )
        stored.check()
        _refuse_gaps(sites, stored.architecture.num_hidden_layers, whole.path)
        return stored

    def write(self, folder: Path, content: Content) -> None:
        refuse_unwritable("flexmore", _reasons(content))
        site = content.mixture.sites[0]
        assert site.router is not None
        known = content.architecture.to_dict()
        config = {
            **{key: value for key, value in known.items() if value is not None},
            "model_type": "flexmore",
            "architectures": ["FlexMoREForCausalLM"],
            "_name_or_path": content.backbone.name,
            "num_hidden_layers": len(content.sites[0]),
            "expert_ranks": list(site.experts.ranks),
            "num_experts": site.experts.num_experts,
            "num_experts_per_tok": site.router.top_k,
            "norm_topk_prob": site.router.normalize,
            "output_router_logits": site.router.aux_loss_coef > 0,
            "router_aux_loss_coef": site.router.aux_loss_coef,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        places = _places(site.experts.ranks)
        write_tensors(folder / MODEL_FILES[0], cut_modules(content, "", lambda _: places), folder / CONFIG)


class _FullAsLowRank(TensorFile):
    """Full experts seen as low-rank ones: of ``W_e - W_0`` and the identity, whichever of the two is first smaller.

    Args:
        file: the experts. whole: also expert 0.
    """

    def __init__(self, file: TensorFile, whole: TensorFile) -> None:
        self.path = file.path
        self._file, self._whole = file, whole
        self._factors: dict[str, tuple[str, str, bool]] = {}
        self.headers = dict(file.headers)
        for key, header in file.headers.items():
            match = _FULL.fullmatch(key)
            if match is None:
                continue
            first = f"{match['block']}.0.{match['projection']}.weight"
            if len(header.shape) != 2 or whole.headers.get(first, header).shape != header.shape:
                raise CheckpointError(
                    f"{self.path}: {key}: expected the shape of {first}, found {header.shape}: copy it again"
                )
            del self.headers[key]
            out, width = header.shape
            rank = min(out, width)
            for side, shape in (("a", (rank, width)), ("b", (out, rank))):
                factor = f"{match['block']}.{match['expert']}.{match['projection']}_{side}.weight"
                if factor in file.headers:
                    raise CheckpointError(f"{self.path}: expected {key} or {factor}, found both: copy it again")
                self._factors[factor] = (key, first, (side == "a") == (width <= out))
                self.headers[factor] = Header("float32", shape)

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: self._load(key) for key in keys}

    def _load(self, key: str) -> Tensor:
        if key not in self._factors:
            return self._file.load([key])[key]
        full, first, identity = self._factors[key]
        if identity:
            return torch.eye(self.headers[key].shape[0], dtype=torch.float32)
        if first not in self._whole.headers:
            raise CheckpointError(f"{self.path}: {first}: missing; {full} is read as its difference from it")
        return self._whole.load([full])[full].float() - self._whole.load([first])[first].float()


def _config(values: Mapping[str, Any], path: Path) -> FlexMoREConfig:
    """The part of the file that is about experts.

    Raises:
        CheckpointError: it is damaged or does not hold together.
    """
    found = {key: values[key] for key in FlexMoREConfig.model_fields if key in values}
    ranks = found.get("expert_ranks")
    if values["model_type"] == "flex_olmo":
        count = found.setdefault("num_experts", 7)
        found["expert_ranks"] = [0] * count if isinstance(count, int) and 0 < count <= 10_000 else []
    elif isinstance(ranks, list):
        found.setdefault("num_experts", len(ranks))
    config = parse(FlexMoREConfig, found, path)
    if len(config.expert_ranks) != config.num_experts or config.expert_ranks[0]:
        raise CheckpointError(
            f"{path}: expert_ranks: expected {config.num_experts} ranks (num_experts), the first 0, since the others "
            f"are differences from expert 0, found {config.expert_ranks[:20]}: the file was edited, restore it"
        )
    return config


def _ranks(config: FlexMoREConfig, values: Mapping[str, Any], path: Path) -> list[int]:
    """Of each expert as we read it: a full one beside expert 0 has as many as its matrices can have."""
    if all(config.expert_ranks[1:]):
        return config.expert_ranks
    sizes = [values.get(key) for key in ("hidden_size", "intermediate_size")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(
            f"{path}: hidden_size, intermediate_size: expected the sizes of a full expert, found {sizes}: restore it"
        )
    full = min(size for size in sizes if size is not None)
    return [0, *(rank or full for rank in config.expert_ranks[1:])]


def _mixture(config: FlexMoREConfig, ranks: list[int], sites: list[str], path: Path) -> MixtureConfig:
    values = {
        "target": sites,
        "experts": {"kind": "low_rank", "num_experts": len(ranks), "r": ranks, "alpha": 1.0},
        "router": {
            "kind": "topk",
            "top_k": config.num_experts_per_tok,
            "normalize": config.norm_topk_prob,
            "aux_loss_coef": config.router_aux_loss_coef if config.output_router_logits else 0.0,
        },
    }
    return parse(MixtureConfig, {"sites": [values]}, path)


def _dense(values: Mapping[str, Any], folder: Path) -> Olmo2Config:
    """The configuration of the same model with expert 0 alone; what a file leaves out is as FlexOlmo has it."""
    with explained(str(folder)):
        sparse = FlexOlmoConfig.from_dict({**values, "model_type": "flex_olmo"})
        kept = {key: value for key, value in sparse.to_dict().items() if key not in _ONLY_SPARSE}
        dense: Olmo2Config = Olmo2Config.from_dict(kept)
    return dense


def _backbone(values: Mapping[str, Any], names: Mapping[str, str], folder: Folder) -> BackboneConfig:
    given = values.get("_name_or_path")
    named = given if isinstance(given, str) and given else UNKNOWN
    return BackboneConfig(name=str(folder.path) if names else named, quantization=None)


def _refuse_gaps(sites: Sequence[str], count: int | None, path: Path) -> None:
    wanted = len(sites) if count is None else count
    gap = next((index for index, site in enumerate(sites) if site != f"model.layers.{index}.mlp"), len(sites))
    if gap != wanted or not sites:
        raise CheckpointError(
            f"{path}: model.layers.{gap}.mlp: expected experts in each of {wanted} layers, found none in this one: "
            "copy the checkpoint again"
        )


def _reasons(content: Content) -> list[str]:
    """All that stands against writing a mixture."""
    site = content.mixture.sites[0]
    experts, router = site.experts, site.router
    reasons = ["it has no modules that are saved whole"] if content.mixture.modules_to_save else []
    if len(content.mixture.sites) > 1 or experts.rank_pattern or experts.alpha_pattern:
        reasons.append("it has one configuration of experts and router for all layers, this mixture has several")
    if experts.kind != "low_rank" or router is None or router.kind != "topk" or router.share != "module":
        named = "none" if router is None else f"{router.kind}, share: {router.share}"
        reasons.append(f"it has low_rank experts under a topk router of each layer, found {experts.kind} and {named}")
    if experts.ranks[0] or not all(experts.ranks[1:]):
        reasons.append(f"its expert 0 is the frozen FFN, of rank 0, and no other is, found ranks {list(experts.ranks)}")
    if set(experts.alphas) != {1.0}:
        reasons.append(f"it has no scale, so alpha must be 1, found {sorted(set(experts.alphas))}")
    if content.architecture.model_type not in (None, "olmo2"):
        reasons.append(f"its backbone is an OLMo 2, found {content.architecture.model_type}")
    expected = [f"model.layers.{layer}.mlp" for layer in range(len(content.sites[0]))]
    if sorted(content.sites[0]) != sorted(expected):
        reasons.append(f"its sites are the FFN of every layer, such as {expected[0]!r}, found {content.sites[0][0]!r}")
    elif lacking := [key for key in _tensors(expected, experts.ranks) if key not in content.tensors]:
        reasons.append(f"each FFN has experts in {', '.join(_PROJECTIONS)}, found no {lacking[0]}")
    return reasons


def _tensors(sites: Iterable[str], ranks: Sequence[int]) -> list[str]:
    return [f"{site}.{tensor}" for site in sites for tensor in _places(ranks)]
