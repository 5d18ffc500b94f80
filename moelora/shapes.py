"""A backbone without its weights: built from its configuration alone, for plans; and what its weights would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AutoHfQuantizer

from .backbone import check_causal, loading_arguments
from .config import BackboneConfig
from .errors import UserError
from .gguf import DEFAULT_BACKBONE
from .image_config import Carrier

# Of the embedded default, whose weights are fixed by their sha256.
DEFAULT_SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# bitsandbytes' NF4 as :mod:`moelora.backbone` asks for it: a scale for each block of values, which is an 8-bit number
# with a float32 scale for each group of blocks. The tables of 16 and 256 values and an offset come with each tensor.
NF4_BLOCK, NF4_GROUP, NF4_TABLES = 64, 256, 4 * (16 + 256 + 1)


def read_shape(backbone: BackboneConfig, given: Path | None = None, carrier: Carrier = "language") -> PreTrainedConfig:
    """The configuration of a backbone; no weights are read or fetched.

    Args:
        given: a ``config.json``, or the folder where one lies, to take in place of the backbone's own.
        carrier: what the backbone should be: a causal language model, or a CLIP model.

    Raises:
        UserError: it cannot be had, or is that of another model.
    """
    if given is None and backbone.name == DEFAULT_BACKBONE and carrier == "language":
        return LlamaConfig(**DEFAULT_SHAPE)
    check = check_causal
    if carrier == "clip":
        from .clip import SMALL, check_clip, small_config

        if given is None and backbone.name == SMALL:
            return small_config()
        check = check_clip
    places: dict[str, Any] = {"revision": backbone.revision, "subfolder": backbone.subfolder or ""}
    source = Path(backbone.name).expanduser()
    if given is not None:
        source, places = given / "config.json" if given.is_dir() else given, {}
    elif backbone.name.lower().endswith(".gguf"):
        source, places = source.parent, {"gguf_file": source.name}
    if given is not None and not source.is_file():
        raise UserError(f"--backbone-config {given}: no such file; give a config.json, or the folder where one lies")
    name = str(source) if given is not None or source.exists() or "gguf_file" in places else backbone.name
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **places)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"the shapes of backbone {backbone.name!r} cannot be had: {' '.join(str(error).split())}. A plan needs "
            "config.json alone: give one, or a folder that holds it, with --backbone-config, or name a local folder "
            "(backbone.name=FOLDER)"
        ) from None
    check(backbone.name, config)
    return config  # type: ignore[no-any-return]


def sketch_backbone(backbone: BackboneConfig, config: PreTrainedConfig, on_gpu: bool) -> PreTrainedModel:
    """The frozen model on the meta device, its linears those of bitsandbytes where they would be quantised.

    Args:
        on_gpu: where it is to be trained, which decides the dtype where the recipe names none.

    Raises:
        ConfigError, UserError: the quantisation cannot be had.
    """
    if backbone.dtype is None and backbone.quantization in ("nf4", "int8"):
        backbone = backbone.model_copy(update={"dtype": "bfloat16" if on_gpu else "float32"})
    arguments = loading_arguments(backbone, config, "cpu")
    dtype = arguments["dtype"]
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    quantization = arguments.get("quantization_config") or _stored(config)
    with torch.device("meta"):
        kind: Any = AutoModel if isinstance(config, CLIPConfig) else AutoModelForCausalLM
        model: PreTrainedModel = kind.from_config(config, dtype=dtype)
        if quantization is not None:
            AutoHfQuantizer.from_config(quantization).preprocess_model(model, device_map=None)
    model.requires_grad_(False)
    return model


def _stored(config: PreTrainedConfig) -> BitsAndBytesConfig | None:
    """How a backbone that was quantised before is stored, where bitsandbytes did it."""
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, dict) or not (values.get("load_in_4bit") or values.get("load_in_8bit")):
        return None
    return BitsAndBytesConfig.from_dict(values)  # type: ignore[no-any-return]


def storage_bytes(model: nn.Module, skip: set[int]) -> int:
    """Bytes of all parameters and buffers in the form that they are stored in, each once.

    Args:
        skip: the identities of those to leave out.
    """
    seen, total = set(skip), 0
    for module in model.modules():
        kind = type(module).__name__
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if name == "weight" and kind == "Linear4bit":
                total += nf4_bytes(tensor.numel())
            elif name == "weight" and kind == "Linear8bitLt":
                total += tensor.numel() + 4 * tensor.shape[0]  # and a float32 scale for each row
            else:
                total += tensor.numel() * tensor.element_size()
    return total


def nf4_bytes(count: int) -> int:
    """Bytes of a weight of ``count`` numbers in NF4 with double quantisation: 4.127 bits each and 1 kB of tables."""
    blocks = -(-count // NF4_BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NF4_GROUP) + NF4_TABLES
