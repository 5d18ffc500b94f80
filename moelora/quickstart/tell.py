"""What the quickstart says: the table, the results file, the card of the checkpoint."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..checkpoints.reading import is_hub_id
from ..evaluation.scoring import Comparison, Report, compare
from ..trainers.comparison import Outcome
from .plan import Plan

MIXTURE, BASELINE = "MixLoRA", "LoRA"


def results(plan: Plan, before: Report, constant: Report, outcomes: dict[str, Outcome], steps: int) -> dict[str, Any]:
    """Everything that was measured, in plain JSON types."""
    better = compare(plan.test, outcomes[MIXTURE].report, outcomes[BASELINE].report)
    return {
        "backbone": plan.recipe.backbone.to_dict(),
        "data": None if plan.recipe.data is None else plan.recipe.data.to_dict(),
        "steps": steps,
        "batch_size": plan.batch_size,
        "seed": plan.seed,
        "always_the_most_frequent_answer": constant.to_dict(),
        "backbone_alone": before.to_dict(),
        "methods": {name: outcome.to_dict() for name, outcome in outcomes.items()},
        "mixlora_minus_lora": vars(better),
        "verdict": verdict(better),
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "moelora": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def verdict(better: Comparison) -> str:
    """One sentence on who won, if anybody did; ``better`` is the mixture against plain LoRA."""
    spread = f"{100 * better.difference:+.1f} points, 95 % interval {100 * better.low:+.1f} to {100 * better.high:+.1f}"
    if better.low > 0:
        return f"MixLoRA scores higher than LoRA here ({spread}). One seed, one learning rate: no ranking of methods."
    if better.high < 0:
        return f"MixLoRA does not win here: LoRA scores higher ({spread}). One seed, one learning rate."
    return f"MixLoRA does not win here: the difference to LoRA is within chance ({spread})."


def rows(before: Report, constant: Report, outcomes: dict[str, Outcome]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table: tasks, their mean, and what it cost.

    ``n`` is the number of test questions; ``constant`` what the most frequent training answer of each task scores.
    """
    reports = {"Backbone": before, **{name: outcome.report for name, outcome in outcomes.items()}}
    columns = ["", "n", "constant", *reports]
    table = []
    for task, first in before.tasks.items():
        scores = [f"{100 * r.tasks[task].mean:.0f} ({_interval(r, task)})" for r in reports.values()]
        table.append([task, str(first.count), f"{100 * constant.tasks[task].mean:.0f}", *scores])
    means = [f"{100 * report.mean:.1f}" for report in reports.values()]
    count = sum(task.count for task in before.tasks.values())
    table.append(["mean of tasks", str(count), f"{100 * constant.mean:.1f}", *means])
    methods = outcomes.values()
    table += [
        ["trained parameters", "", "", "", *(f"{outcome.trainable:,}" for outcome in methods)],
        ["tokens trained on", "", "", "", *(f"{outcome.tokens:,}" for outcome in methods)],
        ["tokens per second", "", "", "", *(f"{outcome.tokens_per_second:.0f}" for outcome in methods)],
        ["peak memory", "", "", "", *(f"{outcome.peak_mib:,.0f} MiB" for outcome in methods)],
    ]
    return columns, table


def _interval(report: Report, task: str) -> str:
    found = report.tasks[task]
    return f"{100 * found.low:.0f}-{100 * found.high:.0f}"


def print_table(
    console: Console, before: Report, constant: Report, outcomes: dict[str, Outcome], conclusion: str
) -> None:
    """The table on the terminal, and the verdict."""
    columns, lines = rows(before, constant, outcomes)
    title = "Score in % (95 % interval)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for index, line in enumerate(lines):
        table.add_row(*line, end_section=index in (len(before.tasks) - 1, len(before.tasks)))
    console.print()
    console.print(table)
    console.print(conclusion)


def markdown_table(columns: list[str], lines: list[list[str]]) -> str:
    """The table in Markdown."""
    head = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])


def print_reload(console: Console, found: dict[str, Any]) -> None:
    """What the new process found."""
    if found["agrees"]:
        console.print(f"Logits agree with the trained model's (largest difference {found['max_difference']:.1e}).")
    for item in found["answers"]:
        question = " ".join(item["prompt"].split())
        console.print(f"[bold]{item['task']}[/] ", question, highlight=False, markup=True)
        console.print(f"  right: {item['answer']}   model: {item['model']}", highlight=False, markup=False)


def card(plan: Plan, found: dict[str, Any], table: str) -> str:
    """README.md of the checkpoint."""
    mixture = "\n".join(f"    {line}" for line in plan.recipe.mixture.to_yaml().splitlines())
    name = plan.recipe.backbone.name
    base = f"base_model: {json.dumps(name)}\n" if is_hub_id(name) and "/" in name else ""
    return f"""---
library_name: moelora
{base}tags: [moelora, mixture-of-lora-experts, mixlora]
---
# MixLoRA on {plan.recipe.backbone.name}

Trained by `moelora quickstart` (moelora {__version__}) for {found["steps"]} steps of {found["batch_size"]} questions,
seed {found["seed"]}.

    model = moelora.from_pretrained("path/to/this/folder")

## Scores

{table}

Scores in % with 95 % Wilson intervals; n test questions; constant: always the most frequent training answer.
{found["verdict"]}

## Mixture

{mixture}
"""
