"""The layout of Phi-4-multimodal's LoRAs; see :class:`Phi4Layout`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..backbone import load_backbone
from ..config import BackboneConfig, Closed, MixtureConfig
from ..errors import CheckpointError
from .by_module import PEFT_PREFIX, Places, modules_of
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, MODEL_FILES, Folder
from .layout import LAYOUTS, Architecture, Content, Layout
from .peft_files import UNKNOWN, refuse_unwritable
from .reading import parse, parse_known
from .tensor_file import JoinedFile, RenamedFile, SelectedFile, TensorFile
from .whole_model import CONFIG, WHOLE_MODEL_FILES, WithModel
from .xlora_parts import Expert, Factor, backbone_of, experts_of, read_expert, union
from .xlora_writing import Plan

ADAPTERS = ("vision", "speech")
FOLDERS = ("vision-lora", "speech-lora")
# The adapters of text, of images, of speech, and of images with speech, as the model's own processor numbers them.
TABLE = [[], [0], [1], [0]]
_KEY = re.compile(r"(?P<path>[\w.]+)\.(?P<tail>lora_[AB]\.(?:vision|speech)\.weight)")
# Encoders and their projections, which transformers has under other names than the published files.
_ENCODERS = "model.embed_tokens_extend."


class LoRASpec(Closed):
    """``vision_lora`` and ``speech_lora`` of ``config.json``; ``layer`` is a regular expression, which is not run."""

    r: Annotated[int, Field(gt=0)]
    lora_alpha: Annotated[float, Field(gt=0)]
    dp: Annotated[float, Field(ge=0, lt=1)] = 0.0
    layer: str | None = None


def input_modes(input_ids: Tensor, config: PreTrainedConfig) -> Tensor:
    """What router ``mask`` of this layout takes as ``task_types``: 0 text, 1 with images, 2 with speech, 3 with both.

    Args:
        input_ids: (B, S). config: of a ``Phi4MultimodalForCausalLM``.

    Returns:
        (B,) int64.
    """
    image: int = config.vision_config.image_token_id
    audio: int = config.audio_config.audio_token_id
    return (input_ids == image).any(dim=-1).long() + 2 * (input_ids == audio).any(dim=-1).long()


@dataclass
class Phi4Stored(WithModel):
    """The two LoRAs of a Phi-4-multimodal; the keys of ``file`` are those of the published state dict.

    Attributes:
        experts: the adapters, in the order of :data:`ADAPTERS`. whole: transformers itself can load a backbone from the
            folder.
    """

    layout: ClassVar[str] = "phi4"
    experts: Sequence[Expert]
    whole: bool

    def places(self, site: str) -> Places:
        places: dict[str, list[tuple[str, tuple[slice, ...]]]] = {"lora_A": [], "lora_B": []}
        start = 0
        for name, expert in zip(ADAPTERS, self.experts, strict=True):
            if site in expert.factors:
                piece = slice(start, start + expert.factors[site].rank)
                start = piece.stop
                places["lora_A"].append((f"lora_A.{name}.weight", (piece,)))
                places["lora_B"].append((f"lora_B.{name}.weight", (slice(None), piece)))
        return places

    def own_backbone(
        self, quantization: str | None, dtype: str | None, device_map: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None] | None:
        if not self.whole:
            return None
        config = self.own_config(quantization, dtype)
        if self.has_tokenizer:
            return load_backbone(config, device_map=device_map)
        return load_backbone(config, tokenizer=False, device_map=device_map)


@LAYOUTS.register("phi4")
class Phi4Layout(Layout):
    """The vision and speech LoRAs of Phi-4-multimodal (arXiv 2503.01743), in both forms in which they are published.

    Subfolders ``vision-lora`` and ``speech-lora``
        each a LoRA adapter of PEFT: ``adapter_config.json``, ``adapter_model.safetensors``. Keys may lack the prefix
        ``base_model.model.``, as transformers' converter leaves them (phi4_multimodal, 089c232). Published: vision
        r 256, lora_alpha 512, speech r 320, lora_alpha 640, on qkv_proj, o_proj, gate_up_proj and down_proj of the 32
        decoder layers; 738 MB and 923 MB in bfloat16. Read where both are there, whatever else the folder has.
    ``config.json`` with ``vision_lora`` and ``speech_lora``, and ``model.safetensors`` or shards with an index
        the original (microsoft/Phi-4-multimodal-instruct): a state dict of the whole model, in which each adapted
        linear has ``<path>.base_layer.weight``, ``<path>.lora_A.vision.weight`` (r, in) and
        ``<path>.lora_B.vision.weight`` (out, r), and the same for speech. vision_lora and speech_lora are {r,
        lora_alpha, dp, layer}; layer is a regular expression for the adapted modules, which is not run: the keys say
        which they are.

    Read as two ``frozen`` experts, vision and speech, under router ``mask`` by ``task_type``, which is the published
    rule: with images (speech or not) the vision LoRA, with speech alone the speech LoRA, with neither the backbone.
    The published code takes input_mode for a whole batch; here each sequence has its own, 0 text, 1 images, 2 speech,
    3 both: pass ``task_types`` (B,) to ``forward`` and ``generate``, see :func:`input_modes`. The mode belongs to the
    sequence and not to its tokens: text beside an image, and all that is generated after it, has the vision LoRA.

    The backbone is transformers' ``Phi4MultimodalForCausalLM``. A folder with its ``config.json`` (model_type
    "phi4_multimodal") and weights, as its converter makes it, loads alone. The original's weights are those of code
    that is not run here: give a converted model; its decoder is compared with the weights in the file, the encoders,
    which have other names, are not.

    Written: the two subfolders, which PEFT, transformers' ``load_adapter`` and vLLM read.

    Quirks: the adapters' dropout is of no effect, since nothing is trained here.
    """

    files = (CONFIG, *(f"{folder}/{name}" for folder in FOLDERS for name in (ADAPTER_CONFIG, *ADAPTER_TENSORS)))

    def further_files(self, folder: Folder) -> tuple[str, ...]:
        return () if _has_folders(folder) else WHOLE_MODEL_FILES

    def detect(self, folder: Folder) -> str | None:
        if _has_folders(folder):
            return f"it has the adapters {' and '.join(FOLDERS)}"
        config = folder.mapping(CONFIG) if folder.has(CONFIG) else {}
        if not all(isinstance(config.get(f"{name}_lora"), dict) for name in ADAPTERS):
            return None
        return f"{CONFIG} has vision_lora and speech_lora"

    def read(self, folder: Folder) -> Phi4Stored:
        values = folder.mapping(CONFIG) if folder.has(CONFIG) else {}
        source, file, experts = _from_folders(folder) if _has_folders(folder) else _from_model(folder, values)
        others = file.others if isinstance(file, SelectedFile) else {}
        sites = union(experts)
        sizes = ("hidden_size", "num_hidden_layers", "hidden_act")
        known: dict[str, Any] = {key: values[key] for key in sizes if key in values}
        stored = Phi4Stored(
            folder=folder.path,
            backbone=backbone_of(None, None, experts),
            architecture=parse(Architecture, known, folder.path / CONFIG),
            mixture=_mixture(experts, sites, folder.path),
            file=file,
            detail="subfolders" if _has_folders(folder) else "whole model",
            prefix="",
            groups=[sites],
            source=source,
            names={key.replace(".base_layer.", "."): key for key in others if not key.startswith(_ENCODERS)},
            model_config=None,
            experts=experts,
            whole=values.get("model_type") == "phi4_multimodal" and any(map(folder.has, MODEL_FILES[::2])),
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        refuse_unwritable("phi4", _reasons(content))
        Plan(content, FOLDERS, []).write_experts(folder)


class _AdapterFolder(Folder):
    """The folder of an adapter, in whose file the prefix of PEFT's keys may be missing."""

    def _open(self, name: str) -> TensorFile:
        file = super()._open(name)
        if any(key.startswith(PEFT_PREFIX) for key in file.headers):
            return file
        return RenamedFile(file, {f"{PEFT_PREFIX}{key}": key for key in file.headers})


