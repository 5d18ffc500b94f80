"""Training the router over finished adapters, which stay as they are to the last bit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..config import card_names, card_recipe
from ..data import Collator, Splits, TokenizedSet, task_names, tokenize
from ..errors import ConfigError, DataError
from ..model import MoELoRAModel
from ..registry import ROUTERS
from ..trainers.live import LiveProgress
from ..trainers.sft import SFTConfig, SFTTrainer
from . import card
from .plan import expert_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What :func:`train_router` did.

    Attributes:
        parameters: how many were trained. steps, examples: how long and on what. tasks: name of each task id.
        metrics: of the Trainer; ``eval_task_loss`` is over the test examples, if there are any.
    """

    parameters: int
    steps: int
    examples: int
    tasks: list[str]
    metrics: dict[str, float]

    def __str__(self) -> str:
        loss = self.metrics.get("eval_task_loss")
        return (
            f"{self.parameters:,} parameters of the router were trained for {self.steps} steps on {self.examples} "
            f"examples of the tasks {', '.join(self.tasks)}"
            + (", the adapters were not." if loss is None else f"; the loss of the test examples is {loss:.4g}.")
        )


def default_trainer(router: str, **args: Any) -> SFTConfig:
    """The supervised trainer with the options of a router's model card that it has, ``args`` in place of the card's.

    Without checkpoints. A card may name another trainer, such as one of several stages.
    """
    recipe = card_recipe(router) if router in card_names() else {}
    given = recipe.get("trainer", {})
    trainer = {name: given[name] for name in SFTConfig.model_fields if name in given and name != "kind"}
    if not {"max_steps", "num_train_epochs"}.isdisjoint(args):
        trainer["args"] = {
            k: v for k, v in trainer.get("args", {}).items() if k not in ("max_steps", "num_train_epochs")
        }
    trainer["args"] = {"save_strategy": "no", **trainer.get("args", {}), **args}
    return SFTConfig.parse(trainer)


def train_router(
    model: MoELoRAModel,
    examples: Splits,
    trainer: SFTConfig | None = None,
    *,
    max_length: int = 512,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> Trained:
    """Train what a composition has to be trained, with the supervised trainer, on a mixed set.

    A task is known to the router by its name: task ids are the indices of the adapters' names, then those of the other
    tasks in alphabetical order. A router to which ids name experts gets -1 for these. A router with a phase of its own,
    such as ``phatgoose``, is trained in it and evaluated outside of it.

    Args:
        model: of :func:`moelora.compose`; its ``tokenizer`` is set. It is left in evaluation mode.
        trainer: by default that of the router's model card. output_dir: for checkpoints, if the trainer writes any.

    Raises:
        ConfigError: there is nothing to train, the router is not trained by this trainer, or there is no tokenizer.
        DataError: no task is named as an adapter, where the router needs that.
        TrainingError: a loss or a gradient was not finite.
    """
    [site] = model.mixture.sites
    assert site.router is not None
    router = ROUTERS.get(site.router.kind)
    config = trainer or default_trainer(router.kind)
    parameters = _trainable(model, router)
    train, test = _tokens(model, examples, expert_names(site), router, max_length)
    before = experts_digest(model)
    with TemporaryDirectory() as temporary:
        run = SFTTrainer(
            model,
            config.training_arguments(output_dir or temporary, seed),
            data_collator=Collator(model.tokenizer.pad_token_id, with_task_ids=True),
            train_dataset=train,
            eval_dataset=test,
            processing_class=model.tokenizer,
            callbacks=[LiveProgress("training the router")],
            **config.trainer_options(),
        )
        with model.routing_context(phase=router.train_phase) if router.train_phase else nullcontext():
            metrics = dict(run.train().metrics)
        if test is not None:
            metrics.update(run.evaluate())
    model.train(False)
    assert experts_digest(model) == before, "training changed the adapters, which are frozen"
    trained = Trained(parameters, run.state.global_step, len(train), train.tasks, metrics)
    if model.card is not None:
        model.card = card.with_section(model.card, "Training", str(trained), {**config.to_dict(), "seed": seed})
    return trained


def _trainable(model: MoELoRAModel, router: Any) -> int:
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not count:
        raise ConfigError(
            f"router {router.kind!r} has no parameters here, so there is nothing to train: leave out data"
        )
    if router.samples:
        raise ConfigError(f"router {router.kind!r} draws its choice, which moelora.policy trains and this trainer not")
    if model.tokenizer is None:
        raise ConfigError("the model has no tokenizer to read examples with: set model.tokenizer")
    return count


def task_order(names: Sequence[str], examples: Splits) -> list[str]:
    """The name of each task id: those of the adapters, then the other tasks of the data in alphabetical order."""
    tasks = task_names([*examples.train, *examples.test])
    return [*names, *(task for task in tasks if task not in names)]


def _tokens(
    model: MoELoRAModel, examples: Splits, names: Sequence[str], router: Any, max_length: int
) -> tuple[TokenizedSet, TokenizedSet | None]:
    order = task_order(names, examples)
    sets = [
        tokenize(part, model.tokenizer, max_length, order) if part else None for part in (examples.train, examples.test)
    ]
    train, test = sets
    if train is None:
        raise DataError("there are no examples to train on")
    if router.task_ids == "experts":
        _name_experts([one for one in sets if one is not None], len(names), router.kind)
    return train, test


def _name_experts(sets: Sequence[TokenizedSet], count: int, kind: str) -> None:
    """Let the ids of tasks that are named as no adapter be -1."""
    tasks = sets[0].tasks
    seen = {row["task_ids"] for row in sets[0].rows}
    known = [tasks[index] for index in sorted(seen) if index < count]
    others = [tasks[index] for index in sorted(seen) if index >= count]
    if not known:
        raise DataError(
            f"router {kind!r} learns which adapter a task belongs to, but no task of the data is named as an adapter: "
            f"the tasks are {', '.join(others[:10])}, the adapters {', '.join(tasks[:count])}; give the adapters these "
            "names, or say which column of the data holds the tasks"
        )
    if others:
        logger.warning("no adapter is named as the tasks %s: their examples do not teach which to use", others)
    for one in sets:
        for row in one.rows:
            row["task_ids"] = row["task_ids"] if row["task_ids"] < count else -1


@torch.no_grad()
def experts_digest(model: MoELoRAModel) -> str:
    """sha256 of all tensors of the experts."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.adapter_tensors().items()):
        if ".router." not in name:
            total.update(name.encode() + tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
