"""The leave-one-out estimator and what is summed for it; its expectation is in tests/reference/test_remix.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora.errors import UserError
from moelora.routers import rloo
from moelora.routing import RoutingRecord


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def record_of(log_prob: Tensor, mask: Tensor | None = None, owner: str | None = None) -> RoutingRecord:
    logits = log_prob.unsqueeze(-1).expand(*log_prob.shape, 3)
    return RoutingRecord(None, torch.ones_like(logits), 3, logits=logits, log_prob=log_prob, mask=mask, owner=owner)


@pytest.mark.parametrize("per_example", [True, False])
def test_a_constant_added_to_all_losses_changes_nothing(per_example: bool) -> None:
    losses = random(4, 3)
    found = rloo.advantages(losses + 100, per_example)
    assert torch.allclose(found, rloo.advantages(losses, per_example), atol=1e-12)
    assert torch.allclose(found.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("selections", [2, 3, 7])
def test_equal_losses_give_exactly_no_advantage(selections: int) -> None:
    losses = torch.tensor([[1 / 3, 0.1, 7.7]]).expand(selections, 3)
    assert not rloo.advantages(losses).any()
    assert not rloo.advantages(losses, per_example=False).any()


def test_one_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="leave-one-out baseline takes at least 2"):
        rloo.advantages(random(1, 3))


def test_advantages_leave_the_own_loss_out() -> None:
    losses = random(4, 3)
    for m in range(4):
        others = torch.cat([losses[:m], losses[m + 1 :]])
        expected = (losses[m] - others.mean(0)) / 4 / 3
        assert torch.allclose(rloo.advantages(losses)[m], expected)
        batch = (losses[m].mean() - others.mean()) / 4
        assert torch.allclose(rloo.advantages(losses, per_example=False)[m], batch.expand(3))


def test_for_one_example_both_forms_are_one() -> None:
    losses = random(5, 1)
    assert torch.allclose(rloo.advantages(losses), rloo.advantages(losses, per_example=False))


def test_advantages_of_examples_vary_less_by_the_size_of_the_batch() -> None:
    """Independent examples with one decision each: an example's advantage leaves the noise of the others out."""
    losses, scores = random(2000, 4, 16), random(2000, 4, 16, seed=1)
    variance = {}
    for per_example in (True, False):
        pairs = zip(losses, scores, strict=True)
        estimates = [(rloo.advantages(one, per_example) * score).sum() for one, score in pairs]
        variance[per_example] = torch.stack(estimates).var().item()
    assert variance[False] / variance[True] == pytest.approx(16, rel=0.1)
    harder = losses[0] + 10 * random(16, seed=2)  # an example that is hard under all selections tells nothing
    assert torch.allclose(rloo.advantages(harder), rloo.advantages(losses[0]), atol=1e-12)


def test_the_surrogate_keeps_the_gradient_of_the_losses() -> None:
    losses, log_prob = random(3, 2).requires_grad_(), random(3, 2, seed=1).requires_grad_()
    rloo.surrogate(losses, log_prob).backward()
    assert torch.allclose(losses.grad, torch.full((3, 2), 1 / 6, dtype=torch.float64))
    assert torch.equal(log_prob.grad, rloo.advantages(losses))


def test_log_probabilities_are_summed_over_real_tokens_and_sites() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    one, two = random(2, 3), random(2, 3, seed=1)
    expected = torch.stack([one[0, :2].sum() + two[0, :2].sum(), one[1, :1].sum() + two[1, :1].sum()])
    assert torch.allclose(rloo.example_log_prob([record_of(one, mask), record_of(two, mask)], 2), expected)
    flat = record_of(one.flatten(), mask.flatten())
    assert torch.allclose(rloo.example_log_prob([flat, record_of(two, mask)], 2), expected)
    whole = record_of(random(2), mask)  # one decision for each sequence
    assert torch.equal(rloo.example_log_prob([whole], 2), random(2))
    undrawn = RoutingRecord(None, torch.ones(2, 3, 3), 3)
    assert torch.allclose(rloo.example_log_prob([undrawn, record_of(one)], 2), one.sum(1))


def test_a_shared_decision_counts_once() -> None:
    values = random(2, 3)
    records = [record_of(values, owner="gate_proj"), record_of(values, owner="gate_proj"), record_of(values, owner="b")]
    assert torch.allclose(rloo.example_log_prob(records, 2), 2 * values.sum(1))
    with pytest.raises(UserError, match=r"router of 'gate_proj' see different inputs"):
        rloo.example_log_prob([records[0], record_of(values + 1, owner="gate_proj")], 2)


def test_without_a_sample_there_is_nothing_to_sum() -> None:
    with pytest.raises(UserError, match="no site sampled its experts"):
        rloo.example_log_prob([RoutingRecord(None, torch.ones(2, 3, 3), 3)], 2)
    with pytest.raises(UserError, match="cannot be told apart by 4 examples"):
        rloo.example_log_prob([record_of(random(2, 3))], 4)


@pytest.mark.parametrize("causal", [True, False])
def test_losses_are_means_over_the_labelled_tokens_of_an_example(causal: bool) -> None:
    logits = random(3, 5, 7).float()
    labels = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(1))
    labels[0, 3:] = -100
    labels[1] = -100
    found = rloo.example_losses(logits, labels, causal)
    for row in range(3):
        each = [
            -logits[row, place - causal].log_softmax(-1)[labels[row, place]]
            for place in range(int(causal), 5)
            if labels[row, place] != -100
        ]
        assert found[row].item() == pytest.approx(sum(each).item() / len(each) if each else 0.0, rel=1e-5)


def test_a_policy_finds_the_expert_with_the_lower_loss() -> None:
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    cost = torch.tensor([1.0, 0.2, 1.0, 0.8])
    for seed in range(100):
        drawn = rloo.seeded_exponential((8, 16, 4), range(8 * seed, 8 * seed + 8), "router", torch.device("cpu"))
        picks = rloo.gumbel_top_k(logits.detach().expand(8, 16, 4), drawn, 2)
        log_prob = rloo.plackett_luce(logits.expand(8, 16, 4), picks)
        optimizer.zero_grad()
        rloo.surrogate(cost[picks].mean(-1), log_prob).backward()
        optimizer.step()
    assert logits.topk(2).indices.tolist() == [1, 3]
    assert logits.softmax(0)[1] > 0.5
