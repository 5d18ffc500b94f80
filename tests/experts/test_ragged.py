"""Frozen experts of rank 0 and with scalings of their own, at linear sites and in blocks, in every implementation."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sites_by_hand import EVEN, by_hand, logits, mixture
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora.dispatch import block, linear
from moelora.dispatch.linear import Gate
from moelora.experts import build

RAGGED = [(0, 3, 2), (2, 0, 0), (0, 0, 0), (0, 1, 1)]
SCALING = ["rslora", -0.7, "lora"]


def scales_of(ranks: tuple[int, ...]) -> list[float]:
    """Of experts with alpha 6 under SCALING; of no matter at rank 0."""
    return [6 / math.sqrt(ranks[0]) if ranks[0] else 1.0, -0.7, 6 / ranks[2] if ranks[2] else 1.0]


def frozen(ranks: tuple[int, ...], router: Any) -> dict[str, Any]:
    experts = {"kind": "frozen", "num_experts": 3, "r": list(ranks), "alpha": 6, "scaling": SCALING}
    return {"target": "x", "experts": experts, "router": router}


def filled(module: nn.Module, site: dict[str, Any]) -> Any:
    container = build(module, site)
    with torch.no_grad():
        for value in container.adapter_tensors().values():
            value.copy_(torch.randn_like(value) * 0.2)
    return container


@pytest.mark.parametrize("ranks", RAGGED, ids=str)
@pytest.mark.parametrize("router", [{"kind": "topk", "top_k": 2}, {"kind": "softmax"}, EVEN], ids=lambda r: r["kind"])
def test_a_linear_site_with_ragged_ranks_is_the_sum_by_hand(ranks: tuple[int, ...], router: dict[str, Any]) -> None:
    router = {**router, "expert_types": [0, 1, 1]} if router["kind"] == "softmax" else router
    container = filled(nn.Linear(8, 6), frozen(ranks, router)).eval()
    x = torch.randn(2, 4, 8)
    weights = container.decide(x).dense_weights()
    expected = by_hand(container, x, list(ranks), scales_of(ranks), weights)
    assert torch.allclose(container(x), expected, atol=1e-6)
    assert container.site.scales == pytest.approx(tuple(scales_of(ranks)))


@pytest.mark.parametrize("ranks", RAGGED, ids=str)
@pytest.mark.parametrize("indices", [None, [[0, 1], [2, 0], [1, -1], [-1, -1]]], ids=["dense", "chosen"])
def test_every_implementation_of_a_linear_site_takes_ragged_ranks(
    ranks: tuple[int, ...], indices: list[list[int]] | None
) -> None:
    total = sum(ranks)
    picks = None if indices is None else torch.tensor(indices)
    out, x, A, B = torch.randn(4, 6), torch.randn(4, 8), torch.randn(total, 8), torch.randn(6, total)
    weights = torch.rand(4, 3 if indices is None else 2)
    scale = torch.tensor([s for s, rank in zip(scales_of(ranks), ranks, strict=True) for _ in range(rank)])
    given = [x, A, B, weights]
    found: dict[str, list[Tensor]] = {}
    for name, implementation in linear.IMPLEMENTATIONS.items():
        leaves = [value.clone().requires_grad_() for value in given]
        gate = Gate(leaves[3], picks, ranks, scale)
        result = implementation(out.clone(), *leaves[:3], gate)
        gradients = torch.autograd.grad(result.square().sum(), leaves, allow_unused=True)
        found[name] = [
            result,
            *(torch.zeros_like(v) if g is None else g for v, g in zip(given, gradients, strict=True)),
        ]
    dense = Gate(weights, picks, ranks, scale).per_unit()
    assert dense is not None
    expected = out
    for index, (rows, columns) in enumerate(zip(A.split(list(ranks)), B.split(list(ranks), dim=1), strict=True)):
        expected = expected + dense[:, index : index + 1] * scales_of(ranks)[index] * (x @ rows.T @ columns.T)
    for name, values in found.items():
        assert torch.allclose(values[0], expected, atol=1e-5), name
        for ours, theirs in zip(values, found["reference"], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("ranks", RAGGED, ids=str)
@pytest.mark.parametrize("implementation", ["auto", *block.IMPLEMENTATIONS])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_block_site_with_ragged_ranks_is_the_mix_by_hand(
    tiny_llama: LlamaForCausalLM, ranks: tuple[int, ...], implementation: Any, top_k: int
) -> None:
    mlp = tiny_llama.model.layers[0].mlp
    container = filled(mlp, frozen(ranks, {"kind": "topk", "top_k": top_k})).eval()
    container.implementation = implementation
    x = torch.randn(2, 5, 32)
    weights = container.decide(x).dense_weights()

    def projection(name: str, inputs: Tensor, expert: int) -> Tensor:
        bank = container.experts[name]
        A, B = bank.lora_A.split(list(ranks))[expert], bank.lora_B.split(list(ranks), dim=1)[expert]
        return mlp.get_submodule(name)(inputs) + scales_of(ranks)[expert] * (inputs @ A.T @ B.T)

    expected = torch.zeros(2, 5, 32)
    for expert in range(3):
        inner = F.silu(projection("gate_proj", x, expert)) * projection("up_proj", x, expert)
        expected = expected + weights[..., expert : expert + 1] * projection("down_proj", inner, expert)
    with torch.no_grad():
        assert torch.allclose(container(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["q_proj", "mlp"])
def test_a_mixture_with_empty_sites_is_saved_and_merged(tiny_config: LlamaConfig, target: str, tmp_path: Path) -> None:
    """One expert has nothing in layer 0, in layer 1 nobody has anything."""
    backbone = LlamaForCausalLM(tiny_config).eval()
    path = target if target == "mlp" else f"self_attn.{target}"
    experts = {
        "kind": "frozen",
        "num_experts": 3,
        "r": [2, 3, 1],
        "alpha": 6,
        "scaling": SCALING,
        "rank_pattern": {f"0.{path}": [0, 3, 1], f"1.{path}": [0, 0, 0]},
    }
    router = {"kind": "static", "weights": [0.0, 1.0, 0.0]}
    model = mixture(copy.deepcopy(backbone), experts, router, target=target)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(moelora.from_pretrained(tmp_path, copy.deepcopy(backbone))), expected)
    empty = [container for container in model.containers().values() if container.site.layer == 1]
    x = torch.randn(2, 4, 32)
    with torch.no_grad():
        assert torch.allclose(empty[0](x), empty[0].base(x), atol=1e-6)
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).abs().max() <= 1e-5
