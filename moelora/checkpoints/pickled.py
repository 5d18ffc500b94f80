"""``torch.save`` files, read in two steps so that neither code nor sizes in them are trusted.

First the pickle is examined without running anything of torch: only the instructions and the few globals that a dict
of tensors needs are allowed, and every tensor's extent is compared with the bytes that are there. Only then does
``torch.load(weights_only=True)`` read it, and never on a torch before 2.10, whose loader had known holes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensor_file import Header, TensorFile

_MAX_PICKLE_BYTES = 64_000_000
_MAX_MAPPED_BYTES = 128_000_000
_TAIL_BYTES = 56 + 20 + 22  # how an archive ends: the two records of zip64, where it has them, and the older one
_SAFE_TORCH = (2, 10)
_OPCODES = {
    *("PROTO", "STOP", "MARK", "EMPTY_DICT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE"),
    *("NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINPUT", "LONG_BINPUT"),
    *("BINGET", "LONG_BINGET", "GLOBAL", "BINPERSID", "REDUCE", "SETITEM", "SETITEMS"),
}


# How many values an instruction takes from the stack; None is all down to the last mark.
_TAKEN = {
    **{"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3},
    **{"BINPERSID": 1, "REDUCE": 2, "SETITEM": 2, "SETITEMS": None},
}
_MAX_IN_A_TUPLE = 1000


@dataclass(frozen=True)
class _Kind:
    dtype: str
    itemsize: int


@dataclass(frozen=True)
class _Storage:
    kind: _Kind
    key: str
    numel: int


@dataclass(frozen=True)
class _Extent:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the tensor; with a stride of 0 a few bytes of storage stand for any number of them."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Elements of the storage that the tensor needs."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any) -> _Extent:
    numbers = [offset, *shape, *stride]
    if not isinstance(storage, _Storage) or len(shape) != len(stride):
        raise ValueError("a tensor without storage")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise ValueError("a tensor whose extent is not made of whole numbers")
    return _Extent(storage, offset, tuple(shape), tuple(stride))


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    return data


_GLOBALS: dict[str, Any] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "collections OrderedDict": OrderedDict,
    "torch FloatStorage": _Kind("float32", 4),
    "torch BFloat16Storage": _Kind("bfloat16", 2),
    "torch HalfStorage": _Kind("float16", 2),
    "torch DoubleStorage": _Kind("float64", 8),
    "torch LongStorage": _Kind("int64", 8),
    "torch IntStorage": _Kind("int32", 4),
    "torch ShortStorage": _Kind("int16", 2),
    "torch CharStorage": _Kind("int8", 1),
    "torch ByteStorage": _Kind("uint8", 1),
    "torch BoolStorage": _Kind("bool", 1),
}


class _Describer(pickle.Unpickler):
    """Builds extents in place of tensors; a global is looked up in a table, nothing is imported."""

    def find_class(self, module: str, name: str) -> Any:
        return _GLOBALS[f"{module} {name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _, numel = pid
        if tag != "storage" or not isinstance(kind, _Kind) or type(numel) is not int or numel < 0:
            raise ValueError("a storage of an unknown form")
        if not isinstance(key, str):
            raise ValueError("a storage without a name")
        return _Storage(kind, key, numel)


def _most_in_a_tuple(instructions: Iterable[tuple[str, Any]]) -> int:
    """How many values there are in the largest tuple, those of tuples in it included.

    One that is there twice counts twice: of sixty tuples, each with the one before it twice, the last would never be
    hashed, as it is where it is a key.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    most = 0
    for name, argument in instructions:
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _TAKEN:
            taken = _TAKEN[name]
            first = marks.pop() if taken is None else len(stack) - taken
            count = sum(stack[first:])
            del stack[first:]
            if not name.startswith("SETITEM"):
                stack.append(count + name.startswith("TUPLE"))
                most = max(most, stack[-1])
        elif name not in ("PROTO", "STOP"):
            stack.append(1)
    return most


