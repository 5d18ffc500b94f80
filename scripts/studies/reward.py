"""Reward models of one budget, on preferences that the backbone's own answers give: one, ensembles, DMoERM.

    python scripts/studies/reward.py              # everything, resumed where it stopped
    python scripts/studies/reward.py --seeds 1    # a quicker look

The 4-bit backbone answers reasoning-gym questions of four categories, and their scorers and properties of the text rank
the answers (``moelora/data/sampled.py``). On these rankings are trained, for each seed: a single reward model with
``--steps`` steps of 4 rankings of 4 answers; three with a third of the steps each, as an ensemble of the same budget;
and DMoERM, whose base, capabilities and classifier share about the same number of tokens. Beyond that it reads the
rankings of its aggregator once; the tokens are printed. The single models of all seeds are an ensemble of as many times
the budget. One learning rate holds for all.

All models then judge the same held-out rankings, and 16 answers each to further questions choose the best of n.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import reward_tables as tables
import typer
from transformers import set_seed
from transformers.utils import logging as bars

import moelora
from moelora.config import BackboneConfig, Recipe, SampledPreferenceData, load_recipe
from moelora.data.preferences import Ranking
from moelora.data.properties import PROPERTIES
from moelora.data.sampled import Sampler
from moelora.evaluation.reward_ensembles import WAYS, Scale, combine
from moelora.lower import LowerStates
from moelora.reward.model import RewardModel
from moelora.reward.scoring import Reward
from moelora.trainers.reward import RewardRun

# Short questions that SmolLM2 sometimes gets right, so that its answers differ in more than their form.
CATEGORIES: dict[str, Any] = {
    "arithmetic": {
        "tasks": {
            "basic_arithmetic": {
                "min_terms": 2,
                "max_terms": 2,
                "min_digits": 1,
                "max_digits": 1,
                "operators": ["+", "-"],
                "allow_negation": False,
            },
            "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        },
        "capabilities": ["correctness", "closeness", "brevity"],
    },
    "letters": {
        "tasks": {
            "spell_backward": {"min_word_len": 3, "max_word_len": 4},
            "word_sequence_reversal": {"min_words": 2, "max_words": 3},
        },
        "capabilities": ["likeness", "grounding", "brevity"],
    },
    "counting": {
        "tasks": {
            "letter_counting": {"min_words": 2, "max_words": 3},
            "count_primes": {"max_n": 20},
        },
        "capabilities": ["correctness", "closeness", "form"],
    },
    "reading": {
        "tasks": {
            "needle_haystack": {"min_num_statements": 2, "max_num_statements": 3},
            "syllogism": {"allow_some": False, "allow_some_not": False, "inversion_probability": 0.0},
        },
        "capabilities": ["correctness", "grounding", "brevity"],
    },
}
MEMBERS = 3
MOST = 16
RANKINGS = 4  # of a step
SHARES = {"base": 0.35, "capability": 0.5, "category": 0.3}  # of DMoERM's steps
PROMPTS = 16  # of a step of the classifier: about half as many tokens as a step of rankings
SINGLE, DMOERM = "single", "DMoERM"
KEPT = 2**31  # bytes of states below the experts
Scored = list[list[Reward]]


@dataclass(frozen=True)
class Study:
    """What all models share."""

    folder: Path
    backbone: str
    steps: int
    seeds: int
    train_size: int
    test_size: int
    learning_rate: float
    current: list[RewardModel] = field(default_factory=list)
    lower: list[LowerStates] = field(default_factory=list)

    def data(self, **options: Any) -> SampledPreferenceData:
        """The questions and how they are answered."""
        return SampledPreferenceData(
            categories=CATEGORIES,
            max_new_tokens=20,
            worked_examples=0,
            **{"train_size": self.train_size, "test_size": self.test_size, **options},
        )

    def sampler(self, data: SampledPreferenceData) -> Sampler:
        """The answers of the backbone."""
        backbone = BackboneConfig(name=self.backbone)
        return Sampler(data, backbone, self.bare, self.folder / "answers")

    @cached_property
    def shared(self) -> tuple[Any, Any]:
        """The backbone and its tokenizer, which all models are on, one after the other."""
        return moelora.load_backbone(BackboneConfig(name=self.backbone))

    def bare(self) -> tuple[Any, Any]:
        """The same without a model on it."""
        if self.current:
            self.current.pop().unload()
        return self.shared

    def on_it(self, make: Callable[[Any], RewardModel]) -> RewardModel:
        """The model that ``make`` puts on the shared backbone, in the place of the one before.

        What the layers below the experts make of a text is kept for all models, so each text goes through them once.
        """
        backbone, tokenizer = self.bare()
        model = make(backbone)
        model.tokenizer = tokenizer
        lower = model.remember(self.lower[0] if self.lower else KEPT)
        assert lower is not None, "the experts begin above the first layer"
        self.lower[:] = [lower]
        self.current.append(model)
        return model

    @cached_property
    def train(self) -> list[Ranking]:
        """The rankings to learn from."""
        return self.sampler(self.data()).part("train")

    @cached_property
    def test(self) -> list[Ranking]:
        """The rankings that are held out."""
        return self.sampler(self.data()).part("test")

    @cached_property
    def many(self) -> list[Ranking]:
        """Held-out questions with many answers of one policy, which the price of best-of-n is about."""
        return self.sampler(self.data(test_size=max(1, self.test_size // 3), temperatures=(1.0,) * MOST)).part("test")

    def recipe(self, name: str, steps: int, seed: int) -> Recipe:
        """One training run."""
        categories = {
            name: {"capabilities": {each: PROPERTIES[each].description for each in group["capabilities"]}}
            for name, group in CATEGORIES.items()
        }
        phases: dict[str, dict[str, Any]] = {
            phase: {"max_steps": max(1, round(share * steps))} for phase, share in SHARES.items()
        }
        phases["category"]["per_device_train_batch_size"] = PROMPTS
        layered = {"categories": categories, "phases": {**phases, "aggregate": {"max_steps": -1}}}
        return load_recipe(
            {
                "backbone": {"name": self.backbone},
                "mixture": {
                    "sites": [
                        {
                            "target": ["q_proj", "v_proj", "up_proj", "down_proj"],
                            "layers": "-3:",
                            "experts": {"kind": "lora", "num_experts": 1, "r": 8, "alpha": 16},
                        }
                    ]
                },
                "data": self.data().to_dict(),
                "trainer": {
                    "kind": "reward",
                    "args": {
                        "max_steps": max(1, steps),
                        "learning_rate": self.learning_rate,
                        "per_device_train_batch_size": RANKINGS,
                        "logging_steps": 5,
                        "save_strategy": "no",
                    },
                    **(layered if name == DMOERM else {}),
                },
                "max_length": 192,
                "output_dir": str(self.folder / "models" / f"{name}-{seed}"),
                "seed": seed,
            }
        )


def trained(study: Study, name: str, steps: int, seed: int) -> Path:
    """The folder of a model, trained if it is not there."""

    class Run(RewardRun):
        """Trains on the study's rankings; the test is not looked at before the end."""

        @classmethod
        def examples_of(cls, recipe: Recipe) -> Any:
            return study.train, []

        @staticmethod
        def model_of(recipe: Recipe) -> RewardModel:
            def make(backbone: Any) -> RewardModel:
                set_seed(recipe.seed)
                return RewardModel.attach(backbone, recipe.trainer.reward, recipe.mixture)

            return study.on_it(make)

    recipe = study.recipe(name, steps, seed)
    folder = Path(recipe.output_dir)
    if not (folder / "recipe.yaml").is_file():
        began = time.monotonic()
        Run.run(recipe, resume=folder.is_dir() and any(folder.iterdir()))
        (folder / "seconds.json").write_text(json.dumps(time.monotonic() - began))
    return folder


