"""How many examples, tokens and optimizer steps a recipe has, as far as that can be counted without any weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from .backbone import load_tokenizer
from .config import DataConfig, ImageSequenceData, Recipe, SequenceData
from .errors import UserError
from .gguf import DEFAULT_BACKBONE, GGUF_SHA256, cache_folder

if TYPE_CHECKING:
    from .data import Example
    from .data.image_sequences import ImageTask

# More are not tokenised for a plan: the mean of so many is good enough.
SAMPLE = 2000


@dataclass(frozen=True)
class Data:
    """Of the training data; ``None`` where it is not known.

    Attributes:
        examples: of one epoch. tokens: of one epoch, without padding. tokens_exact: not from a sample.
        steps: optimizer steps of the whole run. batch: examples (or packed rows) of one step.
        unknown: why something is not known.
    """

    examples: int | None
    tokens: int | None
    tokens_exact: bool
    steps: int | None
    batch: int
    unknown: list[str]

    def lines(self) -> Iterator[str]:
        """As text."""

        def shown(value: int | None) -> str:
            return "unknown" if value is None else f"{value:,}"

        yield f"training examples     {shown(self.examples):>16}"
        sampled = "" if self.tokens_exact or self.tokens is None else "  from a sample"
        yield f"tokens of an epoch    {shown(self.tokens):>16}{sampled}"
        yield f"optimizer steps       {shown(self.steps):>16}  of {self.batch:,} examples"
        yield from (f"unknown: {reason}" for reason in self.unknown)


def count_data(recipe: Recipe, world: int) -> Data:
    """Count what a recipe trains on."""
    defaults = {field.name: field.default for field in fields(TrainingArguments)} | {"num_train_epochs": 1}
    args: dict[str, Any] = {**defaults, **recipe.trainer.args}
    size, accumulation = int(args["per_device_train_batch_size"]), int(args["gradient_accumulation_steps"])
    batch = size * accumulation * world
    fixed = int(args["max_steps"]) if int(args["max_steps"]) > 0 else None
    if recipe.data is None:
        return Data(None, None, False, fixed, batch, ["the recipe names no data"])
    if isinstance(recipe.data, ImageSequenceData):
        return _count_images(recipe.data, batch)
    from .data import tokenize
    from .data.examples import streamed
    from .data.packing import packed

    if streamed(recipe.data):
        return Data(None, None, False, fixed, batch, ["examples, which are streamed"])
    try:
        examples = _examples(recipe.data)
    except UserError as error:
        return Data(None, None, False, fixed, batch, [str(error)])
    unknown: list[str] = []
    tokens, exact, count = None, len(examples) <= SAMPLE, len(examples)
    tokenizer = _tokenizer(recipe)
    if tokenizer is None:
        unknown.append("tokens, for want of the backbone's tokenizer on this machine")
    else:
        rows = tokenize(examples[:SAMPLE], tokenizer, recipe.max_length)
        tokens = round(rows.num_tokens * len(examples) / len(examples[:SAMPLE]))
        kept = packed(rows, recipe.max_length) if recipe.packing else rows
        count = len(kept) if exact else round(len(kept) * len(examples) / SAMPLE)
    steps = fixed
    if "stages" in type(recipe.trainer).model_fields or isinstance(recipe.data, SequenceData):
        steps = None
        unknown.append("steps, which each stage has of its own")
    elif fixed is None and (tokenizer is not None or not recipe.packing):
        batches = math.ceil(math.ceil(count / size) / world)
        steps = math.ceil(float(args["num_train_epochs"]) * max(1, math.ceil(batches / accumulation)))
    return Data(count, tokens, exact, steps, batch, unknown)


def most_classes(recipe: Recipe) -> int | None:
    """Classes of the task of images that has most of them; ``None`` where the data cannot be had."""
    if not isinstance(recipe.data, ImageSequenceData):
        return None
    try:
        return max(len(task.classes) for task in _image_tasks(recipe.data))
    except UserError:
        return None


def _count_images(config: ImageSequenceData, batch: int) -> Data:
    try:
        count = sum(len(task.train) for task in _image_tasks(config))
    except UserError as error:
        return Data(None, None, False, None, batch, [str(error)])
    return Data(
        count, None, False, None, batch, ["tokens, for these are images", "steps, which each stage has of its own"]
    )


def _image_tasks(config: ImageSequenceData) -> list[ImageTask]:
    from .data.image_sequences import read_images

    return read_images(config).ordered(config.order)


def _examples(config: DataConfig) -> list[Example]:
    """All training examples; those of a sequence mixed, so that a sample is of all tasks."""
    from .data import load_examples, mix
    from .data.sequences import read_sequence

    if isinstance(config, SequenceData):
        return mix((example for task in read_sequence(config).ordered(config.order) for example in task.train), 0)
    return load_examples(config).train


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """The backbone's tokenizer where it is on this machine already."""
    name = recipe.backbone.name
    if name == DEFAULT_BACKBONE:
        folder = cache_folder() / "backbones" / f"{DEFAULT_BACKBONE}-{GGUF_SHA256[:12]}"
        if not folder.is_dir():
            return None
        name = str(folder)
    if name.lower().endswith(".gguf"):
        return None
    places = {"revision": recipe.backbone.revision, "subfolder": recipe.backbone.subfolder or ""}
    try:
        return load_tokenizer(recipe.backbone.name, str(Path(name).expanduser()), {**places, "local_files_only": True})
    except (OSError, ValueError, UserError):
        return None
