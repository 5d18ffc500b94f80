"""Data in the form of RewardBench: pairs in named subsets, whose accuracies are averaged into sections and one score.

A section is the weighted mean of its subsets; the score is the mean of the sections. Sections and weights below are
those of the first RewardBench (Lambert et al. 2024, arXiv 2403.13787; https://github.com/allenai/reward-bench,
``rewardbench/constants.py``), where math-prm weighs as much as all code although it has fewer rows.

What is not the same as on the official board: two equal rewards count as half right, not as wrong; text is written
through the reward model's own chat template and truncated at its own length; the board's former section of prior sets,
which counted half, is not here; and only what is in the file is scored, so a part of the data gives the mean of the
sections that it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..registry import closest
from .rewards import DRAWS, Accuracy, Rewards, check, proportion, quantiles, resampled, tally

if TYPE_CHECKING:
    from ..config import PreferenceData
    from ..data.ranking import Ranking

Sections = Mapping[str, Mapping[str, float]]

# Of each section, the weight of each of its subsets.
REWARD_BENCH: Sections = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}


def read_bench(config: PreferenceData) -> tuple[list[Ranking], list[str]]:
    """The rankings of data with a column ``subset``, and the subset of each.

    A subset is no category of a task, so the rankings have none. All are taken, none held out.

    Raises:
        DataError: as :func:`~moelora.data.preferences.read_rankings`, or a row has no subset.
    """
    from ..data.preferences import read_rankings

    columns = config.columns.model_copy(update={"category": "subset"})
    rankings, _ = read_rankings(config.model_copy(update={"columns": columns, "test_fraction": 0.0}))
    subsets = []
    for ranking in rankings:
        if ranking.category is None:
            raise DataError(f"{ranking.where}: column 'subset' is empty; fill or remove the row")
        subsets.append(ranking.category)
    return [replace(ranking, category=None) for ranking in rankings], subsets


@dataclass(frozen=True)
class Average:
    """A weighted mean of accuracies, with its 95 % interval from drawing the prompts of each subset anew."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class BenchReport:
    """Accuracy by subset, and its averages.

    Attributes:
        subsets: accuracy of each. sections: of each that has subsets in the data, in the order of the mapping.
        score: mean of the sections. missing: subsets of the mapping that the data lacks.
    """

    subsets: dict[str, Accuracy]
    sections: dict[str, Average]
    score: Average
    missing: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "subsets": {name: vars(each) for name, each in self.subsets.items()},
            "sections": {name: vars(each) for name, each in self.sections.items()},
            "score": vars(self.score),
            "missing": self.missing,
        }


def bench(
    rankings: Sequence[Ranking],
    rewards: Rewards,
    subsets: Sequence[str],
    sections: Sections = REWARD_BENCH,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> BenchReport:
    """Average the accuracies of subsets.

    Args:
        subsets: the one of each ranking. sections: of each section, the weight of each of its subsets.

    Raises:
        DataError: a subset is in no section, or in several, or has no comparisons; or as :func:`rewards.judge`.
    """
    check(rankings, rewards)
    home = _homes(sections)
    for ranking, subset in zip(rankings, subsets, strict=True):
        if subset not in home:
            raise DataError(
                f"{ranking.where}: subset {subset!r} is in no section{closest(subset, list(home))}: the sections have "
                f"{', '.join(home)}"
            )
    present = [name for name in home if name in set(subsets)]
    found, drawn = {}, {}
    for place, name in enumerate(present):
        sums_P2 = tally(
            (ranking.key, ranking.comparisons, values)
            for ranking, values, subset in zip(rankings, rewards, subsets, strict=True)
            if subset == name
        )
        if not len(sums_P2):
            raise DataError(f"subset {name!r} has no comparison but ties: remove it, or say which response is better")
        found[name] = proportion(sums_P2, draws=draws, seed=seed)
        # Subsets have prompts of their own, so their draws have nothing in common.
        each = resampled(sums_P2, draws, seed=[seed, place])
        drawn[name] = each[:, 0] / each[:, 1]
    parts = {}
    for section, weights in sections.items():
        known = {name: weight for name, weight in weights.items() if name in found}
        if known:
            total = sum(known.values())
            mean = sum(weight * found[name].mean for name, weight in known.items()) / total
            spread = np.sum([weight * drawn[name] for name, weight in known.items()], axis=0) / total
            parts[section] = (mean, spread)
    score = float(np.mean([mean for mean, _ in parts.values()]))
    return BenchReport(
        found,
        {section: _average(mean, spread) for section, (mean, spread) in parts.items()},
        _average(score, np.mean([spread for _, spread in parts.values()], axis=0)),
        [name for name in home if name not in found],
    )


def _homes(sections: Sections) -> dict[str, str]:
    home: dict[str, str] = {}
    for section, weights in sections.items():
        for name, weight in weights.items():
            if name in home:
                raise DataError(f"subset {name!r} is in sections {home[name]!r} and {section!r}: it can be in one")
            if not weight > 0:
                raise DataError(f"section {section!r}: the weight of subset {name!r} is {weight}; it is above 0")
            home[name] = section
    return home


def _average(mean: float, drawn: Any) -> Average:
    low, high = quantiles(drawn)
    return Average(float(mean), float(low), float(high))
