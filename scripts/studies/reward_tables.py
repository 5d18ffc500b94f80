"""What the study of reward models prints and draws."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelora.data.preferences import Ranking
from moelora.evaluation.reward_best_of_n import BestOfN
from moelora.evaluation.reward_report import ModelReport, report

Pairs = Mapping[str, Sequence[tuple[Any, Any]]]


@dataclass(frozen=True)
class Results:
    """The numbers of all methods.

    Attributes:
        judged: of the held-out rankings, all seeds together. curves: best of n. table: markdown.
    """

    judged: dict[str, ModelReport]
    curves: dict[str, BestOfN]
    table: str

    def write(self, folder: Path) -> None:
        """``table.md``, ``metrics.json``, ``best_of_n.csv`` and ``best_of_n.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(self.table + "\n")
        metrics = {
            name: each.to_dict() | {"best_of_n": self.curves[name].to_dict()} for name, each in self.judged.items()
        }
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        with (folder / "best_of_n.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "n", "kl", "gold", "low", "high", "proxy gain", "gold gain", "best possible"])
            for name, curve in self.curves.items():
                for place, n in enumerate(curve.n):
                    kept = curve.gold.mean, curve.gold.low, curve.gold.high, curve.proxy_gain.mean
                    values = [
                        curve.kl[place],
                        *(each[place] for each in (*kept, curve.gold_gain.mean, curve.best.mean)),
                    ]
                    writer.writerow([name, n, *(f"{value:.4f}" for value in values)])
        draw(self.curves, folder / "best_of_n.png")


def results(
    test: Sequence[Ranking], many: Sequence[Ranking], found: Pairs, used: Mapping[str, Sequence[Path]], most: int
) -> Results:
    """Judge all methods. Seeds are put together: intervals are from drawing prompts, each with all its seeds."""
    judged: dict[str, ModelReport] = {}
    curves: dict[str, BestOfN] = {}
    first = next(iter(found))
    for name, seeds in found.items():
        # Differences are paired, so the first method is repeated as often as this one has seeds.
        base = [found[first][place % len(found[first])] for place in range(len(seeds))]
        for part, rankings in enumerate((test, many)):
            rows = {
                "first": [row for pair in base for row in pair[part]],
                name: [row for pair in seeds for row in pair[part]],
            }
            reports = report([*rankings] * len(seeds), rows, best_of=most if part else None)
            if part:
                curve = reports[name].best_of
                assert curve is not None
                curves[name] = curve
            else:
                judged[name] = reports[name]
    return Results(judged, curves, table(judged, curves, used))


def table(judged: Mapping[str, ModelReport], curves: Mapping[str, BestOfN], used: Mapping[str, Sequence[Path]]) -> str:
    """Markdown: pairwise accuracy in percent with intervals, of each category, and gold scores of best of n."""
    categories = list(next(iter(judged.values())).rewards.categories)
    most = next(iter(curves.values())).n[-1]
    lines = [
        f"| | all | {' | '.join(categories)} | minus the single | router | gold, best of {most} | tokens trained on |",
        f"| --- |{' ---: |' * (len(categories) + 5)}",
    ]
    for name, each in judged.items():
        overall, gap = each.rewards.overall, (each.differences or {}).get("overall")
        curve = curves[name]
        cells = [
            _percent(overall.mean, overall.low, overall.high),
            *(f"{100 * each.rewards.categories[category].mean:.0f}" for category in categories),
            _percent(gap.difference, gap.low, gap.high, "+") if gap is not None and name != next(iter(judged)) else "",
            f"{100 * each.router.accuracy.mean:.0f}" if each.router is not None else "",
            f"{curve.gold.mean[-1]:.3f} ({curve.gold.low[-1]:.3f} to {curve.gold.high[-1]:.3f})",
            f"{tokens(used[name]):,}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = next(iter(curves.values()))
    lines += [
        "",
        f"Gold score of one answer: {first.gold.mean[0]:.3f}; of the truly best of {most}: {first.best.mean[-1]:.3f}.",
    ]
    return "\n".join(lines)


def tokens(folders: Sequence[Path]) -> int:
    """Tokens, without padding, that training these models saw; an aggregator's single reading is not among them."""
    states = [state for folder in folders for state in folder.glob("stage-*/trainer_state.json")]
    return sum(int(json.loads(state.read_text())["num_input_tokens_seen"]) for state in states)


def draw(curves: Mapping[str, BestOfN], path: Path) -> None:
    """The gold score of the chosen answer over the price in nats."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, curve in curves.items():
        [line] = axes.plot(curve.kl, curve.gold.mean, label=name)
        axes.fill_between(curve.kl, curve.gold.low, curve.gold.high, color=line.get_color(), alpha=0.08)
    best = next(iter(curves.values()))
    axes.plot(best.kl, best.best.mean, "k--", label="the gold score itself")
    axes.set(xlabel="KL from the sampling policy, nats: log n - (n - 1) / n", ylabel="gold score of the chosen answer")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _percent(mean: float, low: float, high: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"
