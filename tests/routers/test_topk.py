"""The choice of the k largest: exact, whatever way is the quicker one."""

from __future__ import annotations

import pytest
import torch

from moelora.routers.topk import top_indices


def by_sorting(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("experts", [16, 17, 64])
def test_ties_go_to_the_lower_index(experts: int, k: int) -> None:
    scores = torch.randint(0, 4, (3, 50, experts)).float()
    assert torch.equal(top_indices(scores, k), by_sorting(scores, k))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("special", [-torch.inf, torch.inf, torch.nan])
def test_no_expert_is_chosen_twice_where_scores_are_not_finite(special: float, k: int) -> None:
    scores = torch.where(torch.rand(40, 16) < 0.9, special, torch.randn(40, 16))
    assert torch.equal(top_indices(scores, k), by_sorting(scores, k))


def test_the_scores_are_left_alone() -> None:
    scores = torch.randn(5, 16)
    before = scores.clone()
    top_indices(scores, 2)
    assert torch.equal(scores, before)
    assert top_indices(torch.randn(0, 16), 2).shape == (0, 2)
