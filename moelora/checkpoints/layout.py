"""What a checkpoint layout is: files on disk on one side, a mixture and its tensors on the other.

A layout says how each tensor of a mixture is cut into tensors of its file; reading, writing and all checks follow from
that one description. To add a layout, write a file with a subclass of :class:`Layout`, register it in
:data:`LAYOUTS`, import it in ``checkpoints/__init__.py``, and describe it fully in the docstring of its class.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import BackboneConfig, Closed, MixtureConfig
from ..errors import CheckpointError
from ..registry import Registry
from .folder import Folder
from .reading import not_finite
from .tensor_file import TensorFile

logger = logging.getLogger(__name__)

LAYOUTS: Registry[Layout] = Registry("checkpoint layout", "moelora.checkpoints")
DTYPES = ("float32", "bfloat16", "float16")
Shape = tuple[int, ...]


class Architecture(Closed):
    """What tells one backbone from another, as far as it is known; ``hidden_act`` is the FFN's nonlinearity."""

    model_type: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    hidden_act: str | None = None

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Read off a transformers configuration."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        acts = ("hidden_activation", "hidden_act", "activation_function")
        act = next((value for name in acts if isinstance(value := getattr(text, name, None), str)), None)
        sizes = {
            name: value
            for name in ("hidden_size", "num_hidden_layers")
            if isinstance(value := getattr(text, name, None), int)
        }
        return cls(model_type=getattr(text, "model_type", None), hidden_act=act, **sizes)

    def differences(self, other: Architecture) -> list[str]:
        """Where both know a size or the nonlinearity and do not agree; ``model_type`` is informative only."""
        mine, theirs = self.to_dict(), other.to_dict()
        acts = (self.hidden_act, other.hidden_act)
        if acts[0] != acts[1] and all(act is not None and act.startswith("gelu") for act in acts):
            # Gemma's configurations named the exact GELU for years while its code used the approximation.
            logger.warning("trained with %s, the backbone has %s: results may differ slightly", *acts)
            theirs["hidden_act"] = mine["hidden_act"]
        return [
            f"{name}: expected {mine[name]}, found {theirs[name]}"
            for name in ("hidden_size", "num_hidden_layers", "hidden_act")
            if None not in (mine[name], theirs[name]) and mine[name] != theirs[name]
        ]


@dataclass(frozen=True)
class Part:
    """A tensor of a file, and where it belongs in a tensor of the mixture.

    Attributes:
        key: its name in the file. shape: its shape there. where: index into the mixture's tensor; empty is all of it.
    """

    key: str
    shape: Shape
    where: tuple[slice | int, ...] = ()


@dataclass(frozen=True)
class Content:
    """All that a layout is given to write.

    Attributes:
        sites: names of the sites of each entry of ``mixture.sites``, in the order of the backbone.
        tensors: by the mixture's names, ``<site>.lora_A`` and so on.
        reward: how the experts make up a reward model, see ``moelora/reward/config.py``; only the native layout has a
            place for it.
    """

    backbone: BackboneConfig
    architecture: Architecture
    mixture: MixtureConfig
    sites: Sequence[Sequence[str]]
    tensors: Mapping[str, Tensor]
    reward: Mapping[str, Any] | None = None


