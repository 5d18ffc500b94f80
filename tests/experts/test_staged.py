"""Stages beside the frozen linears of a backbone: how they grow, are shown, saved, merged, and refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.composition import export_lora
from moelora.config import SiteConfig
from moelora.errors import CheckpointError, ConfigError, UserError
from moelora.experts.staged import StagedConfig, StagedExperts
from moelora.growth import at_stage
from moelora.mixture import MoELoRAModel
from moelora.trainers.optimizer import GroupOptions, parameter_groups, sync_optimizer

POLICIES = ["paper", "head", "strict"]
policies = pytest.mark.parametrize("policy", POLICIES)
EXPERTS: dict[str, Any] = {"kind": "staged", "r": 4, "alpha": 8}
TARGETS = ["q_proj", "v_proj", "up_proj"]
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
Q = "model.layers.0.self_attn.q_proj"


def model_of(backbone: LlamaForCausalLM, **experts: Any) -> MoELoRAModel:
    return moelora.attach(backbone, {"sites": [{"target": TARGETS, "experts": {**EXPERTS, **experts}}]})


def groups(model: MoELoRAModel) -> list[dict[str, Any]]:
    return parameter_groups(model, (), 0.05, 0.0, GroupOptions())


def train(model: MoELoRAModel, optimizer: torch.optim.Optimizer, task: int, steps: int = 2) -> None:
    model.train()
    for step in range(steps):
        torch.manual_seed(100 * task + step)
        ids = torch.randint(3, 64, (2, 9))
        model(ids, labels=ids.roll(task, 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def next_stage(model: MoELoRAModel, optimizer: torch.optim.Optimizer) -> None:
    model.begin_task()
    sync_optimizer(optimizer, groups(model))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model.eval()(IDS).logits
    return result


def banks(model: MoELoRAModel) -> dict[str, StagedExperts]:
    return {
        name: bank for name, c in model.containers().items() for bank in c.banks() if isinstance(bank, StagedExperts)
    }


@policies
@pytest.mark.parametrize("variant", ["float32", "bfloat16", "dropout"])
def test_every_older_stage_is_shown_bit_for_bit(tiny_llama: LlamaForCausalLM, policy: str, variant: str) -> None:
    if variant == "bfloat16":
        tiny_llama.to(torch.bfloat16)
    backbone = logits(tiny_llama)
    model = model_of(tiny_llama, policy=policy, dropout=0.2 if variant == "dropout" else 0.0)
    optimizer = torch.optim.AdamW(groups(model))
    ends = [backbone]
    for stage in range(1, 5):
        if stage > 1:
            next_stage(model, optimizer)
        assert torch.equal(logits(model), ends[-1])  # a stage begins as nothing
        train(model, optimizer, stage)
        ends.append(logits(model))
        assert not torch.equal(ends[-1], ends[-2])
    for stage in (3, 0, 4, 1, 2):
        with at_stage(model, stage):
            assert torch.equal(logits(model), ends[stage]), stage
    assert torch.equal(logits(model), ends[-1])
    with model.disable_experts():
        assert torch.equal(logits(model), backbone)


@policies
def test_under_autocast_and_with_gradient_checkpointing(tiny_llama: LlamaForCausalLM, policy: str) -> None:
    model = model_of(tiny_llama, policy=policy)
    optimizer = torch.optim.AdamW(groups(model))
    ends = []
    for stage in range(1, 4):
        if stage > 1:
            next_stage(model, optimizer)
        train(model, optimizer, stage)
        with torch.autocast("cpu", torch.bfloat16):
            ends.append(logits(model))
    for stage, end in enumerate(ends, start=1):
        with at_stage(model, stage), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logits(model), end)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with at_stage(model, 2):  # of an older stage the scales are numbers, and the factors are frozen
        assert not model(IDS, labels=IDS).loss.requires_grad
    plain = gradients()
    model.gradient_checkpointing_enable()
    again = gradients()
    assert plain.keys() == again.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@policies
def test_beside_a_4_bit_linear(policy: str) -> None:
    import bitsandbytes as bnb

    plain = nn.Linear(64, 32)
    base = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(plain.state_dict())
    base = base.to("cpu").requires_grad_(False)
    built = moelora.experts.build(base, {"target": "any", "experts": {**EXPERTS, "policy": policy}})
    bank = built.experts
    assert isinstance(bank, StagedExperts)
    x = torch.randn(3, 64)
    ends = [base(x)]
    for stage in range(1, 4):
        if stage > 1:
            bank.begin_task(bank.config.next_task())
        assert torch.equal(built(x), ends[-1])
        optimizer = torch.optim.Adam([p for p in built.parameters() if p.requires_grad], lr=0.05)
        for _ in range(2):
            built(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(built(x).detach())
    for stage, end in enumerate(ends):
        with moelora.experts.staged.showing([bank], stage):
            assert torch.equal(built(x), end)
    first, *scales = bank.factors(3)
    wanted = first * (base(x) - base.bias) + base.bias
    parts = zip((*bank.old_lora_A, bank.lora_A), (*bank.old_lora_B, bank.lora_B), scales, strict=True)
    for A, B, scale in parts:
        wanted = wanted + scale * 2.0 * x @ A.T @ B.T
    assert torch.allclose(built(x), wanted, atol=1e-5)
    assert (first == 1) == (policy != "head")


@policies
def test_what_trains_in_each_stage(tiny_llama: LlamaForCausalLM, policy: str) -> None:
    model = model_of(tiny_llama, policy=policy)
    optimizer = torch.optim.AdamW(groups(model))
    train(model, optimizer, 1)
    for stage, scales in (
        (2, {"paper": [0, 1], "head": [0], "strict": [1]}),
        (3, {"paper": [0, 1, 2], "head": [0, 1], "strict": [2]}),
    ):
        kept = {id(p): state["exp_avg"].clone() for p, state in optimizer.state.items()}
        next_stage(model, optimizer)
        names = {"lora_A", "lora_B", *(f"scale_logits.{index}" for index in scales[policy])}
        names |= {"base_logit"} if policy == "head" else set()
        wanted = {f"{path}.{name}" for path in model.containers() for name in names}
        tensors = model.adapter_tensors()
        assert {name for name, value in tensors.items() if value.requires_grad} == wanted
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(tensors[name]) for name in wanted}
        assert all(torch.equal(state["exp_avg"], kept[id(p)]) for p, state in optimizer.state.items())
        before = {name: value.detach().clone() for name, value in tensors.items()}
        train(model, optimizer, stage)
        assert {name for name, value in tensors.items() if not torch.equal(value, before[name])} == wanted


@policies
def test_saved_in_the_middle_of_a_stage_it_goes_on_as_if_nothing_had_been(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, policy: str
) -> None:
    fresh = copy.deepcopy(tiny_llama)
    model = model_of(tiny_llama, policy=policy, r=16)  # all stages together are wider than the backbone
    optimizer = torch.optim.AdamW(groups(model))
    ends = [logits(model)]
    for stage in (1, 2, 3):
        if stage > 1:
            next_stage(model, optimizer)
        train(model, optimizer, stage)
        ends.append(logits(model))
    model.save_pretrained(tmp_path / "saved")
    loaded = moelora.from_pretrained(tmp_path / "saved", backbone=fresh)
    assert loaded.mixture == model.mixture and loaded.mixture.sites[0].experts.num_experts == 3
    ours, theirs = loaded.adapter_tensors(), model.adapter_tensors()
    assert {n: t.requires_grad for n, t in ours.items()} == {n: t.requires_grad for n, t in theirs.items()}
    for stage, end in enumerate(ends):
        with at_stage(loaded, stage):
            assert torch.equal(logits(loaded), end)
    second = torch.optim.AdamW(groups(loaded))
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (loaded, second)):
        train(each, its, 3)
        torch.manual_seed(0)
        next_stage(each, its)
        train(each, its, 4)
    ours, theirs = loaded.adapter_tensors(), model.adapter_tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with at_stage(model, 3), at_stage(loaded, 3):
        assert torch.equal(logits(model), logits(loaded))


def test_everything_that_counts_experts_follows(tiny_llama: LlamaForCausalLM) -> None:
    model = model_of(tiny_llama)
    for stages in (2, 3, 4):
        model.begin_task()
        container = model.containers()[Q]
        assert container.site.ranks == (4,) * stages == container.experts.ranks
        assert container.site.scales == (2.0,) * stages
        assert container.config == model.mixture.sites[0]
        assert container.lora_A.shape == (4 * stages, 32) and container.lora_B.shape == (32, 4 * stages)
    assert "4 x staged experts, router always on" in model.trainable_report()
    before = model.adapter_tensors()
    with pytest.raises(ConfigError, match="stage 4 is the last of num_stages 5: raise num_stages"):
        model.begin_task()
    after = model.adapter_tensors()
    assert before.keys() == after.keys() and all(after[name] is value for name, value in before.items())


@policies
def test_merged_it_computes_the_same(tiny_llama: LlamaForCausalLM, policy: str, tmp_path: Path) -> None:
    model = model_of(tiny_llama, policy=policy, num_experts=3, alpha=[8, 4, 2], r=[4, 2, 3])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.adapter_tensors().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    expected = logits(model)
    if policy == "head":
        with pytest.raises(ConfigError, match="policy 'head' of experts 'staged' scales the frozen weight as well"):
            export_lora(model, tmp_path / "one")
    else:
        export_lora(model, tmp_path / "one")
        alone = moelora.from_pretrained(tmp_path / "one", backbone=copy.deepcopy(tiny_llama_of(model)))
        assert (logits(alone) - expected).abs().max() < 1e-4
    assert (logits(model.merge_and_unload()) - expected).abs().max() < 1e-4


def tiny_llama_of(model: MoELoRAModel) -> LlamaForCausalLM:
    """The backbone, without experts."""
    bare: LlamaForCausalLM = copy.deepcopy(model).unload()
    return bare


def test_a_file_that_asks_for_more_stages_than_it_has_is_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    fresh = copy.deepcopy(tiny_llama)
    model = model_of(tiny_llama)
    model.begin_task()
    object.__setattr__(model.mixture.sites[0].experts, "num_experts", 10**6)
    object.__setattr__(model.mixture.sites[0].experts, "num_stages", 10**7)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="stacked rank of 4000000"):
        moelora.from_pretrained(tmp_path / "saved", backbone=fresh)


def test_what_makes_no_sense_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    routed = {"target": "q_proj", "experts": EXPERTS, "router": {"kind": "static", "weights": "ones"}}
    with pytest.raises(ConfigError, match="router is 'static', but experts of kind 'staged' all act together"):
        SiteConfig.parse(routed)
    with pytest.raises(ConfigError, match="5 stages and stage 0 are more than num_stages 5: raise num_stages"):
        StagedConfig.parse({"num_experts": 5})
    with pytest.raises(
        ConfigError, match=r"is an FFN block: stages of experts 'staged' add to the output of one linear"
    ):
        moelora.attach(tiny_llama, {"sites": [{"target": "mlp", "experts": EXPERTS}]})
    model = model_of(tiny_llama)
    with pytest.raises(UserError, match=f"stage 2 of '{Q}': there are stages 0 to 1"), at_stage(model, 2):
        pass
    plain = moelora.attach(model.unload(), {"sites": [{"target": "q_proj", "experts": {"num_experts": 1}}]})
    with pytest.raises(ConfigError, match=r"have stages \(they are of kind lora\)"), at_stage(plain, 0):
        pass


def test_scales_stay_in_their_range_and_start_where_they_are_told() -> None:
    config = StagedConfig(r=2, num_experts=2, policy="head", scale_init=0.5, scale_range=0.1)
    bank = StagedExperts(config, 4, 4)
    assert [a.item() for a in bank.factors(2)] == pytest.approx([1.0, 0.5, 0.5])
    with torch.no_grad():
        bank.scale_logits[0].fill_(50.0)
        bank.scale_logits[1].fill_(-50.0)
    assert [a.item() for a in bank.factors(2)] == pytest.approx([1.0, 0.6, 0.4])


def test_two_adapters_at_one_linear_add_up_with_the_rescaling_one_inside(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [{"target": "q_proj", "experts": {"num_experts": 1, "r": 2}}]})
    staged = {"sites": [{"target": "q_proj", "experts": {**EXPERTS, "policy": "head"}}]}
    model.add_adapter("staged", staged)
    model.set_adapter(["default", "staged"])
    outer = model.backbone.get_submodule(Q)
    assert outer.config.experts.kind == "lora" and outer.base.config.experts.kind == "staged"
