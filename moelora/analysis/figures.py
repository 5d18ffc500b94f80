"""Interactive figures of routing statistics, as plotly figures: in a notebook, ``figures.load(stats).show()``.

Colours are orange for too little, white for a fair share, blue for too much: told apart with any colour vision.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from . import metrics
from .stats import RoutingStats, SiteStats

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK, MUTED, GRID, BLUE, ORANGE = "#1f2933", "#616e7c", "#e4e7eb", "#1f5fa8", "#c4561a"
DEAD = "#1f2933"
UNDER = (
    (0.0, DEAD),
    (metrics.DEAD_BELOW, DEAD),
    (metrics.DEAD_BELOW, "#a63603"),
    (0.25, "#e6701f"),
    (0.5, "#fdb777"),
    (0.8, "#feead6"),
)
OVER = ((1.0, "#fbfbfb"), (1.25, "#deebf5"), (1.75, "#93c0de"), (2.5, "#3b86bf"), (4.0, "#0d3d78"))
FAIR_RANGE = 2.0
WIDEST = 4.0


def load(stats: RoutingStats) -> Figure:
    """Layer by expert: the share of the tokens that each expert gets, 1.0 being fair; dead experts are crossed."""
    groups = list(stats.groups.values())
    most = max(float(np.nanmax(metrics.utilisation(site.load_E))) for site in stats.sites)
    traces = [_load_trace(sites, _ceiling(most)) for sites in groups]
    figure = blank(traces, height=140 + 30 * max(site.num_experts for site in stats.sites))
    label_axes(figure, "layer", "expert")
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category")
    if len(groups) > 1:
        _choose(figure, [html.escape(name) for name in stats.groups], 0)
    return figure


def tasks(stats: RoutingStats) -> Figure:
    """Task by expert, for one site at a time: a slider goes through the sites and starts where tasks differ most."""
    shares = [metrics.utilisation(site.load_NE) for site in stats.sites]
    ceiling = _ceiling(max(float(np.nanmax(values)) for values in shares))
    traces, names = [], []
    for site, ratio in zip(stats.sites, shares, strict=True):
        names.append(f"{_label(site)} {html.escape(stats.kind(site))}".rstrip())
        traces.append(_task_trace(site, stats.tasks, ratio, ceiling))
    figure = blank(traces, height=210 + 34 * len(stats.tasks))
    label_axes(figure, "expert", "")
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    figure.update_xaxes(type="category")
    start = int(np.argmax([metrics.task_specialisation(site.load_NE) for site in stats.sites]))
    _slide(figure, names, start)
    return figure


def entropy(stats: RoutingStats) -> Figure:
    """Over layers: how evenly the experts are used, how undecided the router is, how differently tasks are routed."""
    traces = []
    for index, (kind, sites) in enumerate(stats.groups.items()):
        suffix = f" · {html.escape(kind)}" if len(stats.groups) > 1 else ""
        lines = [
            ("experts used evenly", BLUE, "circle", [float(metrics.balance(site.load_E)) for site in sites]),
            ("router undecided", ORANGE, "square", [site.entropy for site in sites]),
        ]
        if len(stats.tasks) > 1:
            differs = [metrics.task_specialisation(site.load_NE) for site in sites]
            lines.append(("tasks routed apart", INK, "diamond", differs))
        traces += [_line(sites, name + suffix, colour, mark, index, values) for name, colour, mark, values in lines]
    figure = blank(traces, height=330)
    label_axes(figure, "layer", "0 … 1")
    figure.update_yaxes(range=[-0.03, 1.05], dtick=0.25, showgrid=True, gridcolor=GRID)
    figure.update_xaxes(type="category")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, hovermode="x unified")
    return figure


def require_plotly() -> None:
    """Raise a :class:`~moelora.errors.UserError` that names the extra to install, where plotly is missing."""
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise UserError("figures are drawn with plotly, which is not installed: pip install 'moelora[viz]'") from None


def graph_objects() -> Any:
    """The module of plotly that has its kinds of traces.

    Raises:
        UserError: plotly is not installed.
    """
    require_plotly()
    import plotly.graph_objects

    return plotly.graph_objects


def _load_trace(sites: Sequence[SiteStats], ceiling: float) -> Any:
    most = max(site.num_experts for site in sites)
    ratio = np.full((most, len(sites)), np.nan)
    for column, site in enumerate(sites):
        ratio[: site.num_experts, column] = metrics.utilisation(site.load_E)
    rows = _experts(most, {site.experts for site in sites})
    return _heatmap(ratio, [_label(site) for site in sites], rows, ceiling, "layer %{x}, expert %{y}")


def _task_trace(site: SiteStats, names: Sequence[str], ratio: metrics.Array, ceiling: float) -> Any:
    short = [_short(name) for name in names]
    rows = [html.escape(name) for name in (short if len(set(short)) == len(short) else names)]
    columns = _experts(site.num_experts, {site.experts})
    return _heatmap(ratio, columns, rows, ceiling, "%{y}, expert %{x}")


def _heatmap(ratio: metrics.Array, x: Sequence[str], y: Sequence[str], ceiling: float, hover: str) -> Any:
    values = [[None if np.isnan(cell) else round(float(cell), 4) for cell in row] for row in ratio]
    marks = [["" if v is None else "✕" if v < metrics.DEAD_BELOW else f"{v:.1f}" for v in row] for row in values]
    return graph_objects().Heatmap(
        z=values,
        x=list(x),
        y=list(y),
        text=marks,
        texttemplate="%{text}",
        textfont={"size": 10},
        zmin=0,
        zmax=ceiling,
        colorscale=_scale(ceiling),
        xgap=1.5,
        ygap=1.5,
        hovertemplate=hover + "<br>%{z:.2f} × a fair share<extra></extra>",
        colorbar={
            "title": {"text": "× fair share", "font": {"size": 11}},
            "thickness": 10,
            "outlinewidth": 0,
            "tickvals": [tick for tick in (0, 0.5, 1, 1.5, 2, 3, 4) if tick <= ceiling],
        },
    )


def _line(sites: Sequence[SiteStats], name: str, colour: str, mark: str, index: int, values: list[float]) -> Any:
    return graph_objects().Scatter(
        x=[_label(site) for site in sites],
        y=[round(value, 4) for value in values],
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": ("solid", "dash", "dot", "dashdot")[index % 4]},
        marker={"symbol": mark, "size": 6},
        hovertemplate="%{y:.2f}",
    )


def blank(traces: Sequence[Any], height: int) -> Figure:
    """These traces in the style of all figures; ``height`` in pixels."""
    figure: Figure = graph_objects().Figure(list(traces))
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": INK},
    )
    return figure


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> Any:
    """The area between two curves, behind the curve that it belongs to."""
    return graph_objects().Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )


def parts_of_one(
    cells: Sequence[Sequence[Any]], x: Sequence[str], y: Sequence[str], colour: str, hover: str, **text: Any
) -> Any:
    """Cells from white at 0 to ``colour`` at 1, empty where ``None``; ``text`` is what is written into them."""
    return graph_objects().Heatmap(
        z=cells,
        x=list(x),
        y=list(y),
        texttemplate="%{text}",
        zmin=0,
        zmax=1,
        colorscale=[(0, "#ffffff"), (1, colour)],
        showscale=False,
        xgap=1.5,
        ygap=1.5,
        hovertemplate=f"{hover}<extra></extra>",
        **text,
    )


def label_axes(figure: Figure, x: str, y: str) -> None:
    """Name both axes, without lines across the figure."""
    figure.update_xaxes(title={"text": x, "standoff": 8}, showgrid=False, zeroline=False)
    figure.update_yaxes(title={"text": y, "standoff": 8}, showgrid=False, zeroline=False)


def _choose(figure: Figure, names: Sequence[str], start: int) -> None:
    """A drop-down that shows one trace at a time."""
    _only(figure, start)
    buttons = [
        {"label": name, "method": "restyle", "args": ["visible", [i == index for i in range(len(names))]]}
        for index, name in enumerate(names)
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "active": start}
    figure.update_layout(updatemenus=[menu], margin={"t": 60})


def _slide(figure: Figure, names: Sequence[str], start: int) -> None:
    """A slider that shows one trace at a time."""
    _only(figure, start)
    if len(names) < 2:
        return
    steps = [
        {"label": name, "method": "restyle", "args": ["visible", [i == index for i in range(len(names))]]}
        for index, name in enumerate(names)
    ]
    current = {"prefix": "layer " if names[start].isdigit() else ""}
    slider = {"steps": steps, "active": start, "currentvalue": current, "pad": {"t": 45}}
    figure.update_layout(sliders=[{**slider, "tickcolor": MUTED, "font": {"color": MUTED, "size": 10}}])


def _only(figure: Figure, start: int) -> None:
    for index, trace in enumerate(figure.data):
        trace.visible = index == start


def _ceiling(most: float) -> float:
    return min(max(FAIR_RANGE, float(np.ceil(most * 2) / 2)), WIDEST)


def _scale(ceiling: float) -> list[tuple[float, str]]:
    """Colours whose white lies at 1.0; what is above the ceiling has the ceiling's colour."""
    over = [(value, colour) for value, colour in OVER if value < ceiling]
    last = next(colour for value, colour in OVER if value >= ceiling)
    return [(value / ceiling, colour) for value, colour in (*UNDER, *over)] + [(1.0, last)]


def _experts(count: int, names: set[tuple[str, ...]]) -> list[str]:
    """Their names where all sites have the same, else their numbers."""
    [*known] = names
    if len(known) == 1 and known[0]:
        short = [_short(name) for name in known[0]]
        return [html.escape(name) for name in (short if len(set(short)) == len(short) else known[0])]
    return [str(expert) for expert in range(count)]


def _label(site: SiteStats) -> str:
    return html.escape(site.name or "site") if site.layer is None else str(site.layer)


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:39]}…"
