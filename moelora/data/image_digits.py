"""The image sequence that runs anywhere: scikit-learn's digits in disguises, and patches of its two photographs.

The 1797 digits of 8x8 pixels are divided by the image, once for all: some are for training the backbone, the others
for training, validation and test of the tasks. A task shows five digits in a disguise, with names such as "inverted
three". The backbone's own images are all ten digits as they are ("plain three"), and the other five of three of the
disguises: of "red", "inverted" and "mirrored" it knows the word and the look, but not with the digits of the task; the
words "turned", "noisy" and "striped", and the photographs, it has never seen.

Shapes: N images, H = W = 8, C = 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import DataError
from .image_sequences import ImageSequence, ImageSplit, ImageTask, few_shot, shortened

VERSION = "1"
TEMPLATE = "a picture of a {}."
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Images of each digit for the backbone, and of the others those for validation and for test; the rest is for training.
BASE, VAL, TEST = 80, 15, 40
# For training and validation; the rest is for test.
PATCHES = {"train": 60, "val": 30}

Disguise = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _noisy(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A fifth of the pixels is black or white."""
    chance = generator.random(images.shape)
    return np.where(chance < 0.1, 0, np.where(chance > 0.9, 255, images)).astype(np.uint8)


def _striped(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Every other row is grey where it is dark."""
    striped = images.copy()
    striped[:, ::2] = np.maximum(striped[:, ::2], 128)
    return striped


# (N, H, W) uint8 to (N, H, W) or, where colour matters, (N, H, W, C).
DISGUISES: dict[str, Disguise] = {
    "plain": lambda images, generator: images,
    "red": lambda images, generator: np.stack([images, np.zeros_like(images), np.zeros_like(images)], axis=-1),
    "inverted": lambda images, generator: 255 - images,
    "mirrored": lambda images, generator: images[:, :, ::-1],
    "turned": lambda images, generator: np.rot90(images, axes=(1, 2)),
    "noisy": _noisy,
    "striped": _striped,
}
# The digits that each task shows; the backbone has seen the others of the first three.
SHOWN: dict[str, tuple[int, ...]] = {
    "red": (0, 1, 2, 3, 4),
    "inverted": (5, 6, 7, 8, 9),
    "mirrored": (0, 2, 4, 6, 8),
    "turned": (1, 3, 5, 7, 9),
    "noisy": (0, 3, 4, 7, 8),
    "striped": (1, 2, 5, 6, 9),
}
KNOWN = ("red", "inverted", "mirrored")
ORDERS = {
    "a": ("red", "inverted", "mirrored", "turned", "noisy", "striped", "photos"),
    "b": ("photos", "striped", "noisy", "turned", "mirrored", "inverted", "red"),
    "c": ("turned", "red", "photos", "inverted", "striped", "mirrored", "noisy"),
}


def digits(shots: int, test_size: int | None, seed: int) -> ImageSequence:
    """The sequence; what is shown in training follows from ``seed``, and the rest is always the same.

    Raises:
        DataError: scikit-learn, or Pillow, is missing.
    """
    images, labels = _load_digits()
    parts = _parts(labels)
    tasks = [_task(name, images, labels, parts) for name in SHOWN] + [_photos()]
    return ImageSequence("digits", VERSION, tuple(_fewer(task, shots, test_size, seed) for task in tasks), dict(ORDERS))


def digits_base() -> ImageTask:
    """What the small backbone is trained on; no task has any of its images or classes.

    Validation and test are the test images of the tasks in the disguises and digits that the backbone knows.
    """
    images, labels = _load_digits()
    parts = _parts(labels)
    shown = {"plain": tuple(range(10)), **{name: _others(SHOWN[name]) for name in KNOWN}}
    splits = {}
    for split, part in {"train": "base", "val": "val", "test": "test"}.items():
        pieces = [_disguised(name, which, images, labels, parts[part]) for name, which in shown.items()]
        starts = np.cumsum([0, *(len(which) for which in shown.values())])
        splits[split] = ImageSplit(
            np.concatenate([piece.images for piece in pieces]),
            np.concatenate([piece.labels + start for piece, start in zip(pieces, starts, strict=False)]),
        )
    classes = tuple(f"{name} {DIGITS[digit]}" for name, which in shown.items() for digit in which)
    return ImageTask("base", **splits, classes=classes, template=TEMPLATE)


def digits_words() -> list[str]:
    """All words of the prompts of the backbone and the tasks, in a fixed order."""
    photos = " ".join(_PHOTOS.values())
    return [*["a", "picture", "of", "."], *DISGUISES, *DIGITS, *dict.fromkeys(f"negative {photos}".split())]


def _others(shown: Sequence[int]) -> tuple[int, ...]:
    return tuple(digit for digit in range(10) if digit not in shown)


def _datasets() -> Any:
    try:
        import_module("PIL")
        return import_module("sklearn.datasets")
    except ImportError as error:
        raise DataError(
            f"the sequence 'digits' needs the images of scikit-learn, and Pillow ({error}): pip install "
            "'moelora[images]'"
        ) from error


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W) uint8 and (N,) int64."""
    loaded = _datasets().load_digits()
    return np.round(loaded.images * (255 / 16)).astype(np.uint8), loaded.target.astype(np.int64)


def _parts(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the images by what they are for."""
    parts: dict[str, list[np.ndarray]] = {"base": [], "val": [], "test": [], "train": []}
    for digit in range(10):
        mine = np.random.default_rng([20, digit]).permutation(np.flatnonzero(labels == digit))
        cuts = np.split(mine, np.cumsum([BASE, VAL, TEST]))
        for part, piece in zip(parts.values(), cuts, strict=True):
            part.append(piece)
    return {name: np.sort(np.concatenate(pieces)) for name, pieces in parts.items()}


def _disguised(name: str, shown: Sequence[int], images: np.ndarray, labels: np.ndarray, part: np.ndarray) -> ImageSplit:
    """The images of a part that show some digits, in a disguise."""
    chosen = part[np.isin(labels[part], shown)]
    generator = np.random.default_rng([30, *name.encode()])
    # Over all images, so that each has its own noise whatever part it is in.
    looks = DISGUISES[name](images, generator)[chosen]
    if looks.ndim == 3:
        looks = np.repeat(looks[..., None], 3, axis=-1)
    return ImageSplit(np.ascontiguousarray(looks), np.searchsorted(shown, labels[chosen]))


def _task(name: str, images: np.ndarray, labels: np.ndarray, parts: dict[str, np.ndarray]) -> ImageTask:
    splits = {split: _disguised(name, SHOWN[name], images, labels, parts[split]) for split in ("train", "val", "test")}
    classes = tuple(f"{name} {DIGITS[digit]}" for digit in SHOWN[name])
    return ImageTask(name, **splits, classes=classes, template=TEMPLATE)


_PHOTOS = {"china.jpg": "temple", "flower.jpg": "flower"}


def _photos() -> ImageTask:
    """Patches of 32 x 32 pixels, made smaller by the mean of each 4 x 4; as they are, and in negative."""
    loaded = _datasets().load_sample_images()
    names = [str(name).replace("\\", "/").rpartition("/")[2] for name in loaded.filenames]
    pieces: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "val": [], "test": []}
    for number, (file, word) in enumerate(_PHOTOS.items()):
        photo = np.asarray(loaded.images[names.index(file)])
        rows, columns = photo.shape[0] // 32, photo.shape[1] // 32
        small = photo[: rows * 32, : columns * 32].reshape(rows * 8, 4, columns * 8, 4, 3).mean(axis=(1, 3))
        patches = small.reshape(rows, 8, columns, 8, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 8, 8, 3)
        order = np.random.default_rng([40, *word.encode()]).permutation(len(patches))
        patches = np.round(patches[order]).astype(np.uint8)
        cuts = np.split(patches, np.cumsum(list(PATCHES.values())))
        for split, piece in zip(pieces, cuts, strict=True):
            pieces[split] += [(piece, number), (255 - piece, number + len(_PHOTOS))]
    splits = {
        split: ImageSplit(
            np.concatenate([piece for piece, _ in parts]),
            np.concatenate([np.full(len(piece), label, dtype=np.int64) for piece, label in parts]),
        )
        for split, parts in pieces.items()
    }
    words = tuple(_PHOTOS.values())
    return ImageTask("photos", **splits, classes=(*words, *(f"negative {w}" for w in words)), template=TEMPLATE)


def _fewer(task: ImageTask, shots: int, test_size: int | None, seed: int) -> ImageTask:
    kept = few_shot(task.train.labels, shots, seed)
    train = ImageSplit(np.asarray(task.train.images)[kept], task.train.labels[kept])
    test = shortened(task.test, test_size)
    return ImageTask(task.name, train, task.val, test, task.classes, task.template)
