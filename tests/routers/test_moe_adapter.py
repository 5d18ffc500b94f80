"""A router for each task: which weights a token meets, and what only training adds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import ConfigError, UserError
from moelora.experts import Container, build
from moelora.mixture import MoELoRAModel
from moelora.routers.moe_adapter import MoEAdapterConfig, MoEAdapterRouter
from moelora.routers.topk import TopKConfig, TopKRouter
from moelora.routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo

EXPERTS = 6
SITE = SiteInfo("s", 0, 16, 16, ranks=(2,) * EXPERTS, scales=(1.0,) * EXPERTS)
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


def make(tasks: int, **options: Any) -> MoEAdapterRouter:
    router = MoEAdapterRouter(MoEAdapterConfig(num_tasks=tasks, **options), SITE)
    draw(router)
    return router.train(False)


def draw(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5, generator=generator)


def route(router: Any, ids: list[int], x: Tensor = X, **context: Any) -> RoutingRecord:
    known = RoutingContext(task_ids=torch.tensor(ids), **context)
    record: RoutingRecord = router.route(RouteInput(x, None, known, SITE))
    return record


def plain(router: MoEAdapterRouter, task: int) -> TopKRouter:
    """The router ``topk`` with the weight of a task."""
    twin = TopKRouter(TopKConfig(top_k=router.config.top_k), SITE).train(False)
    with torch.no_grad():
        twin.weight.copy_(router.weight[task])
    return twin


@pytest.mark.smoke
def test_one_task_is_plain_topk_bit_for_bit() -> None:
    router = make(1)
    record, expected = route(router, [0, 0, 0]), plain(router, 0).route(RouteInput(X, None, RoutingContext(), SITE))
    assert torch.equal(record.indices, expected.indices)
    assert torch.equal(record.weights, expected.weights)
    assert torch.equal(record.probs, expected.probs)


def test_weights_are_the_softmax_over_the_chosen() -> None:
    router = make(2, top_k=3)
    record = route(router, [1, 1, 1])
    scores, indices = (X @ router.weight[1].T).topk(3)
    assert torch.equal(record.indices, indices)
    assert torch.allclose(record.weights, scores.softmax(-1), atol=1e-6)


def test_all_experts_chosen_is_the_dense_softmax() -> None:
    router = make(3, top_k=EXPERTS)
    dense = (X @ router.weight[2].T).softmax(-1)
    assert torch.allclose(route(router, [2, 2, 2]).dense_weights(), dense, atol=1e-6)


@pytest.mark.smoke
def test_each_sequence_of_a_mixed_batch_meets_its_own_task() -> None:
    router = make(3)
    mixed = route(router, [2, 0, 1])
    for row, task in enumerate([2, 0, 1]):
        alone = route(router, [task], X[row : row + 1])
        expected = plain(router, task).route(RouteInput(X[row : row + 1], None, RoutingContext(), SITE))
        for one in (alone, expected):
            assert torch.equal(mixed.indices[row], one.indices[0])
            assert torch.allclose(mixed.weights[row], one.weights[0], atol=1e-6)
    assert not torch.equal(mixed.indices[0], route(router, [1, 1, 1]).indices[0])


def test_each_token_of_a_packed_row_meets_its_own_task() -> None:
    router = make(2)
    ids = torch.tensor([[0, 0, 1, 1, 1]] * 3)
    record = router.route(RouteInput(X, None, RoutingContext(task_ids=ids), SITE))
    zero, one = route(router, [0] * 3), route(router, [1] * 3)
    expected = torch.where((ids == 0).unsqueeze(-1), zero.indices, one.indices)
    assert torch.equal(record.indices, expected)


def test_an_unknown_task_has_no_experts_and_leaves_the_others_alone() -> None:
    router = make(2)
    record = route(router, [2, 1, -1])
    assert (record.indices[[0, 2]] == -1).all() and not record.weights[[0, 2]].any()
    assert torch.equal(record.indices[1], route(router, [1, 1, 1]).indices[1])
    record.weights.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in router.weight)
    mask = torch.ones(3, 5, dtype=torch.bool)
    assert record.counts(mask).sum() == 5 * 2


def test_only_the_tasks_of_the_batch_get_a_gradient() -> None:
    router = make(3).train()
    (route(router, [1, 1, 1]).weights[..., 0]).sum().backward()
    for weights in (router.weight, router.noise_weight):
        assert [bool(weight.grad.any()) for weight in weights] == [False, True, False]


def test_what_is_over_is_frozen() -> None:
    router = make(3, frozen_tasks=2).train()
    assert [weight.requires_grad for weight in router.weight] == [False, False, True]
    assert [weight.requires_grad for weight in router.noise_weight] == [False, False, True]
    route(router, [2, 2, 0]).weights[..., 0].sum().backward()
    assert router.weight[0].grad is None and router.weight[2].grad.any()
    with pytest.raises(ConfigError, match="frozen_tasks is 2, but num_tasks is 1"):
        MoEAdapterConfig.parse({"frozen_tasks": 2})


def test_a_new_task_leaves_the_older_ones_as_they_are() -> None:
    router = make(1)
    before, state = route(router, [0, 0, 0]), [weight.clone() for weight in router.parameters()]
    router.on_step_end(torch.ones(EXPERTS, dtype=torch.float64))
    router.begin_task(router.config.next_task())
    assert router.config == MoEAdapterConfig(num_tasks=2, frozen_tasks=1) and not router.usage.any()
    assert [weight.requires_grad for weight in router.weight] == [False, True]
    assert not router.weight[1].any() and not router.noise_weight[1].any()
    after = route(router, [0, 0, 0])
    assert torch.equal(after.indices, before.indices) and torch.allclose(after.weights, before.weights, atol=1e-7)
    assert torch.equal(router.weight[0], state[0]) and torch.equal(router.noise_weight[0], state[1])


@pytest.mark.smoke
def test_noise_is_of_the_learned_size_and_in_training_alone() -> None:
    router = make(2).train()
    clean = route(make(2), [1, 1, 1]).logits
    draws = torch.stack([route(router, [1, 1, 1]).logits.detach() - clean for _ in range(4000)])
    expected = torch.nn.functional.softplus(X @ router.noise_weight[1].T) + 0.01
    assert torch.allclose(draws.std(0), expected, rtol=0.08)
    assert torch.equal(route(router.train(False), [1, 1, 1]).logits, clean)
    quiet = make(2, noise=False)
    assert torch.equal(route(quiet.train(), [1, 1, 1]).logits, route(quiet.train(False), [1, 1, 1]).logits)
    assert not list(quiet.noise_weight)


def test_noise_of_a_generator_is_kept_for_a_recomputation() -> None:
    router = make(1).train()
    context = RoutingContext(task_ids=torch.tensor([0, 0, 0]), generator=torch.Generator())
    inputs = RouteInput(X, None, context, SITE)
    first = router.route(inputs)
    again = router.route(replace(inputs, replay=first.decision()))
    assert torch.equal(first.weights, again.weights) and torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, router.route(inputs).logits)


def test_the_most_used_experts_are_those_of_the_steps() -> None:
    router = make(1)
    router.on_step_end(torch.tensor([1.0, 5, 0, 0, 5, 0], dtype=torch.float64))
    router.on_step_end(torch.tensor([9.0, 0, 0, 0, 1, 0], dtype=torch.float64))
    assert router.usage.tolist() == [10, 5, 0, 0, 6, 0] and router.most_used() == [0, 4]
    assert router.usage.dtype == torch.float32 == router.to(torch.bfloat16).usage.dtype


@pytest.mark.parametrize(
    ("ids", "says"), [(None, "needs task_ids"), (torch.tensor([0, 1]), "do not fit tokens of the shape")]
)
def test_what_is_told_of_the_tasks_has_to_fit(ids: Tensor | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make(2).route(RouteInput(X, None, RoutingContext(task_ids=ids), SITE))


# -- in a container and a model ---------------------------------------------------------------------------------------


def layer(**options: Any) -> Container:
    config = {
        "target": "any",
        "experts": {"num_experts": EXPERTS, "r": 2, "alpha": 4.0},
        "router": {"kind": "moe_adapter", "num_tasks": 2, **options},
    }
    built = build(nn.Linear(16, 12), config)
    draw(built)
    return built.train()


def test_a_recomputation_repeats_noise_choice_and_gradients() -> None:
    """With a task of each sort in the batch: one that is known, and one that is not."""
    built, found = layer(), []
    for checkpointed in (False, True):
        built.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        with built.slot.using(RoutingContext(task_ids=torch.tensor([1, 0, 7]))):
            if checkpointed:
                out = checkpoint(built, X, use_reentrant=False, context_fn=built.slot.checkpoint_contexts)
            else:
                out = built(X)
            out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in built.parameters() if p.grad is not None)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert torch.equal(found[0][0][2], built.base(X[2]))
    assert all(value.isfinite().all() for value in found[0])


def model_of(backbone: LlamaForCausalLM, target: list[str] | str, **options: Any) -> MoELoRAModel:
    site = {
        "target": target,
        "experts": {"kind": "freezing", "num_experts": 4, "r": 2, "alpha": 4.0},
        "router": {"kind": "moe_adapter", "num_tasks": 2, **options},
    }
    model = moelora.attach(backbone, {"sites": [site]})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            if isinstance(tensor, nn.Parameter):
                tensor.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], "mlp"])
@torch.no_grad()
def test_a_task_that_is_not_learnt_is_answered_by_the_frozen_model(tiny_llama: LlamaForCausalLM, target: Any) -> None:
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    base = tiny_llama(ids).logits
    model = model_of(tiny_llama, target)
    found = model(ids, task_ids=torch.tensor([0, 2, 1])).logits
    assert torch.allclose(found[1], base[1], atol=1e-6)
    whole = model(ids, task_ids=torch.tensor([2])).logits
    assert torch.allclose(whole, base, atol=1e-6) if target == "mlp" else torch.equal(whole, base)
    for row, task in ((0, 0), (2, 1)):
        alone = model(ids[row : row + 1], task_ids=torch.tensor([task])).logits[0]
        assert torch.allclose(found[row], alone, atol=1e-5) and not torch.allclose(alone, base[row], atol=1e-2)


def test_generation_with_a_cache_is_that_without(tiny_llama: LlamaForCausalLM) -> None:
    model = model_of(tiny_llama, ["q_proj", "down_proj"])
    ids = torch.randint(3, 64, (3, 5), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    known = {"attention_mask": torch.ones_like(ids), "task_ids": torch.tensor([1, 0, 5])}
    made = model.generate(ids, **known, **options)
    assert torch.equal(made, model.generate(ids, **known, **options, use_cache=False))
    alone = model.generate(ids[:1], attention_mask=torch.ones(1, 5), task_ids=torch.tensor([1]), **options)
    assert torch.equal(made[:1], alone)
