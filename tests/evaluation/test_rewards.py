"""Pairwise accuracy of rewards and its intervals, calibration, the router of categories, RewardBench's averages."""

from __future__ import annotations

import math
import random
from itertools import product
from typing import Any

import numpy as np
import pytest

from moelora.data.ranking import Comparison, Ranking, comparisons
from moelora.errors import DataError
from moelora.evaluation.reward_bench import REWARD_BENCH, bench
from moelora.evaluation.reward_calibration import calibration, router_report
from moelora.evaluation.rewards import differences, judge, proportion, resampled
from moelora.evaluation.scoring import wilson
from moelora.reward.scoring import Reward

pytestmark = pytest.mark.smoke


def ranking(key: str, ranks: list[float | None], category: str | None = None, **more: Any) -> Ranking:
    prompt = ({"role": "user", "content": key},)
    responses = tuple(f"answer {number}" for number in range(len(ranks)))
    return Ranking(prompt, responses, comparisons(ranks), category, key=key, where=f"here, {key}", **more)


def clusters(count: int, pairs: int, seed: int = 0) -> tuple[list[Ranking], list[list[float]]]:
    """Rankings of 2 · pairs responses; within a prompt, either nearly all comparisons are right or nearly none."""
    rng = random.Random(seed)
    rankings, rewards = [], []
    for number in range(count):
        prompt = ({"role": "user", "content": str(number)},)
        found = tuple(Comparison(2 * i, 2 * i + 1) for i in range(pairs))
        rankings.append(Ranking(prompt, ("x",) * (2 * pairs), found, key=str(number)))
        good = rng.random() < 0.7
        rewards.append([float((rng.random() < 0.95) == good) if i % 2 == 0 else 0.5 for i in range(2 * pairs)])
    return rankings, rewards


def test_ties_of_the_data_are_left_out_and_equal_rewards_are_half_right() -> None:
    rankings = [ranking("a", [1, 2, 2]), ranking("b", [2, 1, None])]
    report = judge(rankings, [[1.0, 1.0, 3.0], [0.0, 5.0, 9.0]])
    # a: 0 above 1 (equal: half), 0 above 2 (wrong), 1 and 2 a tie; b: 1 above 0 (right), 2 unknown.
    assert report.overall.mean == pytest.approx(1.5 / 3)
    assert (report.overall.pairs, report.overall.prompts, report.ties, report.equal) == (3, 2, 1, 1)


def test_categories_and_capabilities_are_judged_apart() -> None:
    both = {"logic": comparisons([1, 2]), "tone": comparisons([2, 1])}
    rankings = [
        ranking("a", [1, 2], "maths", capabilities=both),
        ranking("b", [1, 2], "chat", capabilities={"tone": comparisons([1, 2])}),
        ranking("c", [1, 2], "chat"),
        ranking("d", [2, 1], capabilities={"logic": comparisons([1, 1])}),
    ]
    rewards = [[2.0, 1.0], [2.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    own = [
        [{"logic": 0.0, "tone": 0.0}, {"logic": 1.0, "tone": 3.0}],
        [{"other": 1.0}, {"other": 2.0}],
        [{}, {}],
        [{"logic": 1.0}, {"logic": 0.0}],
    ]
    report = judge(rankings, rewards, own)
    assert report.overall.mean == 0.75
    assert {name: each.mean for name, each in report.categories.items()} == {"maths": 1.0, "chat": 0.5}
    # Even comparisons alone make no row.
    assert set(report.capabilities) == {"maths/logic", "maths/tone", "chat/tone"}
    logic, tone, chat = (report.capabilities[name] for name in ("maths/logic", "maths/tone", "chat/tone"))
    assert logic.own is not None and logic.own.mean == 0.0 and logic.total.mean == 1.0
    assert tone.own is not None and tone.own.mean == 1.0 and tone.total.mean == 0.0
    assert chat.own is None and chat.missing == 1 and chat.total.mean == 1.0
    assert judge(rankings, rewards).capabilities["maths/logic"].own is None
    assert report.to_dict()["capabilities"]["chat/tone"]["own"] is None


def test_one_pair_for_each_prompt_has_the_wilson_interval() -> None:
    rankings = [ranking(str(number), [1, 2]) for number in range(40)]
    overall = judge(rankings, [[float(number % 4 > 0), 0.5] for number in range(40)]).overall
    assert (overall.mean, overall.low, overall.high) == (0.75, *wilson(0.75, 40))


def test_comparisons_of_one_prompt_do_not_count_as_so_many() -> None:
    rankings, rewards = clusters(60, 20)
    overall = judge(rankings, rewards).overall
    # By hand: the standard error of a mean of 60 prompts' accuracies.
    means = [np.mean([values[2 * i] > 0.5 for i in range(20)]) for values in rewards]
    error = np.std(means) / math.sqrt(60)
    assert overall.mean == pytest.approx(np.mean(means))
    assert (overall.high - overall.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    as_if_independent = wilson(overall.mean, overall.pairs)
    assert overall.high - overall.low > 3 * (as_if_independent[1] - as_if_independent[0])
    assert judge(rankings, rewards).overall == overall  # the same seed
    assert judge(rankings, rewards, seed=1).overall.low != overall.low


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    truth = 0.7 * 0.95 + 0.3 * 0.05
    inside = 0
    for seed in range(100):
        overall = judge(*clusters(50, 4, seed), draws=300).overall
        inside += overall.low <= truth <= overall.high
    assert 86 <= inside <= 99


def test_rankings_with_the_same_prompt_are_drawn_together() -> None:
    rankings, rewards = clusters(20, 5)
    apart = [
        Ranking(r.prompt, r.responses, (pair,), key=r.key) for r in rankings for pair in r.comparisons
    ]  # one comparison in each ranking, the same prompts
    repeated = [values for r, values in zip(rankings, rewards, strict=True) for _ in r.comparisons]
    assert judge(apart, repeated).overall == judge(rankings, rewards).overall


def test_an_interval_is_never_a_point() -> None:
    rankings, rewards = clusters(5, 3)
    right = [[1.0, 0.0] * 3 for _ in rewards]
    overall = judge(rankings, right).overall
    assert (overall.low, overall.high) == wilson(1.0, 5)
    alone = judge(rankings[:1], [[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]]).overall
    assert alone.high - alone.low > 0.5


def test_draws_are_those_of_a_plain_loop_in_mean_and_spread() -> None:
    values = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 3.0]])
    drawn = resampled(values, draws=20000)
    every = np.array([values[list(chosen)].sum(0) for chosen in product(range(3), repeat=3)])
    assert drawn.mean(0) == pytest.approx(every.mean(0), rel=0.02)
    assert drawn.std(0) == pytest.approx(every.std(0), rel=0.02)


