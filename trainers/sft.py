"""Supervised fine-tuning: next-token loss on the answers, on ``transformers.Trainer``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from .. import data
from ..backbone import load_backbone
from ..config import MixtureConfig, Pluggable, Recipe
from ..errors import ConfigError
from ..image_config import Carrier
from ..lower import LowerStates
from ..mixture import MoELoRAModel, attach
from ..registry import TRAINERS, closest
from .alarm import AlarmConfig, CollapseAlarm
from .live import LiveProgress
from .mixture_trainer import MixtureTrainer
from .optimizer import GroupOptions, parameter_groups, sync_optimizer
from .progress import Decision
from .progress_sft import ProgressHost, ProgressRows, SFTProgress, host_progress

logger = logging.getLogger(__name__)

# Where ours differ from the Trainer's own defaults.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "warmup_steps": 0.03,
    "num_train_epochs": 1,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "remove_unused_columns": False,
    "include_num_input_tokens_seen": "non_padding",
}
LENGTHS = ("max_steps", "num_train_epochs")
ELSEWHERE = {
    "output_dir": "output_dir",
    "seed": "seed",
    "resume_from_checkpoint": "moelora train --resume",
    "label_smoothing_factor": "nothing: the Trainer would compute the loss without the model's auxiliary losses",
}


class SFTConfig(Pluggable, GroupOptions):
    """Options of ``sft``, and of the groups of its optimizer.

    Attributes:
        args: fields of :class:`transformers.TrainingArguments`, checked by name and type. ``output_dir`` and ``seed``
            are the recipe's.
        step_balance: balance the experts over whole optimizer steps, at the cost of one more forward; see
            :class:`~moelora.trainers.MixtureTrainer`.
        collapse_alarm: when to warn that the experts of a site collapse; ``true`` with the usual limits, ``false``
            never.
        aux_warmup_steps: optimizer steps, or below 1 their share of all, in which the coefficients of the auxiliary
            losses grow from 0 to what they are.
        remember_mib: memory of the CPU, for each process, for what the layers below the first with experts make of each
            text: 4 bytes times width times tokens. They do not change, so that later passes leave them out. 0 is none.
        progress: tasks leave the mixture when they meet their targets, and stages of experts are added; of ``sft``
            alone. See :class:`~moelora.trainers.progress_sft.SFTProgress`.
    """

    carrier: ClassVar[Carrier] = "language"  # the model that experts are put on, for a plan

    kind: str = "sft"
    args: dict[str, Any] = Field(default_factory=dict)
    step_balance: bool = False
    aux_warmup_steps: Annotated[float, Field(ge=0)] = 0
    collapse_alarm: AlarmConfig | bool = True
    remember_mib: Annotated[int, Field(ge=0)] = 0
    progress: SFTProgress | None = None

    @model_validator(mode="after")
    def _who_hosts_progress(self) -> Self:
        if self.progress is not None and self.kind != "sft":
            raise ValueError(f"progress: trainer {self.kind!r} chooses its examples by itself; take 'sft', or drop it")
        return self

    @field_validator("args")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return known_arguments(value)

    def training_arguments(self, output_dir: str | Path, seed: int) -> TrainingArguments:
        """The whole arguments.

        Raises:
            ConfigError: the Trainer refuses a value or a combination.
        """
        cuda = torch.cuda.is_available()
        machine = {"use_cpu": not cuda, "dataloader_pin_memory": cuda}
        try:
            args = TrainingArguments(
                **{**DEFAULTS, **machine, **self.args, "output_dir": str(output_dir), "seed": seed}
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"trainer.args: {' '.join(str(error).split())}") from None
        if args.deepspeed and args.use_cpu:
            # On a CPU accelerate starts torch's processes and not DeepSpeed's, which then counts one of them.
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo")
        return args

    def arguments_with(self, own: Mapping[str, Any], output_dir: str | Path, seed: int) -> TrainingArguments:
        """The whole arguments with ``own`` in place of the common ones. A length that it names replaces the common one.

        Raises:
            ConfigError: as of :meth:`training_arguments`.
        """
        lengths = LENGTHS if any(name in own for name in LENGTHS) else ()
        common = {name: value for name, value in self.args.items() if name not in lengths}
        both = self.model_copy(update={"args": {**common, **own}})
        return both.training_arguments(output_dir, seed)

    def callbacks(self, title: str = "training") -> list[TrainerCallback]:
        """What a run is watched by: a progress bar of this title, and the alarm unless it is off."""
        alarm = self.collapse_alarm
        if alarm is False:
            return [LiveProgress(title)]
        return [LiveProgress(title), CollapseAlarm(None if alarm is True else alarm)]

    def attach(self, backbone: PreTrainedModel, mixture: MixtureConfig) -> MoELoRAModel:
        """The fresh model of a recipe whose trainer this is."""
        return attach(backbone, mixture)

    def remember(self, model: MoELoRAModel) -> LowerStates | None:
        """What ``model`` keeps from here on of the layers below its first one with experts; see ``remember_mib``."""
        lower = model.remember(self.remember_mib * 2**20)
        if self.remember_mib and lower is None:
            logger.warning(
                "remember_mib keeps nothing: the first layer has experts already, or something below the first with "
                "experts is trained; set mixture.sites.layers, such as '24:'"
            )
        return lower

    def trainer_options(self) -> dict[str, Any]:
        """What :class:`~moelora.trainers.MixtureTrainer` is told beside its arguments."""
        groups = GroupOptions.parse({name: getattr(self, name) for name in GroupOptions.model_fields})
        return {"step_balance": self.step_balance, "aux_warmup_steps": self.aux_warmup_steps, "groups": groups}


def known_arguments(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` as it is, when all of it are fields of ``TrainingArguments`` that a recipe may set.

    Raises:
        ValueError: an unknown name, a wrong type, or what belongs elsewhere.
    """
    known = [field.name for field in fields(TrainingArguments) if field.init]
    types = get_type_hints(TrainingArguments)
    for name, given in value.items():
        if name in ELSEWHERE:
            raise ValueError(f"{name!r} does not belong here: use {ELSEWHERE[name]}")
        if name not in known:
            raise ValueError(f"{name!r} is not a field of transformers.TrainingArguments{closest(name, known)}")
        try:
            TypeAdapter(types[name]).validate_python(given)
        except ValidationError as error:
            raise ValueError(f"{name} is {given!r}: {error.errors()[0]['msg']}") from None
    return value


