"""MOELoRA's gate: the same for all tokens of a sequence, learnt for each task, and mergeable for each task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import UserError
from moelora.experts import LinearContainer, build
from moelora.routers.task import TaskRouter
from moelora.routing import RoutingContext

TASKS = 4


def layer(**options: Any) -> LinearContainer:
    torch.manual_seed(3)
    config = {
        "target": "any",
        "experts": {"num_experts": 3, "r": [1, 3, 2], "alpha": 4.0},
        "router": {"kind": "task", "num_tasks": TASKS, "embedding_dim": 5, **options},
    }
    container = build(nn.Linear(16, 12), config)
    assert isinstance(container, LinearContainer)
    with torch.no_grad():
        container.experts.lora_B.normal_(std=0.5)
    return container


def router_of(container: LinearContainer) -> TaskRouter:
    assert isinstance(container.router, TaskRouter)
    return container.router


def call(container: LinearContainer, x: Tensor, ids: Tensor) -> Tensor:
    with container.slot.using(RoutingContext(task_ids=ids)):
        out: Tensor = container(x)
    return out


def test_weights_are_the_softmax_of_a_linear_of_the_tasks_embedding() -> None:
    container = layer()
    router = router_of(container)
    ids = torch.tensor([3, 0, 3])
    with container.slot.using(RoutingContext(task_ids=ids)):
        record = container.decide(torch.randn(3, 5, 16))
    assert record is not None and record.normalized
    for row, task in enumerate(ids.tolist()):
        expected = (router.weight @ router.embedding[task]).softmax(-1)
        assert torch.allclose(record.weights[row], expected.expand(5, 3), atol=1e-6)


def test_the_merged_weight_of_a_task_is_its_routed_output() -> None:
    container = layer()
    x = torch.randn(2, 5, 16)
    outs = []
    for task in range(TASKS):
        ids = torch.full((2,), task)
        weights = router_of(container).constant_weights(RoutingContext(task_ids=ids))
        merged = container.base.weight + container.experts.delta(weights, container.base)
        outs.append(call(container, x, ids))
        assert torch.allclose(outs[-1], F.linear(x, merged, container.base.bias), atol=1e-5)
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)


def test_weights_are_constant_for_one_known_task_only() -> None:
    router = router_of(layer())
    for ids in (None, torch.tensor([0, 1]), torch.tensor([TASKS]), torch.tensor([-1])):
        assert router.constant_weights(RoutingContext(task_ids=ids)) is None


def test_gradients_reach_the_rows_of_the_tasks_seen() -> None:
    container = layer()
    call(container, torch.randn(2, 5, 16), torch.tensor([1, 3])).square().sum().backward()
    router = router_of(container)
    assert [bool(row.any()) for row in router.embedding.grad] == [False, True, False, True]
    assert router.weight.grad.any()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "needs task_ids"),
        (torch.tensor([0, 4]), r"task_ids holds 0\.\.4, but there are only 0\.\.3: number them from 0"),
        (torch.tensor([0, -1]), r"task_ids holds -1\.\.0"),
        (torch.tensor([0, 1, 2]), "do not fit tokens"),
    ],
)
def test_task_ids_that_do_not_fit_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(layer(), torch.randn(2, 5, 16), ids)


def test_rank_and_scale_of_the_released_code_are_those_of_the_card() -> None:
    # Released: r is the rank of all experts together and the scale is alpha / r for each.
    site = moelora.load_recipe("task").mixture.sites[0]
    assert site.experts.total_rank == 16
    assert site.experts.scales == (32 / 16,) * 8


@pytest.mark.parametrize("share", ["all", "module"])
def test_by_default_all_sites_of_any_width_have_one_gate(tiny_llama: LlamaForCausalLM, share: str) -> None:
    options = {} if share == "all" else {"share": share}
    site = {
        "target": ["q_proj", "down_proj"],
        "experts": {"num_experts": 3, "r": 2, "alpha": 4.0},
        "router": {"kind": "moelora_task", "num_tasks": TASKS, **options},
    }
    model = moelora.attach(tiny_llama, {"sites": [site]})
    gates = [name for name in model.adapter_tensors() if name.endswith("router.weight")]
    assert len(gates) == (1 if share == "all" else 4)


def test_tasks_of_a_batch_do_not_touch_each_other(tiny_llama: LlamaForCausalLM) -> None:
    site = {
        "target": "mlp",
        "experts": {"num_experts": 3, "r": 2, "alpha": 4.0},
        "router": {"kind": "task", "num_tasks": TASKS},
    }
    model = moelora.attach(tiny_llama, {"sites": [site]}).eval()
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if "lora_B" in name:
                tensor.normal_(std=0.3)
        ids, tasks = torch.randint(3, 64, (3, 6)), torch.tensor([2, 0, 1])
        together = model(ids, task_ids=tasks).logits
        for row in range(3):
            alone = model(ids[row : row + 1], task_ids=tasks[row : row + 1]).logits
            assert torch.allclose(together[row], alone[0], atol=1e-5)
        assert not torch.allclose(together, model(ids, task_ids=tasks.flip(0)).logits, atol=1e-3)
