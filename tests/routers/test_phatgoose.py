"""PHATGOOSE: the phase that trains a vector beside its adapter, and the comparison that composes adapters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import UserError
from moelora.experts import LinearContainer, build
from moelora.routing import RoutingContext, RoutingRecord


def layer(experts: int = 3, fresh: bool = False, **options: Any) -> LinearContainer:
    torch.manual_seed(3)
    config = {
        "target": "any",
        "experts": {"kind": "frozen", "num_experts": experts, "r": 2, "alpha": 4.0},
        "router": {"kind": "phatgoose", **options},
    }
    container = build(nn.Linear(16, 12), config)
    assert isinstance(container, LinearContainer)
    with torch.no_grad():
        for name, tensor in container.adapter_tensors().items():
            if not (fresh and name.startswith("router.")):
                tensor.normal_(std=0.5)
    return container


def decide(container: LinearContainer, x: Tensor, **context: Any) -> RoutingRecord:
    with container.slot.using(RoutingContext(**context)):
        record = container.decide(x)
    assert record is not None
    return record


def normalised(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_weights_are_the_renormalised_softmax_of_normalised_products() -> None:
    container = layer()
    x = torch.randn(9, 16)
    record = decide(container, x)
    probs = (normalised(x) @ normalised(container.router.weight).T / math.sqrt(16)).softmax(-1)
    top = probs.topk(2)
    assert torch.equal(record.indices, top.indices)
    assert torch.allclose(record.weights, top.values / top.values.sum(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(record.probs, probs, atol=1e-6)


def test_only_the_direction_of_a_gate_counts() -> None:
    container = layer()
    x = torch.randn(9, 16)
    before = decide(container, x).logits
    with torch.no_grad():
        container.router.weight += 7.5
    assert torch.allclose(decide(container, x).logits, before, atol=1e-4)
    with torch.no_grad():
        container.router.weight.mul_(20)
    assert torch.allclose(decide(container, x).logits, before, atol=1e-3)


def test_a_single_adapter_counts_in_full() -> None:
    container = layer(experts=1, top_k=1)
    x = torch.randn(9, 16)
    assert (decide(container, x).weights == 1).all()
    update = container.experts.delta(torch.ones(1), container.base)
    assert torch.allclose(container(x), container.base(x) + x @ update.T, atol=1e-5)


def test_the_gate_phase_weighs_the_adapter_of_the_task_by_a_sigmoid() -> None:
    container = layer()
    x = torch.randn(3, 4, 16)
    tasks = torch.tensor([2, -1, 0])
    record = decide(container, x, phase="gate", task_ids=tasks)
    dense = record.dense_weights()
    for row, task in enumerate(tasks.tolist()):
        for expert in range(3):
            expected = (x[row] @ container.router.weight[expert]).sigmoid() if expert == task else torch.zeros(4)
            assert torch.allclose(dense[row, :, expert], expected, atol=1e-6)
    with container.slot.using(RoutingContext(phase="gate", task_ids=tasks)):
        assert torch.equal(container(x)[1], container.base(x)[1])


def test_a_fresh_gate_halves_its_adapter() -> None:
    container = layer(fresh=True)
    weights = decide(container, torch.randn(3, 4, 16), phase="gate", task_ids=torch.tensor([0, 1, 2])).weights
    assert (weights == 0.5).all()


def test_a_sequence_trains_the_gate_of_its_task_alone() -> None:
    container = layer(fresh=True)
    x = torch.randn(2, 4, 16)
    with container.slot.using(RoutingContext(phase="gate", task_ids=torch.tensor([1, 1]))):
        container(x).square().sum().backward()
    grad = container.router.weight.grad
    assert grad[1].any() and not grad[[0, 2]].any()
    assert container.experts.lora_A.grad is None


def test_the_gate_phase_needs_task_ids_that_fit() -> None:
    container = layer()
    with pytest.raises(UserError, match="needs task_ids"):
        decide(container, torch.randn(2, 4, 16), phase="gate")
    with pytest.raises(UserError, match=r"task_ids holds 0\.\.3, but there are only 0\.\.2"):
        decide(container, torch.randn(2, 4, 16), phase="gate", task_ids=torch.tensor([0, 3]))
    with pytest.raises(UserError, match="do not fit tokens"):
        decide(container, torch.randn(2, 4, 16), phase="gate", task_ids=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("target", ["q_proj", "mlp"])
def test_gates_are_trained_in_their_phase_and_compose_afterwards(tiny_llama: LlamaForCausalLM, target: str) -> None:
    site = {
        "target": target,
        "experts": {"kind": "frozen", "num_experts": 3, "r": 2, "alpha": 4.0},
        "router": {"kind": "phatgoose"},
    }
    model = moelora.attach(tiny_llama, {"sites": [site]})
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if "lora_" in name:
                tensor.normal_(std=0.3)
    ids = torch.randint(3, 64, (3, 8))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(8):
        out = model(ids, labels=ids, phase="gate", task_ids=torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    with moelora.trace(model) as tape, torch.no_grad():
        model.eval()(ids)
    for name in tape:
        weights = tape[name][0].weights
        assert weights.shape[-1] == 2 and torch.allclose(weights.sum(-1), torch.ones(3, 8))
