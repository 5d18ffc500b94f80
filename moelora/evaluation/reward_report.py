"""Everything that is known about reward models on the same rankings: numbers for JSON, tables, and one HTML page."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .reward_bench import REWARD_BENCH, BenchReport, Sections, bench
from .reward_best_of_n import BestOfN, Curve, best_of_n, gold_difference
from .reward_calibration import Calibration, RouterReport, calibration, router_report
from .rewards import RewardReport, differences, judge
from .scoring import Comparison as Difference

if TYPE_CHECKING:
    from ..data.ranking import Ranking
    from ..reward.scoring import Reward

CURVES = ("gold", "proxy", "best", "gold_gain", "proxy_gain", "gap")
Scored = Mapping[str, Sequence[Sequence["Reward"]]]


@dataclass(frozen=True)
class ModelReport:
    """What is known about one reward model.

    Attributes:
        router: ``None`` where there is none, or nothing to compare it with. best_of: ``None`` if it was not asked for.
        bench: ``None`` where the data has no subsets. differences: of accuracy to the first model, ``None`` for itself.
        gold_difference: of the gold score of the best of n to that of the first model, where there are both.
    """

    rewards: RewardReport
    calibration: Calibration
    router: RouterReport | None
    best_of: BestOfN | None
    bench: BenchReport | None
    differences: dict[str, Difference] | None
    gold_difference: Curve | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what there is not is left out."""
        parts: dict[str, Any] = {
            "accuracy": self.rewards,
            "calibration": self.calibration,
            "router": self.router,
            "best_of_n": self.best_of,
            "reward_bench": self.bench,
        }
        plain: dict[str, Any] = {name: part.to_dict() for name, part in parts.items() if part is not None}
        if self.differences is not None:
            plain["difference"] = {name: vars(each) for name, each in self.differences.items()}
        if self.gold_difference is not None:
            plain["best_of_n"]["gold_difference"] = vars(self.gold_difference)
        return plain


def report(
    rankings: Sequence[Ranking],
    scored: Scored,
    *,
    best_of: int | None = None,
    subsets: Sequence[str] | None = None,
    given_categories: bool = False,
    seed: int = 0,
) -> dict[str, ModelReport]:
    """Judge each model's rewards of the same rankings, and compare all others with the first.

    Args:
        scored: by the name of the model, of each ranking, the reward of each response.
        best_of: the largest n of best-of-n curves.
        subsets: the one of each ranking, for :func:`~moelora.evaluation.reward_bench.bench`. If all are RewardBench's,
            so are the sections; else each subset is a section of its own.
        given_categories: categories were given to the models, so there is no router to judge.

    Raises:
        DataError: there is nothing to judge.
    """
    plain = {name: [[each.reward for each in row] for row in rows] for name, rows in scored.items()}
    first = next(iter(plain), None)
    if first is None:
        raise DataError("no reward model was scored, so there is nothing to report")
    return {
        name: ModelReport(
            judge(rankings, rewards, [[each.capabilities for each in row] for row in scored[name]], seed=seed),
            calibration(rankings, rewards, seed=seed),
            None if given_categories else router_report(rankings, scored[name], seed=seed),
            None if best_of is None else best_of_n(rankings, rewards, best_of, seed=seed),
            None if subsets is None else bench(rankings, rewards, subsets, _sections(subsets), seed=seed),
            None if name == first else differences(rankings, rewards, plain[first], seed=seed),
            None
            if name == first or best_of is None
            else gold_difference(rankings, rewards, plain[first], best_of, seed=seed),
        )
        for name, rewards in plain.items()
    }


def write(reports: Mapping[str, ModelReport], rankings: Sequence[Ranking], scored: Scored, folder: str | Path) -> Path:
    """Write all that is known into a folder, and return the path of the page in it.

    The files: ``metrics.json``, ``accuracy.csv``, ``best_of_n.csv`` if that was asked for, ``rewards.jsonl`` with the
    reward of each response, and ``rewards.html`` with figures.

    Raises:
        UserError: plotly is not installed; nothing is written.
    """
    page = render(reports)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {name: each.to_dict() for name, each in reports.items()}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _write_csv(folder / "accuracy.csv", ("model", "of", "accuracy", "low", "high", "pairs", "prompts"), _rows(reports))
    curves = list(_points(reports))
    if curves:
        _write_csv(folder / "best_of_n.csv", ("model", "n", "kl", "curve", "mean", "low", "high"), curves)
    with (folder / "rewards.jsonl").open("w", encoding="utf-8") as file:
        for index, ranking in enumerate(rankings):
            row = {
                "key": ranking.key,
                "category": ranking.category,
                "rewards": {name: [each.reward for each in rows[index]] for name, rows in scored.items()},
                "routed": {name: rows[index][0].routed for name, rows in scored.items()},
            }
            file.write(json.dumps(row, allow_nan=False) + "\n")
    path = folder / "rewards.html"
    path.write_text(page, encoding="utf-8")
    return path


