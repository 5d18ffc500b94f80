"""Figures of ScaleZero's runs, as plotly figures: returns, the solved pool, interactions, what is kept; and of arms."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..analysis.figures import BLUE, GRID, INK, MUTED, ORANGE, blank, graph_objects, label_axes
from ..evaluation.reward_figures import COLOURS, LEGEND

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from .progress_ledger import Ledger, TaskRecord
    from .scalezero_report import Moment

ACROSS = 2  # tasks beside each other
KEPT = {"when solved": ("circle", MUTED), "end, live": ("square", ORANGE), "end, prefix": ("diamond", BLUE)}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


def returns(moments: Sequence[Moment], targets: Mapping[str, float]) -> Figure:
    """Each task's return by what all tasks had spent, its target, and where stages ended; hollow once it is solved."""
    figure = _grid(list(targets))
    for place, (task, target) in enumerate(targets.items()):
        told = [moment for moment in moments if task in moment.returns]
        solved = [task in moment.solved for moment in told]
        looks = [_evaluation(now, before) for now, before in zip(solved, [False, *solved], strict=False)]
        trace = graph_objects().Scatter(
            x=[moment.spent for moment in told],
            y=[round(moment.returns[task], 3) for moment in told],
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
            marker={"opacity": 1, **{key: [look[key] for look in looks] for key in ("symbol", "size", "color")}},
            cliponaxis=False,
            hovertemplate="%{y:.1f} after %{x:,} steps<extra></extra>",
        )
        row, column = _cell(place)
        figure.add_trace(trace, row=row, col=column)
        figure.add_hline(y=target, line={"color": MUTED, "dash": "dash", "width": 1}, row=row, col=column)
        for moment in moments:
            if moment.switched:
                figure.add_vline(x=moment.spent, line=_between_stages(), row=row, col=column)
    figure.update_xaxes(range=[0, 1.02 * moments[-1].spent if moments else 1])
    return figure


def pool(moments: Sequence[Moment], count: int) -> Figure:
    """How many tasks are solved, by what all tasks had spent; each end of a stage with its reason."""
    trace = graph_objects().Scatter(
        x=[0, *(moment.spent for moment in moments)],
        y=[0, *(len(moment.solved) for moment in moments)],
        text=["none", *(", ".join(moment.solved) or "none" for moment in moments)],
        mode="lines+markers",
        line={"color": BLUE, "width": 2, "shape": "hv"},
        marker={"size": 6},
        hovertemplate="%{y} solved after %{x:,} steps: %{text}<extra></extra>",
    )
    figure = blank([trace], height=360)
    label_axes(figure, "environment steps of all tasks", "solved tasks")
    # Above the curve there is room for the reasons.
    figure.update_yaxes(range=[-0.2, 1.6 * count], tickvals=list(range(count + 1)), showgrid=True, gridcolor=GRID)
    for moment in moments:
        if moment.switched:
            says = {"text": f"stage {moment.stage}: {html.escape(moment.reason)}", "textangle": -90, "yanchor": "top"}
            font = {"size": 11, "color": MUTED}
            figure.add_vline(x=moment.spent, line=_between_stages(), annotation={**says, "font": font})
    return figure


def spent(interactions: Mapping[str, int]) -> Figure:
    """What each task took."""
    tasks = list(interactions)
    bars = graph_objects().Bar(
        x=[interactions[task] for task in tasks],
        y=tasks,
        orientation="h",
        marker={"color": BLUE},
        texttemplate="%{x:,}",
        hovertemplate="%{y}: %{x:,} steps<extra></extra>",
    )
    figure = blank([bars], height=110 + 32 * len(tasks))
    label_axes(figure, "environment steps of the task", "")
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    return figure


