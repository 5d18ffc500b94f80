"""PEFT's layout of X-LoRA; see :class:`PeftXLoRALayout`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..errors import CheckpointError
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Architecture, Content, Layout
from .peft_files import refuse_unwritable, write_adapter
from .reading import parse_known
from .tensor_file import TensorFile
from .xlora_parts import Expert, XLoRAOptions, XLoRAStored, backbone_of, join, mixture_of, read_expert
from .xlora_places import adapter_files, find, missing, told
from .xlora_writing import Plan

_CLASSIFIER = "base_model.internal_xlora_classifier.layers"
_SPOILT = ("base_model.lora_model.", "base_model.internal_xlora_classifier.")


class PeftXLoRAConfig(XLoRAOptions):
    """``adapter_config.json`` with peft_type "XLORA"."""

    peft_type: Literal["XLORA"] = "XLORA"
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = True
    hidden_size: Annotated[int, Field(gt=0)] = 4096
    adapters: Annotated[dict[str, str], Field(min_length=1)]

    def linears(self) -> list[str]:
        """The names of the classifier's linears: those of a sequence that counts ReLU and, if any, dropout too."""
        step = 3 if self.xlora_dropout_p > 0 else 2
        return [f"{_CLASSIFIER}.{step * index}" for index in range(self.xlora_depth)]

    def ordered(self) -> dict[str, str]:
        """The adapters in the order of the classifier's rows."""
        if self.adapters.keys() == {str(index) for index in range(len(self.adapters))}:
            return {key: self.adapters[key] for key in sorted(self.adapters, key=int)}
        return self.adapters


@dataclass
class PeftXLoRAStored(XLoRAStored):
    """An X-LoRA checkpoint of PEFT."""

    layout: ClassVar[str] = "peft_xlora"


@LAYOUTS.register("peft_xlora")
class PeftXLoRALayout(Layout):
    """X-LoRA as PEFT reads it (arXiv 2402.07148; huggingface/peft 0.21.2; written soundly by PEFT up to 0.19).

    ``adapter_config.json`` (indent 2, keys sorted)
        peft_type "XLORA"; adapters: the number of each expert ("0", "1" and so on; PEFT fails with other names) and the
        path of its adapter, or a hub id; hidden_size (4096) of the backbone; enable_softmax (true), enable_softmax_topk
        (false), layerwise_scalings (false), xlora_depth (1), xlora_size (2048), xlora_dropout_p (0.2),
        use_trainable_adapters (false), softmax_temperature (1.0), top_k_lora (null), scaling_pass_value (0.0),
        global_scaling_weight (1.0); base_model_name_or_path, revision, task_type.
    ``adapter_model.safetensors``, or ``adapter_model.bin``
        ``base_model.internal_xlora_classifier.layers.<k>.weight`` and ``.bias``, k = 0, 3, 6 and so on, or 0, 2, 4 with
        xlora_dropout_p 0: shapes and rows as in layout xlora.
    the adapters
        in PEFT's layout, wherever ``adapters`` says. A path is read from the checkpoint's folder, or as PEFT does from
        the folder where the process runs, but only where it leads into the checkpoint or two folders above it at most.
        Else the end of the path is looked for in the checkpoint, then ``adapter_1`` to ``adapter_n``. So a copied
        checkpoint needs its adapters' folders beside its files, and nothing is downloaded.

    Told by peft_type "XLORA". Adapters may differ as in layout xlora.

    Quirks: PEFT's save is broken since 0.20: it takes numbers in the names of tensors for the names of experts, and
    leaves out the classifier's first linear, which is all of it at xlora_depth 1. Such a file is refused; what it lacks
    lies in a subfolder, and the message says how to put it back. The subfolders "0", "1" that PEFT writes for the
    experts hold other tensors in all versions, and are refused where nothing else is found; experts that were trained
    (use_trainable_adapters) are therefore lost in every save of PEFT, so they are only read from inside the checkpoint.
    PEFT writes more than ten experts in the order 0, 1, 10, 2, and its loader then mistakes the tenth for the second;
    here the numbers count, and what we write PEFT reads in order.

    Written: adapters with paths seen from the checkpoint's folder. Stock PEFT opens these where its process runs: start
    it there, or give it ``config=`` with ``config.adapters`` completed to full paths. It cannot load experts where
    paths of modules do not begin with ``model.``; such mixtures are refused.
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS)

    def detect(self, folder: Folder) -> str | None:
        if not folder.has(ADAPTER_CONFIG) or folder.mapping(ADAPTER_CONFIG).get("peft_type") != "XLORA":
            return None
        return f"{ADAPTER_CONFIG} has peft_type 'XLORA'"

    def further_files(self, folder: Folder) -> tuple[str, ...]:
        # Not what PEFT wrote under the experts' numbers: that may be as large as the backbone, and is refused.
        adapters = _config(folder).ordered().values()
        return adapter_files(place for i, path in enumerate(adapters) for place in _near(folder, i, path))

    def read(self, folder: Folder) -> PeftXLoRAStored:
        config = _config(folder)
        classifier = folder.tensors(*ADAPTER_TENSORS)
        _refuse_lost(folder, config, classifier)
        experts = list(_experts(folder, config))
        stored = PeftXLoRAStored(
            folder=folder.path,
            backbone=backbone_of(config.base_model_name_or_path, config.revision, experts),
            architecture=Architecture(hidden_size=config.hidden_size),
            mixture=mixture_of(config, experts, folder.path / ADAPTER_CONFIG),
            file=join(folder.path, classifier, experts),
            options=config,
            linears=config.linears(),
            experts=experts,
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        plan = Plan.of("peft_xlora", content)
        paths = [path for paths in content.sites for path in paths]
        reasons = [
            f"PEFT's loader expects paths that begin with 'model.', found {path!r}"
            for path in paths
            if not path.startswith("model.")
        ][:1]
        if plan.router.depth > 1 and not plan.router.relu:
            reasons.append("there is always a ReLU between the classifier's linears, found relu: false")
        if not plan.router.bias:
            reasons.append("the classifier's linears have biases, found bias: false")
        refuse_unwritable("peft_xlora", reasons)
        config = PeftXLoRAConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=content.backbone.name,
            revision=content.backbone.revision,
            adapters={str(index): name for index, name in enumerate(plan.names)},
            **plan.options(),
        )
        plan.write_experts(folder)
        write_adapter(folder, config.to_dict(), plan.classifier(config.linears()), pickled=False)


def _config(folder: Folder) -> PeftXLoRAConfig:
    return parse_known(PeftXLoRAConfig, folder.mapping(ADAPTER_CONFIG), folder.path / ADAPTER_CONFIG)


def _near(folder: Folder, index: int, path: str) -> list[str]:
    """Where the adapter of an expert may lie."""
    return [*told(folder, path), f"adapter_{index + 1}"]


def _places(folder: Folder, config: PeftXLoRAConfig) -> dict[str, list[str]]:
    """By the names of the experts, where their adapters may lie; the subfolder that PEFT wrote for one comes last."""
    adapters = config.ordered().items()
    return {key: [*_near(folder, i, path), *told(folder, key)] for i, (key, path) in enumerate(adapters)}


def _experts(folder: Folder, config: PeftXLoRAConfig) -> Iterator[Expert]:
    """The adapters, in the order of the classifier's rows."""
    for key, places in _places(folder, config).items():
        path = config.adapters[key]
        there = find(folder, places)
        if there is None:
            raise missing(folder, ADAPTER_CONFIG, f"adapters.{key}", path, places)
        place, inner = there
        _refuse_spoilt(inner, key, path)
        if config.use_trainable_adapters and place.startswith(".."):
            raise CheckpointError(
                f"{folder.path / ADAPTER_CONFIG}: use_trainable_adapters: true: the adapters were trained along with "
                f"the classifier, but PEFT saves none of them whole, and {inner.path} holds adapters.{key} as it was "
                f"before: save the trained adapters into {folder.path}, or, if this is the trained one, set "
                "use_trainable_adapters to false"
            )
        yield read_expert(inner, place)


