"""Reading what others wrote: configuration files, safetensors, and ``torch.save`` files, without trusting them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import Closed, read_mapping
from ..errors import CheckpointError, ConfigError
from .pickled import PickleFile
from .tensor_file import Header, TensorFile

C = TypeVar("C", bound=Closed)

SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form of a hub id, ``name`` or ``owner/name``."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def regular_file(path: Path) -> bool:
    """Whether ``path`` is a file or a link to one; pipes and devices, which would block, are not."""
    return path.is_file()


def load_mapping(path: Path) -> dict[str, Any]:
    """A JSON file as a mapping; see :func:`moelora.config.read_mapping` for what is refused.

    Raises:
        CheckpointError: it is missing or refused; the message names the file and how to go on.
    """
    if not regular_file(path):
        raise CheckpointError(f"{path}: missing; expected a JSON file: copy the whole checkpoint folder")
    try:
        values = read_mapping(path)
        json.dumps(values, ensure_ascii=False).encode()
    except ConfigError as error:
        raise CheckpointError(f"{error}; expected plain JSON: copy the checkpoint again or ask its author") from None
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: expected text, found {error.object[error.start]!r}, half a character: copy the checkpoint again "
            "or ask its author"
        ) from None
    return values


def parse(cls: type[C], values: Mapping[str, Any], path: Path) -> C:
    """``values`` of the file ``path`` as ``cls``.

    Raises:
        CheckpointError: they do not fit; names the file, the keys, what is allowed.
    """
    try:
        return cls.parse(values, where=str(path))
    except ConfigError as error:
        raise CheckpointError(f"{error}; the file was damaged or edited: restore it") from None


def parse_known(cls: type[C], values: Mapping[str, Any], path: Path) -> C:
    """As :func:`parse`, for files whose writers add keys with time: an unknown one that says nothing is left out.

    Raises:
        CheckpointError: an unknown key has a value other than null, false, 0, or something empty: it may change what
            the tensors mean.
    """
    unknown = {key: value for key, value in values.items() if key not in cls.model_fields}
    if telling := {key: value for key, value in unknown.items() if value not in (None, False, 0, "", [], {})}:
        named = ", ".join(f"{key}: {json.dumps(value)[:80]}" for key, value in telling.items())
        raise CheckpointError(
            f"{path}: keys that are not known here and may change what the tensors mean: {named}; expected "
            f"{', '.join(cls.model_fields)}: upgrade moelora, or convert the checkpoint with the program that wrote it"
        )
    return parse(cls, {key: value for key, value in values.items() if key not in unknown}, path)


class SafetensorsFile(TensorFile):
    """A ``.safetensors`` file. It stays open, so that replacing it on disk does not change what is read.

    Raises:
        CheckpointError: not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, framework="pt", device="cpu"))
            self._reader = cast(Any, safe_open(path, framework="pt", device="cpu", backend="pread"))
            self.headers = {}
            for key in self._file.keys():  # noqa: SIM118 - not a mapping
                view = self._file.get_slice(key)
                dtype = view.get_dtype()
                self.headers[key] = Header(SAFETENSORS_DTYPES.get(dtype, dtype), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: expected a safetensors file, found one that cannot be read ({error}): it is truncated or "
                "damaged; copy it again"
            ) from None

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: self._file.get_tensor(key) for key in keys}

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: self._reader.get_tensor(key) for key in keys}


def open_tensors(path: Path) -> TensorFile:
    """Open a tensor file by its ending, ``.safetensors`` or ``.bin``.

    Raises:
        CheckpointError: missing, damaged, or a pickle that holds anything but a flat dict of tensors.
    """
    if not regular_file(path):
        raise CheckpointError(f"{path}: missing; expected the file with the tensors: copy the whole checkpoint folder")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return PickleFile(path)


def not_finite(tensor: Tensor) -> int:
    """How many elements are NaN or infinite."""
    return int(tensor.numel() - torch.isfinite(tensor).sum())
