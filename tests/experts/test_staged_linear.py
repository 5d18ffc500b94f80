"""Stages on a small transformer of our own, with a MoE layer, that is trained from scratch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelora.errors import ConfigError, UserError
from moelora.experts import Staged, StagedLinear, stage_linears
from moelora.experts.staged import StagedConfig
from moelora.trainers.optimizer import sync_optimizer

POLICIES = ["paper", "head", "strict"]
policies = pytest.mark.parametrize("policy", POLICIES)
CONFIG: dict[str, Any] = {"r": 3, "alpha": 6, "num_stages": 5}
# As in LightZero: attention and the experts, but neither the gate nor the shared expert.
TARGETS = ["query", "key", "value", "proj", "w1", "w2", "w3"]


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.query, self.key, self.value))
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    def __init__(self, width: int, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(width, 12) for _ in range(experts))
        self.shared = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).topk(2)
        weights = weights.softmax(-1)
        out = self.shared(x)
        for index, expert in enumerate(self.experts):
            weight = (weights * (chosen == index)).sum(-1, keepdim=True)
            out = out + weight * expert(x)
        return out


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.feed_forward = Attention(width), MoE(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


def trunk(**config: Any) -> tuple[nn.Sequential, Staged]:
    torch.manual_seed(3)
    module = nn.Sequential(Block(8), Block(8))
    return module, stage_linears(module, {**CONFIG, **config}, TARGETS)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def groups(staged: Staged) -> list[dict[str, Any]]:
    return [{"name": "trunk", "params": staged.trainable()}]


def optimizer_of(staged: Staged) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(staged), lr=0.02, weight_decay=0.1)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, task: int, steps: int = 2) -> None:
    module.train()
    for step in range(steps):
        torch.manual_seed(100 * task + step)
        x = torch.randn(4, 5, 8).to(next(module.parameters()).dtype)
        (module(x) - x.roll(task, -1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def advance(staged: Staged, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    new = staged.advance()
    sync_optimizer(optimizer, groups(staged))
    return new


@torch.no_grad()
def output(module: nn.Module) -> Tensor:
    return module.eval()(X.to(next(module.parameters()).dtype))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def moved(module: nn.Module, before: Mapping[str, Tensor]) -> set[str]:
    return {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}


@policies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [{}, {"dropout": 0.2}, {"dropout": 0.2, "expert_dropout": "shared"}])
def test_every_older_stage_is_shown_bit_for_bit(policy: str, dtype: torch.dtype, dropout: dict[str, Any]) -> None:
    module, staged = trunk(policy=policy, **dropout)
    module.to(dtype)
    optimizer = optimizer_of(staged)
    ends = []
    for stage in range(5):
        if stage:
            advance(staged, optimizer)
            assert torch.equal(output(module), ends[-1])  # a stage begins as nothing
        train(module, optimizer, stage)
        ends.append(output(module))
    assert all(not torch.equal(one, other) for one, other in pairwise(ends))
    for stage in (2, 0, 4, 1, 3):
        with staged.at(stage):
            assert torch.equal(output(module), ends[stage]), stage
    assert torch.equal(output(module), ends[-1])


@pytest.mark.parametrize("policy", ["paper", "head"])
def test_without_the_scales_of_its_end_an_older_stage_is_another(policy: str) -> None:
    """What the snapshots are for; under ``strict`` the scales of older stages do not move."""
    module, staged = trunk(policy=policy)
    optimizer = optimizer_of(staged)
    for stage in (1, 2, 3):
        advance(staged, optimizer)
        train(module, optimizer, stage, steps=4)
        if stage == 2:
            end = output(module)
    for linear in staged.linears.values():
        assert linear.stages is not None
        linear.stages.ends[1] = linear.stages._logits().detach()[:4]
    with staged.at(2):
        assert not torch.equal(output(module), end)


def test_what_moves_in_a_stage_is_what_the_policy_trains() -> None:
    trains = {
        "paper": {"lora_A", "lora_B", "scale_logits.0", "scale_logits.1", "scale_logits.2"},
        "head": {"lora_A", "lora_B", "base_logit", "scale_logits.0", "scale_logits.1"},
        "strict": {"lora_A", "lora_B", "scale_logits.2"},
    }
    for policy in POLICIES:
        module, staged = trunk(policy=policy)
        optimizer = optimizer_of(staged)
        for stage in (1, 2):
            advance(staged, optimizer)
            train(module, optimizer, stage)
        advance(staged, optimizer)
        before = snapshot(module)
        train(module, optimizer, 3, steps=3)
        wanted = {f"{path}.stages.{name}" for path in staged.linears for name in trains[policy]}
        assert moved(module, before) == wanted, policy


def test_stages_are_made_when_they_begin() -> None:
    module, staged = trunk()
    plain = nn.Sequential(Block(8), Block(8))
    assert list(module.state_dict()) == list(plain.state_dict())
    sizes = [sum(p.numel() for p in module.parameters())]
    for stage in (1, 2):
        new = staged.advance()
        assert staged.stage == stage == staged.linears["0.attn.query"].stage
        sizes.append(sum(p.numel() for p in module.parameters()))
        inputs = sum(3 * (linear.in_features + linear.out_features) + 1 for linear in staged.linears.values())
        assert sizes[-1] - sizes[-2] == inputs == sum(p.numel() for p in new)
    with pytest.raises(ConfigError, match="stage 5: an older stage can be shown"):
        for _ in range(3):
            staged.advance()
    assert staged.stage == 4


def test_a_staged_module_computes_what_it_did_and_has_the_same_parameters() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(Block(8), Block(8))
    parameters, before = list(module.parameters()), output(module)
    staged = stage_linears(module, StagedConfig(**CONFIG), TARGETS)
    assert torch.equal(output(module), before)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert sorted(staged.linears)[:5] == [f"0.attn.{n}" for n in ("key", "proj", "query", "value")] + [
        "0.feed_forward.experts.0.w1"
    ]
    assert len(staged.linears) == 2 * (4 + 3 * 3)
    assert type(module[0].feed_forward.gate) is nn.Linear and type(module[0].feed_forward.shared[0]) is nn.Linear


def test_the_defect_at_lightzeros_head_an_optimizer_that_is_not_synced_trains_no_stage() -> None:
    """There it is built in stage 0 of what requires a gradient then, and never again: every adapter stays at zero."""
    module, staged = trunk()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.02)
    for stage in (1, 2):
        new = staged.advance()
        before = snapshot(module)
        train(module, optimizer, stage)
        assert not moved(module, before)
        assert not any(parameter in optimizer.state for parameter in new)


@policies
def test_a_synced_optimizer_trains_every_stage_without_orphans_and_survivors_keep_their_moments(policy: str) -> None:
    module, staged = trunk(policy=policy)
    optimizer = optimizer_of(staged)
    train(module, optimizer, 0)
    for stage in range(1, 5):
        moments = {id(p): state["exp_avg"].clone() for p, state in optimizer.state.items()}
        old = {id(p) for p in staged.trainable()}
        new = advance(staged, optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {id(p) for p in module.parameters() if p.requires_grad}
        assert held == trained == {id(p) for p in new} | (old & trained)
        kept = {id(p): state["exp_avg"] for p, state in optimizer.state.items()}
        assert set(kept) == old & trained and all(torch.equal(kept[key], moments[key]) for key in kept)
        survivors = {"paper": stage > 1, "head": stage > 1, "strict": False}[policy]
        assert bool(kept) == survivors
        before = snapshot(module)
        train(module, optimizer, stage)
        assert {id(module.get_parameter(name)) for name in moved(module, before)} == trained


@policies
def test_saved_in_the_middle_of_a_stage_it_goes_on_as_if_nothing_had_been(policy: str) -> None:
    def run() -> tuple[nn.Module, Staged, torch.optim.Optimizer]:
        module, staged = trunk(policy=policy, dropout=0.1)
        optimizer = optimizer_of(staged)
        train(module, optimizer, 0)
        for _ in range(2):
            advance(staged, optimizer)
            train(module, optimizer, staged.stage, steps=2)
        return module, staged, optimizer

    module, staged, optimizer = run()
    state = copy.deepcopy({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    again, other = trunk(policy=policy, dropout=0.1)
    again.load_state_dict(state["module"])
    assert other.stage == 2
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    assert {name: p.requires_grad for name, p in again.named_parameters()} == flags
    second = optimizer_of(other)
    second.load_state_dict(state["optimizer"])
    for each, handle, its in ((module, staged, optimizer), (again, other, second)):
        train(each, its, 7, steps=2)  # the rest of stage 2
        torch.manual_seed(9)
        advance(handle, its)
        train(each, its, 8)
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True)
    )
    for stage in range(4):
        with staged.at(stage), other.at(stage):
            assert torch.equal(output(module), output(again))


def test_a_state_of_stage_zero_brings_all_of_stage_zero_back() -> None:
    module, staged = trunk()
    first = copy.deepcopy(module.state_dict())
    module[0].norm1.weight.requires_grad_(False)  # the user's own choice
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    staged.advance()
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        f"{path}.stages.{name}" for path in staged.linears for name in ("lora_A", "lora_B", "scale_logits.0")
    }
    module.load_state_dict(first)
    assert staged.stage == 0 and {name: p.requires_grad for name, p in module.named_parameters()} == flags


def test_a_copy_has_stages_of_its_own() -> None:
    module, staged = trunk()
    staged.advance()
    target = copy.deepcopy(module)
    other = Staged(target)
    other.advance()
    assert (staged.stage, other.stage) == (1, 2)
    with other.at(0):
        assert all(linear.stages is not None and linear.stages.shown is None for linear in staged.linears.values())
    target.load_state_dict(module.state_dict())
    assert other.stage == 1 and torch.equal(output(target), output(module))


def test_a_block_that_shows_a_stage_ends_with_what_was_before() -> None:
    module, staged = trunk()
    optimizer = optimizer_of(staged)
    ends = [output(module)]
    for stage in (1, 2):
        advance(staged, optimizer)
        train(module, optimizer, stage)
        ends.append(output(module))
    with staged.at(1):
        with pytest.raises(RuntimeError, match="inside"), staged.at(0):
            assert torch.equal(output(module), ends[0])
            raise RuntimeError("inside")
        assert torch.equal(output(module), ends[1])
    assert torch.equal(output(module), ends[2])
    with pytest.raises(UserError, match="stage 3: there are stages 0 to 2"), staged.at(3):
        pass


@pytest.mark.parametrize("way", ["separate", "shared"])
def test_dropout_is_drawn_for_each_stage_by_itself_or_once(way: str) -> None:
    """Stage 1 writes what is left of each feature into the first output, stage 2 into the second."""
    linear = StagedLinear(64, 2, False, config=StagedConfig(r=64, alpha=64, dropout=0.5, expert_dropout=way))
    linear.set_stage(2)
    bank = linear.stages
    assert bank is not None
    with torch.no_grad():
        linear.weight.zero_()
        bank.old_lora_A[0].copy_(torch.eye(64))
        bank.lora_A.copy_(torch.eye(64))
        bank.old_lora_B[0][0] = 1.0
        bank.lora_B[1] = 1.0
    first, second = (linear(torch.eye(64)) != 0).unbind(1)
    assert 10 < int(first.sum()) < 54
    assert torch.equal(first, second) == (way == "shared")


def test_what_cannot_have_stages_is_refused() -> None:
    module = nn.Sequential(Block(8), nn.MultiheadAttention(8, 2))
    with pytest.raises(
        ConfigError, match=r"target '1.out_proj' is a NonDynamicallyQuantizableLinear, expected nn.Linear"
    ):
        stage_linears(module, CONFIG, ["query", "out_proj"])
    with pytest.raises(ConfigError, match=r"target '0.feed_forward' is a MoE, expected nn.Linear"):
        stage_linears(module, CONFIG, "feed_forward")
    with pytest.raises(ConfigError, match="target 'q_proj' matches no module of Sequential"):
        stage_linears(module, CONFIG, "q_proj")
    with pytest.raises(ConfigError, match=r"begins in stage 0.*leave num_experts out"):
        stage_linears(module, {**CONFIG, "num_experts": 2}, "query")
    assert type(module[0].attn.query) is nn.Linear
    with pytest.raises(ConfigError, match="Sequential has no staged linears: call stage_linears first"):
        Staged(module)
    twice = nn.Sequential(linear := nn.Linear(4, 4), linear)
    with pytest.raises(ConfigError, match="'0' and '1' are one module"):
        stage_linears(twice, CONFIG, "0")


def test_linears_in_different_stages_are_told() -> None:
    _, staged = trunk()
    staged.linears["0.attn.query"].set_stage(2)
    with pytest.raises(UserError, match=r"'0.attn.query' is in stage 2, but '1.*' in stage 0"):
        staged.advance()


def test_ranks_of_single_linears_and_stages() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Block(8))
    staged = stage_linears(module, {**CONFIG, "rank_pattern": {"attn.query": 2}, "init": "gaussian"}, ["query", "w2"])
    staged.advance()
    assert staged.linears["0.attn.query"].stages.ranks == (2,)
    assert staged.linears["0.feed_forward.experts.1.w2"].stages.lora_A.shape == (3, 12)
    with pytest.raises(ConfigError, match="rank_pattern has 'proj', which fits none"):
        stage_linears(nn.Sequential(Block(8)), {**CONFIG, "rank_pattern": {"proj": 2}}, ["query"])


def test_a_first_stage_is_drawn_as_in_lightzero_and_in_the_dtype_of_the_linear() -> None:
    linear = StagedLinear(64, 8, config=StagedConfig(r=64), dtype=torch.float64).eval()
    linear.set_stage(1)
    bank = linear.stages
    assert bank is not None and not bank.training
    assert bank.lora_A.dtype == bank.ends.dtype == bank.scale_logits[0].dtype == torch.float64
    assert bank.lora_A.std().item() == pytest.approx(0.01, rel=0.1) and not bank.lora_B.any()
