"""MeteoRA's gate and the loss that teaches it; numbers of the authors' layer are in tests/reference/test_meteora.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import ConfigError, UserError
from moelora.experts import LinearContainer, build
from moelora.experts.frozen import FrozenExperts
from moelora.mixture import MoELoRAModel
from moelora.routers.meteora import MeteoRARouter
from moelora.routing import RouteInput, RoutingContext, RoutingRecord

EXPERTS = 4
K1 = pytest.mark.filterwarnings("ignore:router 'meteora' with top_k 1")


def layer(**options: Any) -> LinearContainer:
    torch.manual_seed(3)
    config = {
        "target": "any",
        "experts": {"kind": "frozen", "num_experts": EXPERTS, "r": [1, 2, 3, 2], "alpha": 4.0},
        "router": {"kind": "meteora", **options},
    }
    container = build(nn.Linear(16, 12), config)
    assert isinstance(container, LinearContainer)
    with torch.no_grad():
        for tensor in container.adapter_tensors().values():
            tensor.normal_(std=0.5)
    return container


def router_of(container: LinearContainer) -> MeteoRARouter:
    assert isinstance(container.router, MeteoRARouter)
    return container.router


def records(container: LinearContainer, masks: list[Tensor | None], flat: bool = False) -> list[RoutingRecord]:
    router = router_of(container)
    result = []
    for index, mask in enumerate(masks):
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(index))
        x = x.flatten(0, 1) if flat else x
        record = router.route(RouteInput(x, None, RoutingContext(), container.site))
        record.mask = None if mask is None else mask.reshape(x.shape[:-1])
        result.append(record)
    return result


def alone(container: LinearContainer, x: Tensor, expert: int) -> Tensor:
    """The frozen linear with one adapter."""
    weights = F.one_hot(torch.tensor(expert), EXPERTS).float()
    return container.base(x) + x @ container.experts.delta(weights, container.base).T


RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
LEFT = RIGHT.flip(1)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_the_gate_loss_is_the_mean_over_gates_and_real_tokens(shift: bool, flat: bool) -> None:
    container = layer(shift=shift)
    ids = torch.tensor([2, -1, 0])  # the second sequence has no task
    for masks in ([RIGHT, RIGHT], [LEFT, LEFT], [None, None]):
        made = records(container, masks, flat)
        loss = router_of(container).losses(made, RoutingContext(task_ids=ids))["gate"]
        terms = []
        for record, mask in zip(made, masks, strict=True):
            logits = record.logits.reshape(3, 5, EXPERTS)
            for row in (0, 2):
                real = [t for t in range(5) if mask is None or mask[row, t]]
                for token in real[:-1] if shift else real:
                    terms.append(F.cross_entropy(logits[row, token], ids[row]))
        assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_a_zero_gate_has_the_loss_log_E() -> None:
    container = layer()
    with torch.no_grad():
        router_of(container).weight.zero_()
    loss = router_of(container).losses(records(container, [RIGHT]), RoutingContext(task_ids=torch.tensor([3, 1, 0])))
    assert loss["gate"].item() == pytest.approx(math.log(EXPERTS), rel=1e-6)


def test_no_sequence_with_a_task_is_no_loss() -> None:
    container = layer()
    ids = torch.tensor([-1, -1, -1])
    assert router_of(container).losses(records(container, [RIGHT]), RoutingContext(task_ids=ids))["gate"].item() == 0


def test_training_without_task_ids_is_refused_and_evaluation_is_not() -> None:
    container = layer().train()
    with pytest.raises(UserError, match=r"needs task_ids .* or set router.gate_loss_coef to 0"):
        router_of(container).losses(records(container, [None]), RoutingContext())
    assert router_of(container).losses(records(container.eval(), [None]), RoutingContext()) == {}
    free = layer(gate_loss_coef=0.0).train()
    assert router_of(free).losses(records(free, [None]), RoutingContext()) == {}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 4, 1]), r"task_ids holds 0\.\.4, but there are only 0\.\.3"),
        (torch.tensor([0, -2, 1]), r"task_ids holds -2\.\.1"),
        (torch.tensor([0, 1]), r"task_ids has the shape \(2,\), which does not fit 15 tokens"),
        (torch.zeros(3, 5, dtype=torch.long), r"task_ids has the shape \(3, 5\)"),
    ],
)
def test_task_ids_that_do_not_fit_are_refused(ids: Tensor, message: str) -> None:
    container = layer()
    with pytest.raises(UserError, match=message):
        router_of(container).losses(records(container, [None]), RoutingContext(task_ids=ids))


def test_one_adapter_per_token_is_warned_of_and_its_gate_learns_from_the_gate_loss_alone() -> None:
    with pytest.warns(UserWarning, match="it learns from the loss 'gate' alone"):
        container = layer(top_k=1).train()
    with pytest.warns(UserWarning, match="it learns nothing at all"):
        layer(top_k=1, gate_loss_coef=0.0)
    x = torch.randn(3, 5, 16)
    record = container.decide(x)
    assert record is not None and (record.weights == 1).all()
    container(x).square().sum().backward()
    router = router_of(container)
    assert router.weight.grad is None or not router.weight.grad.any()
    router.losses([record], RoutingContext(task_ids=torch.tensor([0, 1, 2])))["gate"].backward()
    assert router.weight.grad.any()
    two = layer(top_k=2).train()
    two(x).square().sum().backward()
    assert router_of(two).weight.grad.any()


@K1
def test_one_adapter_is_that_adapter_alone() -> None:
    container = layer(top_k=1)
    x = torch.randn(7, 16)
    record = container.decide(x)
    assert record is not None
    expected = torch.stack([alone(container, x[t], int(record.indices[t, 0])) for t in range(7)])
    assert len(set(record.indices.flatten().tolist())) > 1
    assert torch.allclose(container(x), expected, atol=1e-5)


def test_all_adapters_are_the_dense_softmax_mixture() -> None:
    container = layer(top_k=EXPERTS)
    x = torch.randn(7, 16)
    probs = (x @ router_of(container).weight.T).softmax(-1)
    expected = sum(probs[:, e, None] * (alone(container, x, e) - container.base(x)) for e in range(EXPERTS))
    assert torch.allclose(container(x), container.base(x) + expected, atol=1e-5)


def test_the_order_of_the_adapters_does_not_matter() -> None:
    container, other = layer(), layer()
    order = [2, 0, 3, 1]
    experts = {"kind": "frozen", "num_experts": EXPERTS, "r": [3, 1, 2, 2], "alpha": 4.0}
    other = build(container.base, {"target": "any", "experts": experts, "router": {"kind": "meteora"}})
    assert isinstance(other, LinearContainer) and isinstance(other.experts, FrozenExperts)
    A, B = container.lora_A.split([1, 2, 3, 2]), container.lora_B.split([1, 2, 3, 2], dim=1)
    for place, expert in enumerate(order):
        other.experts.load_expert(place, A[expert], B[expert])
    with torch.no_grad():
        router_of(other).weight.copy_(router_of(container).weight[order])
    x = torch.randn(7, 16)
    assert torch.allclose(other(x), container(x), atol=1e-5)


def test_more_adapters_per_token_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k is 5 but there are 4 experts"):
        layer(top_k=5)


@pytest.mark.parametrize("target", [["q_proj", "down_proj"], ["mlp"]])
def test_gates_learn_tasks_and_adapters_stay(tiny_llama: LlamaForCausalLM, target: list[str]) -> None:
    model = _model(tiny_llama, target)
    adapters = {name: value.clone() for name, value in model.adapter_tensors().items() if "lora_" in name}
    generator = torch.Generator().manual_seed(2)
    # Two tasks that use different halves of the vocabulary.
    ids = torch.cat([torch.randint(3, 30, (4, 8), generator=generator), torch.randint(34, 64, (4, 8))])
    tasks = torch.tensor([0] * 4 + [1] * 4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(25):
        out = model(ids, labels=ids, task_ids=tasks)
        assert out.loss.item() == pytest.approx(out.task_loss.item() + 50 * out.aux_losses["gate"].item(), rel=1e-5)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.aux_losses["gate"].item())
    assert losses[0] > 1.0 and losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(model.adapter_tensors()[name], value) for name, value in adapters.items())


def _model(backbone: LlamaForCausalLM, target: list[str]) -> MoELoRAModel:
    site = {
        "target": target,
        "experts": {"kind": "frozen", "num_experts": EXPERTS, "r": 2, "alpha": 4.0},
        "router": {"kind": "meteora"},
    }
    model = moelora.attach(backbone, {"sites": [site]}).train()
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if "lora_B" in name:
                tensor.normal_(std=0.1)
    return model
