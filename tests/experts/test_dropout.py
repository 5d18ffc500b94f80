"""Dropout of the experts' input: one mask for all experts, or one for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import ConfigError
from moelora.experts import LinearContainer, build

P = 0.4


def container(mode: str, kind: str = "lora", **router: Any) -> LinearContainer:
    """Three experts of rank 1 with the same factors: only their masks can make them differ."""
    options = {"kind": kind, "num_experts": 3, "r": 1, "alpha": 1.0, "dropout": P, "expert_dropout": mode}
    routing = {"kind": "topk", "top_k": 3, **router}
    base = nn.Linear(16, 8).requires_grad_(False)
    built = build(base, {"target": "any", "experts": options, "router": routing})
    assert isinstance(built, LinearContainer)
    with torch.no_grad():
        built.experts.lora_A.fill_(1.0)
        built.experts.lora_B.fill_(1.0)
    return built.train()


def kept(bank: nn.Module, tokens: int, features: int = 16) -> Tensor:
    """(tokens, features, experts) which features each expert saw: with powers of 2 the sum tells them apart."""
    with torch.no_grad():
        bank.lora_A.copy_((2.0 ** torch.arange(features)).expand(3, -1))
        low = bank.low(torch.ones(tokens, features)) * (1 - P)
    whole = low.round().long()
    return torch.stack([whole >> feature & 1 for feature in range(features)], dim=1)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_separate_draws_a_mask_for_each_expert_and_shared_one_for_all(kind: str) -> None:
    one = kept(container("shared", kind).experts, 500)
    assert torch.equal(one[..., 0], one[..., 1]) and torch.equal(one[..., 0], one[..., 2])
    many = kept(container("separate", kind).experts, 500).double()
    for expert in range(3):
        assert many[..., expert].mean().item() == pytest.approx(1 - P, abs=0.02)
    correlation = torch.corrcoef(many.reshape(-1, 3).T)
    assert (correlation - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_the_mean_over_masks_is_the_output_without(mode: str) -> None:
    built = container(mode)
    x = torch.randn(1, 16)
    drawn = built(x.expand(20_000, -1))  # each token has masks of its own
    assert torch.allclose(drawn.mean(0), built.eval()(x), atol=0.1)
    assert (drawn.std(0) > 0.5).all()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_off_in_evaluation(mode: str, kind: str) -> None:
    built = container(mode, kind).eval()
    x = torch.randn(4, 16)
    quiet = built(x)
    assert torch.equal(built(x), quiet)
    assert not torch.allclose(built.train()(x), quiet)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_checkpointing_repeats_the_masks_bit_for_bit(tiny_llama: LlamaForCausalLM, mode: str, kind: str) -> None:
    site = {
        "target": ["q_proj", "down_proj"],
        "experts": {"kind": kind, "num_experts": 3, "r": 2, "dropout": P, "expert_dropout": mode},
        "router": {"kind": "topk", "top_k": 2, "init_std": 0.5},
    }
    model = moelora.attach(tiny_llama, {"sites": [site]}).train()
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.2)
    ids = torch.randint(3, 64, (2, 9))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(7)
        out = model(ids, labels=ids)
        out.loss.backward()
        results.append((out.loss.detach(), {name: t.grad.clone() for name, t in model.adapter_tensors().items()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


def test_separate_masks_of_a_block_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    experts = {"num_experts": 3, "r": 2, "dropout": P, "expert_dropout": "separate"}
    with pytest.raises(ConfigError, match=r"'separate' needs a mask as wide as the block.*set 'shared'"):
        moelora.attach(tiny_llama, {"sites": [{"target": "mlp", "experts": experts, "router": "topk"}]})
    linears = {"target": ["gate_proj", "up_proj"], "experts": experts, "router": "topk"}
    moelora.attach(tiny_llama, {"sites": [linears]})
