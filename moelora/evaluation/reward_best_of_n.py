"""Best-of-n: what becomes of the true (gold) score as more responses are drawn and the best by a reward is kept.

Each prompt has N sampled responses with rewards (the proxy) and gold scores. For n <= N the expected gold score of the
response with the largest reward among n, drawn without replacement from the N, is computed exactly, not simulated: the
response of rank i (1 the smallest reward) is the one with probability C(i - 1, n - 1) / C(N, n). Over the sampling of
the N it is an unbiased estimate of best-of-n. Responses with equal rewards share their probability evenly.

The price is KL = log n - (n - 1) / n nats from the sampling policy (Stiennon et al. 2020, arXiv 2009.01325; exact where
no two responses are alike, else an upper bound: Beirami et al. 2024, arXiv 2401.01879). That the proxy keeps rising
along it while the gold score falls is over-optimisation (Gao et al. 2023, arXiv 2210.10760).

Shapes: N responses of a prompt, K curve points (n = 1 .. K), P prompts, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .rewards import DRAWS, Array, Rewards, check, quantiles, resampled
from .scoring import Comparison as Difference

if TYPE_CHECKING:
    from ..data.ranking import Ranking


@dataclass(frozen=True)
class Curve:
    """A value for each n = 1 .. K, with a 95 % band over prompts."""

    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class BestOfN:
    """What best-of-n brings, the mean over prompts.

    Attributes:
        n, kl: the curve's points; kl in nats.
        gold: expected gold score of the chosen response. proxy: its expected reward.
        best: the gold score if the gold score itself chose: what no reward can exceed.
        gold_gain, proxy_gain: how far each rose since n = 1, in standard deviations of its own among the responses of a
            prompt; a proxy that is a rising linear function of the gold score has the same gain.
        gap: proxy_gain - gold_gain: what the proxy promises and does not keep.
        peak: n with the largest gold score, the smallest of several. peak_range: its 95 % range over draws of prompts.
        drop: gold score at the last n minus that at the peak, with its interval. The peak was looked for in the same
            data, so this is a little below its true value; an interval that ends below 0 is over-optimisation.
        prompts: that the curves are of. left_out: rankings without gold scores, or with fewer than K responses.
    """

    n: list[int]
    kl: list[float]
    gold: Curve
    proxy: Curve
    best: Curve
    gold_gain: Curve
    proxy_gain: Curve
    gap: Curve
    peak: int
    peak_range: tuple[int, int]
    drop: Difference
    prompts: int
    left_out: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = {name: vars(value) if isinstance(value, Curve) else value for name, value in vars(self).items()}
        return {**plain, "peak_range": list(self.peak_range), "drop": vars(self.drop)}


def kl(n: int) -> float:
    """The divergence of best-of-n from the policy that it samples, in nats: log n - (n - 1) / n."""
    return float(np.log(n) - (n - 1) / n)


def expected_best(proxy: Sequence[float], gold: Sequence[float], most: int) -> Array:
    """(K,) the expected gold score of the response with the largest proxy among n = 1 .. ``most`` of these, exactly.

    With ``gold = proxy`` it is the expected largest proxy itself. ``most`` is at most the number of responses.
    """
    proxy_N = np.asarray(proxy, dtype=np.float64)
    # Equal proxies share evenly what their ranks have together, so each has the mean of their gold scores.
    _, group_N, counts = np.unique(proxy_N, return_inverse=True, return_counts=True)
    shared = np.bincount(group_N, weights=np.asarray(gold, dtype=np.float64)) / counts
    expected: Array = rank_weights(len(proxy_N), most) @ np.repeat(shared, counts)
    return expected


@lru_cache(maxsize=64)
def rank_weights(responses: int, most: int) -> Array:
    """(K, N) the probability that each rank, the smallest first, is the largest of n drawn: C(i - 1, n - 1) / C(N, n).

    By p_N = n / N and p_(i-1) = p_i (i - n) / (i - 1), so that no binomial coefficient overflows.
    """
    n_K1 = np.arange(1, most + 1, dtype=np.float64)[:, None]
    rank_N = np.arange(responses, 1, -1, dtype=np.float64)
    steps = np.maximum(rank_N - n_K1, 0) / (rank_N - 1)
    weights: Array = np.cumprod(np.concatenate([n_K1 / responses, steps], axis=1), axis=1)[:, ::-1]
    weights.flags.writeable = False
    return weights


def best_of_n(
    rankings: Sequence[Ranking], rewards: Rewards, most: int, *, draws: int = DRAWS, seed: int = 0
) -> BestOfN:
    """The curves for n = 1 .. ``most``, of the rankings with gold scores and so many responses at least.

    Bands are from drawing prompts with replacement.

    Raises:
        DataError: no ranking is left, or rewards are missing or not finite.
    """
    check(rankings, rewards)
    rows: dict[str, Array] = {}
    chosen = usable(rankings, most)
    for index, scores in chosen.items():
        key = rankings[index].key
        rows[key] = rows.get(key, 0) + _row(rewards[index], scores, most)
    sums_PM = np.stack(list(rows.values()))
    mean, drawn = _curves(sums_PM.sum(0, keepdims=True), most), _curves(resampled(sums_PM, draws, seed), most)
    gold = mean["gold"][0]
    peak = int(gold.argmax())
    low, high = quantiles(drawn["gold"][:, -1] - drawn["gold"][:, peak])
    first, last = np.quantile(drawn["gold"].argmax(1) + 1, [0.025, 0.975], method="inverted_cdf")
    n = list(range(1, most + 1))
    return BestOfN(
        n,
        [kl(each) for each in n],
        **{name: _curve(mean[name][0], drawn[name]) for name in mean},
        peak=peak + 1,
        peak_range=(int(first), int(last)),
        drop=Difference(float(gold[-1] - gold[peak]), float(low), float(high)),
        prompts=len(rows),
        left_out=len(rankings) - len(chosen),
    )


def gold_difference(
    rankings: Sequence[Ranking], one: Rewards, other: Rewards, most: int, *, draws: int = DRAWS, seed: int = 0
) -> Curve:
    """By how much the gold score of what ``one`` chooses is above that of what ``other`` does, for n = 1 .. ``most``.

    Each draw takes the same prompts for both: some prompts have better responses than others, which cancels.

    Raises:
        DataError: as :func:`best_of_n`.
    """
    check(rankings, one)
    check(rankings, other)
    rows: dict[str, Array] = {}
    for index, scores in usable(rankings, most).items():
        key = rankings[index].key
        gap = expected_best(one[index], scores, most) - expected_best(other[index], scores, most)
        rows[key] = rows.get(key, 0) + np.append(gap, 1.0)
    sums_PM = np.stack(list(rows.values()))
    drawn = resampled(sums_PM, draws, seed)
    total = sums_PM.sum(0)
    return _curve(total[:-1] / total[-1], drawn[:, :-1] / drawn[:, -1:])


def usable(rankings: Sequence[Ranking], most: int) -> dict[int, tuple[float, ...]]:
    """Which rankings have gold scores and ``most`` responses at least, by number, and these scores.

    Raises:
        DataError: none has.
    """
    found = {
        index: ranking.scores
        for index, ranking in enumerate(rankings)
        if ranking.scores is not None and len(ranking.scores) >= most
    }
    if not found:
        raise DataError(
            f"best-of-{most} needs rankings with gold scores and {most} responses at least; none of {len(rankings)} is "
            "such: ask for fewer, or give `scores` of the responses"
        )
    return found


def _row(proxy: Sequence[float], gold: Sequence[float], most: int) -> Array:
    """(3 K + 3,) what is summed over rankings: three curves, both variances, and one."""
    curves = [expected_best(proxy, gold, most), expected_best(proxy, proxy, most), expected_best(gold, gold, most)]
    return np.concatenate([*curves, [np.var(gold), np.var(proxy), 1.0]])


def _curves(sums: Array, most: int) -> dict[str, Array]:
    """Each curve (…, K), from sums (…, 3 K + 3) over rankings."""
    means = sums[:, :-1] / sums[:, -1:]
    gold, proxy, best = (means[:, place * most : (place + 1) * most] for place in range(3))
    gains = []
    for values, variance in ((gold, means[:, -2]), (proxy, means[:, -1])):
        # Scores that are all alike gain nothing.
        spread = np.sqrt(np.where(variance > 0, variance, 1.0))
        gains.append((values - values[:, :1]) / spread[:, None])
    names = {"gold": gold, "proxy": proxy, "best": best, "gold_gain": gains[0], "proxy_gain": gains[1]}
    return names | {"gap": gains[1] - gains[0]}


def _curve(mean: Array, drawn: Array) -> Curve:
    low, high = quantiles(drawn)
    return Curve(mean.tolist(), low.tolist(), high.tolist())
