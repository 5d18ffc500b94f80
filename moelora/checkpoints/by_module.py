"""What the layouts share whose keys are a module's path and the name of a tensor in it.

PEFT writes ``base_model.model.<path>.lora_A.weight``; most authors changed what comes after the path and kept the rest.
Such a layout says how one module's tensors are cut (:meth:`ByModule.places`), and everything else follows.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .layout import Content, Part, Shape, Stored, inspect, refuse
from .tensor_file import TensorFile

PEFT_PREFIX = "base_model.model."
Where = tuple[slice | int, ...]
# For each tensor of a site the names in the file, after the module's path, and the places of the pieces in it.
Places = Mapping[str, Sequence[tuple[str, Where]]]


@dataclass
class ByModule(Stored):
    """A checkpoint whose keys are ``prefix + path of a module + "." + name of a tensor``.

    Attributes:
        prefix: what stands before the path. groups: paths of the sites of each entry of ``mixture.sites``.
    """

    prefix: str
    groups: list[list[str]]

    @abstractmethod
    def places(self, site: str) -> Places:
        """Where the tensors of a site lie; an empty list for one that is derived."""

    def key(self, site: str, tail: str) -> str:
        """The name of a tensor in the file."""
        return f"{self.prefix}{site}.{tail}"

    def sites(self) -> list[list[str]]:
        return self.groups

    def declared(self) -> dict[str, Shape]:
        return {
            f"{site}.{tensor}": self._extent(site, pieces)
            for group in self.groups
            for site in group
            for tensor, pieces in self.places(site).items()
        }

    def parts(self, declared: Mapping[str, Shape]) -> dict[str, list[Part]]:
        places = {f"{site}.{tensor}": (site, pieces) for site, tensor, pieces in self._all_places()}
        result = {}
        for name, shape in declared.items():
            site, pieces = places.get(name, ("", ()))
            like = torch.empty(shape, device="meta")
            result[name] = [Part(self.key(site, tail), tuple(like[where].shape), where) for tail, where in pieces]
        return result

    def check(self) -> None:
        """Compare the headers of the file with what its configuration promises.

        Raises:
            CheckpointError: they do not agree; all that is wrong is named.
        """
        parts = self.parts(self.declared())
        problems, _ = inspect(self.file, [part for each in parts.values() for part in each])
        refuse(self.file.path, problems, self.backbone.name)

    def _all_places(self) -> Iterable[tuple[str, str, Sequence[tuple[str, Where]]]]:
        for group in self.groups:
            for site in group:
                for tensor, pieces in self.places(site).items():
                    yield site, tensor, pieces

    def _extent(self, site: str, pieces: Sequence[tuple[str, Where]]) -> Shape:
        """The shape of a tensor of the mixture: of its first piece that is there, as far as places do not say more."""
        there = (self.file.headers.get(self.key(site, tail)) for tail, _ in pieces)
        shape = next((header.shape for header in there if header is not None), (0, 0))
        if not pieces or not pieces[0][1]:
            return shape
        sizes: list[int] = []
        axis = 0
        for position, first in enumerate(pieces[0][1]):
            index: list[Any] = [where[position] for _, where in pieces]
            if isinstance(first, int):
                sizes.append(max(index) + 1)
                continue
            stops = [each.stop for each in index if each.stop is not None]
            sizes.append(max(stops) if stops else _at(shape, axis))
            axis += 1
        return (*sizes, *shape[axis:])


def modules_of(file: TensorFile, pattern: re.Pattern[str]) -> dict[str, dict[str, Shape]]:
    """The tensors of each module whose keys fit ``pattern``, in the order of layers: shapes by name after the path.

    Keys that do not fit are left out here; :func:`~moelora.checkpoints.layout.inspect` names them.

    Args:
        pattern: of a whole key, with the groups ``path`` and ``tail``.
    """
    found: dict[str, dict[str, Shape]] = {}
    for key, header in file.headers.items():
        if match := pattern.fullmatch(key):
            found.setdefault(match["path"], {})[match["tail"]] = header.shape
    return {path: found[path] for path in sorted(found, key=in_order)}


def in_order(path: str) -> list[int]:
    """Sort key of module paths: layer 2 comes before layer 10; within a layer the order of the file stays."""
    return [int(part) for part in path.split(".") if part.isdigit() and len(part) < 10]


def cut_modules(content: Content, prefix: str, places: Callable[[str], Places]) -> dict[str, Tensor]:
    """The tensors of a file in the order of its sites and places: the inverse of reading.

    Args:
        places: of a site, as in :meth:`ByModule.places`.

    Raises:
        CheckpointError: a tensor of the mixture has no place.
    """
    left = dict(content.tensors)
    result = {}
    for site in (name for names in content.sites for name in names):
        for tensor, pieces in places(site).items():
            if (value := left.pop(f"{site}.{tensor}", None)) is None:
                continue
            for tail, where in pieces:
                result[f"{prefix}{site}.{tail}"] = value[where].clone(memory_format=torch.contiguous_format)
    if left:
        raise CheckpointError(
            f"{', '.join(list(left)[:20])}: the layout has no place for these: keep the native layout"
        )
    return result


def rows(expert: int, rank: int) -> Where:
    """The place of one expert of a uniform rank in a stacked ``lora_A``."""
    return (slice(expert * rank, (expert + 1) * rank),)


def columns(expert: int, rank: int) -> Where:
    """The place of one expert of a uniform rank in a stacked ``lora_B``."""
    return (slice(None), slice(expert * rank, (expert + 1) * rank))


def _at(shape: Shape, axis: int) -> int:
    return shape[axis] if axis < len(shape) else 0
