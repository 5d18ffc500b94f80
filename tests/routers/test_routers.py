"""Every registered router keeps the rules; and each method's own definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora import routers
from moelora.routers import Router
from moelora.routing import Decision, RouteInput, RoutingContext, RoutingRecord, SiteInfo

SITE = SiteInfo("s", layer=0, in_features=16, out_features=16, ranks=(2,) * 6, scales=(1.0,) * 6, hidden_size=16)
# What routers and losses may look at beside hidden states: who each of two sequences, and each of their tokens, is.
CONTEXT = RoutingContext(
    task_ids=torch.tensor([3, 0]),
    task_types=torch.tensor([1, 0]),
    request_ids=torch.tensor([2, 4]),
    modality_mask=torch.arange(14).view(2, 7) % 2,
)


def make(kind: str, **options: Any) -> Router[Any]:
    entry = routers.get(kind)
    router: Router[Any] = entry(entry.Config.parse({"kind": kind, **options}), SITE)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=0.7, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(5)
    router.fit(torch.randn(12, 16, generator=generator), torch.randn(16, 12, generator=generator), SITE.ranks)
    return router


def route(router: Router[Any], x: Tensor, replay: Decision | None = None, **context: Any) -> RoutingRecord:
    context = {"scoring_states": x, **context}  # what a router sees that looks at the whole model first
    low = x.float() @ torch.randn(16, 12, generator=torch.Generator().manual_seed(5))
    # Numbers that half precision holds, so that they are the same in any dtype.
    activations = low.bfloat16().to(x.dtype) if router.needs_activations else None
    return router.route(RouteInput(x, activations, replace(CONTEXT, **context), SITE, replay))


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(8))


@pytest.mark.smoke
@pytest.mark.parametrize("kind", routers.names())
class TestEveryRouter:
    def test_is_pure_and_repeatable(self, kind: str) -> None:
        router = make(kind).eval()
        x = hidden(2, 7)
        before, state = x.clone(), {k: v.clone() for k, v in router.state_dict().items()}
        one, two = route(router, x), route(router, x)
        assert torch.equal(one.weights, two.weights)
        assert torch.equal(x, before)
        assert all(torch.equal(value, state[name]) for name, value in router.state_dict().items())

    def test_decides_in_float32_whatever_comes_in(self, kind: str) -> None:
        router = make(kind).eval()
        record = route(router, hidden(2, 7).to(torch.bfloat16))
        assert record.weights.dtype == torch.float32
        exact = route(router, hidden(2, 7).to(torch.bfloat16).float())
        assert torch.equal(record.weights, exact.weights)

    def test_shapes_and_ranges(self, kind: str) -> None:
        router = make(kind).eval()
        record, units = route(router, hidden(2, 7)), router.num_units
        assert record.num_experts == units == (6 if router.level == "expert" else 12)
        assert record.weights.shape[:2] == (2, 7)
        if record.indices is not None:
            assert record.indices.shape == record.weights.shape
            assert record.indices.min() >= -1 and record.indices.max() < units
            assert (record.weights[record.indices < 0] == 0).all()
            for row in record.indices.reshape(-1, record.indices.shape[-1]).tolist():
                chosen = [expert for expert in row if expert >= 0]
                assert len(set(chosen)) == len(chosen)
        dense = record.dense_weights()
        assert dense.shape == (2, 7, units)
        assert dense.sum(-1).allclose(record.weights.sum(-1))

    def test_a_replay_takes_the_choice_and_keeps_the_gradient(self, kind: str) -> None:
        router = make(kind).eval()
        first = route(router, hidden(2, 7))
        other = make(kind).eval()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.neg_()
        again = route(other, hidden(2, 7), replay=first.decision())
        if first.indices is not None:
            assert torch.equal(again.indices, first.indices)
        # The weights of remix are constant: its gradient comes through the logits of what was drawn.
        trained = any(True for _ in router.parameters())
        assert (again.logits if kind == "remix" else again.weights).requires_grad == trained
        assert first.decision().indices is first.indices and not (
            first.indices is not None and first.indices.requires_grad
        )

    def test_losses_are_named_finite_and_have_coefficients(self, kind: str) -> None:
        router = make(kind).train()
        losses = router.losses([route(router, hidden(2, 7)), route(router, hidden(2, 7))], CONTEXT)
        assert set(losses) == set(router.config.coefficients())
        for loss in losses.values():
            assert loss.shape == () and loss.isfinite()
        if not losses:  # the router learns from the task alone
            return
        sum(losses.values()).backward()
        assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in router.parameters())

    def test_losses_of_no_real_token_are_zero(self, kind: str) -> None:
        router = make(kind).train()
        record = route(router, hidden(2, 7))
        record.mask = torch.zeros(2, 7, dtype=torch.bool)
        assert all(loss.item() == 0 for loss in router.losses([record], CONTEXT).values())
        assert record.entropy() == 0

    @pytest.mark.parametrize("shape", [(0, 7), (2, 0)])
    def test_a_batch_without_tokens_is_routed_and_costs_nothing(self, kind: str, shape: tuple[int, int]) -> None:
        router = make(kind).train()
        names = RoutingContext.PER_SEQUENCE
        known = {name: getattr(CONTEXT, name)[: shape[0]] for name in names if name != "modality_mask"}
        known["modality_mask"] = CONTEXT.modality_mask[: shape[0], : shape[1]]
        record = route(router, hidden(*shape), **known)
        assert record.dense_weights().shape == (*shape, router.num_units)
        assert not record.counts().any() and record.entropy() == 0
        losses = router.losses([record], replace(CONTEXT, **known))
        assert all(loss.item() == 0 for loss in losses.values())

    def test_a_model_in_half_precision_keeps_what_no_gradient_moves_in_float32(self, kind: str) -> None:
        router = make(kind)
        before = {name: buffer.clone() for name, buffer in router.named_buffers()}
        router.to(torch.bfloat16)
        for name, buffer in router.named_buffers():
            assert torch.equal(buffer, before[name]) and buffer.dtype == before[name].dtype, name
        assert all(parameter.dtype == torch.bfloat16 for parameter in router.parameters())
        assert route(router, hidden(2, 7).bfloat16()).weights.dtype == torch.float32


def test_topk_is_the_renormalised_softmax() -> None:
    router = make("topk", top_k=3)
    record = route(router, hidden(50))
    probs = (hidden(50) @ router.weight.T).softmax(-1)
    top = probs.topk(3)
    assert torch.equal(record.indices, top.indices)
    assert torch.allclose(record.weights, top.values / top.values.sum(-1, keepdim=True))
    assert torch.allclose(route(make("topk", top_k=3, normalize=False), hidden(50)).weights, top.values)


def test_ties_go_to_the_lower_index() -> None:
    router = make("topk", top_k=2)
    with torch.no_grad():
        router.weight.zero_()
    assert (route(router, hidden(9)).indices == torch.tensor([0, 1])).all()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_topp_keeps_experts_until_one_crosses(top_p: float) -> None:
    router = make("topp", top_p=top_p)
    record = route(router, hidden(50))
    probs = (hidden(50) @ router.weight.T).softmax(-1).double()
    for row in range(50):
        order = probs[row].argsort(descending=True).tolist()
        kept, total = [], 0.0
        for expert in order:
            kept.append(expert)
            total += probs[row, expert].item()
            if total > top_p:
                break
        chosen = [expert for expert in record.indices[row].tolist() if expert >= 0]
        assert chosen == kept
        assert record.weights[row].sum().item() == pytest.approx(probs[row, kept].sum().item(), abs=1e-6)


def test_topp_temperature_divides_probabilities() -> None:
    plain, warm = (route(make("topp", top_p=0.6, temperature=t), hidden(20)) for t in (0.0, 2.0))
    assert (warm.indices >= 0).sum() > (plain.indices >= 0).sum()
    assert warm.weights[:, 0].tolist() == pytest.approx((plain.weights[:, 0] / 2).tolist())


def test_switch_admits_as_many_tokens_of_a_sequence_as_there_is_room() -> None:
    router = make("switch", expert_capacity=2, jitter=0.0)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :5] = False
    record = route(router, hidden(3, 12), token_mask=mask)
    probs = (hidden(3, 12) @ router.weight.T).softmax(-1)
    for row in range(3):
        room = [2] * 6
        for place in range(12):
            expert = int(probs[row, place].argmax())
            admitted = not mask[row, place] or room[expert] > 0
            room[expert] -= int(mask[row, place])
            assert record.indices[row, place, 0].item() == (expert if admitted else -1)
            top = probs[row, place].max().item()
            assert record.weights[row, place, 0].item() == pytest.approx(top if admitted else 0.0, abs=1e-6)
            assert record.residual[row, place].item() == pytest.approx(0.0 if admitted else top, abs=1e-6)
    assert (record.indices < 0).any()
    flat = route(router, hidden(3, 12).flatten(0, 1), token_mask=mask)  # as OPT's FFN sees it
    assert torch.equal(flat.indices, record.indices.flatten(0, 1))
    assert torch.equal(flat.residual, record.residual.flatten())
    assert (route(make("switch", expert_capacity=None, jitter=0.0), hidden(3, 12)).indices >= 0).all()


def test_jitter_comes_from_the_contexts_generator_and_is_replayed() -> None:
    router = make("topk", jitter=0.5).train()
    one, two, other = (route(router, hidden(5), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one.weights, two.weights) and not torch.equal(one.weights, other.weights)
    again = route(router, hidden(5), replay=one.decision(), generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.weights, one.weights)
    assert one.noise.min() >= 0.5 and one.noise.max() <= 1.5


def test_load_share_of_the_step_takes_the_place_of_the_batch() -> None:
    router = make("topk")
    record = route(router, hidden(9))
    share = torch.tensor([2.0, 0, 0, 0, 0, 0])
    loss = router.losses([record], RoutingContext(load_share=share))["load_balance"]
    assert loss.item() == pytest.approx(6 * 2 * record.probs.mean(0)[0].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "wanted"),
    [
        ("topk", {"top_k": 3}, {"load_balance": 3, "router_z": math.log(6) ** 2}),
        ("switch", {"expert_capacity": 1}, {"load_balance": 1, "router_z": math.log(6) ** 2}),
        ("topp", {"top_p": 0.6}, {"load_balance": 4, "router_z": math.log(6) ** 2}),
        ("mola", {"top_k": 3}, {"load_balance": 1}),
        ("mola", {"top_k": 3, "balance": "pooled"}, {"load_balance": 3}),
        ("adamole", {}, {"load_balance": 6 * 6 * (1 / 6 - 1 / 12)}),  # all are kept, the threshold is 1/12
        ("adamole", {"threshold": 0.1}, {"load_balance": 6}),
        ("softmax", {"delta": 0.0}, {"localized_balance": 0}),
        ("lora_mixer", {}, {"specialization_balance": 1 / 6, "token_entropy": math.log(6)}),
        ("meteora", {}, {"gate": math.log(6)}),
    ],
)
def test_losses_of_a_router_without_preference(kind: str, options: dict[str, Any], wanted: dict[str, float]) -> None:
    """What each loss is scaled by: the number of tokens, sites of a layer and experts must not change these."""
    router = make(kind, jitter=0.0, **options) if kind == "switch" else make(kind, **options)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    records = [route(router, hidden(2, 7)) for _ in range(1 if kind == "adamole" else 2)]
    losses = router.losses(records, CONTEXT)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(wanted, abs=1e-6)
