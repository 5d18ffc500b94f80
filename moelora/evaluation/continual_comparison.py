"""Methods of continual learning side by side: means and intervals over orders and seeds, figures, one page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .accuracy_matrix import METRICS, AccuracyMatrix
from .continual import finite, write_csv, write_json

Run = tuple[str, int]
"""The name of an order of the tasks, and a seed."""
Runs = Mapping[str, Mapping[Run, AccuracyMatrix]]

# Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom; beyond, that of 30 is a little too wide.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over runs with its 95 % interval, Student's t; the ends are NaN for a single run.

    Runs count as independent draws, which those that share an order or a seed are not quite.
    """

    mean: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        count, mean = len(values), float(np.mean(values))
        if count < 2:
            return cls(mean, float("nan"), float("nan"), count)
        reach = STUDENT[min(count - 1, len(STUDENT)) - 1] * float(np.std(values, ddof=1)) / count**0.5
        return cls(mean, mean - reach, mean + reach, count)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return finite(asdict(self))


@dataclass(frozen=True)
class MethodReport:
    """What is known about one method.

    Attributes:
        runs: by metric, the value of each run; runs for which it has no meaning, or was not measured, are left out.
        metrics: by metric, the mean over those; ``None`` if there is none.
        tasks: the score on each task after the last one.
        differences: by metric, this method minus the first one in runs of the same order and seed; ``None`` for the
            first one, and where they share no run.
    """

    runs: dict[str, dict[Run, float]]
    metrics: dict[str, Estimate | None]
    tasks: dict[str, Estimate]
    differences: dict[str, Estimate | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""

        def told(found: Mapping[str, Estimate | None]) -> dict[str, Any]:
            return {name: None if each is None else each.to_dict() for name, each in found.items()}

        return {"metrics": told(self.metrics), "difference": told(self.differences), "tasks": told(self.tasks)}


def compare_methods(runs: Runs) -> dict[str, MethodReport]:
    """Means and intervals of each method, and its differences to the first one, paired by order and seed.

    Args:
        runs: by method, the matrix of each run.

    Raises:
        DataError: there is no run, tasks differ between runs, or one order has them in two orders.
    """
    _check(runs)
    values = {method: {name: _values(name, mine) for name in METRICS} for method, mine in runs.items()}
    first = next(iter(runs))
    reports = {}
    for method, mine in runs.items():
        found = values[method]
        tasks = next(iter(mine.values())).tasks
        scores = {
            task: [float(run.scores[-1, run.tasks.index(task)]) for run in mine.values()] for task in sorted(tasks)
        }
        reports[method] = MethodReport(
            found,
            {name: _estimate(each.values()) for name, each in found.items()},
            {task: Estimate.of(each) for task, each in scores.items()},
            {
                name: None
                if method == first
                else _estimate(each[run] - values[first][name][run] for run in each if run in values[first][name])
                for name, each in found.items()
            },
        )
    return reports


def write_comparison(runs: Runs, folder: str | Path) -> Path:
    """Write ``comparison.json``, ``.csv``, ``.md`` and ``.html``, and ``runs.csv``; return the page's path.

    The same runs give the same bytes.

    Raises:
        DataError: see :func:`compare_methods`. UserError: plotly is not installed. Nothing is written then.
    """
    reports = compare_methods(runs)
    page = render(runs, reports)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", {name: report.to_dict() for name, report in reports.items()})
    head = ("method", "metric", "mean", "low", "high", "runs", "difference", "difference_low", "difference_high")
    write_csv(folder / "comparison.csv", head, _rows(reports))
    (folder / "comparison.md").write_text(markdown(reports), encoding="utf-8")
    write_csv(folder / "runs.csv", ("method", "order", "seed", *METRICS), _run_rows(runs))
    path = folder / "comparison.html"
    path.write_text(page, encoding="utf-8")
    return path


def render(runs: Runs, reports: Mapping[str, MethodReport]) -> str:
    """The page, as text; it opens offline.

    Raises:
        UserError: plotly is not installed.
    """
    from ..analysis.report import page, section
    from . import continual_figures as figures

    shown = ("average_performance", "forgetting", "learning_accuracy", "transfer")
    asked = (
        "How good is it in the end?",
        "How much is lost?",
        "How well is each task learnt?",
        "What is left of zero shot?",
    )
    orders = len({order for mine in runs.values() for order, _ in mine})
    seeds = len({seed for mine in runs.values() for _, seed in mine})
    parts = [
        f"<h1>{len(runs)} ways to learn {len(next(iter(next(iter(runs.values())).values())).tasks)} tasks</h1>",
        f'<p class="muted">{orders} orders of the tasks, {seeds} seeds. Intervals are 95 %, Student\'s t over runs. '
        f"Differences are to {html.escape(next(iter(runs)))}, in runs of the same order and seed.</p>",
        _table(reports),
    ]
    for name, question in zip(shown, asked, strict=True):
        if any(report.metrics[name] is not None for report in reports.values()):
            better = "Higher" if METRICS[name].higher else "Lower"
            text = f"{METRICS[name].title}: {METRICS[name].meaning}. {better} is better. A thin mark is one run."
            parts.append(section(name, question, html.escape(text), figures.methods(reports, name)))
    text = "After each task, the mean over the tasks learnt so far, averaged over runs."
    lines = {name: list(mine.values()) for name, mine in runs.items()}
    parts.append(section("curves", "Does it hold?", text, figures.curves(lines)))
    return page("Continual learning, compared", parts)


def markdown(reports: Mapping[str, MethodReport]) -> str:
    """The table of the page, for a README: means in percent with the half width of their intervals."""

    def told(found: Estimate | None) -> str:
        if found is None:
            return "–"
        return f"{100 * found.mean:.1f}" + ("" if np.isnan(found.low) else f" ± {100 * (found.high - found.mean):.1f}")

    names = _measured(reports)
    lines = [["method", *(METRICS[name].title for name in names)], ["---"] * (1 + len(names))]
    lines += [[method, *(told(report.metrics[name]) for name in names)] for method, report in reports.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _measured(reports: Mapping[str, MethodReport]) -> list[str]:
    """The metrics that any method has."""
    return [name for name in METRICS if any(report.metrics[name] is not None for report in reports.values())]


def _table(reports: Mapping[str, MethodReport]) -> str:
    """A row for each method and a column for each metric that any of them has."""
    names = _measured(reports)
    heads = "".join(f"<th>{html.escape(METRICS[name].title)}</th>" for name in ("", *names) if name)
    rows = []
    for method, report in reports.items():
        cells = "".join(f"<td>{_told(report.metrics[name], report.differences[name])}</td>" for name in names)
        rows.append(f"<tr><td>{html.escape(method)}</td>{cells}</tr>")
    table = f"<table><tr><th>method</th>{heads}</tr>{''.join(rows)}</table>"
    return f'<div style="overflow-x:auto">{table}</div>'


def _told(found: Estimate | None, difference: Estimate | None) -> str:
    if found is None:
        return "–"
    text = f"{found.mean:.3f}" + ("" if np.isnan(found.low) else f" ± {found.high - found.mean:.3f}")
    if difference is not None:
        reach = "" if np.isnan(difference.low) else f" ± {difference.high - difference.mean:.3f}"
        text += f'<br><span class="muted">{difference.mean:+.3f}{reach}</span>'
    return text


def _values(metric: str, runs: Mapping[Run, AccuracyMatrix]) -> dict[Run, float]:
    found = {run: float(getattr(matrix, metric)) for run, matrix in runs.items()}
    return {run: value for run, value in found.items() if not np.isnan(value)}


def _estimate(values: Iterable[float]) -> Estimate | None:
    found = list(values)
    return Estimate.of(found) if found else None


def _rows(reports: Mapping[str, MethodReport]) -> Iterator[tuple[Any, ...]]:
    for method, report in reports.items():
        for name, found in report.metrics.items():
            if found is not None:
                apart = report.differences[name]
                other = (None,) * 3 if apart is None else tuple(finite(asdict(apart)).values())[:3]
                yield method, name, *finite(asdict(found)).values(), *other


def _run_rows(runs: Runs) -> Iterator[tuple[Any, ...]]:
    for method, mine in runs.items():
        for (order, seed), matrix in mine.items():
            yield method, order, seed, *finite(matrix.metrics()).values()


def _check(runs: Runs) -> None:
    lacking = [method for method, mine in runs.items() if not mine]
    if not runs or lacking:
        raise DataError(f"a comparison needs runs of each method, there are none of {', '.join(lacking) or 'any'}")
    orders: dict[str, tuple[str, ...]] = {}
    known = set(next(iter(next(iter(runs.values())).values())).tasks)
    for method, mine in runs.items():
        for (order, seed), matrix in mine.items():
            where = f"method {method!r}, order {order!r}, seed {seed}"
            if set(matrix.tasks) != known:
                raise DataError(
                    f"{where}: it has the tasks {', '.join(sorted(matrix.tasks))}, others have "
                    f"{', '.join(sorted(known))}: compare runs of one sequence"
                )
            if orders.setdefault(order, matrix.tasks) != matrix.tasks:
                raise DataError(
                    f"{where}: it has the tasks in the order {', '.join(matrix.tasks)}, another run of this order in "
                    f"{', '.join(orders[order])}: give orders names of their own"
                )
