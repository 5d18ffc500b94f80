"""The frozen model that carries the experts: loading, quantising, freezing, and proof that it was left alone."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import gguf
from .config import BackboneConfig, DType, Quantization
from .errors import ConfigError, UserError
from .gguf import DEFAULT_BACKBONE as DEFAULT_BACKBONE

logger = logging.getLogger(__name__)

DeviceMap = str | dict[str, Any] | None
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BOOKMARK = "_moelora_backbone"


class BackboneOptions(TypedDict, total=False):
    """The fields of :class:`~moelora.config.BackboneConfig` besides ``name``, as keywords."""

    quantization: Quantization | None
    dtype: DType | torch.dtype | None
    revision: str | None
    subfolder: str | None


@overload
def load_backbone(
    name: str | Path | BackboneConfig = ...,
    *,
    tokenizer: Literal[True] = ...,
    device_map: DeviceMap = ...,
    token: str | bool | None = ...,
    cache_dir: str | Path | None = ...,
    local_files_only: bool = ...,
    **options: Unpack[BackboneOptions],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]: ...


@overload
def load_backbone(
    name: str | Path | BackboneConfig = ...,
    *,
    tokenizer: Literal[False],
    device_map: DeviceMap = ...,
    token: str | bool | None = ...,
    cache_dir: str | Path | None = ...,
    local_files_only: bool = ...,
    **options: Unpack[BackboneOptions],
) -> tuple[PreTrainedModel, None]: ...


def load_backbone(
    name: str | Path | BackboneConfig = DEFAULT_BACKBONE,
    *,
    tokenizer: bool = True,
    device_map: DeviceMap = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **options: Unpack[BackboneOptions],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A frozen causal language model, in ``eval`` mode, and its tokenizer.

    Args:
        name: ``"smollm2-135m-instruct"`` (weights from a Python package, converted once), a hub id, a local folder, a
            ``.gguf`` file, or a whole configuration.
        tokenizer: whether to load the tokenizer too; otherwise the second result is ``None``.
        device_map, token, cache_dir, local_files_only: as in ``from_pretrained`` of transformers.
        options: ``quantization`` ("nf4", the default; "int8", "bf16", "fp16", "fp32"; ``None`` keeps what the source
            has), ``dtype``, ``revision``, ``subfolder``; they override the fields of a configuration given as ``name``.

    Code that comes with a hub repository is never run.

    Raises:
        ConfigError: unknown or contradictory options.
        UserError: no such model, not a causal language model, weights missing, or a package missing.
    """
    config = _configuration(name, options)
    source, places = _source(config, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    with explained(config.name):
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False, **places)
    check_causal(config.name, model_config)
    arguments = loading_arguments(config, model_config, device_map)
    with explained(config.name):
        loading: Any = AutoModelForCausalLM.from_pretrained(
            source, config=model_config, trust_remote_code=False, output_loading_info=True, **arguments, **places
        )
        loaded = load_tokenizer(config.name, source, places) if tokenizer else None
    model: PreTrainedModel = loading[0]
    if missing := sorted(loading[1]["missing_keys"]):
        raise UserError(
            f"backbone {config.name!r} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]!r}: "
            "it is not a whole causal language model; name a checkpoint that is"
        )
    settle(model, config)
    return model, loaded


def _configuration(name: str | Path | BackboneConfig, options: BackboneOptions) -> BackboneConfig:
    given: dict[str, Any] = dict(options)
    if isinstance(given.get("dtype"), torch.dtype):
        given["dtype"] = str(given["dtype"]).removeprefix("torch.")
    fields = name.to_dict() if isinstance(name, BackboneConfig) else {"name": str(name)}
    return BackboneConfig.parse({**fields, **given}, where="load_backbone")