@dataclass
class Stored(ABC):
    """A checkpoint whose configuration has been read and checked, and whose numbers have not been read yet.

    Attributes:
        layout: name of the layout. detail: what else there is to say about it, such as a generation.
        folder: where it lies. file: its tensors. reward: as in :class:`Content`.
    """

    layout: ClassVar[str]
    folder: Path
    backbone: BackboneConfig
    architecture: Architecture
    mixture: MixtureConfig
    file: TensorFile
    detail: str = field(default="", kw_only=True)
    reward: Mapping[str, Any] | None = field(default=None, kw_only=True)

    @abstractmethod
    def declared(self) -> dict[str, Shape]:
        """Names and shapes of the mixture's tensors as far as the file alone tells them."""

    @abstractmethod
    def sites(self) -> list[list[str]]:
        """Names of the sites of each entry of ``mixture.sites``."""

    @abstractmethod
    def parts(self, declared: Mapping[str, Shape]) -> dict[str, list[Part]]:
        """How the file cuts each tensor of the mixture; no parts where it does not hold one, see :meth:`derive`.

        Raises:
            CheckpointError: the layout has no place for a tensor.
        """

    def derive(self, name: str, shape: Shape, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the mixture that the file does not hold, because it follows from others.

        Args:
            name, shape: of the tensor. read: gives another tensor of the mixture by its name.
        """
        raise NotImplementedError(f"layout {self.layout!r} gives no parts for {name!r} and does not derive it")

    def own_backbone(
        self, quantization: str | None, dtype: str | None, device_map: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None] | None:
        """The backbone whose weights lie in the same files, where a layout keeps them there; else ``None``.

        Args:
            quantization, dtype, device_map: as in :func:`moelora.load_backbone`.
        """
        return None

    def to_attach(self) -> MixtureConfig:
        """The mixture in a form in which nothing that the file chose is run, such as a regular expression."""
        return self.mixture

    def check_backbone(self, config: Any) -> None:
        """Compare the backbone's transformers configuration with what the checkpoint was trained on.

        Raises:
            CheckpointError: width, depth or nonlinearity differ.
        """
        differences = self.architecture.differences(Architecture.of(config))
        if differences:
            raise CheckpointError(
                f"{self.folder}: does not fit this backbone: {'; '.join(differences)}; load it on "
                f"{self.backbone.name!r}, which it was trained on"
            )

    def check_weights(self, backbone: PreTrainedModel) -> None:
        """Compare the backbone's weights with those that lie in the same files, where a layout keeps them there.

        Raises:
            CheckpointError: they differ.
        """
        return

    def tensors(self, declared: Mapping[str, Shape]) -> dict[str, Tensor]:
        """All of :meth:`stream` at once."""
        return dict(self.stream(declared))

    def stream(self, declared: Mapping[str, Shape]) -> Iterator[tuple[str, Tensor]]:
        """Read the numbers into the declared structure, one tensor after another, on the CPU and in the file's dtype.

        Args:
            declared: names and shapes that the mixture has on its backbone.

        Raises:
            CheckpointError: before the first tensor, if anything is missing, unexpected, misshapen or of a wrong dtype;
                after the last, if anything was not finite, so what was read until then must not be used. One message
                names all of it.
        """
        parts = self.parts(declared)
        problems, _ = inspect(self.file, [part for each in parts.values() for part in each])
        if problems:
            headers = self.file.headers
            keys = [part.key for each in parts.values() for part in each if part.key in headers]
            numbers = (self.file.read([key]) for key in keys if headers[key].dtype in DTYPES)
            problems += [line for values in numbers for line in _not_finite(self.file, values)]
        refuse(self.file.path, problems, self.backbone.name)

        def read(name: str) -> Tensor:
            values = self.file.read([part.key for part in parts[name]])
            problems.extend(_not_finite(self.file, values))
            return _assemble(declared[name], parts[name], values)

        for name, shape in declared.items():
            yield name, read(name) if parts[name] else self.derive(name, shape, read)
        refuse(self.file.path, list(dict.fromkeys(problems)), self.backbone.name)


def _not_finite(file: TensorFile, values: Mapping[str, Tensor]) -> list[str]:
    """A line for each tensor of a file with NaN or infinite numbers."""
    counts = {key: not_finite(value) for key, value in values.items()}
    return [
        f"not finite: {file.named(key)}: expected finite numbers, found {count} NaN or infinite"
        for key, count in counts.items()
        if count
    ]


def _assemble(shape: Shape, parts: Sequence[Part], values: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the mixture from the parts that a file has of it."""
    if len(parts) == 1 and not parts[0].where:
        return values[parts[0].key]
    dtypes = [value.dtype for value in values.values()]
    # Zero where no part is: an adapter that has nothing there adds nothing.
    result = torch.zeros(shape, dtype=max(dtypes, key=lambda dtype: dtype.itemsize))
    for part in parts:
        result[part.where] = values[part.key]
    return result


class Layout(ABC):
    """One published format. The docstring of a subclass is the format's full description."""

    kind: ClassVar[str]
    # All file names that a checkpoint may consist of, with * for a part of a name; nothing else is downloaded.
    files: ClassVar[tuple[str, ...]]
    # Those of a layout that keeps a whole model; downloaded only where nothing was recognised without them.
    model_files: ClassVar[tuple[str, ...]] = ()

    def further_files(self, folder: Folder) -> tuple[str, ...]:
        """What :attr:`files` does not name, because only those files themselves tell; downloaded after them.

        Raises:
            CheckpointError: they are damaged.
        """
        return ()

    @abstractmethod
    def detect(self, folder: Folder) -> str | None:
        """Why ``folder`` looks like this layout, from what its files contain; ``None`` if it does not."""

    @abstractmethod
    def read(self, folder: Folder) -> Stored:
        """Read and check everything but the numbers.

        Raises:
            CheckpointError: a file is missing or damaged, or says what this layout cannot mean.
        """

    def write(self, folder: Path, content: Content) -> None:
        """Write the files into an empty folder.

        Raises:
            OSError: writing failed.
            CheckpointError: the layout cannot express this mixture; the message says all that stands against it.
        """
        raise CheckpointError(f"layout {self.kind!r} is read only: nobody reads what we would write; write another")


def inspect(file: TensorFile, parts: Iterable[Part]) -> tuple[list[str], list[str]]:
    """Compare a file's headers with what is expected of it.

    Returns:
        A line per problem, and the keys that are as expected.
    """
    problems, sound = [], []
    expected = {part.key: part.shape for part in parts}
    for key, shape in expected.items():
        header = file.headers.get(key)
        if header is None:
            problems.append(
                f"missing: {file.named(key)}: expected {shape if 0 not in shape else 'a tensor'}, found nothing"
            )
        elif header.shape != shape:
            problems.append(f"misshapen: {file.named(key)}: expected {shape}, found {header.shape}")
        elif header.dtype not in DTYPES:
            problems.append(f"wrong dtype: {file.named(key)}: expected {', '.join(DTYPES)}, found {header.dtype}")
        else:
            sound.append(key)
    for key, header in file.headers.items():
        if key not in expected:
            problems.append(
                f"unexpected: {file.named(key)}: expected only tensors of the adapter, found {header.dtype} "
                f"{header.shape}"
            )
    return problems, sound


def refuse(path: Path, problems: Sequence[str], backbone: str) -> None:
    """Raise :class:`CheckpointError` that lists all ``problems`` and says what to do, if there are any."""
    if not problems:
        return
    remedies = []
    kinds = {problem.partition(":")[0] for problem in problems}
    if kinds & {"missing", "misshapen"}:
        remedies.append(f"copy the checkpoint again, or load it on the backbone it was trained on ({backbone!r})")
    if "unexpected" in kinds:
        remedies.append(
            "an adapter must not carry weights of the backbone or of anything else: do not load it as it is"
        )
    if kinds & {"wrong dtype", "not finite"}:
        remedies.append("the numbers are unusable: use an earlier checkpoint")
    lines = "".join(f"\n  {problem}" for problem in problems)
    raise CheckpointError(f"{path}: {len(problems)} tensors do not fit:{lines}\nWhat to do: {'; '.join(remedies)}.")


def cut(tensors: Mapping[str, Tensor], parts: Mapping[str, Sequence[Part]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file from those of a mixture: the inverse of :meth:`Stored.tensors`."""
    for name, each in parts.items():
        for part in each:
            yield part.key, tensors[name][part.where].clone(memory_format=torch.contiguous_format)
