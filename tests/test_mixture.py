"""Invariants of a mixture on a backbone: exactness, determinism, checkpointing, padding, generation, targets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import ConfigError
from moelora.mixture import MoELoRAModel

MIXLORA: dict[str, Any] = {
    "sites": [
        {
            "target": "mlp",
            "experts": {"num_experts": 4, "r": 4, "alpha": 8},
            "router": {"kind": "topk", "top_k": 2, "aux_loss_coef": 0.01, "z_loss_coef": 0.001},
        },
        {"target": ["q_proj", "k_proj", "v_proj", "o_proj"], "experts": {"num_experts": 1, "r": 4, "alpha": 8}},
    ]
}
# The same with a router beside every linear, and with the routers of other kinds.
LINEAR: dict[str, Any] = {
    "sites": [
        {
            "target": ["q_proj", "gate_proj", "down_proj"],
            "experts": {"kind": "rslora", "num_experts": 4, "r": [1, 2, 3, 4], "alpha": 8},
            "router": {"kind": "topk", "top_k": 2},
        }
    ]
}


def with_router(router: dict[str, Any], **experts: Any) -> dict[str, Any]:
    config = copy.deepcopy(MIXLORA)
    config["sites"][0]["router"] = router
    config["sites"][0]["experts"].update(experts)
    return config


def randomize(model: MoELoRAModel, std: float = 0.2) -> MoELoRAModel:
    """Experts that do something, and routing that is not a tie."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=std, generator=generator)
    return model