def scored(study: Study, folder: Path) -> tuple[Scored, Scored]:
    """The rewards of all answers in ``test`` and ``many`` by one model, kept beside it."""
    path = folder / "rewards.json"
    parts = study.test, study.many
    if not path.is_file():
        model = study.on_it(lambda backbone: RewardModel.from_pretrained(folder, backbone=backbone))
        # A small model often says the same, and the same text has the same reward.
        texts = {
            (ranking.key, text): (ranking, text) for part in parts for ranking in part for text in ranking.responses
        }
        with bars.tqdm(total=len(texts), desc=f"Scoring by {folder.name}", unit="text") as bar:
            rewards = model.score(
                [ranking.prompt for ranking, _ in texts.values()],
                [text for _, text in texts.values()],
                batch_size=32,
                progress=lambda done, _: bar.update(done - bar.n),
            )
        rows = [[*key, vars(reward)] for key, reward in zip(texts, rewards, strict=True)]
        path.write_text(json.dumps(rows))
    known = {(key, text): Reward(**reward) for key, text, reward in json.loads(path.read_text())}
    one, other = ([[known[ranking.key, text] for text in ranking.responses] for ranking in part] for part in parts)
    return one, other


def together(members: Sequence[Scored], way: str) -> Scored:
    """The rewards of an ensemble, its members standardised over the responses that are judged."""
    scales = [Scale.of([[each.reward for each in row] for row in member]) for member in members]
    flat = iter(combine([[each for row in member for each in row] for member in members], way, scales))
    return [[next(flat) for _ in row] for row in members[0]]


