"""Reward models: a base, experts of capabilities, an aggregator, and a classifier of categories, one phase each.

See ``moelora/reward`` for the model and ``trainers/reward_phases.py`` for what each phase does. A recipe without
categories trains a single reward model, which has the first phase alone and all rankings.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..config import Recipe, SampledPreferenceData
from ..data.preferences import Ranking
from ..data.ranking_set import NothingToLearnError
from ..data.rankings import read_all
from ..errors import ConfigError
from ..registry import TRAINERS, closest
from ..reward.model import RewardModel
from ..reward.moving import only
from ..routing import RoutingRecord, SiteInfo
from .mixture_trainer import MixtureTrainer
from .reward_config import RewardTrainerConfig
from .reward_phases import PHASES, LossOptions, part_of
from .sft import SFTConfig
from .staged import Staged

logger = logging.getLogger(__name__)

Rankings = tuple[list[Ranking], list[Ranking]]


class RewardTrainer(MixtureTrainer):
    """:class:`MixtureTrainer` for one phase of a reward model; usable by itself.

    While it trains, exactly what the phase moves has gradients: rows of the stacked experts, and small modules. That
    nothing else has moved is checked at the end, bit for bit. Beside the loss it logs ``accuracy``, of comparisons (of
    categories in the phase ``category``), and evaluates it.

    Args:
        model: with a tokenizer. phase: ``base``, ``capability``, ``aggregate`` or ``category``.
        rankings: what to learn from. eval_rankings: what to evaluate on; nothing is evaluated where none of them has
            what the phase learns from, such as comparisons by a capability. max_length: of a text, in tokens.
        label_smoothing, center_coef: see :class:`RewardTrainerConfig`.
        held_out: what :meth:`finish` goes by.
        begin: folder of the model that the phase begins with, instead of the model's own tensors.

    Raises:
        ConfigError: an unknown phase, a model that is no reward model, or weight decay.
        DataError: there is nothing to learn from.
    """

    model: RewardModel

    def __init__(
        self,
        model: RewardModel,
        args: TrainingArguments | None = None,
        *,
        phase: str,
        rankings: Sequence[Ranking],
        eval_rankings: Sequence[Ranking] = (),
        max_length: int = 512,
        label_smoothing: float = 0.0,
        center_coef: float = 0.0,
        held_out: Sequence[Ranking] = (),
        begin: Path | None = None,
        **trainer: Any,
    ) -> None:
        if not isinstance(model, RewardModel):
            raise ConfigError(f"this trainer takes a reward model, got {type(model).__name__}: see RewardModel.attach")
        if phase not in PHASES:
            raise ConfigError(f"phase {phase!r}: the phases are {', '.join(PHASES)}{closest(phase, list(PHASES))}")
        self.phase = PHASES[phase](model, LossOptions(label_smoothing, center_coef))
        # Examples are made once the model lies where it trains; that there will be some, the Trainer asks at once.
        promised: list[Any] | None = [] if eval_rankings else None
        super().__init__(model, args, data_collator=self.phase.collate, eval_dataset=promised, **trainer)
        if self.args.weight_decay and self.phase.moves[0]:
            raise ConfigError(
                f"weight_decay is {self.args.weight_decay:g}: experts that this phase leaves alone lie in one tensor "
                "with those that it trains, and would decay: set it to 0"
            )
        if begin is not None:
            self._restore_adapter(begin)
        self.phase.begin()
        self.train_dataset = self.phase.examples(rankings, max_length)
        for what in self.phase.untaught(self.train_dataset):
            logger.warning("%s then learns nothing", what)
        self.eval_dataset = self._to_evaluate(eval_rankings, max_length) if eval_rankings else None
        self.held_out, self.max_length = held_out, max_length
        self.label_names = self.phase.labels

    def _to_evaluate(self, rankings: Sequence[Ranking], max_length: int) -> Any:
        try:
            return self.phase.examples(rankings, max_length)
        except NothingToLearnError as error:
            logger.warning("the phase %s is not evaluated: of the rankings to test on, %s", self.phase.name, error)
            self.args.eval_strategy = IntervalStrategy.NO
            return None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with only(self.model, *self.phase.moves):
            return super().train(*args, **kwargs)

    def finish(self) -> dict[str, float]:
        """What is set when the phase is over, by ``held_out``: the classifier's temperature; and metrics of it."""
        return self.phase.finish(self.held_out, self.max_length) if self.held_out else {}

    def _hear(self, site: SiteInfo, record: RoutingRecord) -> None:
        """Nothing: which experts are on follows from the data, and is no load to watch."""

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        return self.phase.loss(model, inputs)


@TRAINERS.register("reward", "dmoerm")
class RewardRun(Staged):
    """What ``moelora train`` does with a recipe whose trainer is ``reward``."""

    Config: ClassVar[type[SFTConfig]] = RewardTrainerConfig
    Trainer: ClassVar[type[Any]] = RewardTrainer

    @classmethod
    def stage_names(cls, recipe: Recipe, content: Rankings) -> list[str]:
        return list(recipe.trainer.phase_names)

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if isinstance(recipe.data, SampledPreferenceData):  # whose categories are known before an answer is sampled
            _check_categories(recipe.trainer, set(recipe.data.categories))

    @classmethod
    def check_data(cls, recipe: Recipe, content: Rankings) -> None:
        categories, (train, _) = recipe.trainer.categories, content
        _check_categories(recipe.trainer, {ranking.category for ranking in train if ranking.category is not None})
        known = [ranking for ranking in train if ranking.category in categories]
        if known and not any(set(categories[str(r.category)].capabilities) & set(r.capabilities) for r in known):
            raise ConfigError(
                "trainer.categories: no ranking compares its responses by a capability of its category, such as "
                f"{next(iter(categories[str(known[0].category)].capabilities))!r}: name their column with "
                "data.columns.capabilities, let `moelora label` find labels, or leave trainer.categories out"
            )

    @classmethod
    def examples_of(cls, recipe: Recipe) -> Any:
        """The rankings to train on and those to evaluate on."""
        return read_all(recipe)

    @classmethod
    def prepare_stage(cls, recipe: Recipe, content: Rankings, number: int) -> RewardTrainer:
        config, stages = recipe.trainer, cls.stages(recipe, content)
        name = stages.names[number - 1]
        train, test = content
        model = cls.model_of(recipe)
        assert isinstance(model, RewardModel)
        parts = part_of(name, train, config.first_share, recipe.seed) if config.categories else (train, [])
        return RewardTrainer(
            model,
            config.arguments_of(number, stages.folder(number), recipe.seed),
            phase=name,
            rankings=parts[0],
            held_out=parts[1],
            eval_rankings=test,
            max_length=recipe.max_length,
            label_smoothing=config.label_smoothing,
            center_coef=config.center_coef,
            begin=stages.folder(number - 1) if number > 1 else None,
            processing_class=model.tokenizer,
            callbacks=config.callbacks(f"phase {number} of {len(stages.names)}, {name}"),
            **config.trainer_options(),
        )

    @classmethod
    def finish_stage(cls, trainer: RewardTrainer) -> dict[str, float]:
        return trainer.finish()


def _check_categories(config: RewardTrainerConfig, found: set[str]) -> None:
    """Refuse categories of which the data have none, before the first phase, which needs none, is trained."""
    if config.categories and not found & set(config.categories):
        raise ConfigError(
            f"trainer.categories are {', '.join(config.categories)}, but the rankings are of "
            f"{', '.join(sorted(found)) or 'no category'}: name the same, set data.columns.category, or leave "
            "trainer.categories out for a single reward model"
        )
