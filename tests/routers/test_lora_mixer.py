"""LoRA-Mixer: stages, weights, losses over routers, sharing, the preserve term, and a state-space backbone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import moelora
from moelora import routers
from moelora.errors import ConfigError, UserError
from moelora.experts import build
from moelora.mixture import MoELoRAModel
from moelora.routers import Router
from moelora.routers.lora_mixer import PreserveLoss
from moelora.routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo

E = 4
SITE = SiteInfo(name="s", layer=0, in_features=16, out_features=16, ranks=(2,) * E, scales=(1.0,) * E)
IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(3))


def make(**options: Any) -> Router[Any]:
    entry = routers.get("lora_mixer")
    router: Router[Any] = entry(entry.Config.parse({"kind": "lora_mixer", **options}), SITE)
    with torch.no_grad():
        router.weight.normal_(std=0.7, generator=torch.Generator().manual_seed(4))
    return router


def route(router: Router[Any], x: Tensor, **context: Any) -> RoutingRecord:
    return router.route(RouteInput(x, None, RoutingContext(**context), SITE))


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(8))


def mixture(target: list[str], experts: dict[str, Any] | None = None, **router: Any) -> dict[str, Any]:
    experts = {"num_experts": E, "r": [1, 2, 3, 2], "alpha": 4, **(experts or {})}
    return {"sites": [{"target": target, "experts": experts, "router": {"kind": "lora_mixer", **router}}]}


def randomize(model: MoELoRAModel) -> MoELoRAModel:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.3, generator=generator)
    return model


# -- stages and weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_hard_stage_is_the_single_lora_of_the_domain(tiny_llama: LlamaForCausalLM, training: bool) -> None:
    model = randomize(moelora.attach(copy.deepcopy(tiny_llama), mixture(["q_proj", "v_proj"], stage="hard")))
    domain, start, stop = 2, 3, 6  # the rows of expert 2
    single = {"target": ["q_proj", "v_proj"], "experts": {"num_experts": 1, "r": 3, "alpha": 4}}
    one = moelora.attach(tiny_llama, {"sites": [single]})
    with torch.no_grad():
        for name, tensor in one.adapter_tensors().items():
            stacked = model.adapter_tensors()[name]
            tensor.copy_(stacked[start:stop] if name.endswith("lora_A") else stacked[:, start:stop])
        mixed = model.train(training)(IDS, task_ids=torch.full((3,), domain)).logits
        alone = one.train(training)(IDS).logits
    assert torch.allclose(mixed, alone, atol=1e-6)
    assert not torch.allclose(mixed, model(IDS, task_ids=torch.tensor([0, 1, 3])).logits, atol=1e-3)


def test_the_hard_stage_goes_by_the_sequence_and_leaves_the_router_alone() -> None:
    router = make(stage="hard")
    record = route(router, hidden(3, 5), task_ids=torch.tensor([2, 0, 3]))
    assert record.indices.squeeze(-1).tolist() == [[2] * 5, [0] * 5, [3] * 5]
    assert (record.weights == 1).all() and record.normalized
    assert not record.weights.requires_grad
    assert {name: value.item() for name, value in router.losses([record], RoutingContext()).items()} == {
        "specialization_balance": 0,
        "token_entropy": 0,
    }


def test_the_hard_stage_needs_labels_that_name_experts() -> None:
    with pytest.raises(UserError, match="needs task_ids"):
        route(make(stage="hard"), hidden(3, 5))
    with pytest.raises(UserError, match=r"task_ids holds 0\.\.4, but there are only 0\.\.3"):
        route(make(stage="hard"), hidden(3, 5), task_ids=torch.tensor([0, 1, 4]))


def test_the_phase_of_a_call_decides_instead_of_the_stage() -> None:
    ids = torch.tensor([1, 1, 2])
    assert route(make(stage="soft"), hidden(3, 5), phase="hard", task_ids=ids).probs is None
    assert route(make(stage="hard"), hidden(3, 5), phase="soft", task_ids=ids).probs is not None
    assert route(make(stage="hard"), hidden(3, 5), phase="of another method", task_ids=ids).probs is None


def test_in_the_hard_stage_the_expert_of_one_domain_can_be_merged() -> None:
    router = make(stage="hard")
    domain = RoutingContext(task_ids=torch.tensor([2, 2]))
    assert router.constant_weights(domain).tolist() == [0, 0, 1, 0]
    assert router.constant_weights(RoutingContext(task_ids=torch.tensor([2, 1]))) is None
    assert router.constant_weights(RoutingContext()) is None
    assert make(stage="soft").constant_weights(domain) is None


def test_training_is_dense_and_evaluation_takes_the_top_k() -> None:
    router = make(top_k=3)
    dense = route(router.train(), hidden(50))
    sparse = route(router.eval(), hidden(50))
    probs = (hidden(50) @ router.weight.T).softmax(-1)
    assert dense.indices is None and torch.allclose(dense.weights, probs)
    top = probs.topk(3)
    assert torch.equal(sparse.indices, top.indices)
    assert torch.allclose(sparse.weights, top.values / top.values.sum(-1, keepdim=True))
    plain = route(make(top_k=3, renormalize_topk=False).eval(), hidden(50))
    assert torch.allclose(plain.weights, top.values) and not plain.normalized


def test_with_all_experts_evaluation_is_training(tiny_llama: LlamaForCausalLM) -> None:
    model = randomize(moelora.attach(tiny_llama, mixture(["q_proj", "o_proj"], top_k=E)))
    with torch.no_grad():
        assert torch.equal(model.train()(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("straight_through", [True, False])
def test_equal_experts_leave_the_router_without_influence(training: bool, straight_through: bool) -> None:
    base = nn.Linear(16, 16).double()
    config = mixture([], {"r": 2})["sites"][0] | {"target": "x"}
    config["router"] |= {"straight_through": straight_through}
    site = build(base, config).double().train(training)
    with torch.no_grad():
        site.lora_A.copy_(torch.randn(2, 16, dtype=torch.float64).repeat(E, 1))
        site.lora_B.copy_(torch.randn(16, 2, dtype=torch.float64).repeat(1, E))
    outputs = []
    for seed in range(3):
        nn.init.normal_(site.router.weight, generator=torch.Generator().manual_seed(seed))
        outputs.append(site(hidden(50).double()).detach())
    assert (outputs[0] - base(hidden(50).double())).abs().max() > 1
    for other in outputs[1:]:
        assert torch.allclose(outputs[0], other, atol=1e-5)  # weights are float32


def test_straight_through_goes_forward_sparse_and_back_dense() -> None:
    router = make(straight_through=True, top_k=2)
    seen = route(router.train(), hidden(50))
    assert seen.indices is None
    assert torch.equal(seen.weights, route(router.eval(), hidden(50)).dense_weights())
    weight = torch.randn(50, E, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad((seen.weights * weight).sum(), router.weight)
    dense = make(top_k=2).train()
    (same,) = torch.autograd.grad((route(dense, hidden(50)).weights * weight).sum(), dense.weight)
    assert torch.equal(grad, same)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_losses_are_means_over_routers_of_means_over_real_tokens() -> None:
    router = make()
    records = [route(router, hidden(2, n)) for n in (3, 8)]
    records[0].mask = torch.tensor([[True, True, False], [True, False, False]])
    losses = router.losses(records, RoutingContext())
    kept = [records[0].probs[records[0].mask], records[1].probs.flatten(0, 1)]
    balance = [p.mean(0) @ nn.functional.one_hot(p.argmax(-1), E).float().mean(0) for p in kept]
    entropy = [-(p * p.log()).sum(-1).mean() for p in kept]
    assert losses["specialization_balance"].item() == pytest.approx(sum(balance).item() / 2, rel=1e-6)
    assert losses["token_entropy"].item() == pytest.approx(sum(entropy).item() / 2, rel=1e-6)
    for record in records:  # of one router: its tokens are pooled
        record.owner = "q_proj"
    pooled = torch.cat(kept)
    expected = pooled.mean(0) @ nn.functional.one_hot(pooled.argmax(-1), E).float().mean(0)
    found = router.losses(records, RoutingContext())["specialization_balance"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("sign", "rises"), [("printed", True), ("sharpen", False)])
def test_a_step_on_the_loss_moves_the_entropy_as_the_sign_says(sign: str, rises: bool) -> None:
    router = make(entropy_sign=sign).train()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    entropies = []
    for _ in range(2):
        losses = router.losses([route(router, hidden(64))], RoutingContext())
        entropies.append(losses["token_entropy"].item())
        optimizer.zero_grad()
        sum(router.config.coefficients()[name] * value for name, value in losses.items()).backward()
        optimizer.step()
    assert (entropies[1] > entropies[0]) == rises
    assert abs(entropies[1] - entropies[0]) > 1e-4


def test_mutual_information_is_least_for_sure_and_even_routing() -> None:
    router = make(objective="mutual_information", balance_coef=2.0, entropy_coef=0.5)

    def value(logits: Tensor) -> float:
        record = RoutingRecord(None, logits.softmax(-1), E, logits=logits, probs=logits.softmax(-1))
        losses = router.losses([record], RoutingContext())
        return float(sum(router.config.coefficients()[name] * loss for name, loss in losses.items()))

    sure = 200.0 * torch.eye(E)
    assert value(sure) == pytest.approx(-2 * math.log(E), abs=1e-6)
    assert value(torch.zeros(8, E)) == pytest.approx((0.5 - 2) * math.log(E), abs=1e-6)
    assert value(sure[:1].expand(8, E)) == pytest.approx(0, abs=1e-6)
    logits = (200 * torch.eye(E)).requires_grad_()
    record = RoutingRecord(None, logits.softmax(-1), E, logits=logits, probs=logits.softmax(-1))
    (grad,) = torch.autograd.grad(sum(router.losses([record], RoutingContext()).values()), logits)
    assert grad.isfinite().all()


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="belong to objective sbl"):
        make(objective="mutual_information", entropy_sign="sharpen")
    with pytest.raises(ConfigError, match="top_k is 5 but there are 4 experts"):
        moelora.SiteConfig.parse(mixture(["q_proj"], top_k=5)["sites"][0])
    assert moelora.SiteConfig.parse(mixture(["q_proj"], kind="sbl")["sites"][0]).router.kind == "lora_mixer"


# -- two paradigms -----------------------------------------------------------------------------------------------------


def test_with_frozen_experts_only_the_router_learns(tiny_llama: LlamaForCausalLM) -> None:
    model = randomize(moelora.attach(tiny_llama, mixture(["q_proj", "v_proj"]))).train()
    experts = {name: tensor for name, tensor in model.adapter_tensors().items() if "lora_" in name}
    for tensor in experts.values():
        tensor.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in experts.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    for name, tensor in model.adapter_tensors().items():
        if name in experts:
            assert tensor.grad is None
        else:
            assert tensor.grad.isfinite().all() and tensor.grad.any()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in experts.items())


def test_the_preserve_loss_is_zero_until_something_moves(tiny_llama: LlamaForCausalLM) -> None:
    model = randomize(moelora.attach(tiny_llama, mixture(["q_proj"])))
    chosen = {name: tensor for name, tensor in model.adapter_tensors().items() if name.endswith("lora_B")}
    preserve = PreserveLoss(chosen)
    loss = preserve()
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in chosen.values())
    with torch.no_grad():
        for tensor in chosen.values():
            tensor += 0.5
            tensor.grad = None
    preserve().backward()
    assert preserve().item() == pytest.approx(0.25 * sum(tensor.numel() for tensor in chosen.values()))
    assert all(torch.allclose(tensor.grad, torch.ones_like(tensor)) for tensor in chosen.values())
    with pytest.raises(UserError, match="no tensors"):
        PreserveLoss({})


# -- one router for several sites --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [("module", 6), ("parent", 4), ("layer", 2)])
def test_a_shared_router_is_saved_once_and_its_gradients_add_up(
    tiny_llama: LlamaForCausalLM, tiny_config: LlamaConfig, share: str, count: int, tmp_path: Path
) -> None:
    target = ["q_proj", "v_proj", "gate_proj"]
    alone = moelora.attach(copy.deepcopy(tiny_llama), mixture(target, balance_coef=0, entropy_coef=0)).train()
    config = mixture(target, share=share, balance_coef=0, entropy_coef=0)
    model = randomize(moelora.attach(tiny_llama, config)).train()
    names = [name for name in model.adapter_tensors() if name.endswith("router.weight")]
    assert len(names) == count
    owner = {name: site.router.site.name for name, site in model.containers().items()}
    with torch.no_grad():
        for name, site in model.containers().items():
            alone.containers()[name].load_state_dict(site.state_dict())
    loss, same = model(IDS, labels=IDS).loss, alone(IDS, labels=IDS).loss
    assert torch.equal(loss, same)
    loss.backward()
    same.backward()
    for name in names:
        first = name.removesuffix(".router.weight")
        members = [site for other, site in alone.containers().items() if owner[other] == first]
        expected = torch.stack([member.router.weight.grad for member in members]).sum(0)
        assert torch.allclose(model.adapter_tensors()[name].grad, expected, rtol=1e-5, atol=1e-7), name
    model.eval().save_pretrained(tmp_path / "saved")
    torch.manual_seed(0)
    loaded = moelora.from_pretrained(tmp_path / "saved", backbone=LlamaForCausalLM(tiny_config).eval())
    assert loaded.adapter_tensors().keys() == model.adapter_tensors().keys()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_loss_of_an_attention_with_one_router_is_that_of_one_router(tiny_llama: LlamaForCausalLM) -> None:
    """q, k and v see one input, so that sharing changes no value: three equal routers have the loss of one."""
    target = ["q_proj", "k_proj", "v_proj"]
    shared = randomize(moelora.attach(copy.deepcopy(tiny_llama), mixture(target, share="parent"))).train()
    single = moelora.attach(tiny_llama, mixture(target)).train()
    for name, site in shared.containers().items():
        single.containers()[name].load_state_dict(site.state_dict())
    one, three = shared(IDS).aux_losses, single(IDS).aux_losses
    for name in ("specialization_balance", "token_entropy"):
        assert one[name].item() == pytest.approx(three[name].item(), rel=1e-6)


# -- a state-space backbone --------------------------------------------------------------------------------------------


def test_experts_in_the_input_projection_of_mamba_take_part_once_per_layer() -> None:
    torch.manual_seed(0)
    backbone = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=32)
    ).eval()
    with torch.no_grad():
        base = backbone(IDS).logits
        model = moelora.attach(backbone, mixture(["mixer.in_proj"])).eval()
        assert len(model.containers()) == 2
        assert torch.equal(model(IDS).logits, base)
        for site in model.containers().values():
            site.lora_B.normal_(std=0.5)
        with moelora.trace(model) as tape:
            changed = model(IDS).logits
    assert (changed - base).abs().max() > 0.01
    assert {name: len(tape[name]) for name in tape} == {f"backbone.layers.{n}.mixer.in_proj": 1 for n in range(2)}
    assert all(tape[name][0].weights.shape == (3, 9, 3) for name in tape)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in model.adapter_tensors().values())
