"""Prompts with known answers: from procedural tasks, or from a user's own tables; train and test never overlap."""

from __future__ import annotations

import logging

from ..config import (
    DatasetData,
    ImageSequenceData,
    MixtureData,
    PreferenceData,
    ReasoningGymData,
    SampledPreferenceData,
    SequenceData,
)
from ..data_config import DataConfig
from ..errors import ConfigError
from . import gym, tables
from .example import Example as Example
from .example import Question, Splits, fresh, mix
from .example import task_names as task_names
from .gym import gym_dataset as gym_dataset
from .mixing import mixing_plan

logger = logging.getLogger(__name__)


def load_examples(config: DataConfig, task: str | None = None) -> Splits:
    """The examples that a configuration describes; the same configuration always gives the same ones.

    No question of the test examples occurs among the training examples, and none occurs twice within a data set; the
    plan of a mixture may take an example several times. Of a stream the test examples alone are read.

    Args:
        task: of the rows of a user's table, where no column says it.

    Raises:
        ConfigError: the data are rankings, which have no answers to learn, or a sequence of tasks.
        DataError: a file, column, task or package is missing; a cell is empty; or nothing is left to train on.
    """
    config = examples_only(config)
    if isinstance(config, MixtureData):
        splits = _mixture(config)
    elif isinstance(config, ReasoningGymData):
        splits = gym.generate(config)
    else:
        splits = tables.read(config, task)
    if splits.dropped:
        logger.info("%d examples left out: their questions were there already", splits.dropped)
    return splits


def examples_only(config: DataConfig) -> ReasoningGymData | DatasetData | MixtureData:
    """The configuration itself, if it describes examples.

    Raises:
        ConfigError: it describes rankings, which have no answers to learn, or tasks that are learnt one after another.
    """
    if isinstance(config, SequenceData | ImageSequenceData):
        trainer = "continual" if isinstance(config, SequenceData) else "clip"
        raise ConfigError(
            f"data.kind: {config.kind} describes tasks that are learnt one after another; trainer: {{kind: {trainer}}} "
            "takes it"
        )
    if isinstance(config, PreferenceData | SampledPreferenceData):
        raise ConfigError(
            f"data.kind: {config.kind} says which responses are better, and holds no answers to learn; "
            "trainer: {kind: reward} takes it (moelora train dmoerm). To learn the better answers, read the file with "
            "data: {kind: dataset} and name their column"
        )
    return config


def streamed(config: DataConfig) -> dict[str, DatasetData]:
    """The sources of a stream, by name; empty where the data are read before training."""
    named = config.sources if isinstance(config, MixtureData) else {"": config}
    return {name: source for name, source in named.items() if isinstance(source, DatasetData) and source.streaming}


def _mixture(config: MixtureData) -> Splits:
    parts = {name: load_examples(source, name) for name, source in config.sources.items()}
    seen: set[Question] = set()
    test, dropped = fresh((example for part in parts.values() for example in part.test), seen)
    train: dict[str, list[Example]] = {}
    if not config.streaming:
        for name, part in parts.items():  # what is trained on in one source may be tested in another
            train[name], passed = fresh(part.train, set(seen))
            dropped += passed
    plan = mixing_plan(
        {name: len(examples) for name, examples in train.items()},
        temperature=config.temperature,
        weights=config.weights,
        size=config.size,
        seed=config.seed,
    )
    test.sort(key=lambda example: example.task)
    chosen = [train[name][index] for name, index in plan]
    return Splits(chosen, test, dropped)


__all__ = ["Example", "Splits", "gym_dataset", "load_examples", "mix", "streamed", "task_names"]
