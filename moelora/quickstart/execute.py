"""Carry the plan out: score, train, score, record, save, reload."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from .. import analysis
from ..config import MixtureConfig
from ..data import tokenize
from ..errors import CheckpointError
from ..evaluation.scoring import Report, majority, score
from ..mixture import MoELoRAModel
from ..trainers.comparison import Outcome, train_and_score
from ..trainers.live import LiveProgress
from . import tell
from .plan import Plan, Settings, plan_mixtures, plan_steps, prepare
from .reload import CHECKPOINT, write_probe

RESULTS = "results.json"
MAX_NEW_TOKENS = 16
# Answers come in large batches: a decoding step of a 4-bit backbone on a CPU costs little more for 64 rows than for 1.
BATCH = 64


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """The whole quickstart.

    Returns:
        What is in ``results.json``.

    Raises:
        UserError: the backbone or the data cannot be used, or the minutes do not suffice.
        CheckpointError: the reloaded checkpoint does not do what the trained model did.
    """
    plan = prepare(settings, console)
    plan.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with _answering(console, "Backbone answers") as progress:
        before = score(
            plan.backbone, plan.tokenizer, plan.test, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH, progress=progress
        )
    eval_seconds = time.monotonic() - began
    mixtures = plan_mixtures(plan)
    steps = settings.steps or plan_steps(plan, mixtures, eval_seconds)
    console.print(f"Training each for {steps} steps of {plan.batch_size} questions, the same ones in the same order.")
    story = _Story(before, majority(plan.train_examples, plan.test))
    for name, mixture in mixtures.items():
        _train(plan, name, mixture, steps, story)
    found = story.found
    (plan.output / RESULTS).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    tell.print_table(console, before, story.constant, story.outcomes, found["verdict"])
    _reload(plan)
    minutes = (time.monotonic() - plan.began) / 60
    console.print(f"\nDone in {minutes:.1f} minutes. In [bold]{plan.output}[/]: {CHECKPOINT}/ (the checkpoint with its")
    console.print(f"card), {RESULTS}, and [bold]routing.html[/]: open it to see what each expert does.")
    return found


@dataclass
class _Story:
    """What is known so far; ``found``, all of it, once the mixture is trained, which comes last."""

    before: Report
    constant: Report
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)


def _train(plan: Plan, name: str, mixture: MixtureConfig, steps: int, story: _Story) -> None:
    trainer = plan.recipe.trainer
    config = trainer.model_copy(update={"args": {**trainer.args, "max_steps": steps}})

    def keep(model: MoELoRAModel, outcome: Outcome) -> None:
        story.outcomes[name] = outcome
        folder = name.lower()
        if folder != CHECKPOINT:
            model.save_pretrained(plan.output / folder)
            return
        story.found = tell.results(plan, story.before, story.constant, story.outcomes, steps)
        lines = tell.rows(story.before, story.constant, story.outcomes)
        model.save_pretrained(plan.output / folder, card=tell.card(plan, story.found, tell.markdown_table(*lines)))
        write_probe(plan.output, model, plan.tokenizer, plan.test)
        _record(plan, model)

    with _answering(plan.console, f"{name} answers") as progress:
        train_and_score(
            plan.backbone,
            mixture,
            plan.tokenizer,
            plan.train,
            plan.test,
            config,
            collate=plan.collate,
            output=plan.output / "training" / name.lower(),
            seed=plan.seed,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=BATCH,
            callbacks=[LiveProgress(name, console=plan.console)],
            progress=progress,
            then=keep,
        )


def _record(plan: Plan, model: MoELoRAModel) -> None:
    """Write the routing report over the test questions with their right answers."""
    test = tokenize(plan.test, plan.tokenizer, plan.recipe.max_length, plan.train.tasks)
    batches = DataLoader(test, batch_size=plan.batch_size, collate_fn=plan.collate)
    data = f"{len(test)} test questions and their answers"
    analysis.analyze(
        model,
        batches,
        task_names=plan.train.tasks,
        out=plan.output,
        model_name=f"MixLoRA on {plan.recipe.backbone.name}",
        data_name=data,
    )


def _reload(plan: Plan) -> None:
    """Load the checkpoint in a new process, which compares logits and answers a question of each task."""
    plan.console.print("\nReloading the checkpoint in a new process ...")
    command = [sys.executable, "-m", "moelora", "quickstart", "--check", str(plan.output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if done.returncode not in (0, 1) or not done.stdout:
        raise CheckpointError(f"{plan.output / CHECKPOINT}: could not be reloaded: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout)
    tell.print_reload(plan.console, found)
    if not found["agrees"]:
        raise CheckpointError(
            f"{plan.output / CHECKPOINT}: reloaded logits differ from the trained model's by up to "
            f"{found['max_difference']:.2e}, more than {found['tolerance']:.0e}: this is a bug; please report it"
        )


@contextmanager
def _answering(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears with the first answers."""
    bar = Progress(
        TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    )
    task = bar.add_task(title, total=None)

    def show(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()
