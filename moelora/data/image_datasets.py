"""X-TAIL and MTIL, the sequences of data sets on which continual learning of CLIP is measured, from files or the hub.

Published: MTIL of ZSCL (arXiv 2303.06628; Thunderbeee/ZSCL) has eleven data sets and gives each test image the classes
of its own; X-TAIL of RAIL (arXiv 2406.18868; linghan1997/Regression-based-Analytic-Incremental-Learning) has ten of
them and gives it the classes of all. Both have an alphabetical order, I, and a random one, II. Training is on 16 images
of each class in X-TAIL. Prompts are those of Artificer-AI-Lab/MoRAM.

Differences from the released code: MNIST's class is its digit, where the released prompt quotes "number: " twice; names
of classes are those of the files, with spaces for underscores, so whoever makes a mirror decides on the wording.

``path`` is a folder, or a data set of the hub, with a folder for each data set in the form of an image folder, which
``datasets`` reads: ``<path>/aircraft/train/<class>/<any name>.jpg``, and so on for ``validation``, which may be absent,
and ``test``. Names of the folders: see :data:`TEMPLATES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .image_sequences import Chosen, ImageSequence, ImageSplit, ImageTask, few_shot, shortened

VERSION = "1"
# As in the few-shot protocol of CoOp, on which X-TAIL is built.
VAL_SHOTS = 4

TEMPLATES = {
    "aircraft": "a photo of a {}, a type of aircraft.",
    "caltech101": "a photo of a {}.",
    "cifar100": "a photo of a {}.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of the {} satellite location.",
    "flowers": "a photo of a {}, a type of flower.",
    "food": "a photo of a {}, a type of food.",
    "mnist": 'a photo of the number: "{}".',
    "oxford_pet": "a photo of a {}, a type of pet.",
    "stanford_cars": "a photo of a {}.",
    "sun397": "a photo of a {}.",
}

ORDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "mtil": {
        "I": tuple(TEMPLATES),
        "II": (
            "stanford_cars",
            "food",
            "mnist",
            "oxford_pet",
            "flowers",
            "sun397",
            "aircraft",
            "caltech101",
            "dtd",
            "eurosat",
            "cifar100",
        ),
    },
    "x-tail": {
        "I": tuple(name for name in TEMPLATES if name != "cifar100"),
        "II": (
            "stanford_cars",
            "aircraft",
            "oxford_pet",
            "food",
            "sun397",
            "mnist",
            "flowers",
            "dtd",
            "caltech101",
            "eurosat",
        ),
    },
}


def read_published(name: str, shots: int, test_size: int | None, seed: int, path: str | None) -> ImageSequence:
    """The sequence ``x-tail`` or ``mtil``.

    Raises:
        ConfigError: no path.
        DataError: a data set is missing, cannot be read, or is no image folder with a training and a test part.
    """
    orders = ORDERS[name]
    if path is None:
        raise ConfigError(
            f"the sequence {name!r} is read from files: set path to a folder, or to a data set of the hub, with the "
            f"image folders {', '.join(orders['I'])}"
        )
    folder = Path(path).expanduser()
    if folder.is_dir():
        missing = [dataset for dataset in orders["I"] if not (folder / dataset).is_dir()]
        if missing:
            raise DataError(
                f"{folder}: the sequence {name!r} needs {len(missing)} more image folders there, {', '.join(missing)}"
            )
    tasks = [_read(dataset, str(path), folder.is_dir(), shots, test_size, seed) for dataset in orders["I"]]
    return ImageSequence(name, VERSION, tuple(tasks), orders)


def _read(dataset: str, path: str, local: bool, shots: int, test_size: int | None, seed: int) -> ImageTask:
    from datasets import load_dataset

    where = f"{path}, {dataset}"
    try:
        if local:
            splits = load_dataset("imagefolder", data_dir=str(Path(path).expanduser() / dataset))
        else:
            splits = load_dataset(path, data_dir=dataset)
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise DataError(
            f"{where}: not read as an image folder: {text[:300]}; check the path and what is there"
        ) from error
    if absent := [split for split in ("train", "test") if split not in splits]:
        raise DataError(
            f"{where}: there is no {' and no '.join(absent)} part (there is {', '.join(splits)}): put the images into "
            "train/<class>, validation/<class> and test/<class>"
        )
    names = _names(splits["train"], where)
    train, test = _split(splits["train"]), _split(splits["test"])
    val = ImageSplit([], np.zeros(0, dtype=np.int64))
    if "validation" in splits:
        val = _shots(_split(splits["validation"]), min(shots, VAL_SHOTS), seed)
    classes = tuple(name.replace("_", " ") for name in names)
    test = shortened(test, test_size, seed)
    return ImageTask(dataset, _shots(train, shots, seed), val, test, classes, TEMPLATES[dataset])


def _shots(split: ImageSplit, shots: int, seed: int) -> ImageSplit:
    kept = few_shot(split.labels, shots, seed)
    return ImageSplit(Chosen(split.images, kept), split.labels[kept])


def _names(part: Any, where: str) -> list[str]:
    feature = part.features.get("label")
    names = getattr(feature, "names", None)
    if names is None or "image" not in part.features:
        raise DataError(
            f"{where}: expected the columns image and label, a class label with names, and got "
            f"{', '.join(part.features)}: put the images into a folder for each class"
        )
    return [str(name) for name in names]


def _split(part: Any) -> ImageSplit:
    labels = np.asarray(part.select_columns("label")[:]["label"], dtype=np.int64)
    return ImageSplit(_Decoded(part.select_columns("image")), labels)


class _Decoded(Sequence[Any]):
    """The images of a part of a data set, decoded when they are asked for."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: Any) -> Any:
        return self._part[int(index)]["image"].convert("RGB")