def run(study: Study) -> tuple[dict[str, list[tuple[Scored, Scored]]], dict[str, list[Path]]]:
    """The rewards of every method, a pair of test and many for each seed; and the models that each method uses."""
    found: dict[str, list[tuple[Scored, Scored]]] = {}
    folders: dict[str, list[Path]] = {}

    def add(name: str, used: list[Path], rewards: tuple[Scored, Scored]) -> None:
        found.setdefault(name, []).append(rewards)
        folders.setdefault(name, []).extend(used)

    singles = []
    for seed in range(study.seeds):
        single, layered = (trained(study, name, study.steps, seed) for name in (SINGLE, DMOERM))
        singles.append(single)
        add(SINGLE, [single], scored(study, single))
        add(DMOERM, [layered], scored(study, layered))
        third = max(1, study.steps // MEMBERS)
        members = [trained(study, "member", third, seed * MEMBERS + number) for number in range(MEMBERS)]
        for way in WAYS:
            both = [scored(study, member) for member in members]
            test, many = (together([pair[part] for pair in both], way) for part in (0, 1))
            add(f"ensemble of {MEMBERS}, {way}, same budget", members, (test, many))
    if len(singles) > 1:
        both = [scored(study, single) for single in singles]
        for way in WAYS:
            test, many = (together([pair[part] for pair in both], way) for part in (0, 1))
            add(f"ensemble of {len(singles)}, {way}, {len(singles)} times the budget", singles, (test, many))
    return found, folders


def main(
    folder: Annotated[Path, typer.Option(help="Where answers, models and results are kept.")] = Path("runs/reward"),
    backbone: Annotated[str, typer.Option(help="What answers and what judges.")] = "smollm2-135m-instruct",
    steps: Annotated[int, typer.Option(help="Of the single model, 4 rankings each.")] = 40,
    seeds: Annotated[int, typer.Option(help="How often everything is trained.")] = 3,
    train_size: Annotated[int, typer.Option(help="Questions of each of the eight tasks to learn from.")] = 15,
    test_size: Annotated[int, typer.Option(help="Questions of each task to judge by.")] = 9,
    learning_rate: Annotated[float, typer.Option(help="Of all models.")] = 1e-3,
) -> None:
    """Sample preferences, train reward models on them, and print how they fare."""
    study = Study(folder, backbone, steps, seeds, train_size, test_size, learning_rate)
    found, used = run(study)
    result = tables.results(study.test, study.many, found, used, MOST)
    result.write(folder / "results")
    typer.echo(f"\n{result.table}\n\nin {folder / 'results'}")


if __name__ == "__main__":
    typer.run(main)
