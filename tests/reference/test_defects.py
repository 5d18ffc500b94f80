"""Defects of the released MixLoRA code (MixLoRA d59d09b, MoE-PEFT 40f8cb7) that moelora does not share.

Numbers as in the specification's list:  1, 2 dropout in inference, here · 3 wrong gradients under dropout, here ·
4-8 expert_lora, act_fn, lora_dropout 0, task_type null and DoRA in checkpoints, tests/checkpoints/test_mixlora.py ·
9 Switch in inference and padding in the losses, tests/test_mixture.py · 10 a frozen adapter is no adapter, here ·
11 warm-up ignored, options lost when saving, here · 12 labels on prompts and padding, tests/test_data.py ·
13 jitter changes its input, tests/test_mixture.py · 14 a last partial accumulation, tests/trainers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora import experts
from moelora.config import MixtureConfig
from moelora.experts import BlockContainer, LinearContainer

EXPERTS: dict[str, Any] = {"num_experts": 4, "r": 4, "alpha": 8, "dropout": 0.5}
ROUTER = {"kind": "topk", "top_k": 2}


def filled(container: experts.Container) -> experts.Container:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in container.adapter_tensors().values():
            tensor.normal_(std=0.3, generator=generator)
    return container


def test_dropout_ends_with_training_in_every_part(tiny_llama: LlamaForCausalLM) -> None:
    """1, 2: 24 of their 32 LoRAs stay in training mode after eval()."""
    sites = [
        {"target": "mlp", "experts": EXPERTS, "router": ROUTER},
        {"target": "q_proj", "experts": {**EXPERTS, "num_experts": 1}},
    ]
    model = moelora.attach(tiny_llama, {"sites": sites}).train().eval()
    assert not any(module.training for module in model.modules())
    for container in model.containers().values():
        filled(container)
    ids = torch.randint(3, 64, (2, 7))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_gradients_under_dropout_of_a_linear_site() -> None:
    """3: their fast path takes the gradient of lora_A from the input before dropout."""
    base = nn.Linear(16, 12)
    site = {"target": "x", "experts": {**EXPERTS, "num_experts": 1}}
    container = filled(experts.build(base, site)).train()
    assert isinstance(container, LinearContainer)
    x = torch.randn(3, 5, 16)
    torch.manual_seed(9)
    container(x).square().sum().backward()
    A, B = (t.detach().clone().requires_grad_() for t in (container.lora_A, container.lora_B))
    torch.manual_seed(9)
    dropped = F.dropout(x, 0.5)
    assert (dropped == 0).any()
    (base(x) + 2.0 * dropped @ A.T @ B.T).square().sum().backward()
    assert torch.allclose(container.lora_A.grad, A.grad, rtol=1e-5)
    assert torch.allclose(container.lora_B.grad, B.grad, rtol=1e-5)


def test_gradients_under_dropout_of_a_block_site(tiny_llama: LlamaForCausalLM) -> None:
    """3: the fast dispatch against plain autograd, with the same dropout masks."""
    site = {"target": "mlp", "experts": EXPERTS, "router": ROUTER}
    container = filled(experts.build(tiny_llama.model.layers[0].mlp, site)).train()
    assert isinstance(container, BlockContainer)
    x = torch.randn(2, 9, 32)
    results: dict[str, list[Tensor]] = {}
    for implementation in ("sorted", "reference"):
        container.implementation = implementation
        container.zero_grad()
        hidden = x.clone().requires_grad_()
        torch.manual_seed(9)
        out = container(hidden)
        out.square().sum().backward()
        results[implementation] = [out, hidden.grad, *(p.grad for p in container.parameters())]
    for fast, slow in zip(*results.values(), strict=True):
        assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-4 * slow.abs().max().item())
    container.eval()
    assert not torch.allclose(container(x), results["sorted"][0], atol=1e-2), "dropout did nothing"


@pytest.mark.parametrize("target", ["mlp", "up_proj"])
def test_a_frozen_adapter_is_still_applied(tiny_llama: LlamaForCausalLM, target: str) -> None:
    """10: their fast path skips a LoRA whose tensors need no gradient."""
    model = moelora.attach(tiny_llama, {"sites": [{"target": target, "experts": EXPERTS, "router": ROUTER}]}).eval()
    for container in model.containers().values():
        filled(container)
    ids = torch.randint(3, 64, (2, 7))
    expected = model(ids).logits.detach()
    model.requires_grad_(False)
    assert torch.equal(model(ids).logits, expected)
    with model.disable_experts():
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)


def test_every_option_survives_saving() -> None:
    """11: their exporter drops coefficients, jitter and initial spread; our default coefficient is the paper's."""
    site = {
        "target": "mlp",
        "experts": EXPERTS,
        "router": {"kind": "topk", "jitter": 0.1, "aux_loss_coef": 0.02, "z_loss_coef": 0.003, "init_std": 0.5},
    }
    config = MixtureConfig.parse({"sites": [site]})
    assert MixtureConfig.parse(config.to_dict()) == config
    assert config.sites[0].router.jitter == 0.1
    plain = MixtureConfig.parse({"sites": [{"target": "mlp", "experts": EXPERTS, "router": ROUTER}]})
    assert plain.sites[0].router.aux_loss_coef == 0.01


def test_warm_up_is_not_ignored() -> None:
    """11: their templates say warmup_steps, which nothing reads."""
    from transformers import get_scheduler

    from moelora.trainers.sft import SFTConfig

    arguments = SFTConfig.parse({"args": {"warmup_steps": 4, "learning_rate": 1.0}}).training_arguments("unused", 0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    schedule = get_scheduler("constant_with_warmup", optimizer, arguments.get_warmup_steps(100), 100)
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
