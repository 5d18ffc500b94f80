"""The tables of ``moelora eval --preferences``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from .common import print_lines, print_table

if TYPE_CHECKING:
    from ..evaluation.reward_report import ModelReport


def show(reports: dict[str, ModelReport]) -> None:
    """Print what is known about reward models, the first of them with its intervals."""
    first = next(iter(reports.values()))
    overall = first.rewards.overall
    ties = f", {first.rewards.ties} ties left out" if first.rewards.ties else ""
    print_lines([f"{overall.pairs} comparisons of {overall.prompts} prompts{ties}; intervals are of 95 %"])
    _show_models(reports)
    _show_parts(reports)
    if first.bench is not None:
        _show_bench(reports)
    if first.best_of is not None:
        _show_best_of(reports)


def _show_models(reports: dict[str, ModelReport]) -> None:
    several = len(reports) > 1
    rows = []
    for name, each in reports.items():
        cells = [_interval(each.rewards.overall)]
        if several:
            found = (each.differences or {}).get("overall")
            cells.append(f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]" if found else "")
        cells += [f"{value:.3f}" for value in (each.calibration.ece, each.calibration.brier[0])]
        cells.append(f"{each.calibration.log_loss[0]:.3f}")
        rows.append([escape(name), *cells])
    against = [f"- {escape(next(iter(reports)))}"] * several
    print_table("Rewards", ["model", "accuracy", *against, "ECE", "Brier", "log loss"], rows)
    routers = [(name, each.router) for name, each in reports.items() if each.router is not None]
    if routers:
        print_table(
            "Categories told by the prompt",
            ["model", "accuracy", "ECE", "fell back"],
            [[escape(n), _interval(r.accuracy), f"{r.ece:.3f}", f"{r.fallback:.1%}"] for n, r in routers],
        )


def _show_parts(reports: dict[str, ModelReport]) -> None:
    """Categories and capabilities: of the first model with intervals, of the others beside it without."""
    first, *others = [each.rewards for each in reports.values()]
    rows = []
    for name, value in first.categories.items():
        beside = [f"{each.categories[name].mean:.3f}" for each in others]
        rows.append([escape(name), str(value.pairs), _interval(value), *beside])
    for name, both in first.capabilities.items():
        own = [each.capabilities[name].own for each in others]
        if both.own is not None or any(own):
            cells = [f"{value.mean:.3f}" if value else "" for value in own]
            pairs = str(both.own.pairs) if both.own else ""
            rows.append([f"{escape(name)}, own score", pairs, _interval(both.own) if both.own else "", *cells])
        beside = [f"{each.capabilities[name].total.mean:.3f}" for each in others]
        rows.append([f"{escape(name)}, reward", str(both.total.pairs), _interval(both.total), *beside])
    if rows:
        print_table("Accuracy by category and capability", ["", "pairs", *map(escape, reports)], rows)


def _show_bench(reports: dict[str, ModelReport]) -> None:
    found = [each.bench for each in reports.values() if each.bench is not None]
    rows = [[escape(name), *(f"{each.sections[name].mean:.3f}" for each in found)] for name in found[0].sections] + [
        ["score", *(_interval(each.score) for each in found)]
    ]
    print_table("Sections", ["section", *map(escape, reports)], rows)


def _show_best_of(reports: dict[str, ModelReport]) -> None:
    found = {name: each.best_of for name, each in reports.items() if each.best_of is not None}
    first = next(iter(found.values()))
    shown = sorted({2**power for power in range(len(first.n).bit_length())} | {len(first.n)})
    rows = []
    for n in shown:
        cells = [f"{each.gold.mean[n - 1]:.3f}" for each in found.values()]
        band = f" [{first.gold.low[n - 1]:.3f}, {first.gold.high[n - 1]:.3f}]"
        rows.append([str(n), f"{first.kl[n - 1]:.3f}", cells[0] + band, *cells[1:], f"{first.best.mean[n - 1]:.3f}"])
    left_out = f", {first.left_out} rankings left out" if first.left_out else ""
    title = f"Gold score of the best of n, {first.prompts} prompts{left_out}"
    print_table(title, ["n", "KL", *map(escape, found), "at best"], rows)
    for name, each in found.items():
        gap = reports[name].gold_difference
        if gap is not None:
            told = f"{gap.mean[-1]:+.3f} [{gap.low[-1]:+.3f}, {gap.high[-1]:+.3f}]"
            print_lines([f"{name} - {next(iter(found))}, gold score of the best of {each.n[-1]}: {told}"])
        drop, last = each.drop, each.n[-1]
        fell = "" if each.peak == last else f", {drop.difference:+.3f} [{drop.low:+.3f}, {drop.high:+.3f}] at {last}"
        print_lines([f"{name}: the gold score is highest at n = {each.peak}{fell}"])


def _interval(value: Any) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
