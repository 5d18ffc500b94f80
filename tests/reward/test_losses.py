"""The ranking loss: against its definition in float64, its symmetries, and rewards far from zero."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moelora.reward.losses import Comparisons, ranking_loss

pytestmark = pytest.mark.smoke


def compare(*pairs: tuple[int, int], ties: Any = None, margins: Any = None, groups: Any = None) -> Comparisons:
    winners, losers = torch.tensor(pairs).T
    return Comparisons(
        winners,
        losers,
        torch.tensor(ties) if ties else torch.zeros(len(pairs), dtype=torch.bool),
        torch.tensor(margins) if margins else torch.zeros(len(pairs)),
        torch.tensor(groups) if groups else torch.zeros(len(pairs), dtype=torch.int64),
    )


def minus_log_sigmoid(x: float) -> float:
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def by_hand(rewards: list[float], c: Comparisons, smoothing: float = 0.0, center: float = 0.0) -> float:
    """The definition, one comparison at a time."""
    costs: dict[int, list[float]] = {}
    for w, loser, tie, margin, group in zip(
        *(part.tolist() for part in (c.winners, c.losers, c.ties, c.margins, c.groups)), strict=True
    ):
        d = rewards[w] - rewards[loser]
        if tie:
            cost = (minus_log_sigmoid(d) + minus_log_sigmoid(-d)) / 2
        else:
            cost = (1 - smoothing) * minus_log_sigmoid(d - margin) + smoothing * minus_log_sigmoid(-d - margin)
        costs.setdefault(group, []).append(cost + center * (rewards[w] + rewards[loser]) ** 2)
    return sum(sum(part) / len(part) for part in costs.values()) / len(costs)


@pytest.mark.parametrize(("smoothing", "center"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.02), (0.3, 0.5)])
def test_equals_the_definition(smoothing: float, center: float) -> None:
    rewards = torch.randn(6, dtype=torch.float64) * 3
    c = compare(
        (0, 1), (2, 0), (1, 2), (4, 5),
        ties=[False, True, False, False], margins=[0.5, 9.0, 0.0, 1.25], groups=[3, 3, 3, 7],
    )  # fmt: skip
    ours = ranking_loss(rewards, c, label_smoothing=smoothing, center_coef=center)
    torch.testing.assert_close(ours.item(), by_hand(rewards.tolist(), c, smoothing, center), rtol=1e-14, atol=0)
    assert ranking_loss(rewards[:, None], c, label_smoothing=smoothing, center_coef=center) == ours


def test_a_pair_is_a_binary_cross_entropy() -> None:
    """-log sigmoid(r_w - r_l) is the cross-entropy of label 1 on the logit r_w - r_l, here as log1p(exp(-logit))."""
    rewards = torch.randn(40, dtype=torch.float64) * 5
    pairs = [(2 * i, 2 * i + 1) for i in range(20)]
    ours = ranking_loss(rewards, compare(*pairs, groups=list(range(20))))
    logits = rewards[0::2] - rewards[1::2]
    torch.testing.assert_close(ours, torch.log1p(torch.exp(-logits)).mean(), rtol=1e-14, atol=0)
    swapped = ranking_loss(rewards, compare(*[(b, a) for a, b in pairs], groups=list(range(20))))
    # log sigmoid(-x) = log sigmoid(x) - x: the other order is the other logit.
    torch.testing.assert_close(swapped, ours + logits.mean(), rtol=1e-13, atol=0)


def test_the_order_of_responses_does_not_matter() -> None:
    from moelora.data.ranking import comparisons

    ranks, rewards = [2, 1, 3, 2, None, 1], torch.randn(6, dtype=torch.float64)
    losses = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [4, 2, 5, 1, 3, 0]):
        found = comparisons([ranks[place] for place in order])
        c = compare(*[(p.winner, p.loser) for p in found], ties=[p.tie for p in found])
        losses.append(ranking_loss(rewards[order], c, label_smoothing=0.2, center_coef=0.1))
    torch.testing.assert_close(losses[1:], losses[:1] * 2, rtol=1e-14, atol=0)


def test_training_raises_the_winner() -> None:
    rewards = torch.tensor([0.3, -0.2, 0.1, 0.0], requires_grad=True)
    c = compare((1, 0), (2, 3), margins=[1.0, 0.0])
    ranking_loss(rewards, c, label_smoothing=0.1).backward()
    assert rewards.grad is not None
    assert (rewards.grad[[1, 2]] < 0).all(), "a step against the gradient has to raise what won"
    assert (rewards.grad[[0, 3]] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("far", [1e4, -1e4])
def test_rewards_far_from_zero(dtype: torch.dtype, far: float) -> None:
    """-log(sigmoid(x)), as released, is infinite already at x = -104 in float32, and its gradient not a number."""
    rewards = torch.tensor([far, -far, 0.0], dtype=dtype, requires_grad=True)
    loss = ranking_loss(rewards, compare((0, 1), (2, 0), ties=[False, True]), label_smoothing=0.1, center_coef=1e-3)
    loss.backward()
    assert rewards.grad is not None
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(loss)
    assert torch.isfinite(rewards.grad).all()
    wrong = by_hand([float(r) for r in rewards.tolist()], compare((0, 1), (2, 0), ties=[False, True]), 0.1, 1e-3)
    assert loss.item() == pytest.approx(wrong, rel=1e-6)


def test_gradients() -> None:
    c = compare((0, 1), (2, 0), (3, 4), ties=[False, True, False], margins=[0.4, 0.0, 0.0], groups=[0, 0, 1])
    rewards = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: ranking_loss(r, c, label_smoothing=0.15, center_coef=0.3), rewards)


def test_every_ranking_weighs_the_same() -> None:
    """Ten comparisons of five responses count as much as one of two."""
    rewards = torch.randn(7, dtype=torch.float64)
    many = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    both = ranking_loss(rewards, compare(*many, (5, 6), groups=[0] * 10 + [1]))
    alone = ranking_loss(rewards, compare(*many)), ranking_loss(rewards, compare((5, 6)))
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    parts = [ranking_loss(rewards, c, num_rankings=2) for c in (compare(*many), compare((5, 6)))]
    torch.testing.assert_close(parts[0] + parts[1], both)


def test_smoothing_and_margin() -> None:
    """Which way round the label was is a matter of the smoothing alone; one that says nothing pulls to no side."""
    rewards = torch.randn(2, dtype=torch.float64)
    one = ranking_loss(rewards, compare((0, 1), margins=[0.7]), label_smoothing=0.2)
    other = ranking_loss(rewards, compare((1, 0), margins=[0.7]), label_smoothing=0.8)
    torch.testing.assert_close(one, other, rtol=1e-14, atol=0)
    level = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    ranking_loss(level, compare((0, 1), margins=[0.7]), label_smoothing=0.5).backward()
    assert level.grad is not None
    assert level.grad.abs().max() == 0


def test_ties_pull_together() -> None:
    rewards = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)
    c = compare((0, 1), ties=[True], margins=[5.0])
    loss = ranking_loss(rewards, c)
    loss.backward()
    assert rewards.grad is not None
    assert rewards.grad[0] > 0 > rewards.grad[1]
    flipped = compare((1, 0), ties=[True])
    assert loss == ranking_loss(rewards, flipped) == ranking_loss(rewards, c, label_smoothing=0.4)
    assert ranking_loss(torch.zeros(2, dtype=torch.float64), c).item() == pytest.approx(math.log(2), rel=1e-15)


def test_nothing_to_compare() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="no comparisons"):
        ranking_loss(torch.zeros(3), Comparisons(empty, empty, empty.bool(), empty.float(), empty))
