"""SMoRA: each rank an expert with a row of the router, or one row for a group of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelora
from moelora.config import SiteConfig
from moelora.errors import ConfigError
from moelora.experts import LinearContainer, build
from moelora.routers.smora import SMoRARouter

R, K, ALPHA = 16, 4, 8.0


def layer(ranks: int | list[int] = R, **router: Any) -> LinearContainer:
    torch.manual_seed(0)
    base = nn.Linear(24, 20).requires_grad_(False)
    count = 1 if isinstance(ranks, int) else len(ranks)
    site = {
        "target": "any",
        "experts": {"kind": "lora", "num_experts": count, "r": ranks, "alpha": ALPHA},
        "router": {"kind": "smora", "top_k": K, "bias_rate": 0.25, **router},
    }
    built = build(base, site)
    assert isinstance(built, LinearContainer) and isinstance(built.router, SMoRARouter)
    nn.init.normal_(built.experts.lora_B)
    nn.init.normal_(built.router.weight, std=0.3)
    return built


def gates(built: LinearContainer, x: Tensor) -> Tensor:
    """(..., R) the published g, whose k values sum to k."""
    with torch.no_grad(), moelora.trace(built) as tape:
        built(x)
    record = tape[""][0]
    return record.dense_weights() * K / R


def delta(built: LinearContainer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return built(x) - built.base(x)


@pytest.mark.parametrize("score", ["sigmoid", "softmax_topk"])
@pytest.mark.parametrize("in_value", [True, False])
def test_the_gates_are_the_definition(score: str, in_value: bool) -> None:
    built = layer(score=score, bias_in_value=in_value)
    built.router.bias.copy_(torch.randn(R) * 0.1)
    x = torch.randn(5, 24)
    logits = x @ built.router.weight.detach().T
    s = logits.sigmoid() if score == "sigmoid" else logits
    got = gates(built, x)
    for token in range(5):
        chosen = (s[token] + built.router.bias).topk(K).indices
        value = (s[token] + built.router.bias * in_value)[chosen]
        share = value / value.sum() if score == "sigmoid" else value.softmax(0)
        wanted = torch.zeros(R).scatter(0, chosen, K * share)
        assert torch.allclose(got[token], wanted, atol=1e-5)


@pytest.mark.parametrize("score", ["sigmoid", "softmax_topk"])
@pytest.mark.parametrize("partition", [1, 2, 8])
@pytest.mark.filterwarnings("ignore:router 'smora' with top_k 4 and partition 8")
def test_exactly_k_gates_are_open_and_sum_to_k(score: str, partition: int) -> None:
    got = gates(layer(score=score, partition=partition), torch.randn(50, 24))
    assert ((got != 0).sum(-1) == K).all()
    assert torch.allclose(got.sum(-1), torch.full((50,), float(K)), atol=1e-5)


def test_a_zero_router_over_all_ranks_is_lora() -> None:
    built = layer(top_k=R)
    nn.init.zeros_(built.router.weight)
    x = torch.randn(6, 24)
    with torch.no_grad():
        wanted = ALPHA / R * x @ built.lora_A.T @ built.lora_B.T
    assert torch.allclose(delta(built, x), wanted, atol=1e-5)


def test_open_gates_are_lora_with_alpha_over_k() -> None:
    """With equal logits each of the k chosen gates is 1, and what they add has the published scale alpha / k."""
    built = layer()
    nn.init.zeros_(built.router.weight)
    built.router.bias[:K] += 1e-4  # the first ranks are the chosen ones
    x = torch.randn(6, 24)
    with torch.no_grad():
        wanted = ALPHA / K * (x @ built.lora_A[:K].T) @ built.lora_B[:, :K].T
    assert torch.allclose(delta(built, x), wanted, atol=1e-4)


def test_with_a_row_for_each_expert_it_is_a_mixture_of_loras() -> None:
    """partition = r: top-(k / r) of R / r experts of rank r, with sigmoid gates that sum to k / r."""
    built = layer(partition=2)
    x = torch.randn(7, 24)
    with torch.no_grad():
        s = (x @ built.router.weight.T).sigmoid()
        top = s.topk(K // 2, dim=-1)
        wanted = torch.zeros(7, 20)
        for token in range(7):
            for expert, value in zip(top.indices[token].tolist(), top.values[token], strict=True):
                part = slice(2 * expert, 2 * expert + 2)
                gate = (K // 2) * value / top.values[token].sum()
                wanted[token] += ALPHA / K * gate * built.lora_B[:, part] @ (built.lora_A[part] @ x[token])
    assert torch.allclose(delta(built, x), wanted, atol=1e-5)


def test_ranks_of_several_experts_have_the_scale_of_the_method_too() -> None:
    """alpha / k whatever the rank of the expert that a rank belongs to."""
    one, several = layer(), layer([2, 4, 10])
    x = torch.randn(6, 24)
    assert torch.allclose(delta(one, x), delta(several, x), atol=1e-5)


def test_the_masked_form_is_the_indexed_one_in_all_gradients() -> None:
    """The authors' kernels: gather k rows of A and k columns of B for each token."""
    built = layer()
    x = torch.randn(9, 24)
    x[5] = x[2]  # the same ranks for two tokens
    weight = torch.randn(9, 20)
    trained = [built.experts.lora_A, built.experts.lora_B, built.router.weight]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *trained)]
    inner, A, B, W = leaves
    s = (inner @ W.T).sigmoid()
    ids = s.detach().topk(K, dim=-1).indices
    chosen = s.gather(-1, ids)
    gate = K * chosen / chosen.sum(-1, keepdim=True)
    low = torch.einsum("td,tkd->tk", inner, A[ids])
    out = ALPHA / K * torch.einsum("tk,otk->to", low * gate, B[:, ids])
    (out * weight).sum().backward()
    hidden = x.clone().requires_grad_()
    got = built(hidden)
    (got * weight).sum().backward()
    assert torch.allclose(got - built.base(x), out, atol=1e-5)
    found = [hidden.grad - weight @ built.base.weight, *(p.grad for p in trained)]
    for one, leaf in zip(found, leaves, strict=True):
        assert torch.allclose(one, leaf.grad, atol=1e-5, rtol=1e-4)


