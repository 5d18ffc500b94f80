"""Figures of reward models, as plotly figures: accuracy, calibration, the router, best-of-n and over-optimisation.

All take reports by the name of the model; the first one is drawn first, and in blue.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..analysis.figures import BLUE, GRID, INK, MUTED, ORANGE, band, blank, graph_objects, label_axes, parts_of_one
from .reward_best_of_n import BestOfN, Curve
from .reward_calibration import Calibration, RouterReport
from .rewards import RewardReport

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = (BLUE, ORANGE, "#2f7d4f", "#7b4ea3", INK, "#a8861d", "#b03a6a", MUTED)
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


def accuracy(reports: Mapping[str, RewardReport]) -> Figure:
    """Each model's accuracy over all, by category and by capability, with intervals; a line at 0.5, a coin."""
    traces = []
    rows: dict[str, None] = {}
    for place, (name, report) in enumerate(reports.items()):
        found = {"overall": report.overall, **{f"· {key}": each for key, each in report.categories.items()}}
        # Capabilities by their own score where there is one; the table has both.
        found |= {f"·· {key}": each.own or each.total for key, each in report.capabilities.items()}
        rows |= dict.fromkeys(html.escape(key) for key in found)
        traces.append(
            graph_objects().Scatter(
                x=[round(each.mean, 4) for each in found.values()],
                y=[html.escape(key) for key in found],
                name=html.escape(name),
                mode="markers",
                orientation="h",
                marker={"color": _colour(place), "size": 9},
                error_x={
                    "array": [round(each.high - each.mean, 4) for each in found.values()],
                    "arrayminus": [round(each.mean - each.low, 4) for each in found.values()],
                    "color": _colour(place),
                    "thickness": 1.5,
                },
                customdata=[each.pairs for each in found.values()],
                hovertemplate="%{y}: %{x:.3f} of %{customdata} comparisons",
            )
        )
    figure = blank(traces, height=140 + len(rows) * (26 + 6 * len(reports)))
    label_axes(figure, "comparisons that are right", "")
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    figure.update_yaxes(categoryorder="array", categoryarray=list(rows))
    figure.update_xaxes(range=[0, 1.02], showgrid=True, gridcolor=GRID)
    figure.add_vline(x=0.5, line={"color": MUTED, "dash": "dot", "width": 1})
    figure.update_layout(legend=LEGEND, scattermode="group")
    return figure


def reliability(reports: Mapping[str, Calibration | RouterReport], lowest: float) -> Figure:
    """How often what was said with some confidence was right; the diagonal is what it should be.

    Args:
        lowest: the smallest confidence there is, where the figure begins.
    """
    line = {"color": MUTED, "dash": "dot", "width": 1}
    traces = [graph_objects().Scatter(x=[lowest, 1], y=[lowest, 1], mode="lines", line=line, showlegend=False)]
    for place, (name, report) in enumerate(reports.items()):
        rates = [each.accuracy for each in report.bins]
        traces.append(
            graph_objects().Scatter(
                x=[round(each.confidence, 4) for each in report.bins],
                y=[round(rate.mean, 4) for rate in rates],
                name=html.escape(name),
                mode="lines+markers",
                line={"color": _colour(place), "width": 2},
                marker={"size": 7},
                error_y={
                    "array": [round(rate.high - rate.mean, 4) for rate in rates],
                    "arrayminus": [round(rate.mean - rate.low, 4) for rate in rates],
                    "thickness": 1,
                },
                customdata=[rate.pairs for rate in rates],
                hovertemplate="said %{x:.2f}, right %{y:.2f} of %{customdata}",
            )
        )
    figure = blank(traces, height=420)
    label_axes(figure, "confidence", "right")
    figure.update_yaxes(range=[0, 1.03], showgrid=True, gridcolor=GRID)
    figure.update_xaxes(range=[lowest - 0.01, 1.01], showgrid=True, gridcolor=GRID)
    figure.update_layout(legend=LEGEND)
    return figure


def confusion(report: RouterReport) -> Figure:
    """By the data's category, to which category's experts the prompts went, as parts of 1; numbers are prompts."""
    rows = list(report.answered)
    columns = list(report.answered[rows[0]])
    counts = [[report.answered[row][column] for column in columns] for row in rows]
    shares = [[round(count / sum(row), 4) for count in row] for row in counts]
    x, y = ([html.escape(name) for name in names] for names in (columns, rows))
    trace = parts_of_one(shares, x, y, BLUE, "%{y} answered by %{x}: %{z:.1%}", text=counts)
    figure = blank([trace], height=170 + 36 * len(rows))
    label_axes(figure, "answered by", "category in the data")
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    figure.update_xaxes(type="category")
    return figure


def best_of_n(reports: Mapping[str, BestOfN]) -> Figure:
    """The gold score of the chosen response against KL, with bands; dashed, what the gold score itself would choose."""
    first = next(iter(reports.values()))
    traces = [_line(first, first.best.mean, "the best there is", MUTED, "dot")]
    for place, (name, report) in enumerate(reports.items()):
        traces += _banded(report, report.gold, name, _colour(place))
    return _over_kl(traces, "gold score of the chosen response")


def over_optimisation(reports: Mapping[str, BestOfN]) -> Figure:
    """How far the reward (dashed) and the gold score (solid) rise with KL, in standard deviations within a prompt."""
    traces = []
    for place, (name, report) in enumerate(reports.items()):
        traces += _banded(report, report.gold_gain, f"{name}: gold", _colour(place))
        traces.append(_line(report, report.proxy_gain.mean, f"{name}: reward", _colour(place), "dash"))
    return _over_kl(traces, "gain, in standard deviations")


def _over_kl(traces: list[Any], label: str) -> Figure:
    figure = blank(traces, height=440)
    label_axes(figure, "KL from the sampling policy, log n - (n - 1) / n, in nats", label)
    figure.update_yaxes(showgrid=True, gridcolor=GRID)
    figure.update_xaxes(showgrid=True, gridcolor=GRID)
    figure.update_layout(legend=LEGEND)
    return figure


def _banded(report: BestOfN, curve: Curve, name: str, colour: str) -> list[Any]:
    kl, low, high = ([round(value, 5) for value in values] for values in (report.kl, curve.low, curve.high))
    return [band(kl, low, high, colour), _line(report, curve.mean, name, colour, "solid")]


def _line(report: BestOfN, values: list[float], name: str, colour: str, dash: str) -> Any:
    return graph_objects().Scatter(
        x=[round(value, 5) for value in report.kl],
        y=[round(value, 5) for value in values],
        name=html.escape(name),
        mode="lines+markers" if dash == "solid" else "lines",
        line={"color": colour, "width": 2, "dash": dash},
        marker={"size": 5},
        customdata=report.n,
        hovertemplate="best of %{customdata}: %{y:.3f}",
    )


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
