"""LoRA-Mixer: experts by the label of their domain first, then a router over them; each stage is a run of its own.

See ``routers/lora_mixer.py`` for the method. A recipe lists stages. A ``hard`` one sends each sequence to the expert of
its task and trains experts alone; a ``soft`` one trains the router by the dense softmax with the specialization balance
loss, over experts that are frozen, or trained and kept near to where they were (``preserve_coef``). With ``adapters``
the experts are finished LoRAs, and only a router is trained.

Stages and their folders: see ``trainers/staged.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import TrainingArguments, set_seed

from .. import data
from ..backbone import load_backbone
from ..config import Recipe
from ..errors import ConfigError
from ..experts.frozen import FrozenExperts
from ..mixture import MoELoRAModel
from ..registry import EXPERTS, ROUTERS, TRAINERS
from ..routers.lora_mixer import LoRAMixerRouter, PreserveLoss
from .lora_mixer_config import Experts, LoRAMixerTrainerConfig, Phase, Stage
from .penalised import PenalisedTrainer, Penalty
from .sft import SFTConfig, SFTTrainer
from .staged import Staged


class LoRAMixerTrainer(PenalisedTrainer):
    """:class:`SFTTrainer` for one stage; usable by itself.

    While it trains, exactly the parameters of the stage have ``requires_grad``; afterwards those have it that had it
    before. Training and evaluation run in the stage's phase. The log has the preserve term as ``aux/preserve``, which
    ``aux_warmup_steps`` warms up with the other losses; in evaluation it does not count.

    Args:
        model: as it is when the stage begins, which ``preserve_coef`` keeps it near to, also when a run of the stage
            is resumed. phase, experts, preserve_coef: see :class:`Stage`.
        begin: folder of the mixture that the stage begins with, instead of the model's own tensors.

    Raises:
        ConfigError: a router of another kind, nothing to train, or a preserve term where parameters are sharded.
    """

    def __init__(
        self,
        model: MoELoRAModel,
        args: TrainingArguments | None = None,
        *,
        phase: Phase,
        experts: Experts | None = None,
        preserve_coef: float = 0.0,
        begin: Path | None = None,
        **trainer: Any,
    ) -> None:
        stage = {"phase": phase, "preserve_coef": preserve_coef, **({} if experts is None else {"experts": experts})}
        self.stage = Stage.parse(stage)
        super().__init__(model, args, **trainer)
        _refuse_other_routers({c.router.kind for c in model.containers().values() if c.router is not None})
        if begin is not None:
            self._restore_adapter(begin)
        self._moving = _moving(model, self.stage)
        self.preserve: PreserveLoss | None = None
        if preserve_coef > 0:
            routers = _routers(model)
            self.refuse_sharded("preserve_coef compares whole parameters with what they were")
            self.preserve = PreserveLoss({name: t for name, t in self._moving.items() if id(t) not in routers})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        before = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        moving = {id(tensor) for tensor in self._moving.values()}
        for parameter in before:
            parameter.requires_grad_(id(parameter) in moving)
        try:
            with self.model.routing_context(phase=self.stage.phase):
                return super().train(*args, **kwargs)
        finally:
            for parameter, trained in before.items():
                parameter.requires_grad_(trained)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.model.routing_context(phase=self.stage.phase):
            return super().evaluation_loop(*args, **kwargs)

    def penalties(self) -> Mapping[str, Penalty]:
        return {} if self.preserve is None else {"preserve": Penalty(self.stage.preserve_coef, self.preserve())}


def _routers(model: MoELoRAModel) -> set[int]:
    """Identities of the routers' parameters."""
    routers = [container.router for container in model.containers().values() if container.router is not None]
    return {id(parameter) for router in routers for parameter in router.parameters()}


def _moving(model: MoELoRAModel, stage: Stage) -> dict[str, Tensor]:
    """What a stage trains, by name."""
    routers = _routers(model)
    trainable = {name: tensor for name, tensor in model.adapter_tensors().items() if tensor.requires_grad}
    moving = {
        name: tensor
        for name, tensor in trainable.items()
        if (stage.phase == "soft" if id(tensor) in routers else stage.experts == "trained")
    }
    if not moving or (stage.experts == "trained" and all(id(tensor) in routers for tensor in moving.values())):
        raise ConfigError(
            f"a {stage.phase} stage with {stage.experts} experts has nothing to train here: the experts of this "
            "mixture are frozen ones; use a soft stage with experts: frozen"
        )
    return moving


