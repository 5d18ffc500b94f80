"""The linear container by itself, around every kind of linear that a backbone may have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import moelora
from moelora.dispatch import linear as dispatch
from moelora.dispatch.extension import library
from moelora.experts import LinearContainer, build
from moelora.routing import RoutingContext

SITE: dict[str, Any] = {
    "target": "any",
    "experts": {"kind": "lora", "num_experts": 3, "r": [1, 2, 3], "alpha": [2.0, 2.0, 6.0]},
    "router": {"kind": "topk", "top_k": 2},
}


def dense() -> nn.Module:
    return nn.Linear(64, 48)


def conv1d() -> nn.Module:
    return Conv1D(48, 64)


def nf4() -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu")


def half() -> nn.Module:
    return nn.Linear(64, 48).to(torch.bfloat16)


def filled(base: nn.Module) -> LinearContainer:
    base.requires_grad_(False)
    container = build(base, SITE)
    assert isinstance(container, LinearContainer)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in container.adapter_tensors().values():
            tensor.normal_(std=0.3, generator=generator)
    return container


def expected(container: LinearContainer, x: Tensor) -> Tensor:
    """Token by token and expert by expert, from the definition."""
    out = container.base(x).float()
    weights = (x.float() @ container.router.weight.T).softmax(-1)
    rows = []
    for token, probs in zip(x.reshape(-1, 64), weights.reshape(-1, 3), strict=True):
        top = probs.topk(2)
        total = torch.zeros(48)
        for weight, expert in zip(top.values / top.values.sum(), top.indices.tolist(), strict=True):
            part = slice((0, 1, 3)[expert], (1, 3, 6)[expert])
            update = container.lora_B[:, part] @ (container.lora_A[part] @ token.float())
            total = total + weight * (2.0, 1.0, 2.0)[expert] * update
        rows.append(total)
    return out + torch.stack(rows).reshape(out.shape)


@pytest.mark.smoke
@pytest.mark.parametrize("make", [dense, conv1d, nf4, half])
def test_is_the_definition_with_gradients(make: Any) -> None:
    container = filled(make())
    dtype = torch.bfloat16 if make is half else torch.float32
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    out = container(x)
    assert out.dtype == dtype and out.shape == (2, 5, 48)
    tolerance = 0.15 if make is half else 1e-5
    assert (out.float() - expected(container, x)).abs().max() < tolerance
    out.float().square().mean().backward()
    got = {name: tensor.grad.clone() for name, tensor in container.adapter_tensors().items()}
    hidden = x.grad.clone()
    container.zero_grad()
    x.grad = None
    expected(container, x).square().mean().backward()
    for name, tensor in container.adapter_tensors().items():
        assert (got[name] - tensor.grad).norm() <= (0.05 if make is half else 1e-4) * tensor.grad.norm(), name
    assert (hidden - x.grad).float().norm() <= (0.05 if make is half else 1e-4) * x.grad.float().norm()


def test_tensors_have_the_documented_names_and_shapes() -> None:
    container = filled(dense())
    shapes = {name: tuple(tensor.shape) for name, tensor in container.adapter_tensors().items()}
    assert shapes == {"lora_A": (6, 64), "lora_B": (48, 6), "router.weight": (3, 64)}
    assert {name for name, p in container.named_parameters() if p.requires_grad} == {
        "experts.lora_A",
        "experts.lora_B",
        "router.weight",
    }
    assert (container.in_features, container.out_features) == (64, 48)
    assert container.weight is container.base.weight and container.bias is container.base.bias


def test_a_container_by_itself_can_be_traced() -> None:
    container = filled(dense())
    with moelora.trace(container) as tape, torch.no_grad():
        container(torch.randn(4, 64))
        container(torch.randn(2, 3, 64))
    assert [record.indices.shape for record in tape[""]] == [(4, 2), (2, 3, 2)]


# -- the implementations, inside a container ---------------------------------------------------------------------------


@pytest.fixture(params=["plain", "fused", "sorted", "compiled"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every site takes this implementation."""
    if request.param == "compiled" and library() is None:
        pytest.skip("no C++ compiler and ninja here")
    monkeypatch.setattr(dispatch, "choose", lambda *_: request.param)
    return str(request.param)


@pytest.mark.parametrize("make", [dense, conv1d, nf4])
def test_every_implementation_leaves_every_kind_of_base_its_gradient(implementation: str, make: Any) -> None:
    container = filled(make())
    x = torch.randn(2, 5, 64, requires_grad=True)
    upstream = torch.randn(2, 5, 48)
    found = []
    for function in (container, lambda hidden: expected(container, hidden)):
        container.zero_grad()
        x.grad = None
        out = function(x)
        (out * upstream).sum().backward()
        found.append([out.detach(), x.grad, *(t.grad.clone() for t in container.adapter_tensors().values())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_checkpointing_repeats_every_implementation_bit_for_bit(
    implementation: str, tiny_llama: LlamaForCausalLM
) -> None:
    site = {**SITE, "target": ["q_proj", "down_proj"]}
    model = moelora.attach(tiny_llama, {"sites": [site]}).train()
    for name, tensor in model.adapter_tensors().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(tensor, std=0.3)
    ids = torch.randint(0, 64, (2, 9))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(t.grad.clone() for t in model.adapter_tensors().values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_site_is_one_graph_for_torch_compile() -> None:
    container = build(nn.Linear(64, 48).requires_grad_(False), {**SITE, "experts": {"num_experts": 8, "r": 2}})
    x = torch.randn(2, 5, 64, requires_grad=True)
    traced = torch.compile(container, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x), container(x))


def test_the_backbone_with_its_sites_is_one_graph_for_torch_compile(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [{**SITE, "target": ["q_proj", "down_proj"]}]})
    ids = torch.randint(0, 64, (2, 9))
    expected_logits = model.backbone(
        input_ids=ids
    ).logits  # the first forward of all also sets up transformers' own hooks
    traced = torch.compile(lambda ids: model.backbone(input_ids=ids).logits, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(ids), expected_logits)


def test_nothing_is_read_back_to_the_host() -> None:
    """Tensors without data refuse to be read, as a GPU's would make the host wait."""
    site = {**SITE, "experts": {"num_experts": 64, "r": 8, "alpha": 8.0}}
    container = build(nn.Linear(64, 48).requires_grad_(False), site).to("meta")
    container.slot.context = RoutingContext(token_mask=torch.ones(2, 5, dtype=torch.bool, device="meta"))
    x = torch.randn(2, 5, 64, device="meta", requires_grad=True)
    with moelora.trace(container) as tape:
        out = container(x)
    losses = container.router.losses(tape[""], container.slot.context)
    (out.sum() + losses["load_balance"] + losses["router_z"]).backward()
    assert x.grad.shape == x.shape and container.lora_B.grad.shape == (48, 512)
