"""Whether probabilities can be believed: of one response being better than another, and of the chosen category.

A reward model says P(w > l) = sigmoid(r_w - r_l) (Bradley and Terry, 1952). Its confidence in a comparison is the
larger of P(w > l) and P(l > w), 0.5 to 1, and it is right where w has the larger one. The calibration error (ECE) is
that of Guo et al. 2017 (arXiv 1706.04599): over bins of equal width, the mean distance of confidence and accuracy,
weighted by what the bins hold. It is never below 0 by chance, so small data has one even when a model has none.

Shapes: N judgements, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..reward.config import GENERAL
from .rewards import DRAWS, Accuracy, Array, Rewards, check, points, proportion, quantiles, resampled

if TYPE_CHECKING:
    from ..data.ranking import Ranking
    from ..reward.scoring import Reward

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Judgements of similar confidence.

    Attributes:
        start, end: range of confidence, its end excluded but for 1. confidence: its mean. accuracy: what was right.
    """

    start: float
    end: float
    confidence: float
    accuracy: Accuracy

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**vars(self), "accuracy": vars(self.accuracy)}


@dataclass(frozen=True)
class Calibration:
    """How well sigmoid(r_w - r_l) says how likely w is better; ties in the data are left out.

    Attributes:
        ece: calibration error, 0 to 1.
        brier: mean of (1 - P(w > l))², 0.25 for a coin. log_loss: mean of -log P(w > l) in nats, log 2 for a coin; both
            with 95 % intervals over prompts, (mean, low, high).
        bins: those that hold something.
    """

    ece: float
    brier: tuple[float, float, float]
    log_loss: tuple[float, float, float]
    bins: list[Bin]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "ece": self.ece,
            "brier": dict(zip(("mean", "low", "high"), self.brier, strict=True)),
            "log_loss": dict(zip(("mean", "low", "high"), self.log_loss, strict=True)),
            "bins": [each.to_dict() for each in self.bins],
        }


@dataclass(frozen=True)
class RouterReport:
    """How well a category is chosen from a prompt.

    Attributes:
        accuracy: of the classifier's choice, whether or not its expert answered.
        ece, bins: of the classifier's confidence.
        fallback: part of the prompts that were answered by another expert than the chosen one, ``general``.
        accuracy_kept: of the choices of the other prompts; ``None`` if there are none.
        confusion: by the data's category, how often each was chosen.
        answered: by the data's category, how often each category's expert answered, ``general`` too.
    """

    accuracy: Accuracy
    ece: float
    bins: list[Bin]
    fallback: float
    accuracy_kept: Accuracy | None
    confusion: dict[str, dict[str, int]]
    answered: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **vars(self),
            "accuracy": vars(self.accuracy),
            "accuracy_kept": self.accuracy_kept and vars(self.accuracy_kept),
            "bins": [each.to_dict() for each in self.bins],
        }


def calibration(
    rankings: Sequence[Ranking], rewards: Rewards, *, bins: int = BINS, draws: int = DRAWS, seed: int = 0
) -> Calibration:
    """The calibration of the differences of rewards.

    Raises:
        DataError: there is no comparison but ties, or rewards are missing or not finite.
    """
    check(rankings, rewards)
    keys: list[str] = []
    gaps: list[float] = []
    for ranking, values in zip(rankings, rewards, strict=True):
        for pair in ranking.comparisons:
            if not pair.tie:
                keys.append(ranking.key)
                gaps.append(values[pair.winner] - values[pair.loser])
    if not gaps:
        raise DataError("no ranking has two responses of which one is better, so there is nothing to calibrate")
    gaps_N = np.array(gaps)
    # Of the loser, 1 - P(w > l): exact where P(w > l) is nearly 1, and without overflow.
    loser_N = np.exp(-np.logaddexp(0, gaps_N))
    confidence_N = 1 / (1 + np.exp(-np.abs(gaps_N)))
    ece, found = reliability(keys, confidence_N, [points(gap) for gap in gaps], 0.5, bins, draws, seed)
    return Calibration(
        ece,
        _mean(keys, loser_N**2, draws, seed),
        _mean(keys, np.logaddexp(0, -gaps_N), draws, seed),
        found,
    )


def router_report(
    rankings: Sequence[Ranking],
    rewards: Sequence[Sequence[Reward]],
    *,
    bins: int = BINS,
    draws: int = DRAWS,
    seed: int = 0,
) -> RouterReport | None:
    """How prompts were routed; ``None`` where no ranking has a category, or the model tells none apart.

    A prompt is routed before its responses are read, so each ranking counts once.
    """
    known = [
        (ranking, ranking.category, values[0])
        for ranking, values in zip(rankings, rewards, strict=True)
        if ranking.category is not None and values
    ]
    # A reward model without categories answers every prompt with its general expert, and calls that its choice.
    if not any(reward.routed != GENERAL for _, _, reward in known):
        return None
    keys = [ranking.key for ranking, _, _ in known]
    right = [float(reward.routed == category) for _, category, reward in known]
    kept = [index for index, (_, _, reward) in enumerate(known) if reward.category == reward.routed]
    confidence_N = np.array([reward.confidence for _, _, reward in known])
    ece, found = reliability(keys, confidence_N, right, 0.0, bins, draws, seed)
    return RouterReport(
        proportion(_by_key(keys, right), draws=draws, seed=seed),
        ece,
        found,
        1 - len(kept) / len(known),
        proportion(_by_key([keys[i] for i in kept], [right[i] for i in kept]), draws=draws, seed=seed)
        if kept
        else None,
        _counts([(category, reward.routed) for _, category, reward in known]),
        _counts([(category, reward.category) for _, category, reward in known]),
    )


def reliability(
    keys: Sequence[str],
    confidence_N: Array,
    right: Sequence[float],
    lowest: float,
    bins: int,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, list[Bin]]:
    """The calibration error, and the bins that hold something.

    Args:
        keys: the prompt of each judgement. right: 1, 0, or half. lowest: confidence that is possible, the first bin's.
    """
    edges = np.linspace(lowest, 1, bins + 1)
    places = np.clip(np.digitize(confidence_N, edges) - 1, 0, bins - 1)
    error, found = 0.0, []
    for place in range(bins):
        inside = np.flatnonzero(places == place).tolist()
        if not inside:
            continue
        rate = proportion(_by_key([keys[i] for i in inside], [right[i] for i in inside]), draws=draws, seed=seed)
        confidence = math.fsum(confidence_N[inside]) / len(inside)
        error += len(inside) / len(keys) * abs(rate.mean - confidence)
        found.append(Bin(float(edges[place]), float(edges[place + 1]), confidence, rate))
    return error, found


def _mean(keys: Sequence[str], values_N: Array, draws: int, seed: int) -> tuple[float, float, float]:
    drawn = resampled(_by_key(keys, values_N.tolist()), draws, seed)
    low, high = quantiles(drawn[:, 0] / drawn[:, 1])
    return float(values_N.mean()), float(low), float(high)


def _by_key(keys: Sequence[str], values: Sequence[float]) -> Array:
    """(P, 2) the sum and the number of the values of each prompt."""
    sums: dict[str, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        entry = sums.setdefault(key, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1
    return np.array(list(sums.values()))


def _counts(pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Of each first name, how often it comes with each second one; all names of both in every row, sorted."""
    seconds = sorted({name for pair in pairs for name in pair})
    table: Mapping[str, dict[str, int]] = {first: dict.fromkeys(seconds, 0) for first in sorted({a for a, _ in pairs})}
    for first, second in pairs:
        table[first][second] += 1
    return dict(table)