def _refuse_other_routers(kinds: set[str]) -> None:
    others = sorted(kind for kind in kinds if not issubclass(ROUTERS.get(kind), LoRAMixerRouter))
    if others or not kinds:
        raise ConfigError(
            f"trainer kind 'lora_mixer' trains routers of kind lora_mixer in stages, but the mixture has "
            f"{', '.join(map(repr, others)) or 'no router'}: use router kind lora_mixer, or trainer kind sft"
        )


@TRAINERS.register("lora_mixer")
class LoRAMixer(Staged):
    """What ``moelora train`` does with a recipe whose trainer is ``lora_mixer``."""

    Config: ClassVar[type[SFTConfig]] = LoRAMixerTrainerConfig
    Trainer: ClassVar[type[SFTTrainer]] = LoRAMixerTrainer

    @classmethod
    def stage_names(cls, recipe: Recipe, content: data.RecipeData) -> list[str]:
        return [f"{stage.phase}, experts {stage.experts}" for stage in recipe.trainer.stages]

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        _check(recipe)

    @classmethod
    def check_data(cls, recipe: Recipe, content: data.RecipeData) -> None:
        _one_expert_for_each_task(recipe, content)

    @classmethod
    def prepare_stage(cls, recipe: Recipe, content: data.RecipeData, number: int) -> SFTTrainer:
        stage: Stage = recipe.trainer.stages[number - 1]
        stages = cls.stages(recipe, content)
        args = recipe.trainer.arguments_of(number, stages.folder(number), recipe.seed)
        trainer = cls.trainer_of(
            recipe,
            cls.model_of(recipe) if recipe.trainer.adapters is None else _composed(recipe),
            content,
            args,
            phase=stage.phase,
            experts=stage.experts,
            preserve_coef=stage.preserve_coef,
            begin=stages.folder(number - 1) if number > 1 else None,
            callbacks=recipe.trainer.callbacks(f"stage {number} of {len(stages.names)}, {stage.phase}"),
        )
        if stage.samples is not None:
            if not isinstance(trainer.train_dataset, data.TokenizedSet):
                raise ConfigError(
                    "trainer.stages: samples counts examples that are read before training and have a row each: leave "
                    "it out, or set packing and data.streaming to false"
                )
            trainer.train_dataset = replace(trainer.train_dataset, rows=trainer.train_dataset.rows[: stage.samples])
        return trainer


def _check(recipe: Recipe) -> None:
    """What of a recipe can be seen to be wrong before its data and backbone are there."""
    sites, adapters = recipe.mixture.sites, recipe.trainer.adapters
    _refuse_other_routers({site.router.kind for site in sites if site.router is not None})
    finished = [issubclass(EXPERTS.get(site.experts.kind), FrozenExperts) for site in sites]
    if adapters is None:
        if any(finished):
            raise ConfigError(
                "mixture: experts of kind frozen hold finished adapters, but the trainer names none: list their "
                "folders in trainer.adapters"
            )
        return
    if finished != [True] or sites[0].experts.num_experts != len(adapters):
        raise ConfigError(
            f"trainer.adapters lists {len(adapters)} finished adapters, so the mixture has to be one site with experts "
            f"{{kind: frozen, num_experts: {len(adapters)}}}; which modules and ranks follows from the adapters"
        )


def _one_expert_for_each_task(recipe: Recipe, splits: data.RecipeData) -> None:
    tasks = splits.tasks
    hard = [number for number, stage in enumerate(recipe.trainer.stages, 1) if stage.phase == "hard"]
    for index, site in enumerate(recipe.mixture.sites):
        if hard and site.router is not None and site.experts.num_experts != len(tasks):
            raise ConfigError(
                f"stage {hard[0]} (hard) trains one expert for each task, but mixture.sites.{index} has "
                f"{site.experts.num_experts} experts and the data {len(tasks)} tasks ({', '.join(tasks[:10])}): set "
                f"experts.num_experts to {len(tasks)}"
            )


def _composed(recipe: Recipe) -> MoELoRAModel:
    """The mixture of a recipe's finished adapters, with its tokenizer."""
    from ..composition.compose import assemble

    [site] = recipe.mixture.sites
    backbone, tokenizer = load_backbone(recipe.backbone)
    set_seed(recipe.seed)
    experts = {name: getattr(site.experts, name) for name in ("dropout", "expert_dropout")}
    assert site.router is not None
    router = site.router.to_dict()
    model = assemble(recipe.trainer.adapters, router, backbone, names=site.experts.names, experts=experts).model
    model.tokenizer = tokenizer
    return model
