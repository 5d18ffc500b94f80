"""LoRA-LEGO: units, clusters of them, and what must not change the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_cases import adapter_of, random_adapter, total, update

from moelora.composition import Adapter, distance, merge_adapters
from moelora.composition.adapter import Factors
from moelora.composition.lego import cluster

RANKS = {"q": 3, "v": 2}


def adapters() -> list[Adapter]:
    return [random_adapter(1, RANKS, 2.0), random_adapter(2, {"q": 4}, 0.5), random_adapter(3, RANKS, 1.0)]


def lego(given: list[Adapter], weights: list[float] | None = None, **options: Any) -> Adapter:
    return merge_adapters(given, "lego", weights, **options)


@pytest.mark.parametrize("k", [10, 50])
def test_as_many_clusters_as_ranks_make_exactly_the_sum(k: int) -> None:
    weights = [0.7, -1.2, 2.0]
    merged = lego(adapters(), weights, k=k)
    assert [factors.rank for factors in merged.factors.values()] == [10, 4]
    for path in RANKS:
        assert torch.allclose(update(merged, path), total(adapters(), weights, path), atol=2e-5)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_result_does_not_depend_on_the_choice_of_factors(k: int) -> None:
    """(Q A, B Q^-1) is the same adapter, and so is alpha in the factors."""
    changed = []
    for seed, adapter in enumerate(adapters()):
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for path, each in adapter.factors.items():
            Q = torch.randn(each.rank, each.rank, generator=generator).double()
            A, B = Q @ each.A.double(), each.B.double() @ torch.linalg.inv(Q)
            factors[path] = Factors(A, 0.25 * B, 4 * each.scale)
        changed.append(adapter_of(factors))
    first, second = lego(adapters(), k=k), lego(changed, k=k)
    for path in RANKS:
        assert torch.allclose(update(first, path), update(second, path), atol=1e-5)
        assert update(first, path).norm() > 1
        assert not torch.allclose(first.factors[path].A.abs(), adapters()[0].factors[path].A[:1].abs(), atol=1e-2)


def test_the_seed_decides_and_the_order_of_the_adapters_hardly_matters() -> None:
    assert torch.equal(lego(adapters(), k=4).factors["q"].A, lego(adapters(), k=4).factors["q"].A)
    one = [lego(adapters(), k=4, seed=seed, restarts=1) for seed in range(6)]
    assert len({round(update(each, "q").norm().item(), 3) for each in one}) > 1, "single starts end differently"


def test_like_units_go_together_and_keep_their_length() -> None:
    """Two adapters that nearly agree, one of them with signs turned, become one adapter of their mean length."""
    first = random_adapter(1, {"q": 2})
    each = first.factors["q"]
    noise = 0.01 * torch.randn(2, 12, generator=torch.Generator().manual_seed(9))
    second = adapter_of({"q": Factors(-each.A + noise, -each.B, 1.0)})
    merged = lego([first, second], k=2)
    assert distance(merged, [first, second], [0.5, 0.5]).relative < 0.02
    assert distance(merged, [first, second]).relative == pytest.approx(0.5, abs=0.02), "half of the sum"


def test_a_centroid_has_the_mean_norm_of_its_units() -> None:
    a, b = torch.zeros(1, 12), torch.zeros(1, 12)
    a[0, 0], b[0, 1] = 3.0, 5.0
    up = torch.ones(10, 1) / 10**0.5
    given = [adapter_of({"q": Factors(a, 3 * up, 1.0)}), adapter_of({"q": Factors(b, 5 * up, 1.0)})]
    merged = lego(given, k=1).factors["q"]
    unit = torch.cat([merged.A[0], merged.B[:, 0]])
    # Balanced units: 3 and 5 on each side, so of norm 3 sqrt(2) and 5 sqrt(2).
    assert unit.norm() == pytest.approx(4 * 2**0.5, rel=1e-5)
    assert merged.A[0, :2].abs().tolist() == pytest.approx(
        (torch.tensor([3.0, 5.0]) * (unit.norm() / torch.tensor([3.0, 5.0, 8.0]).norm())).tolist(), rel=1e-5
    )


def test_a_negative_weight_takes_the_unit_away() -> None:
    one = random_adapter(1, {"q": 2})
    merged = lego([one], [-0.5], k=2)
    assert torch.allclose(update(merged, "q"), -0.5 * update(one, "q"), atol=1e-5)


def test_units_without_length_are_no_units() -> None:
    one = random_adapter(1, {"q": 3})
    thin = Factors(one.factors["q"].A, one.factors["q"].B * torch.tensor([1.0, 0.0, 0.0]), 1.0)
    assert lego([adapter_of({"q": thin})], k=3).factors["q"].rank == 1
    nothing = Factors(one.factors["q"].A, torch.zeros(10, 3), 1.0)
    merged = lego([adapter_of({"q": nothing}), adapter_of({"q": nothing})], k=2)
    assert merged.factors["q"].rank == 1 and update(merged, "q").abs().max() == 0
    assert torch.allclose(update(lego([one, adapter_of({"q": nothing})], k=3), "q"), update(one, "q"), atol=1e-5)


def test_an_adapter_with_the_weight_0_takes_no_part() -> None:
    one, other = random_adapter(1, {"q": 3}), random_adapter(2, {"q": 3})
    assert torch.allclose(update(lego([one, other], [1.0, 0.0], k=3), "q"), update(one, "q"), atol=1e-5)
    assert torch.equal(lego([one, other], [1.0, 0.0], k=2).factors["q"].A, lego([one], k=2).factors["q"].A)
    assert update(lego([one, other], [0.0, 0.0]), "q").abs().max() == 0


def test_clusters_are_those_that_stand_apart_and_none_is_empty() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    truth = torch.arange(30) % 3
    signs = torch.where(torch.rand(30, generator=generator) < 0.5, -1.0, 1.0).double()
    units = signs.unsqueeze(1) * (centres[truth] + 0.1 * torch.randn(30, 6, generator=generator, dtype=torch.float64))
    found = cluster(units, 3, generator)
    for group in range(3):
        assert len(set(found.members[truth == group].tolist())) == 1
    assert len(set(found.members.tolist())) == 3
    assert found.spread < 30 * 6 * 0.1**2 * 2
    inside = units * found.signs.unsqueeze(1) - found.centroids[found.members]
    assert found.spread == pytest.approx(inside.square().sum().item())
    # Fewer different units than clusters: copies are told apart, so that every centroid is some unit.
    copies = units[:2].repeat(3, 1)
    full = cluster(copies, 5, generator)
    assert sorted(full.members.bincount(minlength=5).tolist()) == [1, 1, 1, 1, 2]
