"""Continual learning: a sequence of tasks, one after another, and after each the model is asked about all of them.

Each task is a stage (see ``trainers/staged.py``): it begins with the model that the task before left in its folder, and
is a run of its own with exact resume. ``stage-N/scores.json`` is the row of the accuracy matrix after stage N, and
``stage-0`` that of the model before any task. When all are over, the run's folder holds the model that has learnt all
of them and the matrix with its measures. Which model a task begins with, what is added to the loss, and what answers
afterwards is the method's: see ``trainers/continual_methods.py``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from .. import checkpoints
from ..analysis.drift import routing_drift
from ..analysis.figures import require_plotly
from ..backbone import load_backbone
from ..config import Recipe, SequenceData
from ..data.sequences import Task, read_sequence
from ..data.sets import RecipeData, check_routers
from ..errors import ConfigError
from ..evaluation.continual import AccuracyMatrix, write_continual
from ..lower import LowerStates
from ..mixture import MoELoRAModel, put_on
from ..registry import TRAINERS, closest
from .continual_config import ContinualConfig
from .continual_methods import CONTINUAL_METHODS, Method
from .continual_scores import Answering, ForcedAnswering, Scores, mean, read_routing, write_json
from .penalised import PenalisedTrainer, Penalty
from .sft import SFTConfig, SFTTrainer
from .staged import Staged
from .stages import Stages

GROWTH = "growth.json"
# In the state of a trainer.
SECONDS = "moelora_seconds"


class ContinualTrainer(PenalisedTrainer):
    """:class:`~moelora.trainers.SFTTrainer` for one task of a sequence; usable by itself.

    Args:
        method: what adds to the loss.

    Raises:
        ConfigError: each process would hold a part of every parameter.
    """

    def __init__(
        self, model: MoELoRAModel, args: TrainingArguments | None = None, *, method: Method[Any], **trainer: Any
    ) -> None:
        super().__init__(model, args, **trainer)
        self.refuse_sharded("tasks are evaluated by generation with whole parameters")
        self.method = method
        self._since = time.monotonic()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._since = time.monotonic()
        result = super().train(*args, **kwargs)
        self._count_seconds()
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._count_seconds()
        super()._save_checkpoint(model, trial)

    def _count_seconds(self) -> None:
        """Add what passed since the last time to what is kept with the state, so over all processes that trained."""
        kept: Any = self.state.stateful_callbacks
        now = time.monotonic()
        kept[SECONDS] = self.seconds + now - self._since
        self._since = now

    @property
    def seconds(self) -> float:
        """What training took up to the last checkpoint, or its end; steps that a kill undid do not count."""
        kept: Any = self.state.stateful_callbacks
        return float(kept.get(SECONDS, 0.0))

    def penalties(self) -> Mapping[str, Penalty]:
        return self.method.penalties(self.model)


@dataclass
class Content:
    """What a run works on: the tasks in their order, the method, and the backbone between two stages.

    Attributes:
        name: of the sequence, with its version. args: of the recipe, for no task in particular.
    """

    recipe: Recipe
    args: TrainingArguments
    name: str
    tasks: list[Task]
    method: Method[Any]
    _carrier: tuple[PreTrainedModel, Any] | None = None
    _lower: LowerStates | None = None

    def carrier(self) -> tuple[PreTrainedModel, Any]:
        """The backbone without experts, and its tokenizer; loaded again only where training may have changed it."""
        if self._carrier is None:
            self._carrier = self.load()
            backbone = self._carrier[0]
            if getattr(backbone, "hf_device_map", None) is None:  # else it lies where it was quantised
                nn.Module.to(backbone, self.args.device)
        return self._carrier

    def load(self) -> tuple[PreTrainedModel, Any]:
        """The backbone of the recipe, and what makes inputs for it."""
        return load_backbone(self.recipe.backbone)

    def give_back(self, model: MoELoRAModel, args: TrainingArguments | None = None) -> None:
        """Take the experts of ``model``, which is of no use afterwards, off the backbone.

        Args:
            args: that it was trained with, if it was.
        """
        model.unload()
        if args is not None and (args.gradient_checkpointing or args.deepspeed or args.fsdp):
            self._carrier = self._lower = None

    def remember(self, model: MoELoRAModel) -> None:
        """Let a model begin above the layers that nothing trains, with what models before it have kept of them."""
        if self._lower is None:
            self._lower = self.recipe.trainer.remember(model)
        else:
            model.remember(self._lower)

    @property
    def answering(self) -> Answering:
        config = self.recipe.trainer
        kind = ForcedAnswering if config.answers == "forced" else Answering
        return kind(config.max_new_tokens, config.eval_batch_size)


@TRAINERS.register("continual")
class Continual(Staged):
    """What ``moelora train`` does with a recipe whose trainer is ``continual``."""

    Config: ClassVar[type[SFTConfig]] = ContinualConfig
    Trainer: ClassVar[type[SFTTrainer]] = ContinualTrainer
    State: ClassVar[type[Content]] = Content
    Data: ClassVar[type[Any]] = SequenceData
    learns: ClassVar[str] = "a sequence of tasks"
    wanted: ClassVar[str] = "{kind: sequence, name: reasoning-gym-8}, or pass --sequence reasoning-gym-8"

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if not isinstance(recipe.data, cls.Data):
            kind = "none" if recipe.data is None else f"of kind {recipe.data.kind!r}"
            raise ConfigError(
                f"trainer kind {cls.kind!r} learns {cls.learns}, but the data are {kind}: set data to {cls.wanted}"
            )
        require_plotly()
        CONTINUAL_METHODS.get(recipe.trainer.method.kind).check_mixture(recipe.mixture)
        check_routers(recipe)

    @classmethod
    def examples_of(cls, recipe: Recipe) -> Any:
        name, tasks = cls.tasks_of(recipe.data)
        config = recipe.trainer.method
        method = CONTINUAL_METHODS.create(config.kind, config, tasks, recipe.seed)
        args = recipe.trainer.training_arguments(recipe.output_dir, recipe.seed)
        return cls.State(recipe, args, name, tasks, method)

    @classmethod
    def tasks_of(cls, config: Any) -> tuple[str, list[Any]]:
        """The sequence's name, with what tells it from others, and its tasks in their order."""
        sequence = read_sequence(config)
        return f"{sequence.name} {sequence.version}", sequence.ordered(config.order)

    @classmethod
    def check_data(cls, recipe: Recipe, content: Content) -> None:
        names = [task.name for task in content.tasks]
        for task in recipe.trainer.per_task:
            if task not in names:
                raise ConfigError(
                    f"trainer.per_task names the task {task!r}, but the tasks are {', '.join(names)}"
                    f"{closest(task, names)}"
                )
        if recipe.trainer.per_task and content.method.together:
            raise ConfigError(
                f"trainer.method {content.method.kind!r} learns all tasks at once, so per_task has no part: drop it"
            )
        content.method.check()

    @classmethod
    def stage_names(cls, recipe: Recipe, content: Content) -> list[str]:
        method = content.method
        return [f"{content.name}, {method.kind}: {', '.join(t.name for t in tasks)}" for tasks in method.stages()]

    @classmethod
    def prepare_stage(cls, recipe: Recipe, content: Content, number: int) -> SFTTrainer:
        method, stages = content.method, cls.stages(recipe, content)
        tasks = method.stages()[number - 1]
        seed = recipe.seed + number - 1
        args = recipe.trainer.arguments_of(tasks, stages.folder(number), seed)
        backbone, tokenizer = content.carrier()
        set_seed(seed)
        if number == 1 or not method.continues:
            model = recipe.trainer.attach(backbone, method.mixture(recipe.mixture, number))
        else:
            model = put_on(backbone, checkpoints.read(stages.folder(number - 1)))
        method.begin_task(model, number)
        content.remember(model)
        model.tokenizer = tokenizer
        held_out = [example for task in tasks for example in task.val]
        everything = [task.name for task in content.tasks]
        data = RecipeData(recipe, method.examples(number), held_out, everything, {})
        title = f"stage {number} of {len(stages.names)}, {', '.join(task.name for task in tasks)}"
        options = {"method": method, "callbacks": recipe.trainer.callbacks(title)}
        return cls.trainer_of(recipe, model, data, args, **options)

    @classmethod
    def _run_stage(cls, recipe: Recipe, content: Content, number: int, checkpoint: Path | None) -> None:
        stages = cls.stages(recipe, content)
        if number == 1:
            cls._before_any(recipe, content, stages)
        folder, scores = stages.folder(number), Scores(stages.folder(number))
        if not scores.exists() or checkpoint not in (None, checkpoints.latest(folder)):
            cls._train(recipe, content, number, checkpoint)
            scores.write({})
        backbone, tokenizer = content.carrier()
        model = content.method.learned([stages.folder(n) for n in range(1, number + 1)], backbone)
        content.remember(model)
        scores.complete(model, tokenizer, content.tasks, content.method, content.answering)
        if PartialState().is_main_process:
            if number == len(stages.names):
                model.save_pretrained(stages.run_dir)
                cls._conclude(recipe, content, stages)
            stages.finish(number)
        content.give_back(model)
        PartialState().wait_for_everyone()

    @classmethod
    def _before_any(cls, recipe: Recipe, content: Content, stages: Stages) -> None:
        """The row of the model before any task."""
        scores = Scores(stages.folder(0))
        if not scores.exists():
            if PartialState().is_main_process:
                stages.run_dir.mkdir(parents=True, exist_ok=True)
                stages.finish(0)  # from here on the folder is this run's
            scores.write({})
        backbone, tokenizer = content.carrier()
        model = recipe.trainer.attach(backbone, content.method.mixture(recipe.mixture, 1))
        content.remember(model)
        with model.disable_experts():
            scores.complete(model, tokenizer, content.tasks, content.method, content.answering)
        content.give_back(model)

    @classmethod
    def _train(cls, recipe: Recipe, content: Content, number: int, checkpoint: Path | None) -> None:
        """Train a stage and leave its model in its folder, with what it took in ``growth.json``."""
        trainer = cls.prepare_stage(recipe, content, number)
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        content.method.end_task(trainer.model, number)
        metrics = dict(result.metrics)
        if trainer.eval_dataset is not None:
            metrics.update(trainer.evaluate())
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("all", metrics)
        if trainer.is_world_process_zero():
            write_json(cls.stages(recipe, content).folder(number) / GROWTH, _growth(trainer))
        trainer.accelerator.wait_for_everyone()
        content.give_back(trainer.model, trainer.args)
        trainer.accelerator.free_memory()

    @classmethod
    def _conclude(cls, recipe: Recipe, content: Content, stages: Stages) -> None:
        """The matrix and what it comes to, beside the last model."""
        tasks = tuple(task.name for task in content.tasks)
        rows = np.full((len(tasks) + 1, len(tasks)), np.nan)
        learned, folders = 0, [stages.folder(number) for number in range(1, len(stages.names) + 1)]
        for folder, learning in zip([stages.folder(0), *folders], [[], *content.method.stages()], strict=True):
            learned += len(learning)
            found = Scores(folder).read()
            rows[learned] = [mean(found[task]) for task in tasks]
        took = [json.loads((folder / GROWTH).read_text(encoding="utf-8")) for folder in folders]
        growth = {name: [float(stage[name]) for stage in took] for name in took[0]}
        moments = [read_routing(folder, tasks) for folder in folders]
        routed = [moment for moment in moments if moment is not None]
        drift = routing_drift(routed) if len(routed) == len(tasks) > 1 else None
        write_continual(AccuracyMatrix(tasks, rows), stages.run_dir, drift, growth)
        (stages.run_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        shutil.copy(folders[-1] / "all_results.json", stages.run_dir)


def _growth(trainer: Any) -> dict[str, float]:
    """What a stage took: parameters and bytes of the adapter, those that were trained, and seconds of training."""
    tensors = trainer.model.adapter_tensors().values()
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "trained": sum(tensor.numel() for tensor in tensors if tensor.requires_grad),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "seconds": trainer.seconds,
    }
