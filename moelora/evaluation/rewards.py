"""Pairwise accuracy of rewards: how often the better of two responses has the larger one, with honest intervals.

Everything here takes plain numbers: rankings, and for each ranking one reward for each of its responses.

The comparisons of one prompt share its responses, so they are not independent. Intervals therefore come from a
bootstrap that draws whole prompts (by ``Ranking.key``) with replacement. Where every prompt has one comparison it is
Wilson's interval for as many questions.

Ties. A tie in the data has no right answer: it is counted in ``ties`` and not in an accuracy. Two equal rewards for
responses of which one is better are half right, as a coin would be.

Shapes: P prompts, M sums, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .scoring import Comparison as Difference
from .scoring import Progress, wilson

if TYPE_CHECKING:
    from ..data.ranking import Comparison, Ranking
    from ..reward.scoring import Reward

Array = NDArray[np.float64]
Messages = Sequence[Mapping[str, str]]
Rewards = Sequence[Sequence[float]]
Row = tuple[str, "Sequence[Comparison]", Sequence[float]]
DRAWS = 2000
# Draws are made in pieces of at most so many prompts in all, 8 bytes each.
PIECE = 2_000_000


class Scorer(Protocol):
    """What gives rewards: a reward model, or several as one."""

    def score(
        self,
        prompts: Sequence[Messages | str],
        responses: Sequence[str],
        *,
        categories: Sequence[str] | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> list[Reward]:
        """The reward of each response to its prompt."""


@dataclass(frozen=True)
class Accuracy:
    """A part of comparisons that came out right.

    Attributes:
        mean: 0 to 1; 0.5 is a coin. low, high: 95 % interval.
        pairs: comparisons, ties left out. prompts: how many prompts they are of.
    """

    mean: float
    low: float
    high: float
    pairs: int
    prompts: int


@dataclass(frozen=True)
class CapabilityAccuracy:
    """One capability's comparisons, judged in two ways.

    Attributes:
        own: by the capability's own score; ``None`` where the model gives none.
        total: by the reward of the response, as a model without capabilities would.
        missing: comparisons without an own score: the model answered with another category's experts.
    """

    own: Accuracy | None
    total: Accuracy
    missing: int


@dataclass(frozen=True)
class RewardReport:
    """How well rewards order responses.

    Attributes:
        overall: over all comparisons, each counting the same.
        categories: of each category that the data names.
        capabilities: by ``category/capability``, or the capability alone where rankings have no category.
        ties: comparisons that the data calls even, left out. equal: others whose two rewards are equal, half right.
    """

    overall: Accuracy
    categories: dict[str, Accuracy]
    capabilities: dict[str, CapabilityAccuracy]
    ties: int
    equal: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "overall": vars(self.overall),
            "categories": {name: vars(each) for name, each in self.categories.items()},
            "capabilities": {
                name: {"own": each.own and vars(each.own), "total": vars(each.total), "missing": each.missing}
                for name, each in self.capabilities.items()
            },
            "ties": self.ties,
            "equal": self.equal,
        }


def score_rankings(
    scorer: Scorer,
    rankings: Sequence[Ranking],
    *,
    given_categories: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[list[Reward]]:
    """Score every response of every ranking, in their order.

    Args:
        given_categories: tell the scorer each prompt's category instead of letting it choose.
        progress: called with (responses scored, responses in all) after each batch.

    Raises:
        DataError: no rankings, or categories are to be given and one has none.
    """
    if not rankings:
        raise DataError("there are no rankings to score: the data is empty")
    categories: list[str] | None = [] if given_categories else None
    for ranking in rankings:
        if categories is not None:
            if ranking.category is None:
                raise DataError(f"{ranking.where}: no category to give: add one, or let the model choose it")
            categories += [ranking.category] * len(ranking.responses)
    prompts = [ranking.prompt for ranking in rankings for _ in ranking.responses]
    responses = [response for ranking in rankings for response in ranking.responses]
    found = iter(
        scorer.score(prompts, responses, categories=categories, batch_size=batch_size, progress=progress),
    )
    return [[next(found) for _ in ranking.responses] for ranking in rankings]


def judge(
    rankings: Sequence[Ranking],
    rewards: Rewards,
    capabilities: Sequence[Sequence[Mapping[str, float]]] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> RewardReport:
    """Compare rewards with what the rankings say.

    Args:
        rewards: of each ranking, one for each response. capabilities: the same, each a score by capability.

    Raises:
        DataError: there is nothing to compare, or rewards are missing or not finite.
    """
    check(rankings, rewards)
    check_comparisons(rankings)
    overall = _rows(rankings, rewards)
    categories = dict.fromkeys(ranking.category for ranking in rankings if ranking.category is not None)
    by_category = {
        name: [row for row, ranking in zip(overall, rankings, strict=True) if ranking.category == name]
        for name in categories
    }
    compared = [(pair, values) for _, pairs, values in overall for pair in pairs]
    found = {name: accuracy(rows, draws=draws, seed=seed) for name, rows in by_category.items()}
    total = accuracy(overall, draws=draws, seed=seed)
    assert total is not None
    return RewardReport(
        total,
        {name: each for name, each in found.items() if each is not None},
        _capabilities(rankings, rewards, capabilities, draws, seed),
        sum(pair.tie for pair, _ in compared),
        sum(not pair.tie and values[pair.winner] == values[pair.loser] for pair, values in compared),
    )


def differences(
    rankings: Sequence[Ranking], one: Rewards, other: Rewards, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Difference]:
    """By how much the accuracy of ``one`` is above that of ``other``: ``overall``, and of each category.

    Both judge the same comparisons, and each draw takes the same prompts for both, so what is hard for both cancels.

    Returns:
        ``overall`` first; a category is named ``category NAME``, so that none can be taken for it.

    Raises:
        DataError: as :func:`judge`.
    """
    check(rankings, one)
    check(rankings, other)
    chosen = {"overall": list(range(len(rankings)))}
    for index, ranking in enumerate(rankings):
        if ranking.category is not None:
            chosen.setdefault(f"category {ranking.category}", []).append(index)
    found = {}
    for name, indices in chosen.items():
        pairs = [
            tally(_rows([rankings[i] for i in indices], [rewards[i] for i in indices])) for rewards in (one, other)
        ]
        sums = np.stack([pairs[0][:, 0], pairs[1][:, 0], pairs[0][:, 1]], axis=1)
        if len(sums):
            drawn = resampled(sums, draws, seed)
            low, high = quantiles((drawn[:, 0] - drawn[:, 1]) / drawn[:, 2])
            totals = sums.sum(0)
            found[name] = Difference(float((totals[0] - totals[1]) / totals[2]), float(low), float(high))
    return found


def accuracy(rows: Iterable[Row], *, draws: int = DRAWS, seed: int = 0) -> Accuracy | None:
    """The accuracy of comparisons (prompt's key, comparisons, rewards); ``None`` if all of them are ties."""
    sums_P2 = tally(rows)
    return proportion(sums_P2, draws=draws, seed=seed) if len(sums_P2) else None


def tally(rows: Iterable[Row]) -> Array:
    """(P, 2) points and number of the comparisons of each prompt that has any but ties."""
    by_key: dict[str, list[float]] = {}
    for key, pairs, values in rows:
        for pair in pairs:
            if not pair.tie:
                sums = by_key.setdefault(key, [0.0, 0.0])
                sums[0] += points(values[pair.winner] - values[pair.loser])
                sums[1] += 1
    return np.array(list(by_key.values()), dtype=np.float64).reshape(-1, 2)


def points(difference: float) -> float:
    """1 for a winner above the loser, 0 below, half for equal rewards."""
    return 0.5 if difference == 0 else float(difference > 0)


def proportion(sums_P2: Array, *, draws: int = DRAWS, seed: int = 0) -> Accuracy:
    """The ratio of two sums over prompts, the first at most the second, with its interval.

    A bootstrap sees no spread in prompts that all fare alike, such as when all is right. Then too it is Wilson's, for
    as many questions as there are prompts: the comparisons of one prompt count as one.
    """
    right, count = sums_P2.sum(0)
    mean = float(right / count)
    prompts = len(sums_P2)
    if count == prompts or np.ptp(sums_P2[:, 0] / sums_P2[:, 1]) == 0:
        low, high = wilson(mean, prompts)
    else:
        drawn = resampled(sums_P2, draws, seed)
        low, high = quantiles(drawn[:, 0] / drawn[:, 1])
    return Accuracy(mean, float(low), float(high), round(count), prompts)


def resampled(values_PM: Array, draws: int = DRAWS, seed: int | Sequence[int] = 0) -> Array:
    """(D, M) sums over as many prompts as there are, drawn with replacement."""
    prompts = len(values_PM)
    rng = np.random.default_rng(seed)
    piece = max(1, PIECE // prompts)
    sums = []
    for start in range(0, draws, piece):
        size = min(piece, draws - start)
        # How often each draw has each prompt: counted in one go, several times quicker than multinomial numbers.
        drawn = rng.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * prompts).reshape(size, prompts)
        sums.append(times @ values_PM)
    return np.concatenate(sums)


def quantiles(drawn: Array) -> tuple[Any, Any]:
    """The 2.5 % and 97.5 % quantiles over draws, the first axis."""
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return low, high


def check_comparisons(rankings: Sequence[Ranking]) -> None:
    """Make sure that there is something to judge, which costs nothing to know before a model is loaded.

    Raises:
        DataError: there is no comparison but ties.
    """
    if all(pair.tie for ranking in rankings for pair in ranking.comparisons):
        raise DataError("no ranking has two responses of which one is better, so there is nothing to judge")


def check(rankings: Sequence[Ranking], rewards: Rewards) -> None:
    """Make sure that each response has a finite reward.

    Raises:
        DataError: names the first ranking where it is not so.
    """
    if len(rankings) != len(rewards):
        raise DataError(f"there are {len(rankings)} rankings but rewards for {len(rewards)}: give one list for each")
    for ranking, values in zip(rankings, rewards, strict=True):
        if len(ranking.responses) != len(values):
            raise DataError(f"{ranking.where}: {len(ranking.responses)} responses but {len(values)} rewards")
        for number, value in enumerate(values, start=1):
            if not math.isfinite(value):
                raise DataError(f"{ranking.where}: the reward of response {number} is {value}, which is no number")


def _rows(rankings: Sequence[Ranking], rewards: Rewards) -> list[Row]:
    return [(each.key, each.comparisons, values) for each, values in zip(rankings, rewards, strict=True)]


def _capabilities(
    rankings: Sequence[Ranking],
    rewards: Rewards,
    capabilities: Sequence[Sequence[Mapping[str, float]]] | None,
    draws: int,
    seed: int,
) -> dict[str, CapabilityAccuracy]:
    own: dict[str, list[Row]] = {}
    total: dict[str, list[Row]] = {}
    missing: dict[str, int] = {}
    for index, ranking in enumerate(rankings):
        for capability, pairs in ranking.capabilities.items():
            name = capability if ranking.category is None else f"{ranking.category}/{capability}"
            total.setdefault(name, []).append((ranking.key, pairs, rewards[index]))
            scores = [each.get(capability) for each in capabilities[index]] if capabilities is not None else []
            known = [score for score in scores if score is not None]
            if len(known) == len(ranking.responses):
                own.setdefault(name, []).append((ranking.key, pairs, known))
            else:
                missing[name] = missing.get(name, 0) + sum(not pair.tie for pair in pairs)
    found = {}
    for name, rows in total.items():
        judged = accuracy(rows, draws=draws, seed=seed)
        if judged is not None:
            by_own = accuracy(own.get(name, ()), draws=draws, seed=seed)
            found[name] = CapabilityAccuracy(by_own, judged, missing.get(name, 0))
    return found