def test_only_a_step_moves_the_bias_and_nothing_trains_it() -> None:
    built = layer()
    for training in (True, False):
        built.train(training)(torch.randn(5, 24)).sum().backward()
    assert not built.router.bias.any() and not built.router.bias.requires_grad
    built.router.on_step_end(torch.tensor([3.0, 1.0, *[2.0] * 14], dtype=torch.float64))
    assert built.router.bias.tolist() == [-0.25, 0.25, *[0.0] * 14]


def test_the_principled_gate_is_never_negative() -> None:
    x = torch.randn(50, 24)
    for in_value in (True, False):
        built = layer(top_k=R - 1, bias_in_value=in_value)
        built.router.bias[:3] = -1.5
        assert (gates(built, x) < 0).any() == in_value


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 2, "partition": 2}])
@pytest.mark.parametrize("score", ["sigmoid", "softmax_topk"])
def test_constant_gates_teach_the_router_nothing_and_are_warned_of(options: dict[str, Any], score: str) -> None:
    with pytest.warns(UserWarning, match="the task teaches the router nothing; set top_k above partition"):
        built = layer(score=score, **options)
    built(torch.randn(5, 24)).square().sum().backward()
    assert built.experts.lora_A.grad.any()
    assert built.router.weight.grad.abs().max() < 1e-3 * built.experts.lora_A.grad.abs().max()


def test_a_partition_that_does_not_divide_the_ranks_is_refused() -> None:
    site = {"target": "any", "experts": {"num_experts": 1, "r": 16}, "router": {"kind": "smora", "partition": 3}}
    with pytest.raises(ConfigError, match=r"router.partition is 3 but there are 16 ranks: choose a divisor"):
        SiteConfig.parse(site)


def test_a_token_that_no_rank_answers_gets_no_update_and_no_nan() -> None:
    built = layer()
    nn.init.ones_(built.router.weight)
    x = torch.randn(4, 24)
    x[1] = -100  # sigmoid(-2400) is 0 in float32
    x.requires_grad_()
    out = built(x)
    out.square().sum().backward()
    assert torch.equal(out[1], built.base(x)[1]) and out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in built.parameters() if p.grad is not None)
    assert not torch.allclose(out[0], built.base(x)[0], atol=1e-3)


def test_small_moves_of_the_bias_add_up_in_a_half_precision_model() -> None:
    built = layer(bias_rate=1e-5).to(torch.bfloat16)
    for _ in range(100):
        built.router.on_step_end(torch.tensor([3.0, 1.0, *[2.0] * 14], dtype=torch.float64))
    assert built.router.bias[:3].tolist() == pytest.approx([-1e-3, 1e-3, 0.0], rel=1e-4)
    assert built(torch.randn(5, 24, dtype=torch.bfloat16)).isfinite().all()
