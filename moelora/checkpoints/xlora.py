"""The layout of the X-LoRA authors' own package; see :class:`XLoRALayout`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ..errors import CheckpointError
from .folder import ADAPTER_CONFIG, Folder
from .layout import LAYOUTS, Architecture, Content, Layout
from .reading import parse_known
from .tensor_file import SelectedFile, TensorFile
from .xlora_parts import XLoRAOptions, XLoRAStored, backbone_of, join, mixture_of, read_expert
from .xlora_places import adapter_files, find, missing, told
from .xlora_writing import Plan, write_tensors

CONFIG = "xlora_config.json"
CLASSIFIER = ("xlora_classifier.safetensors", "xlora_classifier.pt")
_ENDS_IN_NUMBER = re.compile(r"(.*?)(\d{1,9})")
# PEFT takes the classifier's biases for LoRA's, since "xlora_" has "lora_" in it.
_STRAY = re.compile(r"internal_xlora_classifier\.(?:inner\.\d{1,9}|last)\.bias")


class XLoRAConfig(XLoRAOptions):
    """``xlora_config.json``."""

    base_model_id: str
    adapters: list[str] | dict[str, str] | None = None
    enable_relu_and_dropout: bool = True
    use_bias: bool = True
    device: Any = Field(default=None, exclude=True)
    stop_token_id: Any = Field(default=None, exclude=True)

    @property
    def relu(self) -> bool:
        return self.enable_relu_and_dropout

    @property
    def bias(self) -> bool:
        return self.use_bias

    def linears(self) -> list[str]:
        """The names of the classifier's linears: those of a module list that counts ReLU and dropout too."""
        step = 3 if self.enable_relu_and_dropout else 1
        return [*(f"inner.{step * index}" for index in range(self.xlora_depth - 1)), "last"]


@dataclass
class StandaloneStored(XLoRAStored):
    """A checkpoint of the authors' package."""

    layout: ClassVar[str] = "xlora"


class _AdapterFolder(Folder):
    """The folder of an adapter, without what their save left in its file."""

    def tensors(self, *names: str) -> TensorFile:
        return SelectedFile(super().tensors(*names), lambda key: _STRAY.fullmatch(key) is None)


