"""Experts by identity: each token gets those of its modality, each sequence those of its task or request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import ConfigError, UserError
from moelora.experts import LinearContainer, build
from moelora.routing import RoutingContext

EXPERTS = 3
RANKS = [1, 3, 2]


def layer(**options: Any) -> LinearContainer:
    torch.manual_seed(3)
    config = {
        "target": "any",
        "experts": {"num_experts": EXPERTS, "r": RANKS, "alpha": 4.0},
        "router": {"kind": "mask", **options},
    }
    container = build(nn.Linear(16, 12), config)
    assert isinstance(container, LinearContainer)
    with torch.no_grad():
        for tensor in container.adapter_tensors().values():
            tensor.normal_(std=0.5)
    return container


def call(container: LinearContainer, x: Tensor, **context: Any) -> Tensor:
    with container.slot.using(RoutingContext(**context)):
        out: Tensor = container(x)
    return out


def mixed(container: LinearContainer, x: Tensor, weights: list[float]) -> Tensor:
    """The frozen linear with experts of these weights for all tokens."""
    return container.base(x) + x @ container.experts.delta(torch.tensor(weights), container.base).T


def one_hot(expert: int) -> list[float]:
    return F.one_hot(torch.tensor(expert), EXPERTS).float().tolist()


def test_every_token_has_the_expert_of_its_modality() -> None:
    container = layer()
    x = torch.randn(2, 4, 16)
    modality = torch.tensor([[0, 1, 2, 0], [1, 1, -1, 7]])
    out = call(container, x, modality_mask=modality)
    for row in range(2):
        for token in range(4):
            kind = int(modality[row, token])
            expected = mixed(container, x[row, token], one_hot(kind) if 0 <= kind < EXPERTS else [0.0] * EXPERTS)
            assert torch.allclose(out[row, token], expected, atol=1e-5)
    assert torch.equal(out[1, 2:], container.base(x)[1, 2:])


def test_a_batch_of_one_modality_is_that_expert_alone_and_swapping_ids_swaps_outputs() -> None:
    container = layer()
    x = torch.randn(2, 4, 16)
    text, image = (call(container, x, modality_mask=torch.full((2, 4), kind)) for kind in (0, 1))
    assert torch.allclose(text, mixed(container, x, one_hot(0)), atol=1e-5)
    modality = torch.randint(0, 2, (2, 4))
    out, swapped = (call(container, x, modality_mask=ids) for ids in (modality, 1 - modality))
    assert torch.allclose(out, torch.where(modality.unsqueeze(-1) == 0, text, image), atol=1e-5)
    assert torch.allclose(swapped, torch.where(modality.unsqueeze(-1) == 1, text, image), atol=1e-5)


@pytest.mark.parametrize(
    ("by", "field"), [("task", "task_ids"), ("task_type", "task_types"), ("request", "request_ids")]
)
def test_every_sequence_has_the_expert_of_its_identity(by: str, field: str) -> None:
    container = layer(by=by)
    x = torch.randn(4, 5, 16)
    out = call(container, x, **{field: torch.tensor([2, 0, -1, 1])})
    for row, weights in enumerate([one_hot(2), one_hot(0), [0.0] * EXPERTS, one_hot(1)]):
        assert torch.allclose(out[row], mixed(container, x[row], weights), atol=1e-5)
    with pytest.raises(UserError, match=f"needs {field}"):
        call(container, x)
    with pytest.raises(UserError, match="do not fit tokens"):
        call(container, x, **{field: torch.tensor([0, 1])})


def test_a_table_names_the_experts_of_each_identity_and_their_weights() -> None:
    container = layer(by="request", table=[[1], [], [2, 0]], weights=[[0.5], [], [2.0, -1.0]])
    x = torch.randn(4, 5, 16)
    out = call(container, x, request_ids=torch.tensor([2, 1, 0, 3]))
    for row, weights in enumerate([[-1.0, 0, 2.0], [0.0] * 3, [0, 0.5, 0], [0.0] * 3]):
        assert torch.allclose(out[row], mixed(container, x[row], weights), atol=1e-5)
    unweighted = layer(by="request", table=[[1], [], [2, 0]])
    out = call(unweighted, x, request_ids=torch.full((4,), 2))
    assert torch.allclose(out, mixed(unweighted, x, [1.0, 0, 1.0]), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": [[0], [3]]}, "table names expert 3 but there are 3"),
        ({"table": [[0, 0]]}, "table names an expert twice"),
        ({"weights": [[1.0]]}, "there is no table"),
        ({"table": [[0], [1]], "weights": [[1.0], [1.0, 2.0]]}, "weights has not the shape of table"),
        ({"table": []}, "table"),
        ({"by": "user"}, "by"),
    ],
)
def test_tables_that_do_not_hold_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer(**options)


def test_the_weights_of_one_identity_are_constant_and_can_be_merged() -> None:
    container = layer(by="task", table=[[1], [2, 0]], weights=[[0.5], [2.0, -1.0]])
    x = torch.randn(3, 5, 16)
    for task in (0, 1, 5, -1):
        ids = torch.full((3,), task)
        weights = container.router.constant_weights(RoutingContext(task_ids=ids))
        merged = container.base.weight + container.experts.delta(weights, container.base)
        assert torch.allclose(call(container, x, task_ids=ids), F.linear(x, merged, container.base.bias), atol=1e-5)
    assert container.router.constant_weights(RoutingContext()) is None
    assert container.router.constant_weights(RoutingContext(task_ids=torch.tensor([0, 1]))) is None
    modality = RoutingContext(modality_mask=torch.zeros(2, 3, dtype=torch.long))
    assert layer().router.constant_weights(modality) is None


@pytest.mark.parametrize("target", ["q_proj", "mlp"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_tokens_are_text(tiny_llama: LlamaForCausalLM, target: str, use_cache: bool) -> None:
    site = {"target": target, "experts": {"num_experts": 2, "r": 2, "alpha": 4.0}, "router": {"kind": "mask"}}
    model = moelora.attach(tiny_llama, {"sites": [site]}).eval()
    ids = torch.randint(3, 64, (2, 6))
    modality = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    with moelora.trace(model) as tape:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            modality_mask=modality,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            use_cache=use_cache,
        )
    for name in tape:
        seen = [record.indices.squeeze(-1) for record in tape[name]]
        assert torch.equal(seen[0], modality)
        for step, indices in enumerate(seen[1:], start=1):
            whole = F.pad(modality, (0, step))
            assert torch.equal(indices, whole[:, -1:] if use_cache else whole)


def test_an_expert_that_no_token_needs_has_a_zero_gradient_and_the_others_do_not() -> None:
    container = layer()
    call(container, torch.randn(2, 4, 16), modality_mask=torch.ones(2, 4, dtype=torch.long)).square().sum().backward()
    parts = container.experts.lora_B.grad.split(RANKS, dim=1)
    assert not parts[0].any() and parts[1].any() and not parts[2].any()