def retention(records: Mapping[str, TaskRecord], targets: Mapping[str, float]) -> Figure:
    """Return of each solved task when it was solved and at the end, beside its target."""
    figure = _grid(list(records), height=190)
    for place, (task, record) in enumerate(records.items()):
        found = kept(record)
        shown = {name: round(value, 3) for name, value in found.items() if value is not None}
        looks = [KEPT[name] for name in shown]
        marks = graph_objects().Scatter(
            y=list(shown),
            x=list(shown.values()),
            mode="markers+text",
            marker={"color": [colour for _, colour in looks], "symbol": [mark for mark, _ in looks], "size": 11},
            texttemplate="%{x:.1f}",
            textposition="top center",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
        row, column = _cell(place)
        figure.add_trace(marks, row=row, col=column)
        figure.add_vline(x=targets[task], line={"color": INK, "dash": "dash", "width": 1}, row=row, col=column)
    figure.update_yaxes(type="category", range=[len(KEPT) - 0.4, -0.7], automargin=True)
    return figure


def kept(record: TaskRecord) -> dict[str, float | None]:
    """A task's return when it was solved for the last time, at the end of the run, and there with its prefix."""
    solve = next((entry for entry in reversed(record.retention) if entry.when == "solve"), None)
    end = next((entry for entry in reversed(record.retention) if entry.when == "end"), None)
    at_solve = None if solve is None else solve.metric
    live, prefix = (None, None) if end is None else (end.metric, end.prefix)
    return dict(zip(KEPT, (at_solve, live, prefix), strict=True))


def totals(runs: Mapping[str, Sequence[Ledger]]) -> Figure:
    """What each run took in all: one mark a run, hollow where it did not solve every task."""
    traces = []
    for place, (arm, ledgers) in enumerate(runs.items()):
        mark, colour = _look(place)
        traces.append(
            graph_objects().Scatter(
                x=[ledger.interactions for ledger in ledgers],
                y=[html.escape(arm)] * len(ledgers),
                text=[f"seed {ledger.seed}" + ("" if ledger.complete else ", not all solved") for ledger in ledgers],
                mode="markers",
                marker={
                    "color": colour,
                    "size": 11,
                    "line": {"width": 2, "color": colour},
                    "symbol": [mark + ("" if ledger.complete else "-open") for ledger in ledgers],
                },
                hovertemplate="%{y}, %{text}: %{x:,} steps<extra></extra>",
            )
        )
    return _rows(traces, [html.escape(arm) for arm in runs])


def when_solved(runs: Mapping[str, Sequence[Ledger]]) -> Figure:
    """What each task had taken when it was solved for the last time, in every run that solved it."""
    tasks = list(next(iter(runs.values()))[0].tasks)
    traces = []
    for place, (arm, ledgers) in enumerate(runs.items()):
        mark, colour = _look(place)
        found = [(task, ledger.seed, ledger.solved(task)) for task in tasks for ledger in ledgers]
        points = [(task, seed, solve.interactions) for task, seed, solve in found if solve is not None]
        traces.append(
            graph_objects().Scatter(
                x=[count for _, _, count in points],
                y=[html.escape(task) for task, _, _ in points],
                text=[f"seed {seed}" for _, seed, _ in points],
                name=html.escape(arm),
                mode="markers",
                orientation="h",  # arms lie below each other, each value where it is
                marker={"color": colour, "symbol": mark, "size": 9},
                opacity=0.75,
                hovertemplate="%{y}, %{text}: %{x:,} steps",
            )
        )
    figure = _rows(traces, [html.escape(task) for task in tasks])
    figure.update_layout(legend=LEGEND, showlegend=True, scattermode="group")
    return figure


def _rows(traces: Sequence[Any], names: Sequence[str]) -> Figure:
    figure = blank(traces, height=130 + 42 * len(names))
    label_axes(figure, "environment steps", "")
    figure.update_yaxes(autorange="reversed", type="category", categoryorder="array", categoryarray=list(names))
    figure.update_yaxes(automargin=True)
    figure.update_xaxes(showgrid=True, gridcolor=GRID, rangemode="tozero")
    figure.update_layout(showlegend=False)
    return figure


def _grid(titles: Sequence[str], height: int = 240) -> Figure:
    """A small figure for each title, in rows of two."""
    rows = -(-len(titles) // ACROSS)
    figure = blank([], height=60 + height * rows)
    gap = 70 / (60 + height * rows)
    names = [html.escape(title) for title in titles]
    figure.set_subplots(rows=rows, cols=ACROSS, subplot_titles=names, vertical_spacing=gap, horizontal_spacing=0.12)
    figure.update_annotations(font={"size": 13})
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=True, gridcolor=GRID, zeroline=False)
    figure.update_layout(showlegend=False)
    return figure


def _cell(place: int) -> tuple[int, int]:
    return place // ACROSS + 1, place % ACROSS + 1


def _between_stages() -> dict[str, Any]:
    return {"color": INK, "dash": "dot", "width": 1}


def _evaluation(solved: bool, before: bool) -> dict[str, Any]:
    """The mark of an evaluation: a star where the task is solved, hollow from then on."""
    if solved and not before:
        return {"symbol": "star", "size": 13, "color": ORANGE}
    return {"symbol": "circle-open" if solved else "circle", "size": 6, "color": BLUE}


def _look(place: int) -> tuple[str, str]:
    """Mark and colour; marks tell apart what colours may not."""
    return SYMBOLS[place % len(SYMBOLS)], COLOURS[place % len(COLOURS)]
