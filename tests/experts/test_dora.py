"""DoRA experts: PEFT's DoRA for one expert, the definition in float64 for a mixture, on every kind of linear."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import moelora
from moelora.errors import ConfigError
from moelora.experts import LinearContainer, build
from moelora.experts.dense import dense_weight
from moelora.routers.base import Router, RouterConfig
from moelora.routing import SiteInfo

TARGETS = ["q_proj", "o_proj", "gate_proj", "down_proj"]
TWO: dict[str, Any] = {
    "target": "any",
    "experts": {"kind": "dora", "num_experts": 2, "r": [2, 3], "alpha": [4.0, 3.0]},
    "router": {"kind": "topk", "top_k": 2, "normalize": False, "init_std": 0.5},
}


def linear() -> nn.Module:
    return nn.Linear(64, 48)


def conv1d() -> nn.Module:
    layer = Conv1D(48, 64)
    nn.init.normal_(layer.bias)
    return layer


def nf4() -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32, quant_type="nf4").to("cpu")


def int8() -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")


def filled(base: nn.Module, site: dict[str, Any] | None = None) -> LinearContainer:
    base.requires_grad_(False)
    container = build(base, TWO if site is None else site)
    assert isinstance(container, LinearContainer)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in container.adapter_tensors().items():
            if name == "magnitude":
                tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 1.5, generator=generator))
            else:
                tensor.normal_(std=0.3, generator=generator)
    return container


def oracle(container: LinearContainer, x: Tensor) -> Tensor:
    """The definition in float64, expert by expert; the norm without gradient."""
    bank, W = container.experts, dense_weight(container.base).double()
    base = x.double() @ W.T + container.base.bias.double()
    gate = (x.double() @ container.router.weight.double().T).softmax(-1)
    starts = (0, 2, 5)
    for expert, scale in enumerate((2.0, 1.0)):
        part = slice(starts[expert], starts[expert + 1])
        update = scale * bank.lora_B[:, part].double() @ bank.lora_A[part].double()
        ratio = bank.magnitude[expert].double() / (W + update).norm(dim=1).detach()
        whole = ratio * (x.double() @ (W + update).T) - x.double() @ W.T
        base = base + gate[..., expert : expert + 1] * whole
    return base


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for the old name
@pytest.mark.parametrize("routed", [False, True])
def test_one_expert_is_peft_dora_with_gradients(tiny_llama: LlamaForCausalLM, routed: bool) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True)
    peft = get_peft_model(copy.deepcopy(tiny_llama), config)
    site: dict[str, Any] = {"target": TARGETS, "experts": {"kind": "dora", "num_experts": 1, "r": 4, "alpha": 8}}
    if routed:
        site["router"] = {"kind": "topk", "top_k": 1, "aux_loss_coef": 0.0}
    model = moelora.attach(tiny_llama, {"sites": [site]})
    theirs = {}
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                if "magnitude" in name:
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
                else:
                    parameter.normal_(std=0.2)
            name = name.removeprefix("base_model.model.").replace(".default.weight", "")
            theirs[name.replace("lora_magnitude_vector", "magnitude")] = parameter
    ours = {name: tensor for name, tensor in model.adapter_tensors().items() if "router" not in name}
    assert set(ours) == set(theirs)
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name].reshape(tensor.shape))
    ids = torch.randint(3, 64, (2, 9))
    expected, out = peft(ids, labels=ids), model(ids, labels=ids)
    assert (out.logits - expected.logits).abs().max() <= 1e-5
    expected.loss.backward()
    out.loss.backward()
    for name, tensor in ours.items():
        assert (tensor.grad - theirs[name].grad.reshape(tensor.shape)).abs().max() <= 1e-5, name


@pytest.mark.parametrize("make", [linear, conv1d, nf4])
def test_a_mixture_is_the_definition_with_gradients(make: Callable[[], nn.Module]) -> None:
    container = filled(make())
    x = torch.randn(2, 5, 64, requires_grad=True)
    weight = torch.randn(2, 5, 48)
    grads = []
    for out in (container(x), oracle(container, x)):
        inputs = {"x": x, **container.adapter_tensors()}
        total = (out * weight).sum()
        grads.append(dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True)))
    assert (container(x) - oracle(container, x)).abs().max() <= 1e-5
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-5 * grads[1][name].norm(), name


def test_an_int8_base_is_rescaled_as_it_computes() -> None:
    """bitsandbytes rounds the input of an 8-bit linear, so its output is near the definition, not equal to it."""
    container = filled(int8())
    x = torch.randn(7, 64)
    expected = oracle(container, x)
    assert (container(x) - expected).norm() <= 0.02 * expected.norm()


def test_fresh_experts_add_nothing_bit_for_bit(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 64, (2, 9))
    expected = tiny_llama(ids).logits
    site = {"target": TARGETS, "experts": {"kind": "dora", "num_experts": 3, "r": 2}, "router": {"kind": "topk"}}
    model = moelora.attach(tiny_llama, {"sites": [site]})
    assert torch.equal(model(ids).logits, expected)
    magnitudes = {name: t for name, t in model.adapter_tensors().items() if name.endswith("magnitude")}
    assert len(magnitudes) == 8 and all(t.shape[0] == 3 and t.requires_grad for t in magnitudes.values())


def test_the_magnitude_is_trained_and_saved(tiny_llama: LlamaForCausalLM, tmp_path: Any) -> None:
    site = {"target": TARGETS, "experts": {"kind": "dora", "num_experts": 2, "r": 2}, "router": {"kind": "topk"}}
    base = copy.deepcopy(tiny_llama)
    model = moelora.attach(tiny_llama, {"sites": [site]})
    name = "model.layers.0.self_attn.q_proj.magnitude"
    before = model.adapter_tensors()[name].detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(3, 64, (2, 9))
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert not torch.equal(model.adapter_tensors()[name], before)
    model.save_pretrained(tmp_path)
    again = moelora.from_pretrained(tmp_path, backbone=base)
    assert torch.equal(again.adapter_tensors()[name], model.adapter_tensors()[name])
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_dropout_leaves_the_rescaled_frozen_output_alone() -> None:
    """The known difference from PEFT, which drops features of W x in the update as well."""
    container = filled(linear(), TWO | {"experts": {**TWO["experts"], "dropout": 0.5}})
    x = torch.randn(5, 64)
    with torch.no_grad():
        container.experts.lora_B.zero_()
    assert torch.equal(container.train()(x), container.eval()(x))


def test_the_bias_is_not_rescaled() -> None:
    container = filled(linear())
    with torch.no_grad():
        container.base.bias.add_(100.0)
        before = container(torch.zeros(3, 64))
    assert torch.allclose(before, container.base.bias.expand(3, -1))


def test_a_factor_of_an_expert_multiplies_all_that_it_adds() -> None:
    container = filled(linear())
    x = torch.randn(6, 64)
    with torch.no_grad():
        full, base = container(x), container.base(x)
        parts = []
        for expert in range(2):
            container.slot.expert_scale = {1 - expert: 0.0}
            parts.append(container(x) - base)
        container.slot.expert_scale = {0: 0.0, 1: 0.0}
        assert torch.allclose(container(x), base, atol=1e-6)
    assert torch.allclose(sum(parts), full - base, atol=1e-5)
    assert all(part.norm() > 0.1 for part in parts)


def test_a_row_of_zeros_stays_finite() -> None:
    base = linear()
    with torch.no_grad():
        base.weight[3] = 0
    container = filled(base)
    container(torch.randn(4, 64)).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in container.adapter_tensors().values())


def test_delta_is_what_constant_weights_add() -> None:
    container = filled(conv1d())
    weights = torch.tensor([0.3, 0.9])
    x = torch.randn(6, 64)
    bank = container.experts
    W = dense_weight(container.base)
    expected = torch.zeros(6, 48)
    for expert, (start, stop, scale) in enumerate([(0, 2, 2.0), (2, 5, 1.0)]):
        whole = W + scale * bank.lora_B[:, start:stop] @ bank.lora_A[start:stop]
        whole = whole * (bank.magnitude[expert] / whole.norm(dim=1)).unsqueeze(1)
        expected = expected + weights[expert] * (x @ (whole - W).T)
    assert torch.allclose(x @ bank.delta(weights, container.base).T, expected, atol=1e-5)


def test_block_sites_are_refused_with_the_reason(tiny_llama: LlamaForCausalLM) -> None:
    site = {"target": "mlp", "experts": {"kind": "dora", "num_experts": 2, "r": 2}, "router": {"kind": "topk"}}
    with pytest.raises(ConfigError, match=r"'dora' rescale the output of the frozen projection.*Target the linears"):
        moelora.attach(tiny_llama, {"sites": [site]})


class RankRouter(Router[RouterConfig]):
    """A router of single ranks, as FlyLoRA and SMoRA have one."""

    level = "rank"
    kind = "by_rank"


def test_a_router_of_single_ranks_is_refused() -> None:
    site = {"target": "any", "experts": {"kind": "dora", "num_experts": 1, "r": 4}}
    info = SiteInfo("q_proj", 0, 8, 8, (4,), (8.0,))
    with pytest.raises(ConfigError, match=r"'by_rank' weighs single ranks.*'dora'"):
        build(nn.Linear(8, 8), site, name="q_proj", router=RankRouter(RouterConfig(kind="by_rank"), info))


def test_a_router_that_mixes_factors_is_refused() -> None:
    site = {"target": "any", "experts": {"kind": "dora", "num_experts": 2, "r": 4}}
    router = {"kind": "static", "mix": "factors"}
    with pytest.raises(ConfigError, match=r"'static' mixes the factors of experts.*'dora'"):
        build(nn.Linear(8, 8), {**site, "router": router}, name="q_proj")


def test_weights_that_are_not_here_are_refused() -> None:
    with pytest.raises(ConfigError, match="meta device"):
        build(nn.Linear(8, 8, device="meta"), TWO, name="q_proj")
    base = nn.Linear(8, 8)
    base.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ConfigError, match="sharded"):
        build(base, TWO, name="q_proj")
