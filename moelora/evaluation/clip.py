"""Which class a CLIP model sees in an image: the one whose prompt is nearest, among those of some tasks.

X-TAIL asks among the classes of all tasks of a sequence, learnt or not; MTIL among those of the image's own task.

Shapes: N images, C classes, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..clip import Clip
from ..data.image_sequences import ImageTask
from ..errors import ConfigError


@torch.no_grad()
def text_embeddings(model: nn.Module, clip: Clip, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
    """(C, D), of unit length."""
    vision: Any = clip.model.config.vision_config
    blank = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, device=_device(model))
    found = []
    for start in range(0, len(prompts), batch_size):
        texts = clip.texts(prompts[start : start + batch_size])
        # One whole forward, so that routers are told of padding as in training.
        found.append(model(**_on(texts, model), pixel_values=blank).text_embeds)
    return torch.cat(found)


@torch.no_grad()
def image_embeddings(model: nn.Module, clip: Clip, images: Sequence[Any], batch_size: int = 256) -> Tensor:
    """(N, D), of unit length; of at least one image."""
    text = _on(clip.texts([""]), model)
    found = []
    for start in range(0, len(images), batch_size):
        pixels = clip.pixels(images[start : start + batch_size]).to(_device(model))
        found.append(model(**text, pixel_values=pixels).image_embeds)
    return torch.cat(found)


def seen_classes(
    model: nn.Module,
    clip: Clip,
    task: ImageTask,
    among: Sequence[ImageTask],
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 256,
) -> list[int]:
    """For each test image the class that the model sees in it; the numbers count the classes of all of ``among``.

    Args:
        model: a mixture on ``clip.model``, or that model; it is put into ``eval`` mode. among: the tasks whose classes
            are asked about, in their order. indices: of the images to look at; by default all.
    """
    model.eval()
    prompts = [prompt for other in among for prompt in other.prompts]
    text_CD = text_embeddings(model, clip, prompts, batch_size)
    wanted = range(len(task.test)) if indices is None else indices
    seen: list[int] = []
    for start in range(0, len(wanted), batch_size):
        images = task.test.take(wanted[start : start + batch_size])
        seen += (image_embeddings(model, clip, images, batch_size) @ text_CD.T).argmax(dim=1).tolist()
    return seen


def right_answers(
    model: nn.Module,
    clip: Clip,
    task: ImageTask,
    among: Sequence[ImageTask],
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 256,
) -> list[float]:
    """For each test image 1 where the model sees its class, and 0 where not; see :func:`seen_classes`.

    Raises:
        ConfigError: the task is not among those asked about.
    """
    places = [place for place, other in enumerate(among) if other.name == task.name]
    if not places:
        raise ConfigError(
            f"the classes of {task.name!r} are not among those asked about, of {', '.join(o.name for o in among)}: "
            "no answer could be right"
        )
    first = sum(len(other.classes) for other in among[: places[0]])
    wanted = range(len(task.test)) if indices is None else indices
    seen = seen_classes(model, clip, task, among, indices=wanted, batch_size=batch_size)
    return [float(index == first + task.test.labels[image]) for index, image in zip(seen, wanted, strict=True)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _on(texts: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to(_device(model)) for name, tensor in texts.items()}
