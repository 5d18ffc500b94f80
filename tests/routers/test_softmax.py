"""Dense softmax routing, and LoRAMoE's localized balance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora import routers
from moelora.errors import ConfigError, UserError
from moelora.routers import Router
from moelora.routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo

TYPES = torch.tensor([1, 0, 1])


def make(experts: int = 4, **options: Any) -> Router[Any]:
    site = SiteInfo("s", 0, in_features=16, out_features=16, ranks=(2,) * experts, scales=(1.0,) * experts)
    entry = routers.get("softmax")
    router: Router[Any] = entry(entry.Config.parse({"kind": "softmax", **options}), site)
    with torch.no_grad():
        router.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return router


def route(router: Router[Any], hidden: Tensor, mask: Tensor | None = None) -> RoutingRecord:
    record = router.route(RouteInput(hidden, None, RoutingContext(), router.site))
    record.mask = mask
    return record


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(2))


def balance(router: Router[Any], *records: RoutingRecord, types: Tensor = TYPES) -> Tensor:
    return router.losses(list(records), RoutingContext(task_types=types))["localized_balance"]


def enumerated(
    weights: Tensor, mask: Tensor, types: Tensor, groups: list[int], delta: float, form: str = "released"
) -> float:
    """The loss of one router, number by number in float64."""
    values = []
    for row in range(weights.shape[0]):
        for expert in range(weights.shape[-1]):
            importance = sum(
                weights[row, at, expert].double().item() for at in range(weights.shape[1]) if mask[row, at]
            )
            values.append(importance * (1 + delta if groups[expert] == int(types[row]) else 1 - delta))
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return variance / (mean**2 if form == "released" else mean)


def test_every_expert_is_weighed_by_its_probability() -> None:
    router = make()
    record = route(router, hidden(3, 7))
    assert record.indices is None and record.normalized
    assert torch.allclose(record.weights, (hidden(3, 7) @ router.weight.T).softmax(-1))
    assert torch.allclose(record.weights.sum(-1), torch.ones(3, 7))


def test_the_gate_starts_as_the_authors_start_it_or_normal() -> None:
    entry = routers.get("softmax")
    site = SiteInfo("s", 0, in_features=64, out_features=16, ranks=(2,) * 64, scales=(1.0,) * 64)
    uniform = entry(entry.Config.parse({"kind": "softmax"}), site).weight
    assert uniform.abs().max() <= 1 / 8  # 1 / sqrt(D)
    assert uniform.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    normal = entry(entry.Config.parse({"kind": "softmax", "init": "normal", "init_std": 0.3}), site)
    assert normal.weight.std().item() == pytest.approx(0.3, rel=0.05)
    for router in (normal, make()):
        values = []
        for _ in range(2):
            router.reset_parameters(torch.Generator().manual_seed(5))
            values.append(router.weight.detach().clone())
        assert torch.equal(*values)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("delta", [0.0, 0.1, 0.7])
def test_the_balance_number_by_number(delta: float, form: str) -> None:
    router = make(delta=delta, form=form)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2, :3] = False
    records = [route(router, hidden(3, 7), mask), route(router, -hidden(3, 7), mask)]
    expected = [enumerated(record.weights, mask, TYPES, [1, 1, 0, 0], delta, form) for record in records]
    assert balance(router, *records).item() == pytest.approx(sum(expected), rel=1e-5), "summed over modules"


@pytest.mark.parametrize("batch", [1, 3])
def test_uniform_routing_of_equal_sequences_is_balanced(batch: int) -> None:
    router = make(delta=0.0)
    with torch.no_grad():
        router.weight.zero_()
    record = route(router, hidden(batch, 7))
    assert balance(router, record, types=TYPES[:batch]).item() == pytest.approx(0.0, abs=1e-9)
    assert balance(make(delta=0.1), record, types=TYPES[:batch]).item() > 1e-3, "delta asks for imbalance"


def test_the_formula_as_published_gives_own_experts_the_smaller_share() -> None:
    """Z = I * Q is even where an expert with the larger I has the smaller Q; the aim is told the other way."""
    router = make(delta=0.5)
    record = route(router, hidden(3, 7))
    own = TYPES.view(3, 1, 1) == torch.tensor([1, 1, 0, 0])
    losses = []
    for share in (0.125, 0.25, 0.375):  # of each own expert; a quarter is even, an eighth makes Z even
        record.weights = torch.where(own, share, 0.5 - share).expand(3, 7, 4)
        losses.append(balance(router, record).item())
    assert losses[0] == pytest.approx(0.0, abs=1e-9)
    assert losses[0] < losses[1] < losses[2]


def test_a_type_of_no_group_means_plain_balance() -> None:
    """As released: another label than 0 and 1 is scaled 1 - delta everywhere, a constant that cancels."""
    record = route(make(), hidden(3, 7))
    other = balance(make(delta=0.4), record, types=torch.tensor([2, 2, -1]))
    assert other.item() == pytest.approx(balance(make(delta=0.0), record).item(), rel=1e-5)


def test_expert_types_name_the_groups() -> None:
    record = route(make(), hidden(3, 7))
    assert torch.equal(balance(make(), record), balance(make(expert_types=[1, 1, 0, 0]), record))
    mask = torch.ones(3, 7, dtype=torch.bool)
    types, groups = torch.tensor([5, 2, 9]), [2, 5, 2, 9]
    expected = enumerated(record.weights, mask, types, groups, 0.1)
    assert balance(make(expert_types=groups), record, types=types).item() == pytest.approx(expected, rel=1e-5)
    odd = make(experts=3, expert_types=[1, 0, 0])
    assert balance(odd, route(odd, hidden(3, 7))).isfinite()
    with pytest.raises(ValueError, match=r"expert_types lists 3 types for 4 experts"):
        make(expert_types=[1, 0, 0])


def test_halves_of_an_odd_number_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"there are 5: .*even num_experts.*expert_types.*aux_loss_coef to 0"):
        make(experts=5)
    assert make(experts=5, aux_loss_coef=0.0)
    site = {"target": "mlp", "experts": {"num_experts": 5}, "router": {"kind": "loramoe"}}
    with pytest.raises(ConfigError, match="there are 5"):
        moelora.SiteConfig.parse(site)


def test_without_the_loss_no_types_are_needed() -> None:
    router = make(aux_loss_coef=0.0)
    loss = router.losses([route(router, hidden(3, 7))], RoutingContext())["localized_balance"]
    assert loss.item() == 0 and router.config.coefficients() == {"localized_balance": 0.0}


def test_missing_types_are_named() -> None:
    router = make()
    record = route(router, hidden(3, 7))
    for context in (RoutingContext(), RoutingContext(task_ids=TYPES)):
        with pytest.raises(UserError, match=r"task_types=.*types_of_tasks.*aux_loss_coef to 0"):
            router.losses([record], context)
    with pytest.raises(UserError, match="task_types has 2 values but the batch has 3 sequences"):
        balance(router, record, types=TYPES[:2])


def test_types_may_follow_from_the_tasks() -> None:
    router = make(types_of_tasks=[0, 0, 1])
    record = route(router, hidden(3, 7))
    by_task = router.losses([record], RoutingContext(task_ids=torch.tensor([2, 1, 2])))["localized_balance"]
    assert torch.equal(by_task, balance(router, record))
    given = router.losses([record], RoutingContext(task_ids=torch.tensor([0, 0, 0]), task_types=TYPES))
    assert torch.equal(given["localized_balance"], by_task), "types that are given come first"


def test_padding_counts_only_where_asked() -> None:
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:, :6] = True
    padded = torch.cat([hidden(3, 6), 9 * torch.ones(3, 3, 16)], dim=1)
    left = torch.cat([9 * torch.ones(3, 3, 16), hidden(3, 6)], dim=1)
    router, released = make(), make(count_padding=True)
    alone = balance(router, route(router, hidden(3, 6)))
    for states, real in ((padded, mask), (left, mask.flip(1))):
        assert torch.allclose(balance(router, route(router, states, real)), alone, rtol=1e-6)
        counted = balance(released, route(released, states, real))
        assert (counted - alone).abs() > 1e-2
        everything = torch.ones_like(real)
        weights = route(released, states).weights
        assert counted.item() == pytest.approx(enumerated(weights, everything, TYPES, [1, 1, 0, 0], 0.1), rel=1e-5)


def test_one_row_of_all_tokens_is_taken_apart_again() -> None:
    """OPT makes one row of all tokens before its FFN."""
    router = make()
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 5:] = False
    rows = route(router, hidden(3, 7).flatten(0, 1), mask.flatten())
    assert torch.equal(balance(router, rows), balance(router, route(router, hidden(3, 7), mask)))


def test_one_value_has_no_variance() -> None:
    router = make(experts=1, expert_types=[1])
    assert balance(router, route(router, hidden(1, 7)), types=TYPES[:1]).item() == 0


def test_descending_the_loss_lowers_it() -> None:
    router = make()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    values = []
    for _ in range(5):
        loss = balance(router, route(router, hidden(3, 7)))
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values == sorted(values, reverse=True) and values[-1] < values[0] - 1e-3


SITE = {
    "target": ["gate_proj", "up_proj", "down_proj"],
    "experts": {"num_experts": 4, "r": 2, "alpha": 4},
    "router": {"kind": "loramoe"},
}


def test_a_model_balances_by_the_types_of_its_sequences(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [SITE]}).train()
    ids = torch.randint(3, 64, (3, 8))
    with pytest.raises(UserError, match="task_types"):
        model(ids, labels=ids)
    with torch.no_grad():
        assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (3, 10)
    out = model(ids, labels=ids, task_types=TYPES)
    assert out.loss.item() == pytest.approx((out.task_loss + 0.1 * out.aux_losses["localized_balance"]).item())
    out.loss.backward()
    assert all(container.router.weight.grad.any() for container in model.containers().values())
    assert "router.expert_types" not in " ".join(model.adapter_tensors())


def test_left_and_right_padding_give_the_same_balance(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [SITE]}).train()
    ids = torch.randint(3, 64, (3, 8))
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:], mask[2, 3:] = 0, 0
    right = torch.where(mask.bool(), ids, 0)
    left, left_mask = right.clone(), mask.clone()
    for row, length in enumerate(mask.sum(-1).tolist()):
        left[row], left_mask[row] = right[row].roll(8 - length), mask[row].roll(8 - length)
    losses = [
        model(states, attention_mask=real, task_types=TYPES).aux_losses["localized_balance"]
        for states, real in ((right, mask), (left, left_mask))
    ]
    assert torch.allclose(*losses, rtol=1e-4)