class SFTTrainer(MixtureTrainer):
    """:class:`MixtureTrainer` for tokenised examples; usable by itself.

    Rows hold ``input_ids`` and ``labels``, as :func:`moelora.data.tokenize` makes them. Without a ``data_collator``
    batches are padded on the right with the padding token of ``processing_class``, or its end token.

    Args:
        progress: what the run goes by, whose rows are the ``train_dataset``; see
            :func:`~moelora.trainers.progress_sft.host_progress`.
    """

    def __init__(
        self,
        model: MoELoRAModel,
        args: TrainingArguments | None = None,
        *,
        progress: ProgressHost | None = None,
        **trainer: Any,
    ) -> None:
        tokenizer = trainer.get("processing_class")
        if trainer.get("data_collator") is None and tokenizer is not None:
            pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            trainer["data_collator"] = data.Collator(pad)
        super().__init__(model, args, **trainer)
        self.progress = progress
        if progress is not None:
            progress.on_switch, progress.log = self._grow, self.log
            self.add_callback(progress)

    def _grow(self, decision: Decision) -> None:
        """One more stage of experts; the optimizer goes on with what is trained from here on."""
        self.model.begin_task()
        args = self.args
        assert self.optimizer is not None
        decaying = self.get_decay_parameter_names(self.model)
        groups = parameter_groups(self.model, decaying, args.learning_rate, args.weight_decay, self.groups)
        sync_optimizer(self.optimizer, groups)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, ProgressRows):
            return SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def _restore_adapter(self, folder: Path) -> None:
        if self.progress is not None:
            self.progress.catch_up(self.model, folder)
        super()._restore_adapter(folder)


@TRAINERS.register("sft")
class SFT:
    """What ``moelora train`` does with a recipe whose trainer is ``sft``."""

    kind: ClassVar[str]
    Config: ClassVar[type[SFTConfig]] = SFTConfig
    Trainer: ClassVar[type[SFTTrainer]] = SFTTrainer

    @classmethod
    def run(cls, recipe: Recipe, *, resume: bool | str = False) -> Path:
        """Train as the recipe says.

        Args:
            resume: a checkpoint folder, or ``True`` for the newest whole one of the run's folder.

        Returns:
            The run's folder: the trained mixture, its card, ``recipe.yaml``, metrics as JSON, and ``checkpoint-N``.

        Raises:
            UserError: something in the recipe, its data or its folder has to be mended.
            TrainingError: a loss or a gradient was not finite.
        """
        trainer = cls.prepare(recipe)
        result = trainer.train(resume_from_checkpoint=resume)
        metrics = dict(result.metrics)
        if trainer.eval_dataset is not None:
            metrics.update(trainer.evaluate())
        folder = Path(recipe.output_dir)
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("all", metrics)
        if trainer.is_world_process_zero():
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        return folder

    @classmethod
    def prepare(cls, recipe: Recipe) -> SFTTrainer:
        """Data, backbone, mixture and trainer of a recipe, ready to train."""
        args = recipe.trainer.training_arguments(recipe.output_dir, recipe.seed)
        content = cls.examples_of(recipe)
        return cls.trainer_of(recipe, cls.model_of(recipe), content, args)

    @staticmethod
    def examples_of(recipe: Recipe) -> data.RecipeData:
        """The data of a recipe; see :func:`moelora.data.read_data` for what is raised."""
        return data.read_data(recipe, recipe.trainer.args.get("max_steps", -1))

    @staticmethod
    def model_of(recipe: Recipe) -> MoELoRAModel:
        """The fresh mixture of a recipe, with its tokenizer."""
        backbone, tokenizer = load_backbone(recipe.backbone)
        set_seed(recipe.seed)
        model: MoELoRAModel = recipe.trainer.attach(backbone, recipe.mixture)
        model.tokenizer = tokenizer
        recipe.trainer.remember(model)
        return model

    @classmethod
    def trainer_of(
        cls, recipe: Recipe, model: MoELoRAModel, content: data.RecipeData, args: TrainingArguments, **options: Any
    ) -> SFTTrainer:
        """A trainer of ``model`` on the examples; ``options`` are its own arguments, beside those of the recipe."""
        tokenizer = model.tokenizer
        if recipe.packing:
            data.check_packing(model)
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        train, test = content.tokenize(tokenizer, args.max_steps * step)
        if recipe.trainer.progress is not None:
            options["progress"] = host_progress(recipe.trainer.progress, content, train, model, args)
        return cls.Trainer(
            model,
            args,
            data_collator=data.Collator.fitting(model.backbone, tokenizer.pad_token_id, recipe.packing),
            train_dataset=options["progress"].rows if "progress" in options else train,
            eval_dataset=test,
            processing_class=tokenizer,
            **{"callbacks": recipe.trainer.callbacks(), **recipe.trainer.trainer_options(), **options},
        )
