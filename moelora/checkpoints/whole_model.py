"""What the layouts share that keep a whole model in their files: building it, and comparing a backbone with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..backbone import check_causal, explained, load_tokenizer, loading_arguments, settle
from ..config import BackboneConfig
from ..errors import CheckpointError
from ..sites import layer_of
from .by_module import ByModule
from .folder import MODEL_FILES, Folder
from .reading import regular_file
from .tensor_file import TensorFile

logger = logging.getLogger(__name__)

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
WHOLE_MODEL_FILES = (*MODEL_FILES, CONFIG, GENERATION, *TOKENIZER_FILES)


@dataclass
class WithModel(ByModule):
    """A checkpoint in whose files the weights of its backbone lie as well.

    Attributes:
        source: the file with those weights. names: their keys in it, by the names that they have in the backbone; empty
            where there are none. model_config: what they are the weights of, as far as the folder says.
    """

    source: TensorFile
    names: Mapping[str, str]
    model_config: PreTrainedConfig | None
    _own: PreTrainedModel | None = field(default=None, init=False, repr=False)

    def own_backbone(
        self, quantization: str | None, dtype: str | None, device_map: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None] | None:
        if self.model_config is None or not self.names:
            return None
        config = self.own_config(quantization, dtype)
        self._refuse_another()
        # Views of a mapped file: nothing is read before it is needed.
        tensors = {name: self.source.load([key])[key] for name, key in self.names.items()}
        self._own = _build(config, self.model_config, tensors, device_map)
        tokenizer = None
        with explained(config.name):
            if regular_file(self.folder / GENERATION):
                self._own.generation_config = GenerationConfig.from_pretrained(config.name)
            if self.has_tokenizer:
                tokenizer = load_tokenizer(config.name, config.name, {"config": self.model_config})
        return self._own, tokenizer

    def own_config(self, quantization: str | None, dtype: str | None) -> BackboneConfig:
        """How to load the backbone of this folder; ``None`` is as in the checkpoint."""
        wanted = {"name": str(self.folder), "quantization": quantization, "dtype": dtype}
        changes = {key: value for key, value in wanted.items() if value is not None}
        return BackboneConfig.parse({**self.backbone.to_dict(), **changes})

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer in the folder."""
        return any(regular_file(self.folder / name) for name in TOKENIZER_FILES[:2])

    def check_weights(self, backbone: PreTrainedModel) -> None:
        if backbone is self._own:
            return
        own = dict(backbone.named_parameters(remove_duplicate=False))
        problems, unseen = [], 0
        for name, key in self.names.items():
            parameter = own.get(name)
            if parameter is None:
                problems.append(f"{key}: expected a weight {name!r} in the backbone, found none")
            elif parameter.is_meta or not parameter.is_floating_point():
                unseen += 1
            elif difference := _difference(self.source.load([key])[key], parameter.detach()):
                problems.append(f"{key}: expected the weight {name!r} of the backbone, found {difference}")
        remedy = "load it on the backbone that it was trained on"
        self._refuse(problems, f"{len(problems)} of {len(self.names)} are not this one's", remedy)
        if unseen:
            logger.warning(
                "%s: holds the weights of a backbone too, but %d of %d could not be compared with this one's, which "
                "are quantised or elsewhere; make sure that it is the same backbone",
                self.source.path,
                unseen,
                len(self.names),
            )

    def _refuse_another(self) -> None:
        """Compare the headers with the model that the folder's configuration describes, before it is allocated."""
        assert self.model_config is not None
        check_causal(str(self.folder), self.model_config)
        count = getattr(self.model_config.get_text_config(), "num_hidden_layers", None)
        layers = {layer for name in self.names if (layer := layer_of(name)) is not None}
        if count != len(layers):
            raise CheckpointError(
                f"{self.folder / CONFIG}: num_hidden_layers: expected {len(layers)}, as many layers as there are in "
                f"{self.source.path.name}, found {count}: the file was edited, restore it"
            )
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.model_config)]
        with explained(str(self.folder)), torch.device("meta"):
            skeleton = kind(self.model_config)
        shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
        tied = set(getattr(skeleton, "all_tied_weights_keys", {}))
        found = {name: self.source.headers[key].shape for name, key in self.names.items()}
        problems = [f"missing: {name}" for name in shapes if name not in found and name not in tied]
        problems += [f"unexpected: {self.names[name]}" for name in found if name not in shapes]
        problems += [
            f"misshapen: {self.names[name]}: expected {shapes[name]}, found {shape}"
            for name, shape in found.items()
            if shapes.get(name, shape) != shape
        ]
        remedy = "copy the checkpoint again, or load it on a backbone of your own"
        self._refuse(problems, f"not those of the {type(skeleton).__name__} that {CONFIG} describes", remedy)

    def _refuse(self, problems: list[str], what: str, remedy: str) -> None:
        if problems:
            lines = "".join(f"\n  {problem}" for problem in problems[:20])
            raise CheckpointError(
                f"{self.source.path}: holds the weights of a backbone too, {what}:{lines}\nWhat to do: {remedy}."
            )


def config_in(folder: Folder) -> PreTrainedConfig | None:
    """The transformers configuration in a folder; ``None`` where there is none of a kind that transformers knows.

    Raises:
        CheckpointError, UserError: it is damaged or does not hold together.
    """
    if not folder.has(CONFIG) or folder.mapping(CONFIG).get("model_type") not in CONFIG_MAPPING:
        return None
    with explained(str(folder.path)):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder.path), trust_remote_code=False)
    return config


def _build(
    config: BackboneConfig, model_config: PreTrainedConfig, tensors: dict[str, Tensor], device_map: Any
) -> PreTrainedModel:
    """A frozen model as :func:`moelora.load_backbone` makes it, of weights that are known to fit."""
    arguments = loading_arguments(config, model_config, device_map)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    with explained(config.name):
        model: PreTrainedModel = kind.from_pretrained(None, config=model_config, state_dict=tensors, **arguments)
    model.config.name_or_path = config.name
    settle(model, config)
    return model


def _difference(stored: Tensor, own: Tensor) -> str:
    """In what a weight of a file is not the backbone's; nothing where it is, up to the less precise of both dtypes."""
    if stored.shape != own.shape:
        return f"the shape {tuple(stored.shape)} in place of {tuple(own.shape)}"
    dtype = min((own.dtype, stored.dtype), key=lambda each: each.itemsize)
    stored, own = stored.to(dtype), own.to(device="cpu", dtype=dtype)
    if torch.equal(stored, own):
        return ""
    return f"other numbers (largest difference {float((stored.float() - own.float()).abs().max()):.3g})"