def _source(config: BackboneConfig, **places: Any) -> tuple[str, dict[str, Any]]:
    """Where the files are, and what ``from_pretrained`` needs to know about the place."""
    if config.name == DEFAULT_BACKBONE:
        return str(gguf.default_backbone(local_files_only=places["local_files_only"])), {}
    if config.name.lower().endswith(".gguf"):
        return str(gguf.converted(config.name)), {}
    places |= {"revision": config.revision, "subfolder": config.subfolder or ""}
    path = Path(config.name).expanduser()
    if path.is_dir():
        return str(path), places
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", config.name):
        what = "is a file, not a folder" if path.exists() else "is no folder that exists, and no hub id"
        raise UserError(
            f"backbone {config.name!r} {what}: give {DEFAULT_BACKBONE!r}, a hub id (owner/name), a folder with "
            "config.json and weights, or a .gguf file"
        )
    return config.name, places


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what the loader raises into one paragraph that says what to do."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            remedy = "it needs code from its repository, which moelora never runs; name a model that transformers knows"
        elif isinstance(error, ImportError):
            remedy = f"{text}; install what is missing"
        elif isinstance(error, OSError):
            remedy = f"{text}; check the name, the network (or local_files_only), and the token of a gated model"
        else:
            remedy = f"{text}; check that it holds a whole causal language model"
        raise UserError(f"backbone {name!r} cannot be loaded: {remedy}") from error


def check_causal(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model that would be given a fresh, random head, before any weight is read."""
    causal = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update([value] if isinstance(value, str) else value)
    # Names that transformers does not know are old spellings of classes that it does know: let those pass.
    others = [kind for kind in config.architectures or [] if hasattr(transformers, kind) and kind not in causal]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or others:
        kind = others[0] if others else f"model of type {config.model_type!r}"
        raise UserError(f"backbone {name!r} is a {kind}, not a causal language model: name a model that generates text")


def loading_arguments(config: BackboneConfig, model_config: PreTrainedConfig, device_map: DeviceMap) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` about precision and place.

    Raises:
        ConfigError: the source is already quantised in another way.
        UserError: bitsandbytes is needed and missing.
    """
    wanted = config.quantization
    present = _present_quantization(model_config)
    dtype: torch.dtype | str | None = getattr(torch, config.dtype) if config.dtype else None
    if present is not None and wanted not in (None, present):
        raise ConfigError(
            f"backbone.quantization: {config.name!r} is already quantised ({present}), so it cannot become {wanted}; "
            "set quantization to null (Python: None) to keep it as it is"
        )
    on_gpu = torch.cuda.is_available() and device_map not in ("cpu", {"": "cpu"})
    if present is None and wanted is None:
        return {"dtype": dtype or "auto", "device_map": device_map}
    if wanted in STORAGE:
        return {"dtype": STORAGE[wanted], "device_map": device_map}
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
    if on_gpu and device_map is None:
        # bitsandbytes quantises on the device; without a map every rank of a launcher would pick the first one.
        arguments["device_map"] = {"": int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))}
    if (present or wanted) in ("nf4", "int8"):
        _need_bitsandbytes(wanted or present)
    if present is None:
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        how = {"load_in_8bit": True} if wanted == "int8" else {**nf4, "bnb_4bit_compute_dtype": dtype}
        arguments["quantization_config"] = BitsAndBytesConfig(**how)
    return arguments


def _present_quantization(model_config: PreTrainedConfig) -> str | None:
    """How the source is stored: ``None`` (not quantised), "nf4", "int8", or the name of another method."""
    given = getattr(model_config, "quantization_config", None)
    if given is None:
        return None
    values: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "fp4"))
    return str(values.get("quant_method", "unknown method"))


