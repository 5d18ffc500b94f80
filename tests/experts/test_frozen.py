"""Frozen experts: adapters from elsewhere, with ranks and scales of their own, that no training changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import ConfigError
from moelora.experts import BlockContainer, LinearContainer, build
from moelora.experts.frozen import FrozenExperts
from moelora.mixture import MoELoRAModel

RANKS = (1, 4, 2)
ALPHAS = (2.0, 8.0, 5.0)


def site(**experts: Any) -> dict[str, Any]:
    return {
        "target": "q_proj",
        "experts": {"kind": "frozen", "num_experts": 3, "r": list(RANKS), "alpha": list(ALPHAS), **experts},
        "router": {"kind": "topk", "top_k": 2},
    }


def adapters(width_in: int = 32, width_out: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(r, width_in, generator=generator), torch.randn(width_out, r, generator=generator)) for r in RANKS
    ]


def filled(**experts: Any) -> LinearContainer:
    container = build(nn.Linear(32, 32), site(**experts))
    assert isinstance(container, LinearContainer) and isinstance(container.experts, FrozenExperts)
    for index, (A, B) in enumerate(adapters()):
        container.experts.load_expert(index, A, B)
    return container


@pytest.mark.parametrize(
    ("scaling", "scales"),
    [
        ("lora", [2.0, 2.0, 2.5]),
        ("rslora", [2.0, 4.0, 5.0 / math.sqrt(2)]),
        ([0.5, -1.0, 0.0], [0.5, -1.0, 0.0]),
    ],
)
def test_each_expert_is_its_adapter_times_its_scale(scaling: Any, scales: list[float]) -> None:
    container = filled(scaling=scaling)
    x = torch.randn(5, 32)
    record = container.decide(x)
    assert record is not None
    expected = container.base(x)
    for expert, (A, B) in enumerate(adapters()):
        expected = expected + record.dense_weights()[:, expert, None] * scales[expert] * (x @ A.T @ B.T)
    assert torch.allclose(container(x), expected, atol=1e-4)


def test_the_delta_of_constant_weights_is_the_sum_of_the_adapters() -> None:
    container = filled(scaling=[0.5, -1.0, 2.0])
    weights = torch.tensor([0.3, 0.0, 2.0])
    expected = sum(w * s * (B @ A) for w, s, (A, B) in zip(weights, (0.5, -1.0, 2.0), adapters(), strict=True))
    assert torch.allclose(container.experts.delta(weights, container.base), expected, atol=1e-5)


def test_experts_take_no_gradient_but_pass_it_on() -> None:
    container = filled()
    x = torch.randn(5, 32, requires_grad=True)
    container(x).square().sum().backward()
    assert container.experts.lora_A.grad is None and container.experts.lora_B.grad is None
    assert container.router.weight.grad.any()
    with torch.no_grad():
        container.experts.lora_B.zero_()
    before, x.grad = x.grad, None
    container(x).square().sum().backward()
    assert not torch.allclose(before, x.grad)


def test_an_unfilled_bank_is_the_frozen_layer() -> None:
    container = build(nn.Linear(32, 32), site())
    x = torch.randn(5, 32)
    assert torch.equal(container(x), container.base(x))


@pytest.mark.parametrize(
    ("index", "shape_A", "shape_B", "message"),
    [
        (1, (2, 32), (32, 4), r"expert 1: A has the shape \(2, 32\), expected \(4, 32\): the rank of this expert is 4"),
        (2, (2, 32), (16, 2), r"expert 2: B has the shape \(16, 2\), expected \(32, 2\)"),
        (0, (32, 1), (32, 1), r"expert 0: A has the shape \(32, 1\)"),
        (3, (1, 32), (32, 1), r"there is no expert 3: this bank has 0\.\.2"),
        (-1, (2, 32), (32, 2), r"there is no expert -1"),
    ],
)
def test_wrong_factors_are_refused_by_the_name_of_the_expert(
    index: int, shape_A: tuple[int, ...], shape_B: tuple[int, ...], message: str
) -> None:
    container = filled()
    before = {name: value.clone() for name, value in container.experts.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        container.experts.load_expert(index, torch.ones(shape_A), torch.ones(shape_B))
    assert all(torch.equal(value, before[name]) for name, value in container.experts.state_dict().items())


def test_scales_must_be_one_for_each_expert() -> None:
    with pytest.raises(ConfigError, match="scaling lists 2 values for 3 experts: give one each"):
        build(nn.Linear(8, 8), site(scaling=[1.0, 2.0]))
    with pytest.raises(ConfigError, match="scaling"):
        build(nn.Linear(8, 8), site(scaling="square"))


def test_each_expert_may_have_a_name_of_its_own() -> None:
    container = build(nn.Linear(8, 8), site(names=["math", "code-2", "Büro +1"]))
    assert container.config.experts.names == ["math", "code-2", "Büro +1"]
    for names in (["a", "b"], ["a", "a", "b"], ["a", "b", "b", "c"]):
        with pytest.raises(ConfigError, match="for 3 experts: give each one of its own"):
            build(nn.Linear(8, 8), site(names=names))
    for name in ("", "../b", "a/b", ".hidden", "a\nb", "a" * 101):
        with pytest.raises(ConfigError, match="names"):
            build(nn.Linear(8, 8), site(names=["x", "y", name]))


def test_a_block_is_filled_projection_by_projection(tiny_llama: LlamaForCausalLM) -> None:
    block = build(tiny_llama.model.layers[0].mlp, site())
    assert isinstance(block, BlockContainer)
    bank = block.experts["down_proj"]
    for index, (A, B) in enumerate(adapters(48, 32)):
        bank.load_expert(index, A, B)
    assert torch.equal(bank.down(), torch.cat([A for A, _ in adapters(48, 32)]))
    assert torch.equal(bank.up(), torch.cat([B for _, B in adapters(48, 32)], dim=1))
    assert not any(parameter.requires_grad for parameter in block.experts.parameters())


def test_saved_and_loaded_like_all_tensors(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    twin = LlamaForCausalLM(tiny_llama.config).eval()
    twin.load_state_dict(tiny_llama.state_dict())
    model = moelora.attach(tiny_llama, {"sites": [site(scaling=[1.0, 0.5, -2.0])]}).eval()
    _fill(model)
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.no_grad():
        logits = model(ids).logits
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 3 * 32  # the routers alone
    model.save_pretrained(tmp_path)
    again = moelora.from_pretrained(tmp_path, backbone=twin)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
        with again.disable_experts():
            assert not torch.allclose(again(ids).logits, logits)
    assert not any(bank.lora_A.requires_grad for c in again.containers().values() for bank in c.banks())


def _fill(model: MoELoRAModel) -> None:
    for container in model.containers().values():
        for index, (A, B) in enumerate(adapters()):
            next(container.banks()).load_expert(index, A, B)
