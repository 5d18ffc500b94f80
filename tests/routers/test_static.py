"""Static mixes: CAT is one concatenated LoRA, given weights are arithmetic, and nothing depends on the token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import ConfigError
from moelora.experts import LinearContainer, build
from moelora.experts.frozen import FrozenExperts
from moelora.routing import RoutingContext

RANKS = [1, 3, 2]
SCALES = [2.0, -0.5, 1.5]


def config(target: str | list[str] = "any", ranks: list[int] | None = None, **router: Any) -> dict[str, Any]:
    return {
        "target": target,
        "experts": {"kind": "frozen", "num_experts": 3, "r": ranks or RANKS, "scaling": SCALES},
        "router": {"kind": "static", **router},
    }


def layer(ranks: list[int] | None = None, **router: Any) -> LinearContainer:
    torch.manual_seed(3)
    container = build(nn.Linear(16, 12), config(ranks=ranks, **router))
    assert isinstance(container, LinearContainer)
    with torch.no_grad():
        for name, tensor in container.adapter_tensors().items():
            if "lora_" in name:
                tensor.normal_(std=0.5)
    return container


def test_cat_is_one_concatenated_lora() -> None:
    container = layer()
    weights = container.router.logits.detach().softmax(-1)
    # A stacked as it is, and B stacked with weight and scale folded in: a plain LoRA whose rank is the sum of all.
    one = build(
        container.base, {"target": "any", "experts": {"kind": "frozen", "num_experts": 1, "r": 6, "scaling": [1.0]}}
    )
    assert isinstance(one, LinearContainer) and isinstance(one.experts, FrozenExperts)
    folded = torch.cat(
        [w * s * B for w, s, B in zip(weights, SCALES, container.lora_B.split(RANKS, dim=1), strict=True)], dim=1
    )
    one.experts.load_expert(0, container.lora_A, folded)
    x = torch.randn(2, 5, 16)
    assert torch.allclose(container(x), one(x), atol=1e-5)
    update = container.experts.delta(container.router.constant_weights(RoutingContext()), container.base)
    assert torch.allclose(container(x), F.linear(x, container.base.weight + update, container.base.bias), atol=1e-5)


def test_the_gradient_is_that_of_a_softmax() -> None:
    container = layer()
    x = torch.randn(5, 16)
    out = container(x)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    probs = container.router.logits.detach().softmax(-1)
    parts = [x @ container.experts.delta(F.one_hot(torch.tensor(e), 3).float(), container.base).T for e in range(3)]
    slopes = torch.stack([(part * weight).sum() for part in parts])
    expected = (torch.diag(probs) - torch.outer(probs, probs)) @ slopes
    assert torch.allclose(container.router.logits.grad, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("weights", "expected", "normalized"),
    [("uniform", [1 / 3] * 3, True), ([0.7, -0.4, 2.0], [0.7, -0.4, 2.0], False)],
)
def test_weights_that_are_not_learned(weights: Any, expected: list[float], normalized: bool) -> None:
    container = layer(weights=weights)
    record = container.decide(torch.randn(2, 5, 16))
    assert record is not None and record.normalized == normalized
    assert torch.equal(record.weights, torch.tensor(expected).expand(2, 5, 3))
    assert torch.equal(container.router.constant_weights(RoutingContext()), torch.tensor(expected))
    assert not list(container.router.state_dict())


def test_zeros_start_as_an_even_mix_and_normal_does_not() -> None:
    even = layer(init="zeros").router.constant_weights(RoutingContext())
    assert torch.allclose(even, torch.full((3,), 1 / 3))
    drawn = layer(init="normal").router
    assert drawn.logits.std() > 0.1
    drawn.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(drawn.logits, torch.randn(3, generator=torch.Generator().manual_seed(5)))


def test_mixed_factors_have_every_cross_term() -> None:
    container = layer([2, 2, 2], weights=[0.7, 0.4, -1.0], mix="factors")
    x = torch.randn(5, 16)
    A, B = container.lora_A.split(2), container.lora_B.split(2, dim=1)
    expected = container.base(x)
    for i in range(3):
        for j in range(3):
            weight = (0.7, 0.4, -1.0)[i] * (0.7, 0.4, -1.0)[j] * SCALES[j]
            expected = expected + weight * (x @ A[i].T @ B[j].T)
    assert torch.allclose(container(x), expected, atol=1e-4)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="lists 2 weights for 3 experts: give one for each"):
        layer(weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="needs experts of one rank"):
        layer(mix="factors")


def test_sites_of_any_width_share_one_set_of_weights(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [config(["q_proj", "down_proj", "mlp.up_proj"], share="all")]})
    routers = {id(container.router) for container in model.containers().values()}
    assert len(model.containers()) == 6 and len(routers) == 1
    assert sum("logits" in name for name in model.adapter_tensors()) == 1
    own = moelora.attach(model.unload(), {"sites": [config(["q_proj", "down_proj"])]})
    assert sum("logits" in name for name in own.adapter_tensors()) == 4


def test_a_block_with_one_weight_is_the_block_of_that_expert(tiny_llama: LlamaForCausalLM) -> None:
    block = tiny_llama.model.layers[0].mlp
    container = build(block, config(weights=[0.0, 1.0, 0.0]))
    one = build(
        block, {"target": "mlp", "experts": {"kind": "frozen", "num_experts": 1, "r": 3, "scaling": [SCALES[1]]}}
    )
    with torch.no_grad():
        for name, tensor in container.adapter_tensors().items():
            tensor.normal_(std=0.3)
            part = slice(RANKS[0], RANKS[0] + RANKS[1])
            one.adapter_tensors()[name].copy_(tensor[part] if "lora_A" in name else tensor[:, part])
    x = torch.randn(5, 32)
    assert torch.allclose(container(x), one(x), atol=1e-5)
    assert not torch.allclose(container(x), block(x), atol=1e-2)
