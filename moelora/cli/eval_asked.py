"""What ``moelora eval`` asks: questions of the user's data, or tasks of lm-evaluation-harness; and how it tells scores.

Both know their ``tasks``, ``ask`` a model, and then give the ``result`` for JSON or ``show`` it in a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import print_lines, print_table, stderr

if TYPE_CHECKING:
    from ..analysis import RoutingRecorder
    from ..data import Example
    from ..evaluation import Comparison, HarnessReport, Report
    from ..mixture import MoELoRAModel


class Score(StrEnum):
    """How the answers to questions are scored."""

    GENERATE = "generate"
    EXACT = "exact"
    OPTIONS = "options"
    LABELS = "labels"


class QuestionsAsked:
    """The test questions of a recipe.

    Args:
        limit: at most this many of each task. max_new_tokens: of an answer that is generated.
    """

    def __init__(
        self, examples: Sequence[Example], score: Score, limit: int | None, max_new_tokens: int, batch_size: int
    ) -> None:
        from ..data.examples import task_names

        self.tasks = task_names(examples)
        taken = dict.fromkeys(self.tasks, 0)
        self.examples = []
        for example in examples:
            taken[example.task] += 1
            if limit is None or taken[example.task] <= limit:
                self.examples.append(example)
        self.score = score
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        # Of each metric, the first the main one: of each model its report.
        self.reports: dict[str, dict[str, Report]] = {}

    def ask(self, who: str, model: MoELoRAModel, recorder: RoutingRecorder | None) -> None:
        """Score ``model`` under the name ``who``."""
        from rich.progress import Progress

        ways = {
            Score.GENERATE: self._generate,
            Score.EXACT: self._exact,
            Score.OPTIONS: self._options,
            Score.LABELS: self._labels,
        }
        with Progress(console=stderr(), transient=True) as progress:
            task = progress.add_task("Answering", total=None)
            options = {
                "batch_size": self.batch_size,
                "progress": lambda done, total: progress.update(task, completed=done, total=total),
                "recorder": recorder,
            }
            for metric, report in ways[self.score](model, options).items():
                self.reports.setdefault(metric, {})[who] = report

    def _generate(self, model: Any, options: dict[str, Any]) -> dict[str, Report]:
        from ..evaluation import score

        return {"score": score(model, model.tokenizer, self.examples, max_new_tokens=self.max_new_tokens, **options)}

    def _exact(self, model: Any, options: dict[str, Any]) -> dict[str, Report]:
        from ..evaluation import teacher_forced_match

        return {"exact_match": teacher_forced_match(model, model.tokenizer, self.examples, **options)}

    def _options(self, model: Any, options: dict[str, Any]) -> dict[str, Report]:
        from ..evaluation import score_options

        scores = score_options(model, model.tokenizer, self.examples, **options)
        return {"acc": scores.total, "acc_norm": scores.normalised}

    def _labels(self, model: Any, options: dict[str, Any]) -> dict[str, Report]:
        from ..evaluation import score_labels

        return {"acc": score_labels(model, model.tokenizer, self.examples, **options)}

    def result(self) -> dict[str, Any]:
        """The main metric's report of each model and their difference; any further metric under its name."""
        parts = {metric: self._part(metric) for metric in self.reports}
        main = next(iter(parts))
        return {"metric": main, **parts.pop(main), **parts}

    def _part(self, metric: str) -> dict[str, Any]:
        reports = self.reports[metric]
        difference = self._difference(reports)
        part: dict[str, Any] = {name: report.to_dict() for name, report in reports.items()}
        return part | ({"difference": vars(difference)} if difference else {})

    def _difference(self, reports: dict[str, Report]) -> Comparison | None:
        from ..evaluation import compare

        if len(reports) < 2:
            return None
        return compare(self.examples, reports["mixture"], reports["backbone"])

    def show(self) -> None:
        """Print a table for each metric."""
        for metric, reports in self.reports.items():
            rows = []
            for task, result in reports["mixture"].tasks.items():
                cells = [report.tasks[task] for report in reports.values()]
                rows.append([task, str(result.count), *(f"{c.mean:.3f} [{c.low:.3f}, {c.high:.3f}]" for c in cells)])
            rows.append(["mean", "", *(f"{report.mean:.3f}" for report in reports.values())])
            print_table(f"{metric.capitalize()} [95 % interval]", ["task", "questions", *reports], rows)
            difference = self._difference(reports)
            if difference is not None:
                unsure = "" if _sure(difference) else ": no difference can be told from these questions"
                print_lines([f"mixture - backbone: {_interval(difference)}{unsure}"])


class HarnessAsked:
    """Tasks of lm-evaluation-harness, by name or file, with commas between them."""

    def __init__(
        self,
        tasks: str,
        include_path: Path | None,
        limit: int | None,
        num_fewshot: int | None,
        chat_template: bool,
        batch_size: int,
    ) -> None:
        from ..evaluation import load_tasks

        self.loaded = load_tasks([name.strip() for name in tasks.split(",") if name.strip()], include_path)
        self.tasks = self.loaded.names
        self.options: dict[str, Any] = {
            "limit": limit,
            "num_fewshot": num_fewshot,
            "chat_template": chat_template,
            "batch_size": batch_size,
        }
        self.reports: dict[str, HarnessReport] = {}

    def ask(self, who: str, model: MoELoRAModel, recorder: RoutingRecorder | None) -> None:
        """Run the tasks on ``model``, under the name ``who``."""
        from ..evaluation import run_tasks

        self.reports[who] = run_tasks(model, self.loaded, recorder=recorder, **self.options)

    def result(self) -> dict[str, Any]:
        """The harness' results of each model, and the differences by task and metric."""
        result: dict[str, Any] = {name: report.to_dict() for name, report in self.reports.items()}
        if "backbone" in self.reports:
            differences: dict[str, Any] = {}
            for (task, metric, chosen), difference in self._differences().items():
                differences.setdefault(task, {})[f"{metric},{chosen}"] = vars(difference)
            result["difference"] = differences
        return result

    def _differences(self) -> dict[tuple[str, str, str], Comparison]:
        from ..evaluation.harness import compare_samples

        if "backbone" not in self.reports:
            return {}
        return compare_samples(self.reports["mixture"], self.reports["backbone"])

    def show(self) -> None:
        """Print one table: each task's metrics with the harness' standard errors."""
        differences = self._differences()
        found = [report.metrics() for report in self.reports.values()]
        rows = []
        for metrics in zip(*found, strict=True):
            first = metrics[0]
            name = first.name if first.filter == "none" else f"{first.name} ({first.filter})"
            counts = ["" if count is None else str(count) for count in (first.shots, first.questions)]
            row = [first.task, *counts, name, *(_with_error(m.value, m.stderr) for m in metrics)]
            difference = differences.get((first.task, first.name, first.filter))
            rows.append(row + [_interval(difference) if difference else ""] * (len(metrics) > 1))
        compared = ["mixture - backbone [95 %]"] * (len(found) > 1)
        columns = ["task", "shots", "questions", "metric", *self.reports, *compared]
        print_table("lm-evaluation-harness: value ± standard error", columns, rows)


def _with_error(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _interval(difference: Comparison) -> str:
    return f"{difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _sure(difference: Comparison) -> bool:
    return difference.low > 0 or difference.high < 0
