"""One HTML file that shows what the experts of a model do: opens offline, in any browser, and loads nothing.

The same statistics give the same bytes. All text that comes from a user, a data set or a checkpoint is escaped, and
the page forbids itself every network access.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import figures, metrics
from .findings import dead_experts, findings, place
from .stats import RoutingStats, SiteStats

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"

_STYLE = """
:root { --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --blue: #1f5fa8; --orange: #c4561a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 36px 28px 60px; background: #fff; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 27px; margin: 0 0 2px; letter-spacing: -0.3px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 2px; }
p { margin: 4px 0 10px; max-width: 82ch; }
.muted { color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 22px 0; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.card b { display: block; font-size: 25px; line-height: 1.25; font-weight: 650; }
.card span { color: var(--muted); font-size: 13px; }
ul.findings { list-style: none; padding: 0; margin: 0 0 8px; }
.findings li { border-left: 4px solid var(--line); padding: 4px 14px; margin: 8px 0; overflow-wrap: anywhere; }
.findings li.good { border-color: var(--blue); }
.findings li.warning { border-color: var(--orange); }
.findings b { font-weight: 650; }
.figure { margin: 6px 0 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin-top: 10px; width: 100%; }
th, td { text-align: right; white-space: nowrap; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); }
th { white-space: normal; font-weight: 600; color: var(--muted); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--blue); margin-top: 34px; font-weight: 600; }
code { font-size: 0.92em; overflow-wrap: anywhere; }
"""

_CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtons": [["toImage"]]}
_LABEL = {"good": "Fine.", "note": "Note.", "warning": "Look here."}


def render(stats: RoutingStats) -> str:
    """The whole page as text.

    Raises:
        UserError: plotly is not installed.
    """
    model = html.escape(stats.model or "this model")
    parts = [
        f"<h1>What the experts of {model} do</h1>",
        f'<p class="muted">{_measured(stats)}</p>',
        _cards(stats),
        _findings(stats),
        *_figures(stats),
        _table(stats),
    ]
    return page(f"Routing of {model}", parts)


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page with plotly in it, that opens offline and forbids itself every network access.

    Args:
        title: and ``parts`` of the body: HTML, in which what comes from elsewhere is escaped.

    Raises:
        UserError: plotly is not installed.
    """
    figures.require_plotly()
    from plotly.offline import get_plotlyjs

    head = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style>",
        f"<script>{get_plotlyjs()}</script></head><body>",
    ]
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"


def section(name: str, title: str, text: str, figure: Figure) -> str:
    """A figure under its title and a line of explanation, all HTML; ``name`` is the id of the figure on its page."""
    return (
        f'<h2>{title}</h2><p class="muted">{text}</p><div class="figure">'
        f"{figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=_CONFIG)}</div>"
    )


def write(stats: RoutingStats, folder: str | Path) -> Path:
    """Write ``routing.html``, ``routing.json`` and ``routing.csv`` into ``folder`` and return the path of the page.

    Raises:
        UserError: plotly is not installed.
    """
    page = render(stats)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "routing.json").write_text(stats.to_json(), encoding="utf-8")
    stats.write_csv(folder / "routing.csv")
    path = folder / "routing.html"
    path.write_text(page, encoding="utf-8")
    return path


def _measured(stats: RoutingStats) -> str:
    kinds = [
        f"{len(sites)} × <code>{html.escape(kind)}</code> with {_counts({site.num_experts for site in sites})} "
        f"experts, {_picks(sites):.3g} per token"
        for kind, sites in stats.groups.items()
    ]
    data = f" of {html.escape(stats.data)}" if stats.data else ""
    tasks = f" in {len(stats.tasks)} tasks" if len(stats.tasks) > 1 else ""
    return f"Measured on {stats.tokens:,} tokens{data}{tasks}, padding left out. Routed sites: {'; '.join(kinds)}."


def _counts(numbers: set[int]) -> str:
    return str(numbers.pop()) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _picks(sites: list[SiteStats]) -> float:
    chosen = sum(float(site.load_E.sum()) for site in sites)
    return chosen / max(sum(sum(site.tokens) for site in sites), 1)


