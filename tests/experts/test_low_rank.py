"""Low-rank parts of full experts: the factors themselves, and rank 0."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import ConfigError
from moelora.experts import BlockContainer, build
from moelora.experts.low_rank import LowRankConfig, factor

RANKS = [0, 4, 0, 32]
SITE: dict[str, Any] = {
    "target": "mlp",
    "experts": {"kind": "low_rank", "num_experts": 4, "r": RANKS},
    "router": {"kind": "topk", "top_k": 3, "normalize": False, "init_std": 0.5},
}


@pytest.mark.parametrize("rank", [0, 1, 5, 12, 20])
def test_the_error_is_that_of_the_dropped_singular_values(rank: int) -> None:
    difference = torch.randn(12, 30)
    A, B = factor(difference, rank)
    assert A.shape == (rank, 30) and B.shape == (12, rank)
    values = torch.linalg.svdvals(difference)
    error = (difference - B @ A).norm()
    assert error.item() == pytest.approx(values[rank:].square().sum().sqrt().item(), abs=1e-4)
    assert A.norm().item() == pytest.approx(B.norm().item(), rel=1e-5)
    assert A.square().sum().item() == pytest.approx(values[:rank].sum().item(), rel=1e-5)


def test_a_higher_rank_is_nearer() -> None:
    difference = torch.randn(12, 30)
    errors = []
    for rank in range(13):
        A, B = factor(difference, rank)
        errors.append((difference - B @ A).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4


def test_the_scale_is_alpha_whatever_the_rank() -> None:
    assert LowRankConfig(num_experts=3, r=[0, 2, 4]).scales == (1.0, 1.0, 1.0)
    assert LowRankConfig(num_experts=2, r=4, alpha=[0.5, 2.0]).scales == (0.5, 2.0)
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        LowRankConfig.parse({"num_experts": 1, "r": -1})


def filled(model: LlamaForCausalLM, **experts: Any) -> tuple[BlockContainer, list[nn.Module]]:
    """A block site over the first layer's FFN, and the four full FFNs that its experts are."""
    base = model.requires_grad_(False).model.layers[0].mlp
    container = build(base, {**SITE, "experts": {**SITE["experts"], **experts}})
    assert isinstance(container, BlockContainer)
    full = []
    for index, rank in enumerate(RANKS):
        expert = copy.deepcopy(base)
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = expert.get_submodule(name).weight
            change = torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1]) / 10
            container.experts[name].load_difference(index, change)
            weight.add_(change)
        full.append(expert)
    return container, full


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("implementation", ["sorted", "reference"])
def test_a_block_is_the_mixture_of_full_experts(
    tiny_llama: LlamaForCausalLM, implementation: str, alpha: float
) -> None:
    container, full = filled(tiny_llama, alpha=alpha)
    container.implementation = implementation
    x = torch.randn(2, 7, 32)
    probs = (x @ container.router.weight.T).softmax(-1)
    kept = torch.zeros_like(probs).scatter(-1, probs.topk(3).indices, 1.0) * probs
    expected = sum(kept[..., e : e + 1] * expert(x) for e, expert in enumerate(full))
    assert (container(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rank_0_is_the_frozen_block(tiny_llama: LlamaForCausalLM) -> None:
    base = tiny_llama.requires_grad_(False).model.layers[0].mlp
    container = build(base, SITE | {"experts": {"kind": "low_rank", "num_experts": 2, "r": 0}, "router": "topk"})
    x = torch.randn(2, 7, 32)
    assert torch.equal(container(x), base(x))
    assert all(tensor.numel() == 0 for name, tensor in container.adapter_tensors().items() if "lora" in name)


def test_ranks_of_0_are_saved_and_trained_around(tiny_llama: LlamaForCausalLM, tmp_path: Any) -> None:
    base = copy.deepcopy(tiny_llama)
    model = moelora.attach(tiny_llama, {"sites": [SITE, {**SITE, "target": ["q_proj", "v_proj"]}]})
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.1)
    ids = torch.randint(3, 64, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in model.adapter_tensors().values())
    model.save_pretrained(tmp_path)
    again = moelora.from_pretrained(tmp_path, backbone=base)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_difference_of_the_wrong_shape_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    container, _ = filled(tiny_llama)
    with pytest.raises(ConfigError, match=r"gate_proj.*experts 0\.\.3 .*\(48, 32\), got expert 4"):
        container.experts["gate_proj"].load_difference(4, torch.zeros(48, 32))
