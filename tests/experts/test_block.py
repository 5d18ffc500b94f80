"""The block container: weights of updates, residuals, and every implementation on whole containers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moelora.dispatch import extension
from moelora.experts import BlockContainer, build
from moelora.routers.base import Router, RouterConfig
from moelora.routing import RouteInput, RoutingRecord, SiteInfo

WIDTH, INNER, EXPERTS = 32, 48, 4
IMPLEMENTATIONS = ["reference", "sorted", "masked", "compiled"]


class Given(Router[RouterConfig]):
    """Weights that a test says; not registered."""

    kind = "given"
    Config = RouterConfig

    def __init__(self, indices: Tensor | None, weights: Tensor, residual: Tensor | None = None) -> None:
        super().__init__(RouterConfig(kind="given"), SiteInfo("", None, WIDTH, WIDTH, (3, 1, 0, 4), (2.0,) * EXPERTS))
        self.indices, self.weights, self.residual = indices, nn.Parameter(weights), residual

    def route(self, inputs: RouteInput) -> RoutingRecord:
        weights = self.weights if self.indices is None else self.weights * (self.indices >= 0)
        return RoutingRecord(self.indices, weights, EXPERTS, residual=self.residual)


class WeighsOutputs(Given):
    weighs = "outputs"


def make(router: Router[Any] | None = None, *, bias: bool = True, dropout: float = 0.0, **more: Any) -> BlockContainer:
    torch.manual_seed(0)
    base = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER, mlp_bias=bias)).requires_grad_(False)
    site: dict[str, Any] = {
        "target": "mlp",
        "experts": {"num_experts": EXPERTS, "r": [3, 1, 2, 4], "alpha": [6.0, 2.0, 4.0, 8.0], "dropout": dropout},
        "router": {"kind": "topk", "top_k": 2, "init_std": 1.0},
    }
    if router is not None:
        site["experts"] |= {"r": [3, 1, 1, 4], "alpha": [6.0, 2.0, 2.0, 8.0]}
    container = build(base, {**site, **more}, router=router if router is None else matched(router))
    assert isinstance(container, BlockContainer)
    for bank in container.banks():
        nn.init.normal_(bank.lora_B, std=0.3)
    for parameter in base.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return container


def matched(router: Router[Any]) -> Router[Any]:
    router.site = SiteInfo("", None, WIDTH, WIDTH, (3, 1, 1, 4), (2.0,) * EXPERTS)
    return router


def merged(container: BlockContainer, expert: int) -> nn.Module:
    """The frozen block with one expert added to its weights."""
    block = copy.deepcopy(container.base)
    start = sum(container.site.ranks[:expert])
    part = slice(start, start + container.site.ranks[expert])
    for name in container.spec.projections:
        bank = container.experts[name]
        block.get_submodule(name).weight.data += 2.0 * (bank.lora_B[:, part] @ bank.lora_A[part])
    return block


def need(implementation: str) -> None:
    if implementation == "compiled" and extension.library() is None:
        pytest.skip("no C++ compiler and ninja here")


TOP = torch.tensor([[0, 3], [1, 0], [3, -1], [-1, -1], [2, 1]])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:3])
def test_weights_of_updates_leave_the_rest_to_the_frozen_block(implementation: str, dense: bool) -> None:
    """y = f_0(x) + sum_e w_e (f_e(x) - f_0(x)), for weights that sum to anything."""
    weights = torch.randn(5, EXPERTS if dense else 2)
    container = make(Given(None, weights) if dense else Given(TOP, weights * (TOP >= 0))).double()
    container.implementation = implementation
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    frozen = container.base(x)
    expected = frozen.clone()
    for t in range(5):
        for slot in range(EXPERTS if dense else 2):
            expert = slot if dense else int(TOP[t, slot])
            if expert >= 0:
                expected[t] += weights[t, slot].double() * (merged(container, expert)(x[t]) - frozen[t])
    torch.testing.assert_close(container(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:3])
def test_weights_of_outputs_leave_nothing_to_the_frozen_block(implementation: str) -> None:
    weights, residual = torch.randn(5, 2) * (TOP >= 0), torch.randn(5)
    container = make(WeighsOutputs(TOP, weights, residual)).double()
    container.implementation = implementation
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    expected = residual.double().unsqueeze(1) * x
    for t in range(5):
        for slot, expert in enumerate(TOP[t].tolist()):
            if expert >= 0:
                expected[t] += weights[t, slot].double() * merged(container, expert)(x[t])
    torch.testing.assert_close(container(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_of_zero_are_the_frozen_block(implementation: str, dtype: torch.dtype) -> None:
    need(implementation)
    if implementation == "compiled" and dtype != torch.float32:
        pytest.skip("float32 only")
    container = make(Given(TOP, torch.zeros(5, 2))).to(dtype)
    container.implementation = implementation
    x = torch.randn(5, WIDTH, dtype=dtype)
    torch.testing.assert_close(container(x), container.base(x))


def step(container: BlockContainer, x: Tensor, checkpointed: bool = False) -> list[Tensor]:
    container.zero_grad()
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    with container.slot.using():
        out = checkpoint(container, x, use_reentrant=False) if checkpointed else container(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = [p.grad for p in container.parameters() if p.requires_grad]
    assert x.grad is not None and all(grad is not None for grad in grads)
    return [out.detach(), x.grad, *(grad.clone() for grad in grads if grad is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("router", ["normalised", "updates", "outputs"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_whole_containers_agree(implementation: str, router: str, dropout: float) -> None:
    need(implementation)
    weights = torch.rand(5, 2) * (TOP >= 0)
    kinds: dict[str, Router[Any] | None] = {
        "normalised": None, "updates": Given(TOP, weights), "outputs": WeighsOutputs(TOP, weights, weights[:, 0]),
    }  # fmt: skip
    container = make(kinds[router], dropout=dropout).train()
    x = torch.randn(5, WIDTH)
    container.implementation = "reference"
    expected = step(container, x)
    container.implementation = implementation
    for found, right in zip(step(container, x), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()) + 1e-7)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_checkpointing_repeats_every_bit(implementation: str, dropout: float) -> None:
    need(implementation)
    container = make(dropout=dropout).train()
    container.implementation = implementation
    x = torch.randn(6, WIDTH)
    for found, right in zip(step(container, x, checkpointed=True), step(container, x), strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_a_4_bit_base(implementation: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    need(implementation)
    torch.manual_seed(0)
    base = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=128))
    for name, child in list(base.named_children()):
        if isinstance(child, nn.Linear):
            packed = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            packed.load_state_dict(child.state_dict())
            setattr(base, name, packed.to("cpu"))
    site = {"target": "mlp", "experts": {"num_experts": 3, "r": 2}, "router": {"kind": "topk", "top_k": 2}}
    container = build(base.requires_grad_(False), site)
    assert isinstance(container, BlockContainer)
    for bank in container.banks():
        nn.init.normal_(bank.lora_B, std=0.3)
    x = torch.randn(9, 64)
    container.implementation = "reference"
    expected = step(container, x)
    container.implementation = implementation
    for found, right in zip(step(container, x), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning:torch")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_sees_one_graph(backend: str) -> None:
    """With ``auto``, whatever the device: nothing that depends on values is in the way."""
    container = make().train()
    x = torch.randn(2, 5, WIDTH)
    container.implementation = "reference"
    expected = step(container, x)
    container.implementation = "auto"
    compiled = torch.compile(container, backend=backend, fullgraph=True)
    hidden = x.clone().requires_grad_()
    container.zero_grad()
    out = compiled(hidden)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden.grad, expected[1], rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused() -> None:
    """Rather than computed wrongly: the fast implementations have a first one only."""
    for implementation in ("sorted", "compiled"):
        need(implementation)
        container = make()
        container.implementation = implementation
        x = torch.randn(3, WIDTH, requires_grad=True)
        (grad,) = torch.autograd.grad(container(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
