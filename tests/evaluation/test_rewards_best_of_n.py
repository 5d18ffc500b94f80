"""Best-of-n, exactly: against all subsets of the responses, and its curves, bands and over-optimisation."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest

from moelora.data.ranking import Ranking
from moelora.errors import DataError
from moelora.evaluation.reward_best_of_n import best_of_n, expected_best, gold_difference, kl, rank_weights

pytestmark = pytest.mark.smoke


def by_enumeration(proxy: list[int], gold: list[int], n: int) -> Fraction:
    """The mean over all subsets of n responses, and over those of the subset whose proxy is the largest."""
    chosen = []
    for subset in combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        best = [gold[i] for i in subset if proxy[i] == top]
        chosen.append(Fraction(sum(best), len(best)))
    return sum(chosen, Fraction(0)) / len(chosen)


@pytest.mark.parametrize(
    "proxy",
    [
        [3, 1, 4, 10, 5, 9, 2, 6],
        [3, 1, 4, 1, 5, 9, 2, 5],  # ties in the middle
        [7, 7, 7, 1, 1, 2, 7, 0],  # ties at the top
        [2, 2, 2, 2, 2, 2, 2, 2],
        [5],
    ],
)
def test_the_estimate_is_the_mean_over_all_subsets(proxy: list[int]) -> None:
    gold = [2, 7, 1, 8, 2, 8, 1, 8][: len(proxy)]
    found = expected_best(proxy, gold, len(proxy))
    assert found == pytest.approx([float(by_enumeration(proxy, gold, n)) for n in range(1, len(proxy) + 1)], rel=1e-14)
    own = expected_best(proxy, proxy, len(proxy))
    assert own == pytest.approx([float(by_enumeration(proxy, proxy, n)) for n in range(1, len(proxy) + 1)], rel=1e-14)


def test_order_and_rising_transformations_do_not_matter() -> None:
    proxy, gold = np.random.default_rng(0).normal(size=(2, 30))
    order = np.random.default_rng(1).permutation(30)
    expected = expected_best(proxy, gold, 30)
    assert expected_best(proxy[order], gold[order], 30) == pytest.approx(expected)
    assert expected_best(np.exp(3 * proxy) - 5, gold, 30) == pytest.approx(expected)
    assert expected[0] == pytest.approx(gold.mean()) and expected[-1] == gold[proxy.argmax()]
    assert expected_best(proxy, gold, 4) == pytest.approx(expected[:4])


def test_weights_are_binomial_coefficients_without_overflow() -> None:
    weights = rank_weights(2000, 64)
    assert weights.sum(1) == pytest.approx(np.ones(64), rel=1e-12)
    for n, rank in ((1, 1), (2, 1999), (17, 1500), (64, 2000), (64, 1000), (64, 63)):
        exact = Fraction(math.comb(rank - 1, n - 1), math.comb(2000, n))
        assert weights[n - 1, rank - 1] == pytest.approx(float(exact), rel=1e-11)


def test_a_longer_sample_estimates_the_same_thing() -> None:
    """Unbiased: the mean over pools drawn from a known distribution is its own best-of-n."""
    rng = np.random.default_rng(0)
    found = np.mean([expected_best(pool, pool, 8) for pool in rng.random((4000, 12))], axis=0)
    # The largest of n uniform numbers is n / (n + 1) in the mean.
    assert found == pytest.approx([n / (n + 1) for n in range(1, 9)], abs=0.005)


def test_kl() -> None:
    assert kl(1) == 0
    assert kl(2) == pytest.approx(math.log(2) - 0.5) and kl(64) == pytest.approx(math.log(64) - 63 / 64)
    # By its definition, on 2000 equally likely responses: the limit for responses that are never alike.
    for n in (2, 8, 64):
        rank = np.arange(1, 2001)
        p = (rank / 2000) ** n - ((rank - 1) / 2000) ** n
        assert float((p * np.log(p * 2000, where=p > 0, out=np.zeros_like(p))).sum()) == pytest.approx(kl(n), abs=0.02)


def rankings_of(gold_PN: np.ndarray) -> list[Ranking]:
    return [
        Ranking(({"role": "user", "content": str(n)},), ("x",) * len(row), scores=tuple(row), key=str(n))
        for n, row in enumerate(gold_PN.tolist())
    ]


def hacked(prompts: int) -> tuple[list[Ranking], list[list[float]]]:
    """A proxy that follows the gold score, but loves three responses in a hundred, which are bad."""
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(prompts, 32))
    proxy = 10 + 3 * (gold + rng.normal(size=gold.shape))
    loved = rng.random(gold.shape) < 0.03
    gold[loved] -= 4
    proxy[loved] += 12
    return rankings_of(gold), proxy.tolist()


def test_over_optimisation_is_seen_and_a_perfect_reward_has_none() -> None:
    rankings, proxy = hacked(60)
    found = best_of_n(rankings, proxy, 16)
    assert found.n == list(range(1, 17)) and found.kl == [kl(n) for n in found.n]
    assert 1 < found.peak < 8 and found.peak_range[0] <= found.peak <= found.peak_range[1]
    assert found.drop.high < 0 and found.drop.difference == pytest.approx(
        found.gold.mean[-1] - found.gold.mean[found.peak - 1]
    )
    assert all(a < b for a, b in pairwise(found.proxy.mean)) and found.gap.low[-1] > 1
    for curve in (found.gold, found.proxy, found.best, found.gap):
        assert all(low <= mean <= high for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True))
    assert all(a >= b for a, b in zip(found.best.mean, found.gold.mean, strict=True))
    perfect = best_of_n(rankings, [[5 * s + 2 for s in r.scores or ()] for r in rankings], 16)
    assert perfect.gold.mean == pytest.approx(perfect.best.mean) and perfect.peak == 16
    assert perfect.gap.mean == pytest.approx([0] * 16, abs=1e-12) and perfect.drop.difference == 0
    assert perfect.best.mean == pytest.approx(found.best.mean)


def test_bands_narrow_with_prompts_and_are_seeded() -> None:
    few, many = (best_of_n(*hacked(prompts), 8, draws=500) for prompts in (20, 320))
    widths = [np.array(found.gold.high) - np.array(found.gold.low) for found in (few, many)]
    assert (widths[0] / widths[1]).mean() == pytest.approx(4, rel=0.35)
    assert best_of_n(*hacked(20), 8, draws=500) == few
    # A prompt that comes twice says no more than once.
    rankings, proxy = hacked(20)
    assert best_of_n(rankings * 2, proxy * 2, 8, draws=500).gold.low == pytest.approx(few.gold.low)


def test_two_rewards_are_compared_prompt_by_prompt() -> None:
    rng = np.random.default_rng(3)
    # Prompts differ far more than what is chosen within them.
    gold = rng.normal(size=(50, 16)) + rng.normal(0, 20, size=(50, 1))
    rankings = rankings_of(gold)
    good, bad = (gold + rng.normal(0, noise, size=gold.shape) for noise in (0.3, 3.0))
    gap = gold_difference(rankings, good.tolist(), bad.tolist(), 8)
    one, other = (best_of_n(rankings, proxy.tolist(), 8).gold for proxy in (good, bad))
    assert gap.mean == pytest.approx(np.subtract(one.mean, other.mean))
    assert gap.mean[0] == pytest.approx(0) and gap.low[-1] > 0.5
    assert one.low[-1] < other.high[-1]  # apart, the two bands say nothing
    assert gap.high[-1] - gap.low[-1] < 0.1 * (one.high[-1] - one.low[-1])


def test_rankings_that_do_not_reach_so_far_are_left_out() -> None:
    rankings, proxy = hacked(3)
    short = Ranking(rankings[0].prompt, ("x", "y"), scores=(0.0, 1.0), key="short")
    bare = Ranking(rankings[0].prompt, ("x",) * 32, key="bare")
    found = best_of_n([*rankings, short, bare], [*proxy, [0.0, 1.0], proxy[0]], 4)
    assert (found.prompts, found.left_out) == (3, 2)
    assert found.gold == best_of_n(rankings, proxy, 4).gold
    with pytest.raises(DataError, match="best-of-3 needs rankings with gold scores and 3 responses"):
        best_of_n([short], [[0.0, 1.0]], 3)


def test_scores_without_any_difference_gain_nothing() -> None:
    rankings = rankings_of(np.ones((2, 4)))
    found = best_of_n(rankings, [[1.0, 2.0, 3.0, 4.0]] * 2, 4)
    assert found.gold_gain.mean == [0.0] * 4 and found.peak == 1 and found.drop.difference == 0