class _Without(logging.Filter):
    """Drops the log lines that begin with a text."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def _need_bitsandbytes(quantization: str | None) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantization {quantization!r} needs the package bitsandbytes, which is not installed: pip install "
            "bitsandbytes, or set quantization to fp32 or bf16"
        )
    # Both lines come once per process or once per matrix product and ask nothing of the user.
    for name, start in (
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
        ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast"),
    ):
        log = logging.getLogger(name)
        if not log.filters:
            log.addFilter(_Without(start))


def load_tokenizer(name: str, source: str, places: dict[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad; a UserError where it has neither a padding nor an end token."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **places)
    if loaded.pad_token_id is None:
        if loaded.eos_token_id is None:
            raise UserError(
                f"the tokenizer of backbone {name!r} has neither a padding nor an end token: set pad_token and "
                "eos_token in its tokenizer_config.json"
            )
        logger.warning("the tokenizer of %s has no padding token: its end token %r pads", name, loaded.eos_token)
        loaded.pad_token = loaded.eos_token
    return loaded


def settle(model: PreTrainedModel, config: BackboneConfig) -> None:
    """Freeze, switch to ``eval``, and remember what was loaded."""
    model.requires_grad_(False)
    model.train(False)
    model.config.use_cache = True
    for module in _bitsandbytes_modules(model, "Linear4bit"):
        # On a CPU with avx512_bf16 these modules repack their weights in place at the first forward without gradients,
        # and compute in bfloat16 then: evaluation would differ from training, and the frozen weights would change.
        vars(module)["support_avx512bf16_for_cpu"] = False
    if config.name == DEFAULT_BACKBONE or config.name.lower().endswith(".gguf"):
        model.config._name_or_path = config.name
    commit = getattr(model.config, "_commit_hash", None)
    vars(model)[_BOOKMARK] = config.model_copy(update={"revision": commit or config.revision})


def backbone_config(model: PreTrainedModel) -> BackboneConfig:
    """How to load this backbone again; the revision of a hub model is the commit that was loaded.

    A model that :func:`load_backbone` did not load is described by its own configuration.
    """
    known = vars(model).get(_BOOKMARK)
    if isinstance(known, BackboneConfig):
        return known
    present = _present_quantization(model.config)
    storage = {dtype: name for name, dtype in STORAGE.items()}.get(model.dtype)
    return BackboneConfig.parse(
        {
            "name": model.config.name_or_path or model.config.model_type,
            "quantization": (present if present in ("nf4", "int8") else None) if present else storage,
            "revision": getattr(model.config, "_commit_hash", None),
        }
    )


def forget_source(model: PreTrainedModel) -> None:
    """Call this when the weights of ``model`` are no longer those that were loaded: what is saved must not say so."""
    vars(model).pop(_BOOKMARK, None)
    model.config.name_or_path = ""


def frozen_checksum(model: nn.Module, skip: Collection[str] = ()) -> str:
    """sha256 (hex) of all frozen parameters, all buffers and their quantisation state.

    Equal before and after training proves that the backbone was left alone. Names and order do not enter, so wrapping
    the backbone's modules does not change the result.

    Args:
        skip: names (as in ``named_parameters`` and ``named_buffers``) that are not the backbone's: frozen adapters,
            buffers of routers.
    """
    tensors: list[Tensor] = []
    tensors += [tensor for name, tensor in model.named_parameters() if not tensor.requires_grad and name not in skip]
    tensors += [tensor for name, tensor in model.named_buffers() if name not in skip]
    for module in _bitsandbytes_modules(model, "Linear4bit"):
        tensors += module.weight.quant_state.as_dict(packed=True).values()
    for module in _bitsandbytes_modules(model, "Linear8bitLt"):
        # The first forward moves the scales from the weight to the module.
        tensors.append(module.weight.SCB if module.weight.SCB is not None else module.state.SCB)
    total = hashlib.sha256()
    for digest in sorted(_digest(tensor) for tensor in tensors):
        total.update(digest)
    return total.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.data.detach().reshape(-1).contiguous().cpu()
    header = f"{tuple(tensor.shape)} {tensor.dtype}".encode()
    return hashlib.sha256(header + b"\0" + flat.view(torch.uint8).numpy().tobytes()).digest()


def _bitsandbytes_modules(model: nn.Module, kind: str) -> list[Any]:
    """Modules of a class of ``bitsandbytes.nn``, without importing that package when nothing else has."""
    package = sys.modules.get("bitsandbytes")
    if package is None:
        return []
    return [module for module in model.modules() if isinstance(module, getattr(package.nn, kind))]
