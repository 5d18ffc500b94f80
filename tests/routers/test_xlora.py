"""X-LoRA's classifier and its options, and what must hold of any mixture that it weighs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora import routers
from moelora.errors import ConfigError
from moelora.mixture import MoELoRAModel, trace
from moelora.routers.xlora import XLoRARouter
from moelora.routing import Decision, RouteInput, RoutingContext, RoutingRecord, SiteInfo

MEMBERS = ("a", "b", "c")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def site(name: str = "a") -> SiteInfo:
    return SiteInfo(name, 0, 6, 6, (2,) * 4, (1.0,) * 4, MEMBERS, hidden_size=8)


def make(**options: Any) -> XLoRARouter:
    entry = routers.get("xlora")
    router: XLoRARouter = entry(entry.Config.parse({"kind": "xlora", **options}), site()).eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=0.7, generator=torch.Generator().manual_seed(4))
    return router


def states() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def route(
    router: XLoRARouter, name: str = "a", replay: Decision | None = None, scored: bool = True, **context: Any
) -> RoutingRecord:
    fields = {"scoring_states": states(), **context}
    if scored:
        scores = router.score(fields["scoring_states"], RoutingContext(**fields))
        fields["scores"] = dict.fromkeys(MEMBERS, scores)
    return router.route(RouteInput(torch.zeros(2, 5, 6), None, RoutingContext(**fields), site(name), replay))


def by_hand(router: XLoRARouter) -> Tensor:
    hidden = states()
    for index, layer in enumerate(router.layers):
        hidden = layer(hidden)
        if index < len(router.layers) - 1 and router.config.relu:
            hidden = hidden.clamp(min=0)
    return hidden


@pytest.mark.smoke
@pytest.mark.parametrize("options", [{}, {"depth": 2, "size": 5}, {"depth": 3, "size": 5, "relu": False}])
@pytest.mark.parametrize("layerwise", [False, True])
def test_weights_are_the_tempered_softmax_of_the_sites_row(options: dict[str, Any], layerwise: bool) -> None:
    router = make(**options, layerwise=layerwise, temperature=0.5)
    logits = by_hand(router)
    for row, name in enumerate(MEMBERS):
        mine = logits[..., 4 * row : 4 * row + 4] if layerwise else logits
        record = route(router, name)
        assert record.indices is None and record.normalized
        assert torch.allclose(record.weights, (mine / 0.5).softmax(-1), atol=1e-6)
        assert torch.allclose(record.weights.sum(-1), torch.ones(2, 5))


def test_a_container_alone_gets_what_a_model_gets_once_per_forward() -> None:
    router = make(layerwise=True, depth=2, size=5)
    assert torch.equal(route(router, "b", scored=False).weights, route(router, "b").weights)


def test_without_the_softmax_weights_are_the_logits_and_temperature_is_of_no_matter() -> None:
    router = make(softmax=False, temperature=3.0)
    record = route(router)
    assert torch.equal(record.weights, by_hand(router)) and record.probs is None and not record.normalized


def test_top_k_masks_and_does_not_renormalise() -> None:
    dense, router = make(), make(top_k=2)
    record, full = route(router), route(dense).weights
    top = full.topk(2)
    assert torch.equal(record.indices, top.indices) and torch.equal(record.weights, top.values)
    assert (record.weights.sum(-1) < 1).all() and not record.normalized


def test_top_k_of_all_is_dense() -> None:
    assert torch.equal(route(make(top_k=4)).dense_weights(), route(make()).weights)


def test_softmax_topk_is_taken_over_the_kept_of_each_token() -> None:
    record = route(make(softmax=False, top_k=2, softmax_topk=True))
    kept = route(make(softmax=False)).weights.topk(2)
    assert torch.allclose(record.weights, kept.values.softmax(-1)) and record.normalized
    alone = route(make(softmax=False, softmax_topk=True))
    assert torch.allclose(alone.weights, route(make()).weights)


def test_a_replay_takes_the_choice_and_weighs_anew() -> None:
    router = make(top_k=2)
    first = route(router)
    other = torch.flip(first.indices, dims=(-1,))
    again = route(router, replay=Decision(indices=other, noise=None))
    assert torch.equal(again.indices, other)
    assert torch.equal(again.weights, torch.flip(first.weights, dims=(-1,)))


def test_ties_go_to_the_lower_index() -> None:
    router = make(top_k=2)
    with torch.no_grad():
        router.layers[0].weight.zero_()
        router.layers[0].bias.zero_()
    assert (route(router).indices == torch.tensor([0, 1])).all()


def test_dropout_falls_between_the_linears_in_training_only() -> None:
    router = make(depth=2, size=400, dropout=0.5)
    plain = route(router).logits
    router.train()
    one, two, other = (route(router, generator=torch.Generator().manual_seed(seed)).logits for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other) and not torch.equal(one, plain)
    mean = torch.stack([route(router).logits for _ in range(400)]).mean(0)
    assert (mean - plain).abs().max() < 0.2 * plain.abs().max()
    assert torch.equal(route(make(depth=1, dropout=0.5).train()).logits, route(make(depth=1)).logits)
    assert torch.equal(route(make(depth=2, relu=False).train()).logits, route(make(depth=2, relu=False)).logits)


def test_a_container_alone_replays_the_dropout_of_the_contexts_generator() -> None:
    router = make(depth=2, size=9, dropout=0.5).train()
    first = route(router, scored=False, generator=torch.Generator().manual_seed(1))
    again = route(router, scored=False, generator=torch.Generator().manual_seed(2), replay=first.decision())
    assert torch.equal(again.weights, first.weights)
    assert route(router, scored=False).noise is None


@pytest.mark.parametrize(("value", "expected"), [(0.3, 0.6), (None, 0.5), (0.0, 0.0)])
def test_the_scoring_pass_has_one_weight_for_all(value: float | None, expected: float) -> None:
    router = make(scaling_pass_value=value, global_scaling_weight=2.0, top_k=1)
    record = router.route(RouteInput(torch.zeros(2, 5, 6), None, RoutingContext(scoring_pass=True), site()))
    assert record.weights.tolist() == torch.full((2, 5, 4), expected).tolist()


def test_the_initial_classifier_is_reproducible_and_in_bounds() -> None:
    router = make(depth=2, size=5)
    router.reset_parameters(torch.Generator().manual_seed(3))
    before = copy.deepcopy(router.state_dict())
    router.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
    assert router.layers[0].weight.abs().max() <= 8**-0.5 and router.layers[1].weight.abs().max() <= 5**-0.5
    assert make(bias=False).layers[0].bias is None


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k is 5 but there are 4"):
        make(top_k=5)
    with pytest.raises(ConfigError, match="temperature"):
        make(temperature=0.0)


# -- on a backbone -----------------------------------------------------------------------------------------------


def mixture(backbone: LlamaForCausalLM, experts: int = 3, **router: Any) -> MoELoRAModel:
    bank = {"kind": "frozen", "num_experts": experts, "r": 2, "alpha": 4}
    config = {"sites": [{"target": TARGETS, "experts": bank, "router": {"kind": "xlora", **router}}]}
    model = moelora.attach(backbone, config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.3, generator=generator)
    return model


def classifier(model: MoELoRAModel) -> XLoRARouter:
    return next(iter(model.containers().values())).router  # type: ignore[return-value]


def ids() -> Tensor:
    return torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(3))


def merged(backbone: LlamaForCausalLM, model: MoELoRAModel, expert: int) -> LlamaForCausalLM:
    """A copy of the backbone with one expert added to its weights: plain LoRA."""
    plain = copy.deepcopy(backbone)
    rows = slice(2 * expert, 2 * expert + 2)
    with torch.no_grad():
        for name, container in model.containers().items():
            plain.get_submodule(name).weight += 2.0 * container.lora_B[:, rows] @ container.lora_A[rows]
    return plain


def test_one_classifier_serves_all_sites(tiny_llama: LlamaForCausalLM) -> None:
    model = mixture(tiny_llama, layerwise=True)
    assert len({id(container.router) for container in model.containers().values()}) == 1
    assert classifier(model).layers[0].weight.shape == (6 * 3, 32)


@torch.no_grad()
def test_one_expert_under_a_softmax_is_plain_lora(tiny_llama: LlamaForCausalLM) -> None:
    backbone = copy.deepcopy(tiny_llama)
    model = mixture(tiny_llama, experts=1)
    assert (model(ids()).logits - merged(backbone, model, 0)(ids()).logits).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("expert", range(3))
def test_a_cold_softmax_leaves_one_expert_alone(tiny_llama: LlamaForCausalLM, expert: int) -> None:
    backbone = copy.deepcopy(tiny_llama)
    model = mixture(tiny_llama, temperature=1e-4)
    classifier(model).layers[0].weight.zero_()
    classifier(model).layers[0].bias.copy_(torch.eye(3)[expert])
    assert (model(ids()).logits - merged(backbone, model, expert)(ids()).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_a_global_weight_of_zero_is_the_backbone(tiny_llama: LlamaForCausalLM) -> None:
    expected = tiny_llama(ids()).logits
    model = mixture(tiny_llama, global_scaling_weight=0.0, scaling_pass_value=0.5)
    assert torch.equal(model(ids()).logits, expected)


@torch.no_grad()
def test_a_layerwise_classifier_with_tied_rows_is_a_shared_one(tiny_llama: LlamaForCausalLM) -> None:
    shared = mixture(copy.deepcopy(tiny_llama))
    layerwise = mixture(tiny_llama, layerwise=True)
    for one, many in zip(classifier(shared).parameters(), classifier(layerwise).parameters(), strict=True):
        many.copy_(one.repeat(6, *[1] * (one.dim() - 1)))
    for one, many in zip(shared.containers().values(), layerwise.containers().values(), strict=True):
        for name, tensor in many.experts.named_parameters():
            tensor.copy_(one.experts.get_parameter(name))
    assert torch.allclose(shared(ids()).logits, layerwise(ids()).logits, atol=1e-6)


@torch.no_grad()
def test_every_row_of_a_layerwise_classifier_reaches_its_own_site(tiny_llama: LlamaForCausalLM) -> None:
    model = mixture(tiny_llama, layerwise=True)
    router = classifier(model)
    router.layers[0].weight.zero_()
    wanted = torch.randn(6, 3)
    router.layers[0].bias.copy_(wanted.flatten())
    with trace(model) as tape:
        model(ids())
    for row, name in enumerate(model.containers()):
        assert torch.allclose(tape[name][0].weights, wanted[row].softmax(-1).expand(2, 6, 3))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_reach_real_tokens(tiny_llama: LlamaForCausalLM, side: str) -> None:
    model = mixture(tiny_llama, layerwise=True, scaling_pass_value=0.5)
    pad = torch.zeros(2, 3, dtype=torch.long)
    parts = [pad, ids()] if side == "left" else [ids(), pad]
    mask = torch.cat([part != 0 for part in parts], dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(torch.cat(parts, dim=1), attention_mask=mask, position_ids=positions).logits
    real = padded[:, 3:] if side == "left" else padded[:, :6]
    assert (real - model(ids()).logits).abs().max() <= 1e-5


def test_a_step_trains_the_classifier_and_nothing_else(tiny_llama: LlamaForCausalLM) -> None:
    model = mixture(tiny_llama, layerwise=True, depth=2, size=8).train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".router.")[1] for name in trainable} == {
        f"layers.{index}.{part}" for index in (0, 1) for part in ("weight", "bias")
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = model(ids(), labels=ids())
    assert output.aux_losses == {}
    output.loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".router." in name for name in changed)


def test_experts_may_drop_features_each_by_itself(tiny_llama: LlamaForCausalLM) -> None:
    """The released code drops for each expert; the scalings are the same, the updates have masks of their own."""
    bank = {"kind": "frozen", "num_experts": 2, "r": 2, "alpha": 4, "dropout": 0.5, "expert_dropout": "separate"}
    config = {"sites": [{"target": TARGETS, "experts": bank, "router": {"kind": "xlora"}}]}
    model = moelora.attach(tiny_llama, config).train()
    with torch.no_grad():
        for container in model.containers().values():
            container.experts.lora_A.fill_(0.1)
            container.experts.lora_B.normal_()
    container = next(iter(model.containers().values()))
    low = container.experts.low(torch.ones(4, 32))
    assert torch.equal(low[:, 0], low[:, 1]) and not torch.equal(low[:, 0], low[:, 2])
    assert model(ids(), labels=ids()).loss.isfinite()