@LAYOUTS.register("xlora")
class XLoRALayout(Layout):
    """What the package of X-LoRA's authors writes (arXiv 2402.07148; EricLBuehler/xlora 8217992, on PEFT 0.17.1).

    ``xlora_config.json`` (one line)
        hidden_size and base_model_id, of the backbone; adapters: their names, in the order of the classifier's rows;
        and with these defaults enable_softmax (true), enable_softmax_topk (false), layerwise_scalings (false),
        xlora_depth (1), xlora_size (2048), enable_relu_and_dropout (true), use_bias (true), xlora_dropout_p (0.2),
        use_trainable_adapters (false), softmax_temperature (1.0), top_k_lora (null), scaling_pass_value (0.0; null is
        1 / experts), global_scaling_weight (1.0).
    ``xlora_classifier.safetensors``, or ``xlora_classifier.pt`` (``torch.save`` of the same flat dict)
        ``inner.<i>.weight`` and ``.bias``, i = 0, 3, 6 and so on, or 0, 1, 2 without ReLU and dropout: (xlora_size,
        hidden_size), then (xlora_size, xlora_size), one less than xlora_depth; ``last.weight`` and ``.bias``: (experts,
        or linears x experts if layerwise, and that width). A layerwise row ``l * experts + e`` is expert e at the l-th
        adapted linear in the order of the backbone's modules, which no file has: it is the model's.
    ``<name>/adapter_config.json``, ``<name>/adapter_model.safetensors`` for each adapter
        PEFT's layout; ``adapter_1`` to ``adapter_n`` in what they published.

    Told by ``xlora_config.json`` with its xlora_depth or layerwise_scalings, or beside a classifier. One classifier
    scales the adapters at all linears; adapters may differ in rank and scale, and in the linears that they adapt: one
    that has nothing at a linear adds nothing there, as in the released code. With use_trainable_adapters the adapters
    were trained too: where one kind of ours fits them all they are trainable here, else frozen.

    Quirks: hand-edited files on the hub have adapters as a mapping of names to paths, or not at all (then folders that
    are numbered alike are taken in that order), and a stop_token_id, which their own loader refuses; both are read. Of
    paths see ``xlora_places.py``. Their save leaves the biases of the classifier in every adapter's file; they are left
    out here. With enable_softmax_topk their code takes one softmax over all tokens of the batch, here each token has
    its own, as in PEFT since 2025: such a mixture gives other numbers than with their package.
    """

    files = (CONFIG, *CLASSIFIER)

    def detect(self, folder: Folder) -> str | None:
        if not folder.has(CONFIG):
            return None
        known = {"xlora_depth", "layerwise_scalings", "xlora_size"} & folder.mapping(CONFIG).keys()
        return f"it has {CONFIG}" if known or any(folder.has(name) for name in CLASSIFIER) else None

    def further_files(self, folder: Folder) -> tuple[str, ...]:
        places = _places(folder, _config(folder)).values()
        return adapter_files(place for _, each in places for place in each)

    def read(self, folder: Folder) -> StandaloneStored:
        path = folder.path / CONFIG
        config = _config(folder)
        classifier = folder.tensors(*CLASSIFIER)
        experts = [read_expert(_AdapterFolder(inner.path), label) for label, inner in _found(folder, config)]
        stored = StandaloneStored(
            folder=folder.path,
            backbone=backbone_of(config.base_model_id, None, experts),
            architecture=Architecture(hidden_size=config.hidden_size),
            mixture=mixture_of(config, experts, path),
            file=join(folder.path, classifier, experts),
            options=config,
            linears=config.linears(),
            experts=experts,
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        plan = Plan.of("xlora", content)
        options = XLoRAConfig(
            base_model_id=content.backbone.name,
            adapters=list(plan.names),
            enable_relu_and_dropout=plan.router.relu,
            use_bias=plan.router.bias,
            **plan.options(),
        )
        plan.write_experts(folder)
        (folder / CONFIG).write_text(json.dumps(options.to_dict()), encoding="utf-8")
        write_tensors(folder / CLASSIFIER[0], plan.classifier(options.linears()), beside=folder / CONFIG)


def _config(folder: Folder) -> XLoRAConfig:
    return parse_known(XLoRAConfig, folder.mapping(CONFIG), folder.path / CONFIG)


def _places(folder: Folder, config: XLoRAConfig) -> dict[str, tuple[str, list[str]]]:
    """For each adapter that the configuration names: the key, what it says, and the places that this may mean."""
    if isinstance(config.adapters, dict):
        named = config.adapters.items()
        return {f"adapters.{name}": (path, [*told(folder, name), *told(folder, path)]) for name, path in named}
    return {f"adapters.{i}": (name, list(told(folder, name))) for i, name in enumerate(config.adapters or [])}


def _found(folder: Folder, config: XLoRAConfig) -> list[tuple[str, Folder]]:
    """The places and folders of the adapters, in the order of the classifier's rows."""
    result = []
    for key, (path, places) in _places(folder, config).items():
        there = find(folder, places)
        if there is None:
            raise missing(folder, CONFIG, key, path, places)
        result.append(there)
    return result or [(name, folder.inner(name)) for name in _numbered(folder)]


def _numbered(folder: Folder) -> list[str]:
    """The folders of adapters by their number, where nothing else tells the order.

    Raises:
        CheckpointError: they are not numbered alike, or there are none.
    """
    names = [name for name in folder.names() if folder.has(f"{name}/{ADAPTER_CONFIG}")]
    matches = [match for name in names if (match := _ENDS_IN_NUMBER.fullmatch(name))]
    numbers = {int(match[2]): match[0] for match in matches}
    if not names or len(numbers) < len(names) or len({match[1] for match in matches}) > 1:
        raise CheckpointError(
            f"{folder.path / CONFIG}: adapters: expected the names of the adapters' folders, found none, and the "
            f"folders here tell no order ({', '.join(names) or 'none has an adapter'}): add "
            '"adapters": ["<name>", ...] in the order in which the classifier was trained'
        )
    return [numbers[number] for number in sorted(numbers)]
