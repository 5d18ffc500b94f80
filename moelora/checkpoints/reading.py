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

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


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


class SafetensorsFile(TensorFile):
    """A ``.safetensors`` file. It stays open, so that replacing it on disk does not change what is read.

    Raises:
        CheckpointError: not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, framework="pt", device="cpu"))
            self.headers = {}
            for key in self._file.keys():  # noqa: SIM118 - not a mapping
                view = self._file.get_slice(key)
                dtype = view.get_dtype()
                self.headers[key] = Header(_SAFETENSORS_DTYPES.get(dtype, dtype), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: expected a safetensors file, found one that cannot be read ({error}): it is truncated or "
                "damaged; copy it again"
            ) from None

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: self._file.get_tensor(key) for key in keys}


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
