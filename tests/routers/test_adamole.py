"""AdaMoLE's threshold, learnt or fixed, against an enumeration in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora import experts, routers
from moelora.routers import Router
from moelora.routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo

SITE = SiteInfo("s", 0, in_features=16, out_features=16, ranks=(2,) * 6, scales=(1.0,) * 6)


def make(**options: Any) -> Router[Any]:
    entry = routers.get("adamole")
    router: Router[Any] = entry(entry.Config.parse({"kind": "adamole", **options}), SITE)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return router


def route(router: Router[Any], states: Tensor, mask: Tensor | None = None, **inputs: Any) -> RoutingRecord:
    record = router.route(RouteInput(states, None, RoutingContext(), SITE, **inputs))
    record.mask = mask
    return record


def hidden(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))


def enumerated(router: Router[Any], states: Tensor, most: float) -> tuple[Tensor, Tensor, Tensor]:
    """(T, E) weights, what is kept, and p - tau, in float64, token by token and expert by expert."""
    gate, v, b = (
        value.detach().double() for value in (router.weight, router.threshold_weight[0], router.threshold_bias)
    )
    weights, kept, over = (torch.zeros(len(states), len(gate), dtype=torch.float64) for _ in range(3))
    for token, x in enumerate(states.double()):
        p = torch.softmax(torch.stack([row @ x for row in gate]), dim=0)
        tau = most / (1 + torch.exp(-(v @ x + b[0])))
        over[token] = p - tau
        chosen = [expert for expert in range(len(gate)) if p[expert] - tau >= 0]
        total = sum(p[expert] - tau for expert in chosen)
        for expert in chosen:
            kept[token, expert] = 1
            weights[token, expert] = (p[expert] - tau) / total
    return weights, kept, over


@pytest.mark.parametrize("most", [None, 0.3, 1.0])
def test_experts_over_the_tokens_own_threshold_are_kept(most: float | None) -> None:
    router = make(max_threshold=most)
    record = route(router, hidden(200))
    weights, kept, over = enumerated(router, hidden(200), 1 / 6 if most is None else most)
    assert torch.equal((record.indices >= 0).double(), kept)
    assert torch.equal(record.indices[record.indices >= 0], kept.nonzero()[:, 1])
    assert torch.allclose(record.weights.double(), weights, atol=1e-5)
    assert torch.allclose(record.scores.double(), over, atol=1e-6)
    assert len(set(kept.sum(-1).tolist())) >= 3, "tokens differ in how many experts they keep"
    assert torch.allclose(record.probs.sum(-1), torch.ones(200))


def test_below_one_over_E_every_token_keeps_an_expert_and_above_some_keep_none() -> None:
    always, sometimes = make(), make(max_threshold=1.0)
    assert (route(always, hidden(500)).indices >= 0).any(-1).all()
    record = route(sometimes, hidden(500))
    none = (record.indices < 0).all(-1)
    assert none.any() and not none.all()
    assert (record.weights[none] == 0).all()
    assert torch.allclose(record.weights[~none].sum(-1), torch.ones(int((~none).sum())))
    record.weights.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in sometimes.parameters())


@pytest.mark.parametrize("target", ["linear", "block"])
def test_a_token_that_keeps_none_gets_no_update(target: str, tiny_llama: LlamaForCausalLM) -> None:
    base = nn.Linear(32, 32) if target == "linear" else tiny_llama.model.layers[0].mlp
    router = {"kind": "adamole", "max_threshold": 1.0}
    site = {"target": "x", "experts": {"num_experts": 4, "r": 2}, "router": router}
    container = experts.build(base, site)
    with torch.no_grad():
        for tensor in container.adapter_tensors().values():
            tensor.normal_(std=0.3)
        container.router.threshold_bias.fill_(-1.0)
    x = torch.randn(2, 30, 32)
    records: list[RoutingRecord] = []
    with container.slot.using(listener=lambda site, record: records.append(record)):
        out = container(x)
    none = (records[0].indices < 0).all(-1)
    assert none.any() and not none.all()
    same = (out - base(x)).abs().amax(-1) <= 1e-5
    assert torch.equal(same, none)


def test_gradients_reach_gate_and_threshold() -> None:
    """Through the weights, by autograd of the published line in float64."""
    router = make(max_threshold=0.3)
    target = torch.randn(40, 6, generator=torch.Generator().manual_seed(7))
    record = route(router, hidden(40))
    (record.weights * target).sum().backward()
    doubles = [parameter.detach().double().requires_grad_() for parameter in router.parameters()]
    gate, v, b = doubles
    over = (hidden(40).double() @ gate.T).softmax(-1) - 0.3 * torch.sigmoid(hidden(40).double() @ v.T + b)
    kept = over * (over >= 0)
    total = kept.sum(-1, keepdim=True)
    (kept / torch.where(total == 0, 1, total) * target).sum().backward()
    for parameter, double in zip(router.parameters(), doubles, strict=True):
        assert double.grad.norm() > 1e-2
        assert (parameter.grad.double() - double.grad).norm() <= 1e-4 * double.grad.norm()


def test_the_balance_is_that_of_each_site_on_what_weighs() -> None:
    router = make(max_threshold=0.3)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:], mask[1, :2] = False, False
    records = [route(router, hidden(2, 9, seed=seed), mask) for seed in (3, 4)]
    expected, on_probs = 0.0, 0.0
    for seed in (3, 4):
        states = hidden(2, 9, seed=seed)[mask]
        _, kept, over = enumerated(router, states, 0.3)
        expected += 6 * (kept.mean(0) * over.mean(0)).sum().item()
        probs = (states.double() @ router.weight.double().T).softmax(-1)
        on_probs += 6 * (kept.mean(0) * probs.mean(0)).sum().item()
    loss = router.losses(records, RoutingContext())["load_balance"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert abs(expected - on_probs) > 1e-2, "p - tau, not p"
    loss.backward()
    assert all(parameter.grad.any() for parameter in router.parameters())


def test_padding_never_counts() -> None:
    """The released loss counts it."""
    router = make()
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[:, :7] = True
    right = torch.cat([hidden(3, 7), 5 * torch.ones(3, 3, 16)], dim=1)
    left = torch.cat([5 * torch.ones(3, 3, 16), hidden(3, 7)], dim=1)

    def loss(*arguments: Any) -> float:
        value: float = router.losses([route(router, *arguments)], RoutingContext())["load_balance"].item()
        return value

    alone = loss(hidden(3, 7))
    assert loss(right, mask) == pytest.approx(alone, rel=1e-6)
    assert loss(left, mask.flip(1)) == pytest.approx(alone, rel=1e-6)
    assert loss(right) != pytest.approx(alone, rel=1e-2)


def test_a_fixed_threshold_is_mole() -> None:
    router = make(threshold=0.2)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    record = route(router, hidden(100))
    probs = (hidden(100).double() @ router.weight.detach().double().T).softmax(-1)
    kept = (probs >= 0.2).double()
    expected = probs * kept / (probs * kept).sum(-1, keepdim=True)
    assert torch.equal((record.indices >= 0).double(), kept)
    assert torch.allclose(record.weights.double(), expected, atol=1e-6)
    loss = router.losses([record], RoutingContext())["load_balance"].item()
    assert loss == pytest.approx(6 * (kept.mean(0) * probs.mean(0)).sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match="either fixed or learnt"):
        make(threshold=0.2, max_threshold=0.3)


def test_a_probability_that_equals_the_threshold_is_kept() -> None:
    router = make(threshold=0.5)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:2] = 100 * torch.ones(16)
    record = route(router, torch.ones(1, 16))
    assert record.indices.tolist() == [[0, 1, -1, -1, -1, -1]]
    assert record.weights.tolist() == [[0.5, 0.5, 0, 0, 0, 0]]
    assert (route(make(threshold=1.0), hidden(9)).weights == 0).all(), "none reaches 1: zero, and no division by it"


def test_a_recomputation_keeps_what_was_kept() -> None:
    router, other = make(max_threshold=0.4), make(max_threshold=0.4)
    with torch.no_grad():
        other.threshold_bias.add_(0.3)
    first = route(router, hidden(50))
    again = route(other, hidden(50), replay=first.decision())
    assert torch.equal(again.indices, first.indices)
    assert not torch.equal(route(other, hidden(50)).indices, first.indices)
    assert (again.weights[again.indices < 0] == 0).all() and again.weights.isfinite().all()


def test_the_threshold_starts_as_a_linear_does() -> None:
    entry = routers.get("adamole")
    router = entry(entry.Config.parse({"kind": "adamole"}), SITE)
    for values in (router.weight, router.threshold_weight, router.threshold_bias):
        assert 0 < values.abs().max() <= 0.25  # 1 / sqrt(D)
    drawn = []
    for _ in range(2):
        router.reset_parameters(torch.Generator().manual_seed(3))
        drawn.append([parameter.detach().clone() for parameter in router.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*drawn, strict=True))


def test_a_model_trains_and_keeps_its_threshold(tiny_llama: LlamaForCausalLM) -> None:
    site = {"target": ["q_proj", "v_proj"], "experts": {"num_experts": 4, "r": 2}, "router": {"kind": "adamole"}}
    model = moelora.attach(tiny_llama, {"sites": [site]}).train()
    names = [name for name in model.adapter_tensors() if name.startswith("model.layers.0.self_attn.q_proj.router")]
    assert [name.rpartition(".")[2] for name in names] == ["weight", "threshold_weight", "threshold_bias"]
    ids = torch.randint(3, 64, (2, 8))
    out = model(ids, labels=ids)
    assert out.aux_losses["load_balance"].item() > 0
    out.loss.backward()
    assert all(model.adapter_tensors()[name].grad.any() for name in names)