def test_two_models_are_compared_on_the_same_draws() -> None:
    rankings, rewards = clusters(60, 20)
    better = [list(values) for values in rewards]
    for values in better[::6]:
        values[0::2] = [1.0] * 20
    found = differences(rankings, better, rewards)["overall"]
    one, other = judge(rankings, better).overall, judge(rankings, rewards).overall
    assert found.difference == pytest.approx(one.mean - other.mean)
    # What both find hard cancels: the interval is far narrower than those of the two models.
    assert 0 <= found.low < found.difference < found.high
    assert found.high - found.low < 0.75 * (one.high - one.low)
    swapped = differences(rankings, rewards, better)["overall"]
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))
    none = differences(rankings, rewards, rewards)["overall"]
    assert (none.difference, none.low, none.high) == (0, 0, 0)


def test_differences_by_category() -> None:
    rankings = [ranking(str(n), [1, 2], "overall" if n % 2 else "maths") for n in range(10)]
    found = differences(rankings, [[1.0, 0.0]] * 10, [[float(n % 2 == 0), 0.5] for n in range(10)])
    assert {name: each.difference for name, each in found.items()} == {
        "overall": 0.5,
        "category maths": 0.0,
        "category overall": 1.0,
    }


def test_what_cannot_be_judged_is_said() -> None:
    one = [ranking("a", [1, 2])]
    with pytest.raises(DataError, match="1 rankings but rewards for 0"):
        judge(one, [])
    with pytest.raises(DataError, match="here, a: 2 responses but 3 rewards"):
        judge(one, [[1.0, 2.0, 3.0]])
    with pytest.raises(DataError, match="here, a: the reward of response 2 is nan"):
        judge(one, [[1.0, math.nan]])
    with pytest.raises(DataError, match="nothing to judge"):
        judge([ranking("a", [1, 1])], [[1.0, 2.0]])


def test_calibration_is_that_of_the_probabilities() -> None:
    gaps = [0.1, -0.2, 2.0, 2.1, -1.9, 0.0, 50.0, -50.0, 800.0, -800.0]
    rankings = [ranking(str(number), [1, 2]) for number in range(len(gaps))]
    found = calibration(rankings, [[gap, 0.0] for gap in gaps])
    p = [1 / (1 + math.exp(-gap)) if gap > -700 else 0.0 for gap in gaps]
    assert found.brier[0] == pytest.approx(sum((1 - each) ** 2 for each in p) / 10)
    assert found.log_loss[0] == pytest.approx(
        sum(math.log1p(math.exp(-gap)) if gap > -700 else -gap for gap in gaps) / 10
    )
    assert found.brier[1] <= found.brier[0] <= found.brier[2]
    # Bins of 0.05 from 0.5: [0, ±0.1, ±0.2] and [±1.9, 2, 2.1], the rest in the last.
    assert [each.accuracy.pairs for each in found.bins] == [3, 3, 4]
    assert [each.accuracy.mean for each in found.bins] == pytest.approx([1.5 / 3, 2 / 3, 0.5])
    sure = [max(each, 1 - each) for each in p]
    confidences = [np.mean([sure[i] for i in chosen]) for chosen in ((0, 1, 5), (2, 3, 4), (6, 7, 8, 9))]
    assert [each.confidence for each in found.bins] == pytest.approx(confidences)
    error = sum(n / 10 * abs(a - c) for n, a, c in zip((3, 3, 4), (0.5, 2 / 3, 0.5), confidences, strict=True))
    assert found.ece == pytest.approx(error)


