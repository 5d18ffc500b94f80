"""The data section of a recipe whose tasks are images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .schema import Closed

# What experts are put on: a causal language model, or a CLIP model.
Carrier = Literal["language", "clip"]
IMAGE_SEQUENCE_NAMES = ("digits", "x-tail", "mtil")


class ImageSequenceData(Closed):
    """A sequence of image classification tasks, for CLIP models; see ``moelora/data/image_sequences.py``.

    Attributes:
        name: ``digits``, which needs no download, ``x-tail`` or ``mtil``.
        order: of the tasks; ``a``, ``b``, ``c`` of the first, ``I``, ``II`` of the others. ``None`` is ``a`` or ``I``.
        shots: training images of each class.
        test_size: at most so many test images of each task; ``None`` means all.
        seed: of the choice of training images.
        path: of ``x-tail`` and ``mtil``, a folder or a data set of the hub with an image folder for each task.
    """

    kind: Literal["images"] = "images"
    name: str = "digits"
    order: str | None = None
    shots: Annotated[int, Field(gt=0)] = 16
    test_size: Annotated[int, Field(gt=0)] | None = None
    seed: int = 0
    path: str | None = None

    @property
    def has_task_types(self) -> bool:
        """Images have none."""
        return False