def render(reports: Mapping[str, ModelReport]) -> str:
    """The page, as text; it opens offline.

    Raises:
        UserError: plotly is not installed.
    """
    from ..analysis.report import page, section
    from . import reward_figures as figures

    first = next(iter(reports.values())).rewards
    parts = [
        f"<h1>How good the rewards of {html.escape(next(iter(reports)))} are</h1>",
        f'<p class="muted">Measured on {first.overall.pairs:,} comparisons of {first.overall.prompts:,} prompts; '
        f"{first.ties:,} even ones are left out. Bars and bands are 95 % intervals from drawing prompts anew.</p>",
        section(
            "accuracy",
            "Does the better response get the larger reward?",
            "A coin is right in 0.5. One dot: categories; two: capabilities, judged by their own score where the model "
            "gives one.",
            figures.accuracy({name: each.rewards for name, each in reports.items()}),
        ),
        section(
            "reliability",
            "Can its confidence be believed?",
            "The sigmoid of two rewards' difference, against how often that was right. Below the dotted line it is too "
            f"sure. Calibration error: {_told({name: each.calibration.ece for name, each in reports.items()})}.",
            figures.reliability({name: each.calibration for name, each in reports.items()}, 0.5),
        ),
    ]
    for number, (name, each) in enumerate(reports.items()):
        if each.router is not None:
            parts.append(
                section(
                    f"router{number}",
                    f"Does {html.escape(name)} tell categories apart?",
                    f"{each.router.accuracy.mean:.1%} are told right; {each.router.fallback:.1%} go to another expert "
                    "than the chosen one, because it was not sure.",
                    figures.confusion(each.router),
                )
            )
    return page(f"Rewards of {html.escape(next(iter(reports)))}", parts + _best_of(reports))


def _best_of(reports: Mapping[str, ModelReport]) -> list[str]:
    from ..analysis.report import section
    from . import reward_figures as figures

    found = {name: each.best_of for name, each in reports.items() if each.best_of is not None}
    if not found:
        return []
    return [
        section(
            "best_of_n",
            "What does choosing by it bring?",
            "The gold score of the response with the largest reward among n, computed exactly; the dotted line is what "
            f"no reward can exceed. Best n: {_told({name: each.peak for name, each in found.items()})}.",
            figures.best_of_n(found),
        ),
        section(
            "over_optimisation",
            "Does it promise more than it keeps?",
            "Dashed, the reward; solid, the gold score, both in standard deviations within a prompt. A solid line that "
            "turns down while the dashed one rises is over-optimisation.",
            figures.over_optimisation(found),
        ),
    ]


def _told(values: Mapping[str, float]) -> str:
    return ", ".join(f"{html.escape(name)} {value:.3g}" for name, value in values.items())


def _sections(subsets: Sequence[str]) -> Sections:
    known = {name for weights in REWARD_BENCH.values() for name in weights}
    return REWARD_BENCH if known.issuperset(subsets) else {name: {name: 1.0} for name in dict.fromkeys(subsets)}


def _rows(reports: Mapping[str, ModelReport]) -> Iterator[tuple[Any, ...]]:
    """Each accuracy of each model, for a table."""
    for model, each in reports.items():
        found = {"overall": each.rewards.overall}
        found |= {f"category {name}": value for name, value in each.rewards.categories.items()}
        for name, both in each.rewards.capabilities.items():
            found |= {} if both.own is None else {f"capability {name}, own score": both.own}
            found[f"capability {name}, reward"] = both.total
        found |= {f"subset {name}": value for name, value in (each.bench.subsets if each.bench else {}).items()}
        for name, value in found.items():
            yield model, name, value.mean, value.low, value.high, value.pairs, value.prompts


def _points(reports: Mapping[str, ModelReport]) -> Iterator[tuple[Any, ...]]:
    """Each point of each curve, for a table."""
    for model, each in reports.items():
        if each.best_of is not None:
            curves = {name: getattr(each.best_of, name) for name in CURVES}
            if each.gold_difference is not None:
                curves["gold_difference"] = each.gold_difference
            for name, curve in curves.items():
                values = zip(each.best_of.n, each.best_of.kl, curve.mean, curve.low, curve.high, strict=True)
                for n, kl, mean, low, high in values:
                    yield model, n, kl, name, mean, low, high


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[tuple[Any, ...]] | Iterator[tuple[Any, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)
