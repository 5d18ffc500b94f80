"""What the quickstart is going to do: backbone, data, the two mixtures, and how many steps the minutes allow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..backbone import load_backbone
from ..config import BackboneConfig, DatasetData, MixtureConfig, Quantization, Recipe, load_recipe
from ..data import Collator, Example, TokenizedSet, load_examples, tokenize
from ..errors import UserError
from ..mixture import attach
from ..trainers.comparison import equal_rank, find_targets, seconds_per_step, trainable_parameters

# Reloading in a new process, recording the routing and writing, with room to spare.
CLOSING_SECONDS = 45.0
# An adapted model answers more slowly than the backbone, and steps vary in length.
MARGIN = 1.1
FEWEST_STEPS = 5


@dataclass(frozen=True)
class Settings:
    """What the user chose; ``None`` leaves it to the card.

    Attributes:
        minutes: about how long everything may take. steps: train for so many steps instead, however long they take.
        data: the user's own data in place of the card's tasks. threads: CPU threads; all cores by default.
    """

    minutes: float
    steps: int | None
    backbone: str | None
    quantization: Quantization | None
    data: DatasetData | None
    output: Path
    seed: int
    threads: int | None


@dataclass(frozen=True)
class Plan:
    """Everything that the run works with.

    Attributes:
        began: monotonic time at the start. deadline: when it should be over.
        train: tokenised training examples. train_examples, test: the examples themselves.
    """

    recipe: Recipe
    output: Path
    console: Console
    began: float
    deadline: float
    backbone: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: TokenizedSet
    train_examples: list[Example]
    test: list[Example]
    collate: Collator

    @property
    def batch_size(self) -> int:
        return int(self.recipe.trainer.args["per_device_train_batch_size"])

    @property
    def seed(self) -> int:
        return self.recipe.seed


def prepare(settings: Settings, console: Console) -> Plan:
    """Load data and backbone.

    Raises:
        UserError: the data or the backbone cannot be used.
    """
    began = time.monotonic()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    recipe = _recipe(settings)
    assert recipe.data is not None
    examples = load_examples(recipe.data)
    if not examples.test:
        raise UserError(f"{settings.data}: no test examples; give data a test_path or a larger test_fraction")
    console.print(f"Loading {recipe.backbone.name} ({recipe.backbone.quantization or 'as stored'}) ...")
    backbone, tokenizer = load_backbone(recipe.backbone)
    train = tokenize(examples.train, tokenizer, recipe.max_length)
    plan = Plan(
        recipe=recipe,
        output=settings.output,
        console=console,
        began=began,
        deadline=began + settings.minutes * 60,
        backbone=backbone,
        tokenizer=tokenizer,
        train=train,
        train_examples=examples.train,
        test=examples.test,
        collate=Collator.fitting(backbone, tokenizer.pad_token_id),
    )
    console.print(
        f"{len(train)} training and {len(plan.test)} test questions of {len(train.tasks)} tasks "
        f"({', '.join(train.tasks)}), {train.num_tokens / len(train):.0f} tokens each; "
        f"{torch.get_num_threads()} CPU threads"
    )
    return plan


def _recipe(settings: Settings) -> Recipe:
    card = load_recipe("quickstart")
    changes: dict[str, object] = {"output_dir": str(settings.output), "seed": settings.seed}
    if settings.backbone is not None or settings.quantization is not None:
        changes["backbone"] = BackboneConfig(
            name=settings.backbone or card.backbone.name,
            quantization=settings.quantization or card.backbone.quantization,
        )
    if settings.data is not None:
        changes["data"] = settings.data
    elif settings.seed:
        assert card.data is not None
        changes["data"] = card.data.model_copy(update={"seed": card.data.seed + settings.seed})
    return card.model_copy(update=changes)


def plan_mixtures(plan: Plan) -> dict[str, MixtureConfig]:
    """Plain LoRA and the card's MixLoRA on the middle third of this backbone's layers, with about equal parameters."""
    targets = find_targets(plan.backbone)
    third = targets.layers // 3
    layers = f"{third}:{max(2 * third, third + 1)}"
    block, attention = plan.recipe.mixture.sites
    sites = [block.model_copy(update={"target": [targets.ffn], "layers": layers})]
    if targets.attention:
        sites.append(attention.model_copy(update={"target": targets.attention, "layers": layers}))
    mixlora = MixtureConfig(sites=sites)
    model = attach(plan.backbone, mixlora)
    parameters = trainable_parameters(model)
    model.unload()
    names = [name.rpartition(".")[2] for name in targets.projections] + targets.attention
    site = attention.model_copy(update={"target": names, "layers": layers})
    rank = equal_rank(plan.backbone, site, parameters)
    ratio = attention.experts.alpha / attention.experts.r
    experts = attention.experts.model_copy(update={"r": rank, "alpha": rank * ratio})
    return {"LoRA": MixtureConfig(sites=[site.model_copy(update={"experts": experts})]), "MixLoRA": mixlora}


def plan_steps(plan: Plan, mixtures: dict[str, MixtureConfig], eval_seconds: float) -> int:
    """How many optimizer steps each mixture gets, from the measured time of one step of each.

    Raises:
        UserError: the minutes do not suffice for a few steps.
    """
    seconds = 0.0
    for mixture in mixtures.values():
        model = attach(plan.backbone, mixture)
        seconds += seconds_per_step(model.train(), plan.train, plan.collate, plan.batch_size)
        model.unload()
    left = plan.deadline - time.monotonic() - len(mixtures) * eval_seconds * MARGIN - CLOSING_SECONDS
    steps = int(left / (seconds * MARGIN))
    if steps < FEWEST_STEPS:
        needed = (plan.deadline - plan.began - left + FEWEST_STEPS * seconds * MARGIN) / 60
        raise UserError(
            f"--minutes {(plan.deadline - plan.began) / 60:g} leave time for {max(steps, 0)} training steps on this "
            f"machine: give at least --minutes {needed + 1:.0f}, or a smaller backbone"
        )
    return steps