def _cards(stats: RoutingStats) -> str:
    total = sum(site.num_experts for site in stats.sites)
    effective = float(sum(metrics.effective_experts(site.load_E) for site in stats.sites if site.load_E.any()))
    busiest = max(stats.sites, key=lambda site: float(np.nanmax(metrics.utilisation(site.load_E), initial=0.0)))
    ratio = metrics.utilisation(busiest.load_E)
    cards = [
        (f"{100 * effective / total:.0f} %", f"of the {total} experts in effective use"),
        (f"{len(dead_experts(stats))}", "dead experts"),
        (
            f"{ratio.max():.1f} ×",
            f"a fair share for the busiest: expert {busiest.label(int(ratio.argmax()))}, {place(stats, busiest)}",
        ),
    ]
    if len(stats.tasks) > 1:
        top = max(stats.sites, key=lambda site: metrics.task_specialisation(site.load_NE))
        amount = 100 * metrics.task_specialisation(top.load_NE)
        cards.append((f"{amount:.0f} %", f"of selections depend on the task in {place(stats, top)}, the most of all"))
    inner = "".join(f'<div class="card"><b>{big}</b><span>{html.escape(small)}</span></div>' for big, small in cards)
    return f'<div class="cards">{inner}</div>'


def _findings(stats: RoutingStats) -> str:
    items = "".join(
        f'<li class="{finding.level}"><b>{_LABEL[finding.level]}</b> {html.escape(finding.text)}</li>'
        for finding in findings(stats)
    )
    return f'<ul class="findings">{items}</ul>'


def _figures(stats: RoutingStats) -> list[str]:
    sections: list[tuple[str, str, str, Callable[[RoutingStats], Figure]]] = [
        (
            "load",
            "Is every expert used?",
            "Each cell is one expert of one layer. 1.0 (white) is a fair share of the layer's tokens, "
            "<b>blue</b> more, <b>orange</b> less, black with ✕ dead.",
            figures.load,
        )
    ]
    if len(stats.tasks) > 1:
        sections.append(
            (
                "tasks",
                "Which expert serves which task?",
                "One layer at a time: each row is one task's tokens spread over the experts. Rows that look alike mean "
                "that the task makes no difference. It opens at the layer where tasks differ most; drag to another. "
                "Expert numbers of different layers have nothing to do with each other.",
                figures.tasks,
            )
        )
    apart = (
        " <b>Tasks routed apart</b>: the part of a task's selections that differ from the average task's."
        if len(stats.tasks) > 1
        else ""
    )
    sections.append(
        (
            "entropy",
            "Does it change with depth?",
            "<b>Experts used evenly</b>: entropy of the layer's whole load, 1 is even, under 0.5 is close to collapse. "
            "<b>Router undecided</b>: mean entropy for single tokens, 1 means that all experts look the same to it."
            + apart,
            figures.entropy,
        )
    )
    return [section(name, title, text, make(stats)) for name, title, text, make in sections]


def _table(stats: RoutingStats) -> str:
    head = ("site", "tokens", "effective experts", "evenness", "variation", "undecided", "margin", "busiest", "dead")
    rows = []
    for site in stats.sites:
        ratio = metrics.utilisation(site.load_E)
        dead = ", ".join(site.label(int(expert)) for expert in np.flatnonzero(metrics.dead_experts(site.load_E)))
        busiest = f"{site.label(int(np.nan_to_num(ratio).argmax()))} ({float(np.nan_to_num(ratio).max()):.2f} ×)"
        numbers = (
            f"{sum(site.tokens):,}",
            f"{float(metrics.effective_experts(site.load_E)):.2f} of {site.num_experts}",
            f"{float(metrics.balance(site.load_E)):.3f}",
            f"{float(metrics.variation(site.load_E)):.2f}",
            f"{site.entropy:.3f}",
            f"{site.margin:.3f}",
            html.escape(busiest),
            html.escape(dead) or "–",
        )
        cells = "".join(f"<td>{cell}</td>" for cell in (html.escape(site.name or "site"), *numbers))
        rows.append(f"<tr>{cells}</tr>")
    heads = "".join(f"<th>{name}</th>" for name in head)
    return (
        "<details><summary>All numbers by site</summary>"
        "<p class=muted>Variation is the standard deviation of the load over experts divided by its mean; margin is "
        "the largest probability minus the second largest, averaged over tokens. routing.csv and routing.json hold the "
        f"counts themselves.</p><table><tr>{heads}</tr>{''.join(rows)}</table></details>"
    )