def _identity(path: Path) -> tuple[int, ...]:
    """What tells a file from one that was put in its place, or was written over."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class PickleFile(TensorFile):
    """A ``torch.save`` file that holds a flat dict of tensors, or dicts in dicts.

    Args:
        depth: how many dicts may lie in each other. Above 1 there may be whole numbers and texts beside the tensors,
            and a name is that of each dict on the way to it, with ``/`` between.

    Attributes:
        plain: what is no tensor, by name.

    Raises:
        CheckpointError: anything else; names the file and what it holds that it must not.
    """

    def __init__(self, path: Path, depth: int = 1) -> None:
        self.path = path
        self.plain: dict[str, int | str | None] = {}
        self._depth = depth
        self._values: Any = None
        self._copied = 0
        try:
            self._identity = _identity(path)
            extents = self._describe()
        except CheckpointError:
            raise
        except (
            OSError,
            zipfile.BadZipFile,
            NotImplementedError,
            pickle.UnpicklingError,
            # What a malformed pickle makes of the table's entries and of the stack.
            ArithmeticError,
            AttributeError,
            EOFError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise self._refuse(f"one that cannot be read ({type(error).__name__}: {error})") from None
        self.headers = {key: Header(extent.storage.kind.dtype, extent.shape) for key, extent in extents.items()}

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read these tensors through ``torch.load(weights_only=True)``.

        Raises:
            CheckpointError: torch is older than 2.10, or it reads something else than the examination saw.
        """
        if self._values is None:
            self._values = dict(self._leaves(self._read()))
        found = {}
        for key in keys:
            value = self._values.get(key)
            if not isinstance(value, Tensor) or tuple(value.shape) != self.headers[key].shape:
                raise self._refuse(f"two different descriptions of {key!r}")
            found[key] = value.detach()
        return found

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Copies of these tensors; what has been mapped is let go from time to time, and mapped again when needed."""
        found = {key: value.clone() for key, value in self.load(keys).items()}
        self._copied += sum(value.nbytes for value in found.values())
        if self._copied > _MAX_MAPPED_BYTES:
            self._values, self._copied = None, 0
        return found

    def _read(self) -> Any:
        if tuple(int(number) for number in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
            raise CheckpointError(
                f"{self.path}: .bin files are read with torch 2.10 or newer only, found {torch.__version__}: upgrade "
                "torch, or convert the checkpoint elsewhere with 'moelora convert'"
            )
        if self._identity != _identity(self.path):
            raise CheckpointError(f"{self.path}: was replaced while it was being read; load the checkpoint again")
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, OSError) as error:
            raise self._refuse(f"one that torch cannot read ({str(error).splitlines()[0]})") from None

    def _describe(self) -> dict[str, _Extent]:
        with zipfile.ZipFile(self.path) as archive:
            # torch does not tell capitals from small letters in names.
            members = {info.filename.lower(): info for info in archive.infolist()}
            if len(members) < len(archive.infolist()) or self._has_two_directories(archive):
                raise self._refuse("an archive that can be read in two ways")
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise self._refuse("compressed members, which torch.save does not write")
            if sum(info.file_size for info in members.values()) > self.path.stat().st_size:
                raise self._refuse("members that add up to more than the file")
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1 or members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
                raise self._refuse(f"{len(pickles)} pickles, or one over {_MAX_PICKLE_BYTES} bytes")
            root = pickles[0].removesuffix("data.pkl")
            order = members.get(f"{root}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise self._refuse("numbers that are not little-endian")
            content = archive.read(members[pickles[0]])
        self._allow_only_tensors(content)
        extents = {}
        for key, leaf in self._leaves(_Describer(io.BytesIO(content)).load()):
            if isinstance(leaf, _Extent):
                extents[key] = leaf
            elif self._depth > 1 and isinstance(leaf, int | str | None):
                self.plain[key] = leaf
            else:
                raise self._refuse(f"an entry {key!r} that is no tensor")
        for key, extent in extents.items():
            member = members.get(f"{root}data/{extent.storage.key}".lower())
            size = extent.storage.numel * extent.storage.kind.itemsize
            if member is None or member.file_size != size or max(extent.end, extent.numel) > extent.storage.numel:
                raise self._refuse(f"a tensor {key!r} of shape {extent.shape} without the bytes for it")
        return extents

    def _has_two_directories(self, archive: zipfile.ZipFile) -> bool:
        """Whether torch may find other members than :mod:`zipfile` does, which makes up for wrong offsets."""
        size = self.path.stat().st_size
        with self.path.open("rb") as stream:
            stream.seek(max(size - _TAIL_BYTES, 0))
            tail = stream.read()
        end, locator = tail[-22:], tail[-42:-22]
        if not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0"):
            return True  # a comment, in which there may be another end
        if locator.startswith(b"PK\6\7") and int.from_bytes(locator[8:16], "little") != size - _TAIL_BYTES:
            return True
        return min((info.header_offset for info in archive.infolist()), default=0) != 0

    def _leaves(self, value: Any) -> Iterator[tuple[str, Any]]:
        """What the dicts hold, by name; a dict in two places, which could stand for any number of them, is refused."""
        seen = set()
        waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
        while waiting:
            path, value = waiting.pop()
            if isinstance(value, dict) and len(path) < self._depth:
                odd = (key for key in value if not isinstance(key, str) or (self._depth > 1 and "/" in key))
                if id(value) in seen or next(odd, None) is not None:
                    raise self._refuse(f"a dict {'/'.join(path)!r} that is there twice, or whose keys are not names")
                seen.add(id(value))
                waiting += [((*path, key), inner) for key, inner in reversed(value.items())]
            elif path:
                yield "/".join(path), value
            else:
                raise self._refuse(f"a {type(value).__name__}")

    def _allow_only_tensors(self, content: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of odd escapes in a hostile name
            instructions = list(pickletools.genops(content))
        for opcode, argument, _ in instructions:
            if opcode.name == "GLOBAL" and argument not in _GLOBALS:
                raise self._refuse(f"a reference to {str(argument).replace(' ', '.')!r}, which could run code")
            # A huge memo index would make the unpickler allocate as much.
            if opcode.name not in _OPCODES or (opcode.name == "LONG_BINPUT" and int(argument or 0) > len(content)):
                raise self._refuse(f"the pickle instruction {opcode.name}, which could run code or exhaust memory")
        if _most_in_a_tuple((opcode.name, argument) for opcode, argument, _ in instructions) > _MAX_IN_A_TUPLE:
            raise self._refuse("a tuple that unfolds to more than a tensor's description")

    def _refuse(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: expected a torch.save file with {'dicts' if self._depth > 1 else 'a flat dict'} of tensors, "
            f"found {found}; do not load it: get the checkpoint from its author again, as safetensors if there is one"
        )
