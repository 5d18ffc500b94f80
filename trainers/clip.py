"""Continual learning of CLIP models: image tasks one after another, with experts in both encoders.

The lifecycle, its files and its methods are those of ``trainers/continual.py``; what is another are the loss and how a
task is scored. The loss is the cross-entropy of the images over the classes of their tasks, plus that of the classes
over the images (:func:`~moelora.clip.clip_loss`, as MoRAM's released code has it); all prompts are encoded in every
step, since the text encoder learns too. A task is scored by the share of its test images whose class the model finds
among those of all tasks, learnt or not (X-TAIL), or of its own (MTIL).

The second term compares the images of one micro-batch with each other, so it is no sum over images: a larger batch is
not the mean of its parts. Each process has the loss of its own micro-batch, with no image of another's, and gradients
are averaged. So P processes that accumulate A micro-batches take the step of one process that accumulates P A
micro-batches of the same size, under DDP and ZeRO up to stage 2; not that of one with a batch P times as large. Set
``per_device_train_batch_size`` to the batch in which classes should be told apart, and let processes add micro-batches.

Shapes: N images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from ..clip import Clip, clip_loss, load_clip
from ..config import ImageSequenceData, Recipe
from ..data.image_sequences import ImageSplit, ImageTask, read_images
from ..data.sets import RecipeData
from ..errors import DataError
from ..evaluation.clip import right_answers
from ..image_config import Carrier
from ..mixture import MoELoRAModel
from ..registry import TRAINERS
from .continual import Content, Continual, ContinualTrainer
from .continual_config import ContinualConfig
from .continual_methods import Method, Sequential
from .continual_scores import Answering, shared
from .sft import SFTConfig, SFTTrainer

# The batches hold no tokens that could be counted.
DEFAULTS: dict[str, Any] = {"include_num_input_tokens_seen": "no"}


class ClipConfig(ContinualConfig):
    """Options of ``clip``, beside those of ``continual``.

    Attributes:
        among: the classes that a test image may be of: those of ``all`` tasks of the sequence, or of its ``own``.
        eval_batch_size: images, and prompts, that are encoded at once.
    """

    carrier: ClassVar[Carrier] = "clip"

    kind: str = "clip"
    among: Literal["all", "own"] = "all"
    eval_batch_size: Annotated[int, Field(gt=0)] = 256

    def training_arguments(self, output_dir: str | Path, seed: int) -> TrainingArguments:
        own = self.model_copy(update={"args": {**DEFAULTS, **self.args}})
        return super(ClipConfig, own).training_arguments(output_dir, seed)


@dataclass(frozen=True, eq=False)
class Picture:
    """One image of a task; decoded when it is asked for.

    Attributes:
        place: of its task in the order. label: its class among those of the task.
    """

    place: int
    split: ImageSplit
    index: int

    @property
    def label(self) -> int:
        return int(self.split.labels[self.index])


class Pictures(Sequence[Picture]):
    """The images of a part of a task."""

    def __init__(self, place: int, split: ImageSplit) -> None:
        self.place, self.split = place, split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Any) -> Any:
        return Picture(self.place, self.split, range(len(self))[index])

    def __iter__(self) -> Iterator[Picture]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, eq=False)
class PictureTask:
    """An image task at its place in an order, as the methods of ``trainers/continual_methods.py`` want tasks."""

    place: int
    images: ImageTask
    epochs: None = None  # the sequences of images were published with a number of steps

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def train(self) -> Pictures:
        return Pictures(self.place, self.images.train)

    @property
    def val(self) -> Pictures:
        return Pictures(self.place, self.images.val)


@dataclass(frozen=True)
class PictureAnswering(Answering):
    """How images are classified: among the classes of all tasks, or where there are none, of their own."""

    rivals: tuple[ImageTask, ...] = ()

    def score(self, model: MoELoRAModel, tokenizer: Any, task: Any) -> list[float]:
        """For each test image 1 where its class was found, else 0; the processes of a run share the images."""
        images, size = task.images, self.batch_size
        among = self.rivals or (images,)

        def right(indices: list[int]) -> list[float]:
            return right_answers(model, tokenizer, images, among, indices=indices, batch_size=size)

        return shared(range(len(images.test)), right)


class ClipTrainer(ContinualTrainer):
    """:class:`~moelora.trainers.MixtureTrainer` for image tasks, of which a stage may have one or several.

    Beside the loss it logs ``accuracy``, among the classes of the stage, and evaluates it.

    Args:
        model: a mixture on ``clip.model``. tasks: all of the sequence, in their order.
        pictures: what to learn from. held_out: what to evaluate on.
        method: what adds to the loss, and tells routers of a task; by default nothing.

    Raises:
        DataError: there is nothing to learn from.
        ConfigError: ZeRO-3 or FSDP.
    """

    def __init__(
        self,
        model: MoELoRAModel,
        args: TrainingArguments | None = None,
        *,
        clip: Clip,
        tasks: Sequence[ImageTask],
        pictures: Sequence[Picture],
        held_out: Sequence[Picture] = (),
        method: Method[Any] | None = None,
        **trainer: Any,
    ) -> None:
        if not pictures:
            raise DataError("there are no images to learn from")
        # Those of earlier tasks may be among them (replay); a task whose classes are not is masked.
        places = sorted({picture.place for picture in pictures})
        self.clip, self.places = clip, places
        counts = [len(task.classes) for task in tasks]
        self.first = {place: sum(counts[other] for other in places if other < place) for place in places}
        self.seen = sum(counts[: places[-1]]) - self.first[places[-1]]
        held_out = [picture for picture in held_out if picture.place in self.first]
        method = method or Sequential(Sequential.Config(kind="sequential"), [], 0)
        super().__init__(
            model,
            args,
            method=method,
            data_collator=self.collate,
            train_dataset=pictures,
            eval_dataset=held_out or None,
            **trainer,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over images, not over tokens of a step
        self.label_names = ["labels"]
        self.texts = clip.texts([prompt for place in places for prompt in tasks[place].prompts])
        self.context = method.context(places[0]) if len(places) == 1 else {}

    def collate(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """``pixel_values`` (N, 3, H, W) and ``labels`` (N,) among the classes of the stage."""
        images = [image for picture in pictures for image in picture.split.take([picture.index])]
        labels = [self.first[picture.place] + picture.label for picture in pictures]
        return {"pixel_values": self.clip.pixels(images), "labels": torch.tensor(labels)}

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        labels = inputs["labels"]
        more = {name: value for name, value in inputs.items() if name != "labels"}
        known = {name: value.to(labels.device) for name, value in {**self.texts, **self.context}.items()}
        made = model(**known, **more)
        backbone: Any = self.model.backbone
        scale = backbone.logit_scale.exp()
        loss = clip_loss(made.image_embeds, made.text_embeds, scale, labels, self.seen)
        found = (made.image_embeds @ made.text_embeds.T).argmax(dim=1) == labels
        told = {"task_loss": loss, "metrics": {"accuracy": found.float().mean()}}
        if "aux_losses" in made:
            told["aux_losses"] = made.aux_losses
        if "aux_loss" in made and self.model.training:
            loss = loss + self.aux_scale * made.aux_loss
        return loss, told


class ClipContent(Content):
    """What a run on images works on; its carrier is a CLIP model, with what makes its inputs for a tokenizer."""

    def load(self) -> tuple[PreTrainedModel, Any]:
        clip = load_clip(self.recipe.backbone)
        return clip.model, clip

    @property
    def images(self) -> list[ImageTask]:
        """The tasks in their order."""
        tasks: list[Any] = self.tasks
        return [task.images for task in tasks]

    @property
    def answering(self) -> Answering:
        config = self.recipe.trainer
        rivals = tuple(self.images) if config.among == "all" else ()
        return PictureAnswering(None, config.eval_batch_size, rivals)


@TRAINERS.register("clip")
class ClipRun(Continual):
    """What ``moelora train`` does with a recipe whose trainer is ``clip``."""

    Config: ClassVar[type[SFTConfig]] = ClipConfig
    Trainer: ClassVar[type[SFTTrainer]] = ClipTrainer
    State: ClassVar[type[Content]] = ClipContent
    Data: ClassVar[type[Any]] = ImageSequenceData
    learns: ClassVar[str] = "a sequence of image tasks"
    wanted: ClassVar[str] = "{kind: images, name: digits, order: a}"

    @classmethod
    def tasks_of(cls, config: Any) -> tuple[str, list[Any]]:
        sequence = read_images(config)
        order = next(iter(sequence.orders)) if config.order is None else config.order
        tasks = [PictureTask(place, task) for place, task in enumerate(sequence.ordered(config.order))]
        return f"{sequence.name} {sequence.version}, order {order}", tasks

    @classmethod
    def trainer_of(
        cls, recipe: Recipe, model: MoELoRAModel, content: RecipeData, args: TrainingArguments, **options: Any
    ) -> SFTTrainer:
        clip: Clip = model.tokenizer
        model.tokenizer = clip.tokenizer
        method = options["method"]
        pictures: Any = content.train
        held_out: Any = content.test
        return ClipTrainer(
            model,
            args,
            clip=clip,
            tasks=[task.images for task in method.tasks],
            pictures=pictures,
            held_out=held_out,
            **{"callbacks": recipe.trainer.callbacks(), **recipe.trainer.trainer_options(), **options},
        )
