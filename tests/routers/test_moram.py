"""MoRAM: atoms that choose themselves by how strongly they answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelora
from moelora import routers
from moelora.experts import LinearContainer, build
from moelora.routers.moram import MoRAMConfig, MoRAMRouter
from moelora.routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo

R = 12


def route(z: Tensor, training: bool = True, **options: Any) -> RoutingRecord:
    site = SiteInfo("s", 0, 8, 8, (4, 8), (2.0, 2.0))
    made = MoRAMRouter(MoRAMConfig(**options), site).train(training)
    return made.route(RouteInput(z, z, RoutingContext(), site))


def layer(training: bool = True, **router: Any) -> LinearContainer:
    torch.manual_seed(0)
    base = nn.Linear(24, 20).requires_grad_(False)
    site = {
        "target": "any",
        "experts": {"kind": "rank1", "num_experts": 3, "r": 4, "alpha": 8},
        "router": {"kind": "moram", "temperature": 0.1, **router},
    }
    built = build(base, site)
    assert isinstance(built, LinearContainer)
    for parameter in built.experts.parameters():
        nn.init.normal_(parameter)
    return built.train(training)


def delta(built: LinearContainer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return built(x) - built.base(x)


def test_it_is_registered_under_both_of_its_names() -> None:
    assert routers.get("mora_continual") is routers.get("moram") is MoRAMRouter


@pytest.mark.parametrize("training", [True, False])
def test_the_update_is_the_definition(training: bool) -> None:
    built = layer(training, top_k=5)
    x = torch.randn(7, 24)
    with torch.no_grad():
        z = x @ built.lora_A.T
        s = z / z.norm(dim=-1, keepdim=True)
        wanted = torch.zeros(7, 20)
        for token in range(7):
            chosen = s[token].topk(5).indices
            w = (s[token, chosen] / 0.1).softmax(0)
            for weight, atom in zip(w, chosen.tolist(), strict=True):
                if training or s[token, atom] >= 0.2:
                    wanted[token] += 2.0 * weight * z[token, atom] * built.lora_B[:, atom]
    assert torch.allclose(delta(built, x), wanted, atol=1e-5)


def test_weights_sum_to_one_in_training_and_to_at_most_one_in_evaluation() -> None:
    z = torch.randn(200, R)
    assert torch.allclose(route(z).weights.sum(-1), torch.ones(200))
    record = route(z, training=False, threshold=0.3)
    dense, scores = record.dense_weights(), z / z.norm(dim=-1, keepdim=True)
    assert (dense[scores < 0.3] == 0).all()
    assert (dense.sum(-1) <= 1 + 1e-6).all() and (dense.sum(-1) < 0.999).any()
    kept = route(z).dense_weights()
    assert torch.equal(dense[dense > 0], kept[dense > 0])  # not renormalised


def test_scores_have_norm_one_and_a_zero_input_is_no_nan() -> None:
    built = layer()
    x = torch.randn(5, 24)
    x[2] = 0
    x.requires_grad_()
    with moelora.trace(built) as tape:
        built(x).square().sum().backward()
    squares = tape[""][0].logits.detach().square().sum(-1)
    assert torch.allclose(squares, torch.tensor([1.0, 1, 0, 1, 1]))
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in (built.lora_A, built.lora_B) if p.is_leaf)
    assert built.experts.lora_A.grad.isfinite().all() and built.experts.lora_A.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_the_update_scales_with_its_input(training: bool) -> None:
    built = layer(training)
    x = torch.randn(20, 24)
    assert torch.allclose(delta(built, 3.0 * x), 3.0 * delta(built, x), atol=1e-4)
    assert not torch.allclose(delta(built, -x), -delta(built, x), atol=0.1)  # the choice is signed


def test_the_order_of_atoms_does_not_matter() -> None:
    built = layer()
    x = torch.randn(20, 24)
    before = delta(built, x)
    order = torch.randperm(R)
    A, B = built.lora_A.detach()[order], built.lora_B.detach()[:, order]
    bank = built.experts
    with torch.no_grad():
        bank.old_lora_A.copy_(A[:8]), bank.lora_A.copy_(A[8:])
        bank.old_lora_B.copy_(B[:, :8]), bank.lora_B.copy_(B[:, 8:])
    assert torch.allclose(delta(built, x), before, atol=1e-5)


def test_an_infinite_temperature_over_all_atoms_averages_them() -> None:
    built = layer(top_k=R, temperature=1e6)
    x = torch.randn(20, 24)
    with torch.no_grad():
        wanted = 2.0 * x @ built.lora_A.T @ built.lora_B.T / R
    assert torch.allclose(delta(built, x), wanted, atol=1e-5)


def test_a_threshold_above_one_silences_all_atoms_in_evaluation_only() -> None:
    x = torch.randn(20, 24)
    assert not delta(layer(False, threshold=1.01), x).any()
    assert delta(layer(True, threshold=1.01), x).any()


@pytest.mark.parametrize(("top_k", "taken"), [(1, 2), (2, 2), (5, 5), (99, R)])
def test_at_least_two_and_at_most_all_atoms_are_taken(top_k: int, taken: int) -> None:
    assert route(torch.randn(3, R), top_k=top_k).indices.shape == (3, taken)
