"""``moelora eval``: score a checkpoint on the test data of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    AsJson,
    Backbone,
    CacheDir,
    Checkpoint,
    LocalFilesOnly,
    Overrides,
    Quantization,
    RecipeOption,
    Revision,
    Subfolder,
    Token,
    hub_options,
    load_model,
    load_questions,
    print_json,
    print_table,
    read_questions,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from ..data import Example
    from ..evaluation import Comparison, Report


def evaluate(
    path: Checkpoint,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Score the bare backbone too, and compare.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 16,
    backbone: Backbone = None,
    quantization: Quantization = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint's greedy answers on test data, task by task, with 95 % intervals.

    Example: `moelora eval runs/quickstart --baseline data.test_size=100`
    """
    questions = read_questions(path, recipe, overrides, subfolder)
    examples = load_questions(questions).test
    hub = hub_options(revision, subfolder, token, cache_dir, local_files_only)
    model = load_model(path, backbone, quantization, hub)
    reports = {"mixture": _score(model, examples, max_new_tokens, batch_size)}
    if baseline:
        with model.disable_experts():
            reports["backbone"] = _score(model, examples, max_new_tokens, batch_size)
    from ..evaluation import compare

    difference = compare(examples, reports["mixture"], reports["backbone"]) if baseline else None
    if as_json:
        result: dict[str, Any] = {"path": path, **{name: report.to_dict() for name, report in reports.items()}}
        print_json(result | ({"difference": vars(difference)} if difference else {}))
    else:
        _print(reports, difference)


def _score(model: Any, examples: list[Example], max_new_tokens: int, batch_size: int) -> Report:
    from rich.progress import Progress

    from ..evaluation import score

    with Progress(console=stderr(), transient=True) as progress:
        task = progress.add_task("Answering", total=len(examples))
        return score(
            model,
            model.tokenizer,
            examples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _print(reports: dict[str, Report], difference: Comparison | None) -> None:
    rows = []
    for task, result in reports["mixture"].tasks.items():
        cells = [report.tasks[task] for report in reports.values()]
        rows.append([task, str(result.count), *(f"{c.mean:.3f} [{c.low:.3f}, {c.high:.3f}]" for c in cells)])
    rows.append(["mean", "", *(f"{report.mean:.3f}" for report in reports.values())])
    print_table("Score [95 % interval]", ["task", "questions", *reports], rows)
    if difference is not None:
        sure = "" if difference.low > 0 or difference.high < 0 else ": no difference can be told from these questions"
        stdout().print(
            f"mixture - backbone: {difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]{sure}",
            highlight=False,
            markup=False,
        )
