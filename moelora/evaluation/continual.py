"""What a run of continual learning comes to: the accuracy matrix, its numbers, and one page with figures."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .accuracy_matrix import METRICS as METRICS
from .accuracy_matrix import AccuracyMatrix as AccuracyMatrix
from .accuracy_matrix import Metric as Metric

if TYPE_CHECKING:
    from ..analysis.drift import Drift

Growth = Mapping[str, Sequence[float]]


def write_continual(
    matrix: AccuracyMatrix, folder: str | Path, drift: Drift | None = None, growth: Growth | None = None
) -> Path:
    """Write ``R.json``, ``R.csv``, ``metrics.json`` and ``continual.html``, and return the path of the page.

    The same values give the same bytes.

    Args:
        drift: of the routing of the same tasks; see :func:`~moelora.analysis.drift.routing_drift`.
        growth: what grows with the number of tasks, by name: its value after each stage, such as ``parameters``.

    Raises:
        DataError: the drift is that of other tasks, or the curves of ``growth`` are not of one length.
        UserError: plotly is not installed. Nothing is written then.
    """
    if drift is not None and drift.tasks != matrix.tasks:
        raise DataError(
            f"the drift is that of tasks {', '.join(drift.tasks)}, the matrix that of {', '.join(matrix.tasks)}"
        )
    lengths = {name: len(curve) for name, curve in (growth or {}).items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise DataError(f"the curves of growth have a value after each stage, all of them; got {lengths}")
    page = render(matrix, drift, growth)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "R.json", matrix.to_dict())
    write_csv(folder / "R.csv", ("after", *matrix.tasks), _rows(matrix))
    metrics: dict[str, Any] = {"metrics": finite(matrix.metrics())}
    if drift is not None:
        metrics["drift"] = drift.to_dict()
    if growth:
        metrics["growth"] = {name: list(curve) for name, curve in growth.items()}
    write_json(folder / "metrics.json", metrics)
    path = folder / "continual.html"
    path.write_text(page, encoding="utf-8")
    return path


def render(matrix: AccuracyMatrix, drift: Drift | None = None, growth: Growth | None = None) -> str:
    """The page, as text; it opens offline.

    Raises:
        UserError: plotly is not installed.
    """
    from ..analysis.report import page, section
    from . import continual_figures as figures

    beside = (
        " To the right, how far the routing of a task has moved since it was learnt: Jensen–Shannon divergence, 0 the "
        "same experts, 1 others altogether."
        if drift is not None
        else ""
    )
    parts = [
        f"<h1>{len(matrix.tasks)} tasks, one after another</h1>",
        f'<p class="muted">{", ".join(html.escape(name) for name in matrix.tasks)}. Scores are parts of 1.</p>',
        _numbers(matrix),
        section(
            "matrix",
            "What is known after each task?",
            "A row for each moment, a column for each task; framed, the task that was learnt then. Below the frames is "
            "what is left of a task, above them what is known of it before." + beside,
            figures.matrix(matrix, drift),
        ),
        section(
            "averages",
            "Does it hold?",
            "Mean over the tasks learnt so far, over those to come, and over all. A gap is a mean of which a score was "
            "not measured.",
            figures.averages(matrix),
        ),
    ]
    if drift is not None and len(drift.tasks) > 1:
        text = "Jensen–Shannon divergence of the routing of each two tasks in the last model, mean over sites."
        parts.append(section("between", "Are tasks routed apart?", text, figures.between(drift)))
    if growth:
        text = "Each curve as a multiple of its first value; the values themselves show at the pointer."
        parts.append(section("growth", "What does one more task cost?", text, figures.growth(growth)))
    return page("Continual learning", parts)


def _numbers(matrix: AccuracyMatrix) -> str:
    """The table of all metrics."""
    rows = []
    for name, value in matrix.metrics().items():
        metric = METRICS[name]
        better = "higher" if metric.higher else "lower"
        told = "–" if np.isnan(value) else f"{value:.4f}"
        words = f"<b>{html.escape(metric.title)}</b> <span class=muted>{html.escape(metric.meaning)}</span>"
        rows.append(f"<tr><td>{words}</td><td>{told}</td><td>{better}</td></tr>")
    head = "<tr><th>number</th><th>value</th><th>better</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _rows(matrix: AccuracyMatrix) -> Iterable[tuple[Any, ...]]:
    names = ["zero shot", *matrix.tasks, *(["alone"] if matrix.alone is not None else [])]
    values = matrix.scores if matrix.alone is None else np.vstack([matrix.scores, matrix.alone])
    for name, row in zip(names, values.tolist(), strict=True):
        yield name, *("" if np.isnan(value) else value for value in row)


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers for JSON, which has no NaN."""
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; NaN is refused."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """CSV with a heading and plain line ends."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)
