"""Sequences of image classification tasks, for models that tell an image by the texts of its classes, such as CLIP.

A task is images with the index of their class, the names of its classes, and the text that makes a prompt of a name.
Three sequences ship: ``digits``, which needs no download (``image_digits.py``), and ``x-tail`` and ``mtil`` of the
literature, from a local mirror or the hub (``image_datasets.py``).

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import ImageSequenceData
from ..errors import ConfigError, DataError
from ..registry import closest


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images and what they show.

    Attributes:
        images: (N, H, W, C) uint8, or a sequence of PIL images, which may be decoded when they are asked for.
        labels: (N,) int64, indices of classes.
    """

    images: Sequence[Any] | np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        """The images of these indices."""
        return [self.images[int(index)] for index in indices]


@dataclass(frozen=True, eq=False)
class ImageTask:
    """One task of a sequence.

    Attributes:
        classes: names, in the order of the labels.
        template: the prompt of a class, with ``{}`` where its name goes.

    Raises:
        DataError: labels and images do not fit each other or the classes, a class has no training image, a name comes
            twice, or the template has no ``{}``.
    """

    name: str
    train: ImageSplit
    val: ImageSplit
    test: ImageSplit
    classes: tuple[str, ...]
    template: str

    @property
    def prompts(self) -> list[str]:
        """One for each class."""
        return [self.template.format(name) for name in self.classes]

    def __post_init__(self) -> None:
        where = f"image task {self.name!r}"
        if self.template.count("{}") != 1:
            raise DataError(f"{where}: the template {self.template!r} needs {{}} once, where the class goes")
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if twice or not self.classes:
            raise DataError(f"{where}: the class {twice[0]!r} is there twice" if twice else f"{where}: no classes")
        for split in ("train", "val", "test"):
            part: ImageSplit = getattr(self, split)
            if len(part.images) != len(part.labels):
                raise DataError(f"{where}: {split} has {len(part.images)} images and {len(part.labels)} labels")
            wrong = [int(label) for label in part.labels if not 0 <= label < len(self.classes)]
            if wrong:
                raise DataError(f"{where}: {split} has the label {wrong[0]}, but there are {len(self.classes)} classes")
        for split in ("train", "test"):
            missing = sorted(set(range(len(self.classes))) - set(getattr(self, split).labels.tolist()))
            if missing:
                raise DataError(
                    f"{where}: {split} has no image of {len(missing)} of the {len(self.classes)} classes, such as "
                    f"{self.classes[missing[0]]!r}: add some, or leave the class out"
                )


@dataclass(frozen=True, eq=False)
class ImageSequence:
    """Tasks to learn one after another, in one of several orders.

    Two tasks may have a class of one name, or even one prompt, as in the benchmarks: the classes are different ones
    still, and a model that cannot tell their prompts apart has to be wrong about one of the two.

    Attributes:
        version: changes when any image, label or order does. orders: names of tasks by the name of the order.

    Raises:
        DataError: two tasks of one name, no order, or an order that does not have every task once.
    """

    name: str
    version: str
    tasks: tuple[ImageTask, ...]
    orders: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise DataError(f"sequence {self.name!r}: two tasks have one name, of {', '.join(names)}")
        if not self.orders:
            raise DataError(f"sequence {self.name!r} has no order")
        for order, ordered in self.orders.items():
            if sorted(ordered) != sorted(names):
                raise DataError(
                    f"sequence {self.name!r}: the order {order!r} ({', '.join(ordered)}) has to have each of the tasks "
                    f"{', '.join(names)} once"
                )

    def ordered(self, order: str | None = None) -> list[ImageTask]:
        """The tasks in an order; ``None`` is the first.

        Raises:
            ConfigError: there is no such order.
        """
        order = next(iter(self.orders)) if order is None else order
        if order not in self.orders:
            raise ConfigError(
                f"sequence {self.name!r} has no order {order!r}: orders are {', '.join(self.orders)}"
                f"{closest(order, list(self.orders))}"
            )
        tasks = {task.name: task for task in self.tasks}
        return [tasks[name] for name in self.orders[order]]


def few_shot(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of ``shots`` images of each class, in the order of the classes; the same for the same seed.

    A class that has fewer gives some of them more than once, as the released code of X-TAIL does it.
    """
    chosen = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        generator = np.random.default_rng([seed, int(label)])
        chosen.append(np.sort(generator.choice(mine, shots, replace=len(mine) < shots)))
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def shortened(split: ImageSplit, size: int | None, seed: int = 0) -> ImageSplit:
    """At most ``size`` images, the same for the same seed, and as many of each class as the whole has in proportion."""
    if size is None or len(split) <= size:
        return split
    generator = np.random.default_rng(seed)
    keys = np.empty(len(split))
    for label in np.unique(split.labels):
        mine = np.flatnonzero(split.labels == label)
        # Evenly spread places in the whole order, with a draw that decides which image gets which.
        keys[generator.permutation(mine)] = (np.arange(len(mine)) + 0.5) / len(mine)
    kept = np.sort(np.argsort(keys, kind="stable")[:size])
    return ImageSplit(Chosen(split.images, kept), split.labels[kept])


class Chosen(Sequence[Any]):
    """Some of a sequence of images, which are looked up when they are asked for."""

    def __init__(self, images: Sequence[Any] | np.ndarray, indices: np.ndarray) -> None:
        self._images, self._indices = images, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._images[int(self._indices[index])]


def read_image_sequence(
    name: str, *, shots: int = 16, test_size: int | None = None, seed: int = 0, path: str | None = None
) -> ImageSequence:
    """A sequence by its name; see :data:`IMAGE_SEQUENCES`.

    Args:
        shots: training images of each class. test_size: at most so many test images of each task.
        seed: of the choice of both. path: for ``x-tail`` and ``mtil``, see ``image_datasets.py``.

    Raises:
        ConfigError: an unknown name, or a path where none is needed or none where one is.
        DataError: a package or data are missing, or something does not fit.
    """
    if name not in IMAGE_SEQUENCES:
        known = list(IMAGE_SEQUENCES)
        raise ConfigError(f"unknown image sequence {name!r}: known are {', '.join(known)}{closest(name, known)}")
    return IMAGE_SEQUENCES[name](shots, test_size, seed, path)


def read_images(config: ImageSequenceData) -> ImageSequence:
    """The sequence of a recipe; see :func:`read_image_sequence`."""
    return read_image_sequence(
        config.name, shots=config.shots, test_size=config.test_size, seed=config.seed, path=config.path
    )


def _digits(shots: int, test_size: int | None, seed: int, path: str | None) -> ImageSequence:
    from .image_digits import digits

    if path is not None:
        raise ConfigError(f"the sequence 'digits' needs no path (given {path!r}): leave it out")
    return digits(shots, test_size, seed)


def _published(name: str) -> Callable[[int, int | None, int, str | None], ImageSequence]:
    def read(shots: int, test_size: int | None, seed: int, path: str | None) -> ImageSequence:
        from .image_datasets import read_published

        return read_published(name, shots, test_size, seed, path)

    return read


# What reads each: shots, test size, seed and path to a sequence.
IMAGE_SEQUENCES: dict[str, Callable[[int, int | None, int, str | None], ImageSequence]] = {
    "digits": _digits,
    "x-tail": _published("x-tail"),
    "mtil": _published("mtil"),
}
