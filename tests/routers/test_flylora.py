"""FlyLoRA: ranks chosen by a fixed projection, and a bias that evens out their load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelora
from moelora.errors import ConfigError
from moelora.experts import LinearContainer, build
from moelora.routers.flylora import FlyLoRAConfig, FlyLoRARouter
from moelora.routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo

R, K = 16, 5


def layer(**router: Any) -> LinearContainer:
    torch.manual_seed(0)
    base = nn.Linear(40, 24).requires_grad_(False)
    site = {
        "target": "any",
        "experts": {"kind": "sparse_projection", "r": R, "alpha": 32},
        "router": {"kind": "flylora", "top_k": K, **router},
    }
    built = build(base, site)
    assert isinstance(built, LinearContainer)
    nn.init.normal_(built.experts.lora_B)
    return built


def delta(built: LinearContainer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return built(x) - built.base(x)


def router(ranks: tuple[int, ...] = (R,), **options: Any) -> FlyLoRARouter:
    return FlyLoRARouter(FlyLoRAConfig(**options), SiteInfo("s", 0, 8, 8, ranks, (1.0,) * len(ranks)))


def route(made: FlyLoRARouter, z: Tensor) -> RoutingRecord:
    return made.route(RouteInput(z, z, RoutingContext(), made.site))


@pytest.mark.parametrize("select", ["abs", "signed", "abs_shifted"])
def test_the_choice_is_the_definition(select: str) -> None:
    made = router(select=select, top_k=K)
    made.bias.copy_(torch.randn(R) * 0.5)
    z = torch.randn(3, 7, R)
    score = {"abs": z.abs() + made.bias, "signed": z + made.bias, "abs_shifted": (z + made.bias).abs()}[select]
    record = route(made, z)
    assert torch.equal(record.indices, score.topk(K).indices)
    assert (record.weights == 1).all() and (record.dense_weights().sum(-1) == K).all()


def test_ties_go_to_the_lower_rank() -> None:
    assert (route(router(top_k=3), torch.zeros(4, R)).indices == torch.arange(3)).all()


def test_all_ranks_without_bias_are_lora_with_a_frozen_projection() -> None:
    built = layer(top_k=R)
    x = torch.randn(6, 40)
    assert torch.allclose(delta(built, x), 2.0 * x @ built.lora_A.T @ built.lora_B.T, atol=1e-5)


def test_the_update_and_its_gradients_are_the_definition() -> None:
    built = layer()
    x = torch.randn(6, 40, requires_grad=True)
    weight = torch.randn(6, 24)
    with moelora.trace(built) as tape:
        built(x).backward(weight)
    mask = tape[""][0].dense_weights()
    z = x.detach() @ built.lora_A.T
    assert torch.allclose(delta(built, x), 2.0 * (z * mask) @ built.lora_B.T, atol=1e-5)
    assert torch.allclose(built.experts.lora_B.grad, 2.0 * weight.T @ (z * mask), atol=1e-5)
    through = 2.0 * ((weight @ built.lora_B) * mask) @ built.lora_A
    assert torch.allclose(x.grad, weight @ built.base.weight + through, atol=1e-5)
    assert torch.equal((built.experts.lora_B.grad == 0).all(0), ~mask.bool().any(0))
    assert built.experts.lora_A.grad is None


def test_a_zero_lora_b_changes_nothing() -> None:
    built = layer()
    nn.init.zeros_(built.experts.lora_B)
    assert not delta(built, torch.randn(6, 40)).any()


@pytest.mark.parametrize("select", ["abs", "signed"])
def test_the_update_scales_with_its_input(select: str) -> None:
    built = layer(select=select)
    x = torch.randn(50, 40)
    once, twice, mirrored = (delta(built, c * x) for c in (1.0, 3.0, -2.0))
    assert torch.allclose(twice, 3.0 * once, atol=1e-4)
    assert torch.allclose(mirrored, -2.0 * once, atol=1e-4) == (select == "abs")


@pytest.mark.parametrize(
    ("select", "rate", "even"),
    [("abs", 1e-2, True), ("signed", 1e-2, True), ("abs_shifted", 1e-2, False), ("abs", 0.0, False)],
)
def test_the_bias_evens_out_the_load_of_skewed_inputs(select: str, rate: float, even: bool) -> None:
    """Except where a very negative bias attracts: |z + d| is not monotone in d."""
    width, ranks, steps = 256, 32, 300
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(ranks, width, generator=generator) / ranks
    offset = torch.randn(width, generator=generator)
    made = router((ranks,), select=select, bias_rate=rate, top_k=8)
    load = torch.zeros(ranks, dtype=torch.float64)
    for step in range(steps):
        counts = route(made, (torch.randn(64, width, generator=generator) + offset) @ A.T).counts()
        made.on_step_end(counts)
        if step >= steps - 100:
            load += counts
    ratio = load / load.mean()
    assert (ratio.min() >= 0.9 and ratio.max() <= 1.1) == even, (float(ratio.min()), float(ratio.max()))


def test_a_step_moves_each_bias_by_the_rate_towards_the_mean() -> None:
    made = router((4,), top_k=2, bias_rate=0.25)
    made.on_step_end(torch.tensor([3.0, 1.0, 2.0, 2.0], dtype=torch.float64))
    assert made.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    made.on_step_end(torch.zeros(4, dtype=torch.float64))
    assert made.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_within_each_expert_ranks_compete_and_are_balanced_by_themselves() -> None:
    made = router((4, 2, 6), top_k=3, within="expert", bias_rate=1.0)
    z = torch.randn(9, 12)
    dense = route(made, z).dense_weights()
    assert [part.sum(-1).unique().tolist() for part in dense.split([4, 2, 6], -1)] == [[3.0], [2.0], [3.0]]
    for part, got in zip(z.abs().split([4, 2, 6], -1), dense.split([4, 2, 6], -1), strict=True):
        count = min(3, part.shape[-1])
        assert torch.equal(got, torch.zeros_like(part).scatter(-1, part.topk(count).indices, 1.0))
    made.on_step_end(torch.tensor([9.0, 1, 1, 1, 8, 8, 2, 2, 2, 2, 2, 2], dtype=torch.float64))
    assert made.bias.tolist() == [-1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_a_forward_moves_nothing() -> None:
    built = layer()
    before = built.router.bias.clone()
    for training in (True, False):
        built.train(training)(torch.randn(5, 40))
    assert torch.equal(built.router.bias, before)
    assert "bias" in built.router.state_dict() and not list(built.router.parameters())


def test_more_ranks_than_there_are_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"router.top_k is 17 but there are 16 ranks: choose 1..16"):
        moelora.config.SiteConfig.parse(
            {
                "target": "any",
                "experts": {"kind": "sparse_projection", "r": 16},
                "router": {"kind": "flylora", "top_k": 17},
            }
        )
