"""Arrow's prototypes and scores; numbers of PEFT are in tests/reference/test_arrow.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import ConfigError, UserError
from moelora.experts import LinearContainer, build
from moelora.experts.frozen import FrozenExperts
from moelora.routers.arrow import ArrowRouter, Factors, gen_know_sub, power_iteration, top_right_singular
from moelora.routing import RoutingRecord

RANKS = [1, 3, 2, 4]


def adapters(ranks: list[int], width_in: int = 16, width_out: int = 12) -> list[Factors]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(r, width_in, generator=generator), torch.randn(width_out, r, generator=generator)) for r in ranks
    ]


def layer(ranks: list[int] | None = None, fit: bool = True, **options: Any) -> LinearContainer:
    ranks = RANKS if ranks is None else ranks
    config = {
        "target": "any",
        "experts": {"kind": "frozen", "num_experts": len(ranks), "r": ranks, "alpha": 4.0},
        "router": {"kind": "arrow", "top_k": 2, **options},
    }
    container = build(nn.Linear(16, 12), config)
    assert isinstance(container, LinearContainer) and isinstance(container.experts, FrozenExperts)
    for index, (A, B) in enumerate(adapters(ranks)):
        container.experts.load_expert(index, A, B)
    if fit:
        container.fit_router()
    return container


def prototypes(container: LinearContainer) -> Tensor:
    assert isinstance(container.router, ArrowRouter)
    return container.router.prototypes


@pytest.mark.parametrize("method", ["exact", "power"])
def test_prototypes_of_any_rank_are_the_top_right_singular_vectors(method: str) -> None:
    container = layer(method=method, n_iter=400)
    for row, (A, B) in zip(prototypes(container), adapters(RANKS), strict=True):
        exact = torch.linalg.svd((B @ A).double()).Vh[0]
        assert row.norm().item() == pytest.approx(1, abs=1e-5)
        assert (row.double() @ exact).abs().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["exact", "power"])
def test_an_expert_of_rank_zero_has_no_direction_and_is_chosen_last(method: str) -> None:
    config = {
        "target": "any",
        "experts": {"kind": "low_rank", "num_experts": 3, "r": [0, 2, 3], "alpha": 1.0},
        "router": {"kind": "arrow", "top_k": 2, "method": method},
    }
    container = build(nn.Linear(16, 12), config)
    with torch.no_grad():
        for tensor in container.adapter_tensors().values():
            tensor.normal_()
    container.fit_router()
    assert isinstance(container.router, ArrowRouter)
    assert [bool(row.any()) for row in container.router.prototypes] == [False, True, True]
    records: list[RoutingRecord] = []
    with container.slot.using(listener=lambda _, record: records.append(record)):
        assert container(torch.randn(50, 16)).isfinite().all()
    assert records[0].indices is not None and (records[0].indices > 0).all()


def test_prototypes_do_not_depend_on_how_the_product_is_written() -> None:
    A, B = adapters([4])[0]
    mixer = torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4, dtype=torch.float64)
    one = top_right_singular(A, B)
    two = top_right_singular(mixer @ A.double(), B.double() @ torch.linalg.inv(mixer))
    assert (one @ two).abs().item() == pytest.approx(1, abs=1e-5)


def test_ranks_above_the_width_and_adapters_that_add_nothing_have_a_unit_prototype() -> None:
    A, B = torch.randn(20, 16), torch.randn(12, 20)
    exact = torch.linalg.svd((B @ A).double()).Vh[0]
    assert (top_right_singular(A, B).double() @ exact).abs().item() == pytest.approx(1, abs=1e-5)
    assert top_right_singular(torch.randn(4, 16), torch.zeros(12, 4)).norm().item() == pytest.approx(1, abs=1e-5)


def test_power_iterations_are_drawn_by_the_seed_alone() -> None:
    A, B = adapters([4])[0]
    state = torch.get_rng_state()
    assert torch.equal(power_iteration(A, B, 2, seed=5), power_iteration(A, B, 2, seed=5))
    assert not torch.equal(power_iteration(A, B, 2, seed=5), power_iteration(A, B, 2, seed=6))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_weights_are_the_softmax_of_the_chosen_sizes(temperature: float) -> None:
    container = layer(temperature=temperature)
    x = torch.randn(9, 16)
    record = container.decide(x)
    assert record is not None
    sizes = (x @ prototypes(container).T).abs()
    top = sizes.topk(2)
    assert torch.equal(record.indices, top.indices)
    assert torch.allclose(record.weights, (top.values / temperature).softmax(-1))
    flipped = container.decide(-x)
    assert flipped is not None and torch.equal(flipped.weights, record.weights)


def test_mixed_factors_have_every_cross_term() -> None:
    ranks = [2, 2, 2]
    container = layer(ranks, mix="factors")
    x = torch.randn(9, 16)
    record = container.decide(x)
    assert record is not None and record.mix == "factors"
    weights = record.dense_weights()
    expected = container.base(x)
    for i, (A, _) in enumerate(adapters(ranks)):
        for j, (_, B) in enumerate(adapters(ranks)):
            expected = expected + weights[:, i, None] * weights[:, j, None] * 2.0 * (x @ A.T @ B.T)
    assert torch.allclose(container(x), expected, atol=1e-4)
    assert not torch.allclose(container(x), layer(ranks)(x), atol=1e-1)


def test_one_adapter_is_itself() -> None:
    container = layer([3], top_k=1)
    x = torch.randn(9, 16)
    A, B = adapters([3])[0]
    assert torch.allclose(container(x), container.base(x) + 4.0 / 3 * (x @ A.T @ B.T), atol=1e-4)


def test_a_router_without_prototypes_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"has no prototypes: .*model.fit_routers\(\)"):
        layer(fit=False)(torch.randn(2, 16))


def test_factors_of_different_ranks_cannot_be_mixed() -> None:
    with pytest.raises(ConfigError, match=r"needs experts of one rank, but theirs are \[1, 3, 2, 4\]"):
        layer(mix="factors")


def site(target: str, **options: Any) -> dict[str, Any]:
    return {
        "target": target,
        "experts": {"kind": "frozen", "num_experts": 3, "r": 2, "alpha": 4.0},
        "router": {"kind": "arrow", "top_k": 2, **options.pop("router", {})},
        **options,
    }


def test_a_block_with_experts_in_one_projection_can_be_routed(tiny_llama: LlamaForCausalLM) -> None:
    block = tiny_llama.model.layers[0].mlp
    container = build(block, site("mlp", projections=["up_proj"]))
    bank = container.experts["up_proj"]
    for index, (A, B) in enumerate(adapters([2, 2, 2], 32, 48)):
        bank.load_expert(index, A, B)
    container.fit_router()
    x = torch.randn(5, 32)
    record = container.decide(x)
    assert record is not None
    ups = [block.up_proj(x) + 2.0 * (x @ A.T @ B.T) for A, B in adapters([2, 2, 2], 32, 48)]
    parts = [block.down_proj(block.act_fn(block.gate_proj(x)) * up) for up in ups]
    expected = sum(record.dense_weights()[:, e, None] * parts[e] for e in range(3))
    assert torch.allclose(container(x), expected, atol=1e-4)


def test_blocks_that_have_no_one_projection_to_follow_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    block = tiny_llama.model.layers[0].mlp
    with pytest.raises(ConfigError, match="follows from the experts of one projection, but this block has several"):
        build(block, site("mlp"))
    with pytest.raises(ConfigError, match="mixes factors, but a block has a nonlinearity between them"):
        build(block, site("mlp", projections=["up_proj"], router={"mix": "factors"}))
    with pytest.raises(ConfigError, match="the experts read 48 features but the router 32"):
        build(block, site("mlp", projections=["down_proj"])).fit_router()


def test_sites_that_share_a_router_cannot_be_fitted(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [site("q_proj", router={"share": "all"})]})
    with pytest.raises(ConfigError, match="set share to 'module'"):
        model.fit_routers()


def test_subtraction_needs_general_adapters_and_one_rank_for_factors() -> None:
    with pytest.raises(ConfigError, match="needs at least one general adapter"):
        gen_know_sub(adapters([2]), [])
    with pytest.raises(ConfigError, match=r"factors of the ranks \[1, 2\] cannot be subtracted"):
        gen_know_sub(adapters([2]), adapters([1]), "peft_factors")
    (A, B), (A_general, B_general) = adapters([2, 1])
    (A_new, B_new) = gen_know_sub([(A, B)], [(A_general, B_general)])[0]
    assert torch.allclose(B_new @ A_new, B @ A - B_general @ A_general, atol=1e-5)