def test_calibrated_rewards_have_a_small_error_and_sharpened_ones_a_large_one() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(0, 1.5, size=4000)
    won = rng.random(4000) < 1 / (1 + np.exp(-gaps))
    rankings = [ranking(str(n), [1, 2] if good else [2, 1]) for n, good in enumerate(won)]
    honest = calibration(rankings, [[gap, 0.0] for gap in gaps], draws=200)
    sharp = calibration(rankings, [[4 * gap, 0.0] for gap in gaps], draws=200)
    flat = calibration(rankings, [[gap * 1e-6, 0.0] for gap in gaps], draws=200)
    assert honest.ece < 0.025 < 0.1 < sharp.ece
    assert honest.log_loss[2] < sharp.log_loss[1]
    assert (flat.brier[0], flat.log_loss[0]) == pytest.approx((0.25, math.log(2)), rel=1e-3)
    # An offset of a prompt's rewards means nothing.
    moved = calibration(rankings, [[gap + 7, 7.0] for gap in gaps], draws=200)
    assert moved.ece == pytest.approx(honest.ece) and moved.brier == pytest.approx(honest.brier)


def test_the_router_of_categories() -> None:
    truth = ["maths", "maths", "chat", "chat", "code"]
    said = [("maths", 0.9), ("chat", 0.4), ("chat", 0.8), ("chat", 0.3), ("maths", 0.95)]
    rankings = [ranking(str(n), [1, 2], name) for n, name in enumerate(truth)] + [ranking("x", [1, 2])]
    rewards = [[Reward(0.0, name if p >= 0.5 else "general", name, p, {})] * 2 for name, p in [*said, ("maths", 1.0)]]
    found = router_report(rankings, rewards)
    assert found is not None and found.accuracy.mean == 0.6 and found.accuracy.prompts == 5
    assert found.fallback == pytest.approx(0.4)
    assert found.accuracy_kept is not None and found.accuracy_kept.mean == pytest.approx(2 / 3)
    assert found.confusion["maths"] == {"chat": 1, "code": 0, "maths": 1}
    assert found.confusion["code"] == {"chat": 0, "code": 0, "maths": 1}
    assert found.answered["chat"] == {"chat": 1, "code": 0, "general": 1, "maths": 0}
    # Bins of a tenth: 0.3 right, 0.4 wrong, 0.8 right, and 0.9 and 0.95 of which one is right.
    assert found.ece == pytest.approx((0.7 + 0.4 + 0.2 + 2 * abs(0.5 - 0.925)) / 5)
    assert router_report(rankings[-1:], rewards[-1:]) is None
    single = [[Reward(0.0, "general", "general", 1.0, {})] * 2 for _ in rankings]
    assert router_report(rankings, single) is None


def test_sections_are_weighted_means_of_subsets() -> None:
    subsets = ["alpacaeval-easy"] * 4 + ["mt-bench-easy"] * 2 + ["math-prm"] * 2 + ["hep-go"] * 5
    right = [1, 1, 1, 0, 1, 0, 1, 0.5, 1, 0, 0, 0, 0]
    rankings = [ranking(str(n), [1, 2]) for n in range(len(subsets))]
    found = bench(rankings, [[good, 0.5] for good in right], subsets)
    assert {name: each.mean for name, each in found.subsets.items()} == {
        "alpacaeval-easy": 0.75,
        "mt-bench-easy": 0.5,
        "math-prm": 0.75,
        "hep-go": 0.2,
    }
    chat, reasoning = (0.75 * 100 + 0.5 * 28) / 128, (0.75 * 984 + 0.2 * 164) / (984 + 164)
    assert [found.sections[name].mean for name in ("Chat", "Reasoning")] == pytest.approx([chat, reasoning])
    assert found.score.mean == pytest.approx((chat + reasoning) / 2)
    assert found.score.low < found.score.mean < found.score.high
    assert "donotanswer" in found.missing and set(found.sections) == {"Chat", "Reasoning"}
    with pytest.raises(DataError, match=r"subset 'hep-gp' is in no section.*hep-go"):
        bench(rankings[:1], [[1.0, 0.5]], ["hep-gp"])
    with pytest.raises(DataError, match="'a' is in sections 'X' and 'Y'"):
        bench(rankings[:1], [[1.0, 0.5]], ["a"], {"X": {"a": 1}, "Y": {"a": 1}})


def test_the_benchmark_weighs_as_its_authors_say() -> None:
    totals = {name: sum(weights.values()) for name, weights in REWARD_BENCH.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert REWARD_BENCH["Reasoning"]["math-prm"] == totals["Reasoning"] / 2


def test_a_subset_alone_has_the_interval_of_its_draws() -> None:
    sums = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    assert proportion(sums).low == pytest.approx(wilson(2 / 3, 3)[0])