def _has_folders(folder: Folder) -> bool:
    return all(folder.has(f"{name}/{ADAPTER_CONFIG}") for name in FOLDERS)


def _from_folders(folder: Folder) -> tuple[TensorFile, TensorFile, list[Expert]]:
    """The two subfolders as one file with the keys of the whole model's, and their adapters."""
    files: dict[str, tuple[str, TensorFile]] = {}
    experts = []
    for name, label in zip(ADAPTERS, FOLDERS, strict=True):
        expert = read_expert(_AdapterFolder(folder.inner(label).path), label)
        keys = {f"{path}.lora_A.{name}.weight": factor.A for path, factor in expert.factors.items()}
        keys |= {f"{path}.lora_B.{name}.weight": factor.B for path, factor in expert.factors.items()}
        files[label] = ("", RenamedFile(expert.file, keys))
        experts.append(expert)
    joined = JoinedFile(folder.path, files)
    return joined, joined, experts


def _from_model(folder: Folder, values: Mapping[str, Any]) -> tuple[TensorFile, TensorFile, list[Expert]]:
    """The whole model's file, its adapters' part, and the adapters."""
    whole = folder.model()
    if whole is None:
        raise CheckpointError(
            f"{folder.path}: expected the adapters {' and '.join(FOLDERS)}, or a whole model with both in "
            f"{MODEL_FILES[0]}, found neither: copy the whole checkpoint folder"
        )
    file = SelectedFile(whole, lambda key: ".lora_" in key)
    modules = modules_of(file, _KEY)
    named = values.get("_name_or_path")
    backbone = BackboneConfig(name=named if isinstance(named, str) and named else UNKNOWN, quantization=None)
    experts = []
    for name in ADAPTERS:
        spec = parse_known(LoRASpec, values[f"{name}_lora"], folder.path / CONFIG)
        tails = [f"lora_{side}.{name}.weight" for side in "AB"]
        factors = {
            path: Factor(f"{path}.{tails[0]}", f"{path}.{tails[1]}", spec.r, (0, 0), spec.lora_alpha)
            for path, tensors in modules.items()
            if any(tail in tensors for tail in tails)
        }
        if not factors:
            raise CheckpointError(
                f"{whole.path}: expected tensors named lora_A.{name}.weight, as {CONFIG} has {name}_lora, found none: "
                "the adapters were left out, copy the original"
            )
        experts.append(Expert(name, file, backbone, "lora", spec.dp, factors))
    return whole, file, experts