def _refuse_spoilt(inner: Folder, key: str, path: str) -> None:
    """Refuse a subfolder as PEFT writes it for an expert of X-LoRA."""
    pair = inner.adapter()
    spoilt = next((name for name in pair[1].headers if name.startswith(_SPOILT)), None) if pair is not None else None
    if spoilt is not None:
        raise CheckpointError(
            f"{inner.path}: expected the adapter of expert {key}, found what PEFT writes there in all versions up to "
            f"0.21.2: tensors of the whole model, such as {spoilt!r}, because it takes {key!r} for a part of their "
            f"names; copy the adapter that the expert was made from ({path!r}) into the checkpoint, under the last "
            "name of that path"
        )


def _refuse_lost(folder: Folder, config: PeftXLoRAConfig, classifier: TensorFile) -> None:
    """Refuse a classifier of which PEFT's save left out linears."""
    linears = config.linears()
    lost = [name for name in linears if f"{name}.weight" not in classifier.headers]
    if not lost or any(key.rpartition(".")[0] not in linears for key in classifier.headers):
        return
    numbers = ", ".join(repr(name.rpartition(".")[2]) for name in lost)
    remedy = (
        f"look for {_CLASSIFIER}.weight in the folders {numbers} that it wrote beside this file and copy it here, or "
        "train the classifier again"
    )
    elsewhere = {name: file for name in lost if (file := _elsewhere(folder, name.rpartition(".")[2])) is not None}
    if len(elsewhere) == len(lost):
        copies = (
            f"{_CLASSIFIER}.weight and .bias of {at} as {name}.weight and .bias" for name, at in elsewhere.items()
        )
        remedy = f"it left them in other files, copy them into this one: {'; '.join(copies)}"
    raise CheckpointError(
        f"{classifier.path}: missing: {', '.join(f'{name}.weight' for name in lost)}; expected "
        f"{config.xlora_depth} linears of the classifier, found {len(classifier.headers)} tensors. PEFT 0.20 and newer "
        f"leave some out when they save X-LoRA, since they take the number in a name for that of an expert: {remedy}"
    )


def _elsewhere(folder: Folder, number: str) -> str | None:
    """The file in which PEFT left the linear of this number, without the number in its names."""
    name = f"{number}/{ADAPTER_TENSORS[0]}"
    if not folder.has(name) or f"{_CLASSIFIER}.weight" not in folder.tensors(name).headers:
        return None
    return name