def batch(rows: int = 3, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input_ids, attention_mask and labels."""
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - 2 * row :] = 0
    ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # under left padding the first token would be predicted from a pad
    return ids, mask, labels


def gradients(model: MoELoRAModel) -> dict[str, Tensor]:
    return {name: tensor.grad.clone() for name, tensor in model.adapter_tensors().items()}


@pytest.mark.smoke
@pytest.mark.parametrize("config", [MIXLORA, LINEAR], ids=["block", "linear"])
def test_zero_lora_B_is_the_backbone_bit_for_bit(tiny_llama: LlamaForCausalLM, config: dict[str, Any]) -> None:
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = tiny_llama(ids, attention_mask=mask).logits
        model = moelora.attach(tiny_llama, config)
        for mode in (model.eval(), model.train()):
            assert torch.equal(mode(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("config", [MIXLORA, LINEAR], ids=["block", "linear"])
def test_disable_experts_is_the_backbone_bit_for_bit(tiny_llama: LlamaForCausalLM, config: dict[str, Any]) -> None:
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = tiny_llama(ids, attention_mask=mask).logits
        model = randomize(moelora.attach(tiny_llama, config)).eval()
        on = model(ids, attention_mask=mask).logits
        with model.disable_experts():
            assert torch.equal(model(ids, attention_mask=mask).logits, expected)
        assert torch.equal(model(ids, attention_mask=mask).logits, on)
    assert (on - expected).abs().max() > 0.1


def test_unload_gives_the_backbone_back(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = tiny_llama(ids, attention_mask=mask).logits
        names = [name for name, _ in tiny_llama.named_modules()]
        backbone = randomize(moelora.attach(tiny_llama, MIXLORA)).unload()
        assert backbone is tiny_llama
        assert [name for name, _ in backbone.named_modules()] == names
        assert torch.equal(backbone(ids, attention_mask=mask).logits, expected)
        assert not backbone._forward_hooks and not backbone._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for the old name
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_one_expert_is_peft_lora(tiny_llama: LlamaForCausalLM, kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(
        copy.deepcopy(tiny_llama),
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=kind == "rslora"),
    )
    experts = {"kind": kind, "num_experts": 1, "r": 4, "alpha": 8}
    router = {"kind": "topk", "top_k": 1, "aux_loss_coef": 0.0}
    forms = {
        "always on": [{"target": targets, "experts": experts}],
        "routed": [{"target": targets, "experts": experts, "router": router}],
        "block": [{"target": "mlp", "experts": experts, "router": router}, {"target": targets[:2], "experts": experts}],
    }
    weights = {}
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.normal_(std=0.2)
            weights[name.removeprefix("base_model.model.").replace(".default.weight", "")] = parameter
    ids, mask, labels = batch()
    reference = peft(ids, attention_mask=mask, labels=labels)
    reference.loss.backward()
    for form, sites in forms.items():
        model = moelora.attach(copy.deepcopy(tiny_llama), {"sites": sites})
        tensors = {name: t for name, t in model.adapter_tensors().items() if "router" not in name}
        assert len(tensors) == len(weights)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(weights[name])
        out = model(ids, attention_mask=mask, labels=labels)
        assert (out.logits - reference.logits).abs().max() <= 1e-6, form
        out.loss.backward()
        for name, tensor in tensors.items():
            assert torch.allclose(tensor.grad, weights[name].grad, rtol=1e-4, atol=1e-6), (form, name)


def test_eval_is_deterministic_and_dropout_and_jitter_are_training_only(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = batch()
    config = with_router({"kind": "topk", "jitter": 0.3}, dropout=0.5)
    model = randomize(moelora.attach(tiny_llama, config))
    with torch.no_grad():
        first, second = (model.eval()(ids, attention_mask=mask).logits for _ in range(2))
        assert torch.equal(first, second)
        noisy, again = (model.train()(ids, attention_mask=mask).logits for _ in range(2))
    assert not torch.equal(noisy, again)
    assert not torch.equal(noisy, first)


def test_jitter_leaves_its_input_alone_and_reaches_only_the_router(tiny_llama: LlamaForCausalLM) -> None:
    config = with_router({"kind": "topk", "top_k": 4, "normalize": True, "jitter": 0.5})
    container = randomize(moelora.attach(tiny_llama, config)).containers()["model.layers.0.mlp"].train()
    with torch.no_grad():
        container.router.weight.zero_()  # whatever the jitter, all experts weigh the same
        x = torch.randn(2, 5, 32)
        before = x.clone()
        out = container(x)
        assert torch.equal(x, before)
        assert torch.equal(out, container(x))


@pytest.mark.smoke
def test_state_dict_round_trip(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = batch()
    other = copy.deepcopy(tiny_llama)
    model = randomize(moelora.attach(tiny_llama, MIXLORA)).eval()
    fresh = moelora.attach(other, MIXLORA).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(model.adapter_tensors())
    assert model.get_submodule("backbone.model.layers.1.mlp.router") is not None


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "topk", "jitter": 0.2, "z_loss_coef": 0.01},
        {"kind": "topp", "top_p": 0.6, "jitter": 0.2},
        {"kind": "switch", "expert_capacity": 2, "jitter": 0.2},
    ],
    ids=lambda router: router["kind"],
)
@pytest.mark.parametrize("source", ["global", "private"])
def test_gradient_checkpointing_changes_nothing(
    tiny_llama: LlamaForCausalLM, router: dict[str, Any], source: str
) -> None:
    ids, mask, labels = batch()
    model = randomize(moelora.attach(tiny_llama, with_router(router, dropout=0.3))).train()

    generator = torch.Generator()

    def step() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]:
        model.zero_grad()
        torch.manual_seed(5)
        generator.manual_seed(6)
        private = {"generator": generator} if source == "private" else {}
        with moelora.trace(model) as tape, model.routing_context(**private):
            out = model(ids, attention_mask=mask, labels=labels)
            out.loss.backward()
        return out.loss.detach(), out.aux_losses, gradients(model), sum(len(tape[site]) for site in tape)

    loss, aux, grads, heard = step()
    model.gradient_checkpointing_enable()
    loss2, aux2, grads2, heard2 = step()
    assert torch.equal(loss, loss2)
    assert heard == heard2 == 2, "a recomputation must not be heard a second time"
    assert {k: v.item() for k, v in aux.items()} == {k: v.item() for k, v in aux2.items()}
    for name in grads:
        assert torch.equal(grads[name], grads2[name]), name
    model.gradient_checkpointing_disable()
    assert torch.equal(step()[0], loss)


def test_recomputation_takes_the_recorded_choice(tiny_llama: LlamaForCausalLM) -> None:
    """Even if the router's weights moved between forward and backward, the experts stay those of the forward."""
    ids, mask, labels = batch()
    model = randomize(moelora.attach(tiny_llama, with_router({"kind": "topk", "aux_loss_coef": 0.0}))).train()
    model.gradient_checkpointing_enable()
    out = model(ids, attention_mask=mask, labels=labels)
    with torch.no_grad():
        for container in model.containers().values():
            if container.router is not None:
                container.router.weight.data.neg_()  # .data: autograd's version check is not what is tested here
    out.loss.backward()
    for container in model.containers().values():
        if container.router is not None:
            assert all(torch.isfinite(p.grad).all() for p in container.adapter_tensors().values())


def test_reentrant_checkpointing_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, labels = batch()
    model = moelora.attach(tiny_llama, MIXLORA).train()
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.backbone.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ConfigError, match="on the mixture instead"):
        model(ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize("kind", ["topk", "topp", "switch"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_appended_padding_changes_no_loss_and_no_gradient(tiny_llama: LlamaForCausalLM, kind: str, side: str) -> None:
    ids, mask, labels = batch()
    router = {"kind": kind, "aux_loss_coef": 0.5, "z_loss_coef": 0.1, "jitter": 0.0}
    model = randomize(moelora.attach(tiny_llama, with_router(router))).train()
    results = []
    for padding in (0, 5):
        pad = (0, padding) if side == "right" else (padding, 0)
        model.zero_grad()
        padded = torch.nn.functional.pad(mask, pad)
        out = model(
            torch.nn.functional.pad(ids, pad),
            attention_mask=padded,
            position_ids=(padded.cumsum(-1) - 1).clamp(min=0),
            labels=torch.nn.functional.pad(labels, pad, value=-100),
        )
        out.loss.backward()
        results.append((out, gradients(model)))
    (plain, grads), (padded_out, padded_grads) = results
    for name, value in plain.aux_losses.items():
        assert torch.allclose(value, padded_out.aux_losses[name], rtol=0, atol=1e-6), name
    for name in grads:
        assert torch.allclose(grads[name], padded_grads[name], rtol=1e-4, atol=1e-6), name


def test_aux_losses_see_real_tokens_only(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, labels = batch()
    model = randomize(moelora.attach(tiny_llama, MIXLORA))
    with moelora.trace(model) as tape:
        out = model(ids, attention_mask=mask, labels=labels)
    rows = [tape[site][0] for site in tape]
    chosen = torch.cat([r.indices[mask.bool()] for r in rows])
    probs = torch.cat([r.probs[mask.bool()] for r in rows])
    share = torch.stack([(chosen == e).sum() / len(chosen) for e in range(4)])
    assert out.aux_losses["load_balance"].item() == pytest.approx(4 * (share * probs.mean(0)).sum().item(), abs=1e-6)
    z = torch.cat([r.logits[mask.bool()] for r in rows]).logsumexp(-1).square().mean()
    assert out.aux_losses["router_z"].item() == pytest.approx(z.item(), abs=1e-6)
    total = out.task_loss + 0.01 * out.aux_losses["load_balance"] + 0.001 * out.aux_losses["router_z"]
    assert out.loss.item() == pytest.approx(total.item(), abs=1e-6)


def test_balanced_routing_has_load_balance_k() -> None:
    from moelora.routers.losses import load_balance
    from moelora.routing import RoutingContext, RoutingRecord

    indices = torch.tensor([[0, 1], [2, 3]])
    probs = torch.full((2, 4), 0.25)
    record = RoutingRecord(indices=indices, weights=probs[:, :2], num_experts=4, probs=probs)
    assert load_balance([record], RoutingContext()).item() == pytest.approx(2.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_with_cache_equals_recomputation(tiny_llama: LlamaForCausalLM, side: str) -> None:
    model = randomize(moelora.attach(tiny_llama, MIXLORA)).eval()
    ids = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[1, :2] = 0
        mask[2, :4] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6}
    cached = model.generate(ids, do_sample=False, **settings)
    assert torch.equal(cached, model.generate(ids, do_sample=False, use_cache=False, **settings))
    for row in range(3):
        alone = model.generate(
            ids[row : row + 1, mask[row] == 1][:, :], do_sample=False, max_new_tokens=6, min_new_tokens=6
        )
        assert torch.equal(alone[0, -6:], cached[row, -6:])


def test_sampling_and_beams(tiny_llama: LlamaForCausalLM) -> None:
    model = randomize(moelora.attach(tiny_llama, MIXLORA)).eval()
    ids = torch.randint(3, 64, (2, 5))
    torch.manual_seed(1)
    first = model.generate(ids, do_sample=True, max_new_tokens=5, min_new_tokens=5, num_return_sequences=2)
    torch.manual_seed(1)
    assert torch.equal(
        first, model.generate(ids, do_sample=True, max_new_tokens=5, min_new_tokens=5, num_return_sequences=2)
    )
    beams = {
        cache: model.generate(ids, num_beams=3, max_new_tokens=5, min_new_tokens=5, use_cache=cache)
        for cache in (True, False)
    }
    assert torch.equal(beams[True], beams[False])


def test_context_reaches_every_forward_of_generation(tiny_llama: LlamaForCausalLM) -> None:
    model = randomize(moelora.attach(tiny_llama, MIXLORA)).eval()
    ids, mask, _ = batch(2, 6)
    seen: list[tuple[Any, Any]] = []
    with model.slot.using(listener=lambda site, record: seen.append((model.slot.context.task_ids, record.mask))):
        model.generate(ids, attention_mask=mask, task_ids=torch.tensor([5, 8]), num_beams=2, max_new_tokens=3)
    assert len(seen) == 2 * 3
    first_ids, first_mask = seen[0]
    assert first_mask is not None and first_mask.shape[1] == 6 and not first_mask.all()
    assert first_ids.tolist() in ([5, 5, 8, 8], [5, 8])
    assert seen[-1][0].tolist() == [5, 5, 8, 8]
    assert seen[-1][1].shape == (4, 1) and seen[-1][1].all()
    assert model.slot.context.task_ids is None and model.slot.context.token_mask is None


def test_context_is_restored_after_an_error(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, MIXLORA)
    with pytest.raises(IndexError):
        model(torch.tensor([[9999]]), attention_mask=torch.ones(1, 1))
    assert model.slot.context.token_mask is None
    assert not model.slot.listeners


def test_expert_scale(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = batch()
    model = randomize(moelora.attach(tiny_llama, MIXLORA)).eval()
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        with model.expert_scale({0: 0.0, 2: 0.5}):
            scaled = model(ids, attention_mask=mask).logits
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)
        for container in model.containers().values():
            if container.router is not None:
                for bank in container.banks():
                    bank.lora_B[:, 0:4] *= 0.0
                    bank.lora_B[:, 8:12] *= 0.5
        assert torch.allclose(model(ids, attention_mask=mask).logits, scaled, atol=1e-5)
    assert not torch.allclose(scaled, plain, atol=1e-3)
    with pytest.raises(ConfigError, match=r"0\.\.3"), model.expert_scale({4: 0.0}):
        pass


def test_two_mixtures_do_not_mix(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, labels = batch()
    first = randomize(moelora.attach(tiny_llama, MIXLORA))
    second = copy.deepcopy(first)
    assert second.slot is not first.slot
    assert {id(c.slot) for c in second.containers().values()} == {id(second.slot)}
    with moelora.trace(first) as tape:
        second(ids, attention_mask=mask, labels=labels)
    assert len(tape) == 0


def test_layers_filter(tiny_llama: LlamaForCausalLM) -> None:
    config = copy.deepcopy(MIXLORA)
    config["sites"][0]["layers"] = "-1:"
    config["sites"][1]["layers"] = [0]
    names = list(moelora.attach(tiny_llama, config).containers())
    assert [n for n in names if n.endswith("mlp")] == ["model.layers.1.mlp"]
    assert {n.split(".")[2] for n in names if "self_attn" in n} == {"0"}


@pytest.mark.parametrize(
    ("sites", "parts"),
    [
        ([{"target": "mpl", "experts": {"num_experts": 1}}], ["'mpl'", "LlamaForCausalLM", "mlp"]),
        ([{"target": "mlp", "layers": "7:", "experts": {"num_experts": 1}}], ["7:", "[0, 1]"]),
        ([{"target": "self_attn", "experts": {"num_experts": 1}}], ["self_attn", "neither a linear nor an FFN"]),
        ([{"target": "mlp", "projections": ["fc1"], "experts": {"num_experts": 1}}], ["fc1", "gate_proj"]),
        ([{"target": "mlp", "experts": {"num_experts": 4}}], ["sites.0", "no router", "topk"]),
        (
            [{"target": "mlp", "experts": {"num_experts": 2}, "router": {"kind": "topk", "top_k": 3}}],
            ["top_k", "3", "1..2"],
        ),
        ([{"target": "mlp", "experts": {"num_experts": 1}}] * 2, ["sites.0", "sites.1", "claimed"]),
        (
            [{"target": "mlp", "experts": {"num_experts": 1}}, {"target": "up_proj", "experts": {"num_experts": 1}}],
            ["up_proj", "lies inside", "mlp"],
        ),
        ([{"target": "embed_tokens", "experts": {"num_experts": 1}}], ["embed_tokens", "neither a linear"]),
    ],
)
def test_wrong_sites_are_refused_and_leave_the_backbone_alone(
    tiny_llama: LlamaForCausalLM, sites: list[dict[str, Any]], parts: list[str]
) -> None:
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = tiny_llama(ids, attention_mask=mask).logits
        with pytest.raises(ConfigError) as error:
            moelora.attach(tiny_llama, {"sites": sites})
        for part in parts:
            assert part in str(error.value)
        assert torch.equal(tiny_llama(ids, attention_mask=mask).logits, expected)


def test_switch_computes_the_same_in_training_and_inference(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = batch()
    router = {"kind": "switch", "expert_capacity": 2, "jitter": 0.0}
    model = randomize(moelora.attach(tiny_llama, with_router(router)))
    with torch.no_grad():
        assert torch.equal(
            model.train()(ids, attention_mask=mask).logits, model.eval()(ids, attention_mask=mask).logits
        )


def test_tuple_outputs_and_no_labels(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = batch()
    model = randomize(moelora.attach(tiny_llama, MIXLORA)).eval()
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
        assert out.loss is None and "aux_losses" not in out
        assert torch.equal(model(ids, attention_mask=mask, return_dict=False)[0], out.logits)


def test_bf16_backbone_routes_in_float32(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, labels = batch()
    model = randomize(moelora.attach(tiny_llama.to(torch.bfloat16), MIXLORA)).train()
    with moelora.trace(model) as tape:
        out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    for site in tape:
        assert tape[site][0].probs.dtype == tape[site][0].weights.dtype == torch.float32
    assert all(t.dtype == torch.float32 and torch.isfinite(t.grad).all() for t in model.adapter_tensors().values())


def test_autocast_trains(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, labels = batch()
    model = randomize(moelora.attach(tiny_llama, MIXLORA)).train()
    expected = model(ids, attention_mask=mask, labels=labels).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=0.05)
    assert all(torch.isfinite(t.grad).all() and t.grad.any() for t in model.adapter_tensors().values())


def test_a_second_attach_is_refused_and_a_failed_one_leaves_the_backbone(tiny_llama: LlamaForCausalLM) -> None:
    names = [name for name, _ in tiny_llama.named_modules()]
    bad = {"sites": [MIXLORA["sites"][0], {"target": "self_attn", "experts": {"num_experts": 1}}]}
    with pytest.raises(ConfigError, match="self_attn"):
        moelora.attach(tiny_llama, bad)
    assert [name for name, _ in tiny_llama.named_modules()] == names
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())
    model = moelora.attach(tiny_llama, MIXLORA)
    for backbone in (tiny_llama, model):
        with pytest.raises(ConfigError, match=r"already carries experts.*unload"):
            moelora.attach(backbone, LINEAR)
    moelora.attach(model.unload(), LINEAR)


@pytest.mark.parametrize("scales", [{0: 3.0, 1: 3.0, 2: 3.0, 3: 3.0}, {1: 0.0, 2: 2.0}], ids=["uniform", "mixed"])
def test_switches_reach_a_recomputation_after_their_block(
    tiny_llama: LlamaForCausalLM, scales: dict[int, float]
) -> None:
    ids, mask, labels = batch()
    model = randomize(moelora.attach(tiny_llama, MIXLORA)).train()

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        with model.expert_scale(scales):
            loss = model(ids, attention_mask=mask, labels=labels).loss
        with model.disable_experts():
            loss.backward()
        return gradients(model)

    plain = step()
    model.gradient_checkpointing_enable()
    again = step()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_several_backward_passes_over_one_checkpointed_forward(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, labels = batch()
    model = randomize(moelora.attach(tiny_llama, MIXLORA)).train()
    model.gradient_checkpointing_enable()
    out = model(ids, attention_mask=mask, labels=labels)
    out.task_loss.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    out.task_loss.backward()
    assert all(torch.equal(value, first[name]) for name, value in gradients(model).items())


def test_gpt2_counts_the_labels_of_a_step_as_its_backbone_does() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    backbone = GPT2LMHeadModel(config).eval()
    ids, mask, labels = batch()
    expected = backbone(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    sites = [
        {"target": "mlp", "experts": {"num_experts": 4, "r": 2}, "router": {"kind": "topk"}},
        {"target": "c_attn", "experts": {"num_experts": 1, "r": 2}},
    ]
    model = moelora.attach(backbone, {"sites": sites}).eval()
    assert model.accepts_loss_kwargs
    out = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(40))
    assert out.task_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.aux_share.item() == pytest.approx((labels != -100).sum().item() / 40)


def test_encoder_and_decoder_have_masks_of_their_own() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    backbone = T5ForConditionalGeneration(config).eval()
    site = {"target": "DenseReluDense", "experts": {"num_experts": 4, "r": 2}, "router": {"kind": "topk"}}
    model = moelora.attach(backbone, {"sites": [site]}).eval()
    ids, mask, _ = batch(3, 9)
    with moelora.trace(model) as tape:
        out = model(ids, attention_mask=mask, labels=ids.clone())
    masks = {name.split(".")[0]: tape[name][0].mask for name in tape}
    assert torch.equal(masks["encoder"], mask.bool())
    assert masks["decoder"] is None
    assert out.loss.item() == pytest.approx((out.task_loss + 0.01 * out.aux_losses["load_balance"]).item(), abs=1e-5)
    assert model.slot.context.token_mask is None


def test_a_generation_config_set_on_the_mixture_is_used(tiny_llama: LlamaForCausalLM) -> None:
    from transformers import GenerationConfig

    model = moelora.attach(tiny_llama, MIXLORA).eval()
    model.generation_config = GenerationConfig(max_new_tokens=2, min_new_tokens=2, eos_token_id=2, pad_token_id=0)
    assert model.generate(torch.tensor([[5, 6, 7]])).shape == (1, 5)


def test_outputs_and_models_can_be_pickled_and_configs_stay_clean(tiny_llama: LlamaForCausalLM) -> None:
    import io
    import pickle

    ids, mask, labels = batch()
    before = dict(vars(tiny_llama.config))
    model = moelora.attach(tiny_llama, MIXLORA).eval()
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    again = pickle.loads(pickle.dumps(out))
    assert torch.equal(again.logits, out.logits) and torch.equal(
        again.aux_losses["load_balance"], out.aux_losses["load_balance"]
    )
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(ids, attention_mask=mask).logits, out.logits)
    assert vars(model.unload().config) == before


@pytest.mark.parametrize(
    ("site", "words"),
    [({"target": "re:mlp("}, "not a regular expression"), ({"target": "mlp", "layers": [0, 99]}, r"names \[99\]")],
)
def test_targets_and_layers_that_do_not_exist(tiny_llama: LlamaForCausalLM, site: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        moelora.attach(tiny_llama, {"sites": [{**site, "experts": {"num_experts": 1}}]})
