"""ReMix: constant weights, Plackett-Luce draws, seeds, decisions for sequences; the numbers are in tests/reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora import routers
from moelora.errors import ConfigError, UserError
from moelora.experts import Container, build
from moelora.mixture import MoELoRAModel
from moelora.routers import Router, rloo
from moelora.routing import Decision, RouteInput, RoutingContext, RoutingRecord, SiteInfo

E = 6
SITE = SiteInfo(name="s", layer=0, in_features=16, out_features=16, ranks=(2,) * E, scales=(3.0,) * E)
IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(3))


def make(site: SiteInfo = SITE, **options: Any) -> Router[Any]:
    entry = routers.get("remix")
    router: Router[Any] = entry(entry.Config.parse({"kind": "remix", **options}), site)
    with torch.no_grad():
        router.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    return router


def route(router: Router[Any], x: Tensor, replay: Decision | None = None, **context: Any) -> RoutingRecord:
    return router.route(RouteInput(x, None, RoutingContext(**context), router.site, replay))


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(8))


def site_with(experts: dict[str, Any], **router: Any) -> Container:
    torch.manual_seed(0)
    site = build(nn.Linear(16, 12), {"target": "x", "experts": experts, "router": {"kind": "remix", **router}})
    for parameter in (*site.experts.parameters(), *site.router.parameters()):
        nn.init.normal_(parameter)
    return site


def sequences(**router: Any) -> dict[str, Any]:
    experts = {"num_experts": E, "r": 2, "alpha": 4}
    router = {"kind": "remix", "route_level": "sequence", "init_std": 1.0, **router}
    return {"sites": [{"target": ["gate_proj", "down_proj"], "experts": experts, "router": router}]}


def randomize(model: MoELoRAModel) -> MoELoRAModel:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.5, generator=generator)
    return model


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize(
    ("router", "omega"),
    [({}, 2 / (3 * 4)), ({"scale": "rslora"}, 2 / math.sqrt(3 * 4)), ({"omega": 0.7}, 0.7)],
)
def test_each_chosen_expert_adds_omega_B_A_x_whatever_alpha_is(kind: str, router: dict[str, Any], omega: float) -> None:
    site = site_with({"kind": kind, "num_experts": E, "r": 4, "alpha": 23}, top_k=3, **router).eval()
    heard: list[RoutingRecord] = []
    x = hidden(2, 5)
    with torch.no_grad(), site.slot.using(listener=lambda _, record: heard.append(record)):
        out = site(x)
        A, B = site.lora_A.double().view(E, 4, 16), site.lora_B.double().view(12, E, 4)
        each = torch.einsum("oer,erd,bsd->bseo", B, A, x.double())
        chosen = each.gather(2, heard[0].indices.unsqueeze(-1).expand(-1, -1, -1, 12)).sum(2)
        expected = site.base(x).double() + omega * chosen
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_experts_of_different_ranks_need_omega_and_then_weigh_the_same() -> None:
    experts = {"num_experts": 3, "r": [1, 2, 4], "alpha": [3, 5, 7]}
    with pytest.raises(ConfigError, match=r"ranks \[1, 2, 4\].*set router.omega"):
        site_with(experts)
    site = site_with(experts, omega=0.3, top_k=2).eval()
    record = route(site.router, hidden(9))
    scales = torch.tensor(site.site.scales)[record.indices]
    assert torch.allclose(record.weights * scales, torch.full((9, 2), 0.3))


@pytest.mark.parametrize("training", [True, False])
def test_the_effective_support_of_every_token_is_k(training: bool) -> None:
    record = route(make(top_k=4).train(training), hidden(7, 11))
    support = rloo.effective_support(record.dense_weights())
    assert torch.allclose(support, torch.tensor(4.0))
    collapsed = rloo.effective_support((20 * hidden(50)).softmax(-1))
    assert collapsed.mean() < 1.5


def test_with_all_experts_the_site_is_one_lora_and_can_be_merged() -> None:
    site = site_with({"num_experts": E, "r": 2, "alpha": 5}, top_k=E)
    x = hidden(2, 5)
    with torch.no_grad():
        whole = 2 / (E * 2) * (x @ site.lora_A.T) @ site.lora_B.T
        for mode in (site.train(), site.eval()):
            assert torch.allclose(mode(x), site.base(x) + whole, atol=1e-5)
        weights = site.router.constant_weights(RoutingContext())
        delta = site.experts.delta(weights, site.base)
    assert torch.allclose(x @ delta.T, whole, atol=1e-5)
    assert make(top_k=2).constant_weights(RoutingContext()) is None


def test_the_order_of_the_draw_changes_its_chance_and_nothing_else() -> None:
    site = site_with({"num_experts": E, "r": 2, "alpha": 5}, top_k=3).train()
    x = hidden(2, 5)
    first = route(site.router, x)
    turned = route(site.router, x, replay=Decision(first.indices.flip(-1), None))
    assert torch.equal(turned.indices, first.indices.flip(-1))
    assert torch.equal(turned.dense_weights(), first.dense_weights())
    assert not torch.allclose(turned.log_prob, first.log_prob, atol=1e-3)
    outputs = []
    for record in (first, turned):
        site.router.route = lambda inputs, given=record: given
        outputs.append(site(x))
    assert torch.equal(*outputs)


# -- draws and their chances -------------------------------------------------------------------------------------------


def test_chances_of_all_ordered_draws_sum_to_1() -> None:
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for k in (1, 2, 5):
        every = torch.tensor(list(itertools.permutations(range(5), k)))
        chances = rloo.plackett_luce(logits.expand(len(every), -1), every).exp()
        q = logits.softmax(0)
        naive = []
        for row in every.tolist():
            left, chance = 1.0, 1.0
            for pick in row:
                chance, left = chance * q[pick].item() / left, left - q[pick].item()
            naive.append(chance)
        assert chances.sum().item() == pytest.approx(1, abs=1e-12)
        assert chances.tolist() == pytest.approx(naive, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chance_after_a_near_certain_pick_is_finite(dtype: torch.dtype) -> None:
    router = make(SiteInfo("s", 0, 4, 4, (2,) * 4, (1.0,) * 4)).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.tensor([[20.0, 0.0, -1.0, -2.0]], dtype=dtype)
    record = route(router, x, replay=Decision(torch.tensor([[0, 1]]), None))
    assert record.log_prob.dtype == torch.float32
    assert record.log_prob.item() == pytest.approx(-0.4076, abs=1e-4)
    q = x.float().softmax(-1)[0]
    assert not torch.log(q[1] / (1 - q[0])).isfinite()  # the definition as it is written
    (grad,) = torch.autograd.grad(record.log_prob.sum(), router.weight)
    assert grad.isfinite().all() and grad.any()


def test_the_chance_has_no_gradient_to_its_input_unless_asked() -> None:
    for through in (False, True):
        x = hidden(2, 5).requires_grad_()
        record = route(make(score_through_input=through).train(), x)
        assert not record.weights.requires_grad
        grads = torch.autograd.grad(record.log_prob.sum(), x, allow_unused=True)
        assert (grads[0] is not None) == through


def test_evaluation_takes_the_most_probable_and_draws_nothing() -> None:
    router = make(top_k=3).eval()
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    record = route(router, hidden(50), generator=generator)
    assert torch.equal(record.indices, (hidden(50) @ router.weight.T).topk(3).indices)
    assert record.log_prob is None
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(state, generator.get_state())


def test_draws_from_a_generator_are_repeated_in_a_replay() -> None:
    router = make(top_k=3).train()
    generator = torch.Generator().manual_seed(1)
    first = route(router, hidden(50), generator=generator)
    state = generator.get_state()
    again = route(router, hidden(50), replay=first.decision(), generator=generator)
    assert torch.equal(first.indices, again.indices) and torch.equal(first.log_prob, again.log_prob)
    assert torch.equal(state, generator.get_state()), "the replay drew anew"
    assert not torch.equal(first.indices, route(router, hidden(50), generator=generator).indices)


def test_seeded_draws_depend_on_seed_and_router_alone() -> None:
    router = make(top_k=2).train()
    x = hidden(2, 40)
    state = torch.get_rng_state()
    one, two = (route(router, x, selection_seeds=(seed,)).indices for seed in (5, 6))
    assert torch.equal(one, route(router, x, selection_seeds=(5,)).indices)
    both = route(router, torch.cat([x, x]), selection_seeds=(5, 6)).indices
    assert torch.equal(both, torch.cat([one, two]))
    flat = route(router, torch.cat([x, x]).flatten(0, 1), selection_seeds=(5, 6)).indices
    assert torch.equal(flat, both.flatten(0, 1))
    assert torch.equal(state, torch.get_rng_state())
    other = make(SiteInfo("t", 0, 16, 16, (2,) * E, (3.0,) * E), top_k=2).train()
    assert not torch.equal(one, route(other, x, selection_seeds=(5,)).indices)
    assert not torch.equal(one, two)
    with pytest.raises(UserError, match="3 selection_seeds do not divide 2 rows"):
        route(router, x, selection_seeds=(5, 6, 7))


# -- one decision for a sequence ---------------------------------------------------------------------------------------


def test_a_sequence_has_one_choice_from_its_real_tokens() -> None:
    router = make(route_level="sequence", top_k=2).train()
    x = hidden(3, 7)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    record = route(router, x, token_mask=mask, selection_seeds=(1,))
    pooled = torch.stack([row[real].mean(0) for row, real in zip(x, mask, strict=True)])
    assert torch.allclose(record.logits, (pooled @ router.weight.T).unsqueeze(1).expand(3, 7, E), atol=1e-5)
    assert torch.equal(record.indices, record.sequence_indices.unsqueeze(1).expand(3, 7, 2))
    assert record.log_prob.shape == (3,)
    record.mask = mask
    chances = rloo.plackett_luce(record.logits[:, 0], record.sequence_indices)
    assert torch.allclose(rloo.example_log_prob([record], 3), chances)
    flat = route(router, x.flatten(0, 1), token_mask=mask, selection_seeds=(1,))
    assert torch.equal(flat.indices, record.indices.flatten(0, 1))
    again = route(router, -x, replay=record.decision(), token_mask=mask)
    assert torch.equal(again.indices, record.indices)


def test_the_prompt_mask_makes_the_choice_causal() -> None:
    router = make(route_level="sequence", top_k=2).eval()
    x = hidden(3, 7)
    prompt = torch.arange(7).expand(3, 7) < torch.tensor([[2], [3], [4]])
    other = torch.where(prompt.unsqueeze(-1), x, hidden(3, 7).flip(1) * 9)
    known = route(router, x, prompt_mask=prompt)
    assert torch.equal(known.indices, route(router, other, prompt_mask=prompt).indices)
    assert not torch.equal(known.logits, route(router, x).logits)
    with pytest.raises(UserError, match="do not tell which tokens are whose"):
        route(router, x[:, :1], prompt_mask=prompt)
    with pytest.raises(UserError, match="do not tell which tokens are whose"):
        route(router, x.flatten(0, 1))


def test_before_the_answer_is_what_no_prediction_can_see() -> None:
    labels = torch.tensor([[-100, -100, 5, -100, 6], [4, 5, 6, 7, 8], [-100] * 5])
    expected = [[True, True, False, False, False], [True, False, False, False, False], [True] * 5]
    assert rloo.before_the_answer(labels).tolist() == expected


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_keeps_the_choice_of_the_prompt(tiny_llama: LlamaForCausalLM, search: dict[str, int]) -> None:
    model = randomize(moelora.attach(tiny_llama, sequences())).eval()
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **search}
    with torch.no_grad(), moelora.trace(model) as prompt:
        model(IDS, attention_mask=mask)
    with moelora.trace(model) as tape:
        cached = model.generate(IDS, **settings)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **settings))
    for site in tape:
        first, *later = (record.sequence_indices for record in tape[site])
        assert len(later) == 5
        assert all(torch.equal(first, choice) for choice in later)
        assert torch.equal(first[:: len(first) // 3], prompt[site][0].sequence_indices)
        assert all(record.indices.shape[1] == 1 for record in tape[site][1:])


# -- one router for several sites --------------------------------------------------------------------------------------


def shared(backbone: LlamaForCausalLM, target: list[str], share: str = "parent") -> MoELoRAModel:
    config = sequences(route_level="token", share=share)
    config["sites"][0]["target"] = target
    return randomize(moelora.attach(backbone, config)).train()


def test_sites_that_share_a_router_decide_together_and_count_once(tiny_llama: LlamaForCausalLM) -> None:
    model = shared(tiny_llama, ["gate_proj", "up_proj"])
    with moelora.trace(model) as tape, model.routing_context(selection_seeds=(1,)):
        model(IDS)
    records = [record for site in tape for record in tape[site]]
    assert len(records) == 4
    gate, up = (tape[f"model.layers.1.mlp.{name}_proj"][0] for name in ("gate", "up"))
    assert torch.equal(gate.indices, up.indices)
    once = [tape[f"model.layers.{layer}.mlp.gate_proj"][0].log_prob.sum(1) for layer in range(2)]
    assert torch.allclose(rloo.example_log_prob(records, 3), sum(once))


def test_a_shared_router_over_different_inputs_cannot_be_counted(tiny_llama: LlamaForCausalLM) -> None:
    model = shared(tiny_llama, ["q_proj", "o_proj"])
    with moelora.trace(model) as tape, model.routing_context(selection_seeds=(1,)):
        model(IDS)
    with pytest.raises(UserError, match=r"self_attn.q_proj' see different inputs"):
        rloo.example_log_prob([record for site in tape for record in tape[site]], 3)


def test_a_shared_router_samples_with_seeds_only(tiny_llama: LlamaForCausalLM) -> None:
    model = shared(tiny_llama, ["gate_proj", "up_proj"])
    with pytest.raises(UserError, match="shared by 2 sites, which sample together"):
        model(IDS)
    model.eval()(IDS)
