"""What every file of named tensors offers, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


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
        """Read these tensors, on the CPU."""
