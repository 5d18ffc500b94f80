"""What every file of named tensors offers, whatever its format; and several of them seen as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError


@dataclass(frozen=True)
class Header:
    """What a file says about a tensor before its numbers are read; ``dtype`` as torch names it."""

    dtype: str
    shape: tuple[int, ...]


class TensorFile(ABC):
    """A file of named tensors whose headers are known before anything is allocated."""

    path: Path
    headers: dict[str, Header]

    @abstractmethod
    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU; they may be views of the file in memory, which are read where they are used."""

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """As :meth:`load`, but into memory of their own: when they are gone, nothing of the file stays in memory."""
        return self.load(keys)

    def named(self, key: str) -> str:
        """A tensor as messages call it: by its key, and by its file where ``path`` does not tell that."""
        return key


class JoinedFile(TensorFile):
    """Several files seen as one.

    Args:
        path: what messages name. files: each with the text that its keys get in front, by its name.

    Raises:
        CheckpointError: two files have a tensor of one name.
    """

    def __init__(self, path: Path, files: Mapping[str, tuple[str, TensorFile]]) -> None:
        self.path = path
        self.headers = {}
        self._sources: dict[str, tuple[str, TensorFile, str]] = {}
        for name, (prefix, file) in files.items():
            for key, header in file.headers.items():
                joined = prefix + key
                if joined in self._sources:
                    raise CheckpointError(
                        f"{path}: {joined}: expected in one file, found in {self._sources[joined][0]} and in {name}"
                    )
                self._sources[joined] = (name, file, key)
                self.headers[joined] = header

    def file_of(self, key: str) -> str | None:
        """The name of the file that holds a tensor."""
        return self._sources[key][0] if key in self._sources else None

    def named(self, key: str) -> str:
        if key not in self._sources:
            return key
        _, file, inner = self._sources[key]
        inside = file.path.relative_to(self.path) if file.path.is_relative_to(self.path) else Path(file.path.name)
        return f"{file.named(inner)} (in {inside.as_posix()})"

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        sources = {key: self._sources[key] for key in keys}
        return {key: file.load([inner])[inner] for key, (_, file, inner) in sources.items()}

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        sources = {key: self._sources[key] for key in keys}
        return {key: file.read([inner])[inner] for key, (_, file, inner) in sources.items()}


class SelectedFile(TensorFile):
    """The tensors of a file that belong to an adapter, where the file holds others beside them.

    Args:
        keep: tells by its name whether a tensor belongs to the adapter. Others must be what a layout says may be there:
            it is for the layout to refuse the rest.

    Attributes:
        others: headers of the tensors that are left out.
    """

    def __init__(self, file: TensorFile, keep: Callable[[str], bool]) -> None:
        self.path = file.path
        self.headers = {key: header for key, header in file.headers.items() if keep(key)}
        self.others = {key: header for key, header in file.headers.items() if key not in self.headers}
        self._file = file

    def named(self, key: str) -> str:
        return self._file.named(key)

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return self._file.load(keys)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return self._file.read(keys)


class RenamedFile(TensorFile):
    """Tensors of a file under other names.

    Args:
        names: of the tensors in ``file``, by the names that they get; others are left out.
    """

    def __init__(self, file: TensorFile, names: Mapping[str, str]) -> None:
        self.path = file.path
        self.headers = {new: file.headers[old] for new, old in names.items()}
        self._file, self._names = file, names

    def named(self, key: str) -> str:
        return self._file.named(self._names.get(key, key))

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: self._file.load([self._names[key]])[self._names[key]] for key in keys}

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: self._file.read([self._names[key]])[self._names[key]] for key in keys}
