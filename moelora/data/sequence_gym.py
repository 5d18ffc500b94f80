"""Eight procedural tasks that run anywhere: ``reasoning-gym-8``."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..config import ReasoningGymData, SequenceData
from . import gym
from .sequence_tasks import SEQUENCES, Orders, SequenceReader, Task, make_task

TASKS: dict[str, dict[str, Any]] = {  # short questions of different character; the options keep them short
    "syllogism": {"allow_some": False, "allow_some_not": False, "invalid_ratio": 0.5, "inversion_probability": 0.0},
    "needle_haystack": {"min_num_statements": 2, "max_num_statements": 3},
    "word_sequence_reversal": {"min_words": 2, "max_words": 3},
    "number_filtering": {"min_numbers": 2, "max_numbers": 3, "min_value": 0, "max_decimals": 0},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "family_relationships": {"min_family_size": 3, "max_family_size": 4},
    "aiw": {"task_type_weights": [1.0, 0.0, 0.0], "max_entities": 9},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 40},
}
CLASSES = {"syllogism": ("Yes", "No")}
TEST_SEED = 5_000_011  # of no other data set here, so that nothing was chosen on these questions
SIZES = {"train": 600, "val": 50, "test": 100}


@SEQUENCES.register("reasoning-gym-8")
class ReasoningGym8(SequenceReader):
    """Eight tasks of ``reasoning-gym``, each with its own scorer.

    Order ``a`` goes from choosing to computing; ``b`` is its reverse; ``c`` puts tasks of different kinds side by side.
    Test and validation questions are the same for every seed, and for every training size. The data depend on the
    version of ``reasoning-gym``, which is a part of the version of the sequence. ``basic_arithmetic`` and ``gcd`` have
    about a thousand questions in all. ``aiw`` asks about siblings alone.
    """

    def __init__(self, config: SequenceData) -> None:
        super().__init__(config)
        try:
            self.version = f"1, reasoning-gym {version('reasoning-gym')}"
        except PackageNotFoundError:
            gym.gym_dataset("syllogism", {})  # says what to install

    def orders(self) -> Orders:
        names = (
            "syllogism",
            "family_relationships",
            "needle_haystack",
            "word_sequence_reversal",
            "number_filtering",
            "aiw",
            "gcd",
            "basic_arithmetic",
        )
        return {"a": names, "b": names[::-1], "c": tuple(names[index] for index in (3, 7, 1, 4, 0, 6, 2, 5))}

    def task(self, name: str) -> Task:
        config = self.config
        held = config.test_size or SIZES["test"]
        data = ReasoningGymData.parse(
            {
                "tasks": {name: TASKS[name]},
                "train_size": config.train_size or SIZES["train"],
                "test_size": held + (config.val_size or SIZES["val"]),
                "seed": config.seed,
                "test_seed": TEST_SEED,
                "system": "Answer briefly." if config.system is None else config.system,
            },
            where="data",
        )
        made = gym.generate(data)
        return make_task(
            config,
            name,
            made.train,
            made.test[held:],
            made.test[:held],
            metric="gym_score",
            classes=CLASSES.get(name, ()),
        )