def _mixture(experts: Sequence[Expert], sites: Sequence[str], path: Path) -> MixtureConfig:
    mine = {"dropout": 0.0, "expert_dropout": "shared", "names": list(ADAPTERS)}
    router = {"kind": "mask", "by": "task_type", "table": TABLE}
    site = {"target": list(sites), "experts": {**experts_of(experts), **mine}, "router": router}
    return parse(MixtureConfig, {"sites": [site]}, path)


def _reasons(content: Content) -> list[str]:
    """All that stands against writing a mixture."""
    site = content.mixture.sites[0]
    experts, router = site.experts, site.router
    reasons = ["it has no modules that are saved whole"] if content.mixture.modules_to_save else []
    if len(content.mixture.sites) > 1:
        reasons.append("it has one configuration of experts and router for all sites, this mixture has several")
    if experts.kind not in ("frozen", "lora", "rslora") or experts.num_experts != len(ADAPTERS):
        reasons.append(f"its experts are two plain LoRAs, found {experts.num_experts} of kind {experts.kind}")
    if router is None or router.kind != "mask" or router.by != "task_type" or router.table != TABLE or router.weights:
        found = "none" if router is None else router.to_dict()
        reasons.append(f"its router is mask by task_type with the table {TABLE}, found {found}")
    if blocks := [name for name in content.sites[0] if f"{name}.lora_B" not in content.tensors]:
        reasons.append(f"its sites are linears, {blocks[0]!r} is an FFN block")
    for index, name in enumerate(ADAPTERS[: experts.num_experts]):
        if not any(experts.at(path).ranks[index] for path in content.sites[0]):
            reasons.append(f"an adapter has at least one linear, that of {name} has none")
    return reasons
