"""A folder with a checkpoint, as layouts look at it: every file is opened once, however many layouts ask for it."""

from __future__ import annotations

import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .reading import load_mapping, open_tensors, regular_file
from .tensor_file import JoinedFile, TensorFile

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
MODEL_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


class Folder:
    """A folder and what has been read of it.

    Names of files are relative, with forward slashes. They are checked as text: the files of a hub snapshot are links.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mappings: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, TensorFile] = {}

    def has(self, name: str) -> bool:
        """Whether there is such a file, or a link to one."""
        return regular_file(self.path / name)

    def names(self, pattern: str = "*") -> list[str]:
        """The names of its files and folders that fit a pattern, in order."""
        return sorted(path.name for path in self.path.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def below(self, name: str) -> list[str]:
        """The files of a name that lie in folders of this one, as ``folder/name``."""
        return sorted(path.relative_to(self.path).as_posix() for path in self.path.glob(f"*/{name}"))

    def size(self, name: str) -> int:
        """The bytes of a file."""
        return (self.path / name).stat().st_size

    def inner(self, name: str) -> Folder:
        """A folder below this one.

        Raises:
            CheckpointError: ``name`` leads out of this folder, or there is no such folder.
        """
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or any(part in ("", "..", "/") or ":" in part for part in parts):
            raise CheckpointError(f"{self.path}: expected the name of a folder in it, without '..', found {name!r}")
        path = self.path.joinpath(*parts)
        if not path.is_dir():
            raise CheckpointError(f"{path}: missing; expected a folder: copy the whole checkpoint")
        return Folder(path)

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON file.

        Raises:
            CheckpointError: it is missing, damaged, or no mapping.
        """
        if name not in self._mappings:
            self._mappings[name] = load_mapping(self.path / name)
        return self._mappings[name]

    def tensors(self, *names: str) -> TensorFile:
        """The one file of these names that is there.

        Raises:
            CheckpointError: none is there, more than one is, or it is damaged.
        """
        there = [name for name in names if self.has(name)]
        if len(there) > 1:
            raise CheckpointError(
                f"{self.path}: expected one file with tensors, found {' and '.join(there)}: remove one"
            )
        name = there[0] if there else names[0]
        if name not in self._tensors:
            self._tensors[name] = self._open(name)
        return self._tensors[name]

    def _open(self, name: str) -> TensorFile:
        return open_tensors(self.path / name)

    def adapter(self) -> tuple[dict[str, Any], TensorFile] | None:
        """``adapter_config.json`` and the tensors beside it; ``None`` where one of the two is missing.

        Raises:
            CheckpointError: one is damaged, or there are two files with tensors.
        """
        if not self.has(ADAPTER_CONFIG) or not any(self.has(name) for name in ADAPTER_TENSORS):
            return None
        return self.mapping(ADAPTER_CONFIG), self.tensors(*ADAPTER_TENSORS)

    def model(self) -> TensorFile | None:
        """The weights of a whole model, in one file or in several; ``None`` where there are none.

        Raises:
            CheckpointError: the index names a file that is missing, or a tensor lies in another file than it says.
        """
        single, index = MODEL_FILES[0], MODEL_FILES[2]
        if self.has(single):
            return self.tensors(single)
        if not self.has(index):
            return None
        if index not in self._tensors:
            self._tensors[index] = self._sharded(index)
        return self._tensors[index]

    def _sharded(self, index: str) -> TensorFile:
        weights = self.mapping(index).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
            raise CheckpointError(
                f"{self.path / index}: weight_map: expected the file of each tensor, found {weights!r}"
            )
        shards = sorted(set(weights.values()))
        for name in shards:
            if not fnmatch.fnmatchcase(name, MODEL_FILES[1]) or "/" in name or "\\" in name:
                raise CheckpointError(
                    f"{self.path / index}: weight_map: expected names such as model-00001-of-00002.safetensors, found "
                    f"{name!r}"
                )
        joined = JoinedFile(self.path / index, {name: ("", self._open(name)) for name in shards})
        wrong = next((key for key, name in weights.items() if joined.file_of(key) != name), None)
        if wrong is not None or len(weights) != len(joined.headers):
            raise CheckpointError(
                f"{self.path / index}: weight_map: does not agree with the files beside it"
                f"{'' if wrong is None else f', {wrong!r} first'}: copy the whole checkpoint again"
            )
        return joined
