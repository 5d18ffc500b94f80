"""Figures of continual learning, as plotly figures: the matrix with drift beside it, averages, growth, methods."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..analysis.figures import BLUE, GRID, INK, MUTED, ORANGE, blank, graph_objects, label_axes, parts_of_one
from .accuracy_matrix import METRICS, AccuracyMatrix, Array
from .reward_figures import COLOURS, LEGEND

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ..analysis.drift import Drift
    from .continual_comparison import MethodReport

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot")


def matrix(found: AccuracyMatrix, drift: Drift | None) -> Figure:
    """Scores by moment and task, the zero-shot row first; to the right, in the same rows, the drift of the routing."""
    tasks = [html.escape(name) for name in found.tasks]
    rows = ["zero shot", *(f"{number} {name}" for number, name in enumerate(tasks, 1))]
    traces = [_heat(found.scores, tasks, rows, BLUE, "%{y}: %{x} %{z:.4f}")]
    if drift is not None:
        moved = np.vstack([np.full(len(tasks), np.nan), drift.since])
        traces.append(_heat(moved, tasks, rows, ORANGE, "%{y}: %{x} moved by %{z:.4f}"))
        traces[1].update(xaxis="x2", yaxis="y2")
    figure = blank(traces, height=190 + 34 * len(rows))
    label_axes(figure, "score on", "after")
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    figure.update_xaxes(type="category")
    if drift is not None:
        across = {"type": "category", "showgrid": False, "zeroline": False}
        figure.update_layout(
            xaxis={"domain": [0, 0.56]},
            xaxis2={**across, "domain": [0.6, 1], "anchor": "y2", "title": {"text": "drift of"}},
            yaxis2={**across, "anchor": "x2", "autorange": "reversed", "showticklabels": False},
        )
    for place in range(len(tasks)):
        frame = {"x0": place - 0.5, "x1": place + 0.5, "y0": place + 0.5, "y1": place + 1.5}
        figure.add_shape(type="rect", line={"color": INK, "width": 1.5}, **frame)
    return figure


def between(drift: Drift) -> Figure:
    """Divergence of the routing of each two tasks."""
    tasks = [html.escape(name) for name in drift.tasks]
    figure = blank([_heat(drift.between, tasks, tasks, ORANGE, "%{y} and %{x}: %{z:.4f}")], 170 + 34 * len(tasks))
    label_axes(figure, "", "")
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    figure.update_xaxes(type="category")
    return figure


def averages(found: AccuracyMatrix) -> Figure:
    """Over the number of tasks learnt: the mean over those, over those to come, and over all."""
    count = len(found.tasks)
    lines = [
        ("learnt so far", BLUE, "circle", range(1, count + 1), found.average_so_far()),
        ("to come", ORANGE, "square", range(count), found.average_to_come()),
        ("all", MUTED, "diamond", range(count + 1), found.scores.mean(axis=1)),
    ]
    traces = [_line(name, colour, mark, "solid", at, values) for name, colour, mark, at, values in lines]
    return _over_tasks(traces, "mean score", [0, 1.03])


def growth(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Each curve as a multiple of its first value, over the number of stages."""
    traces = []
    for place, (name, values) in enumerate(curves.items()):
        ratios = np.asarray(values, dtype=np.float64) / values[0] if values[0] else np.full(len(values), np.nan)
        trace = _line(name, *_look(place), range(1, len(values) + 1), ratios)
        trace.update(customdata=list(values), hovertemplate="%{y:.3f} × the first: %{customdata:.6g}")
        traces.append(trace)
    return _over_tasks(traces, "× the first", None)


def methods(reports: Mapping[str, MethodReport], metric: str) -> Figure:
    """A number of each method: the mean over its runs with the interval, and every run as a small mark."""
    traces = []
    for place, (name, report) in enumerate(reports.items()):
        colour, mark, _ = _look(place)
        runs = report.runs[metric]
        traces.append(
            graph_objects().Scatter(
                x=[round(value, 5) for value in runs.values()],
                y=[html.escape(name)] * len(runs),
                mode="markers",
                marker={"color": colour, "symbol": "line-ns-open", "size": 8},
                opacity=0.55,
                customdata=[html.escape(f"{order}, seed {seed}") for order, seed in runs],
                hovertemplate="%{customdata}: %{x:.4f}<extra></extra>",
            )
        )
        found = report.metrics[metric]
        if found is not None:
            error = {"array": _bar(found.high - found.mean), "arrayminus": _bar(found.mean - found.low)}
            traces.append(
                graph_objects().Scatter(
                    x=[round(found.mean, 5)],
                    y=[html.escape(name)],
                    mode="markers",
                    marker={"color": colour, "symbol": mark, "size": 10},
                    error_x={**error, "color": colour, "thickness": 1.5},
                    hovertemplate=f"mean of {found.runs}: %{{x:.4f}}<extra></extra>",
                )
            )
    figure = blank(traces, height=120 + 34 * len(reports))
    label_axes(figure, METRICS[metric].title, "")
    names = [html.escape(name) for name in reports]
    figure.update_yaxes(autorange="reversed", type="category", categoryorder="array", categoryarray=names)
    figure.update_yaxes(automargin=True)
    figure.update_xaxes(showgrid=True, gridcolor=GRID)
    figure.update_layout(showlegend=False)
    return figure


def curves(found: Mapping[str, Iterable[AccuracyMatrix]]) -> Figure:
    """Of each method, the mean over the tasks learnt so far, averaged over its runs."""
    traces = []
    for place, (name, runs) in enumerate(found.items()):
        values = np.mean([run.average_so_far() for run in runs], axis=0)
        traces.append(_line(name, *_look(place), range(1, len(values) + 1), values))
    return _over_tasks(traces, "mean score of the tasks learnt so far", [0, 1.03])


def _heat(values: Array, x: Sequence[str], y: Sequence[str], colour: str, hover: str) -> Any:
    """Cells from white at 0 to ``colour`` at 1, empty where NaN."""
    cells = [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in values]
    text = [["" if value is None else f"{value:.2f}" for value in row] for row in cells]
    return parts_of_one(cells, x, y, colour, hover, text=text, textfont={"size": 11})


def _line(name: str, colour: str, mark: str, dash: str, x: Iterable[int], y: Array) -> Any:
    return graph_objects().Scatter(
        x=list(x),
        y=[None if np.isnan(value) else round(float(value), 5) for value in y],
        name=html.escape(name),
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": dash},
        marker={"symbol": mark, "size": 7},
        hovertemplate="%{y:.4f}",
    )


def _over_tasks(traces: list[Any], label: str, span: list[float] | None) -> Figure:
    figure = blank(traces, height=380)
    label_axes(figure, "tasks learnt", label)
    figure.update_yaxes(showgrid=True, gridcolor=GRID, range=span, rangemode="tozero")
    figure.update_xaxes(tickformat="d", showgrid=True, gridcolor=GRID)
    figure.update_layout(legend=LEGEND, hovermode="x unified", showlegend=True)
    return figure


def _look(place: int) -> tuple[str, str, str]:
    """Colour, mark and dash; marks tell apart what colours may not."""
    colour, dash = COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]
    return colour, SYMBOLS[place % len(SYMBOLS)], dash


def _bar(length: float) -> list[float | None]:
    return [None if np.isnan(length) else round(length, 5)]
