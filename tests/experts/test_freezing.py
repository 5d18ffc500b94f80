"""Experts of which single ones are frozen: what moves, what does not, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.errors import ConfigError
from moelora.experts.freezing import FreezingConfig, FreezingExperts
from moelora.experts.lora import LoRAConfig, LoRAExperts

RANKS = [1, 3, 2, 2]


def bank_of(**options: Any) -> FreezingExperts:
    bank = FreezingExperts(FreezingConfig(num_experts=4, r=RANKS, **options), 8, 6)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return bank


def rows(expert: int) -> slice:
    return slice(sum(RANKS[:expert]), sum(RANKS[: expert + 1]))


@pytest.mark.smoke
def test_without_frozen_experts_it_is_plain_lora() -> None:
    torch.manual_seed(0)
    bank = FreezingExperts(FreezingConfig(num_experts=4, r=RANKS), 8, 6)
    torch.manual_seed(0)
    twin = LoRAExperts(LoRAConfig(num_experts=4, r=RANKS), 8, 6)
    assert torch.equal(bank.down(), twin.down()) and torch.equal(bank.up(), twin.up())
    assert list(bank.state_dict()) == list(twin.state_dict())


@pytest.mark.parametrize("frozen", [[2], [0, 3], [3, 1], [0, 1, 2, 3]])
def test_freezing_changes_no_number(frozen: list[int]) -> None:
    bank = bank_of()
    A, B = bank.down().detach().clone(), bank.up().detach().clone()
    config = FreezingConfig(num_experts=4, r=RANKS, frozen=frozen)
    bank.freeze(config)
    assert torch.equal(bank.down(), A) and torch.equal(bank.up(), B)
    trained = sum(rank for expert, rank in enumerate(RANKS) if expert not in frozen)
    assert bank.lora_A.shape == (trained, 8) and bank.lora_B.shape == (6, trained)
    assert bank.lora_A.requires_grad and not bank.old_lora_A.requires_grad
    fresh = FreezingExperts(config, 8, 6)
    fresh.load_state_dict(bank.state_dict())
    assert torch.equal(fresh.down(), A) and torch.equal(fresh.up(), B)
    assert not fresh.old_lora_B.requires_grad


def test_what_was_frozen_stays_so_through_further_ones_and_training() -> None:
    """Weight decay, momentum and accumulated gradients move all the others, and not a bit of these."""
    bank, x = bank_of(), torch.randn(32, 8)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for frozen in ([], [2], [2, 0], [0, 2, 3]):
        bank.freeze(FreezingConfig(num_experts=4, r=RANKS, frozen=frozen))
        A, B = bank.down().detach().clone(), bank.up().detach().clone()
        kept |= {e: (A[rows(e)], B[:, rows(e)]) for e in frozen if e not in kept}
        optimizer = torch.optim.AdamW([p for p in bank.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
        for _ in range(3):
            for _ in range(2):
                (x @ bank.down().T @ bank.up().T).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for expert in range(4):
            same = torch.equal(bank.down()[rows(expert)], A[rows(expert)])
            assert same == (expert in frozen)
        for expert, (A, B) in kept.items():
            assert torch.equal(bank.down()[rows(expert)], A) and torch.equal(bank.up()[:, rows(expert)], B)


def test_gradients_are_those_of_plain_lora() -> None:
    frozen, plain = bank_of(), bank_of()
    frozen.freeze(FreezingConfig(num_experts=4, r=RANKS, frozen=[1]))
    x = torch.randn(5, 8)
    for bank in (frozen, plain):
        (x @ bank.down().T @ bank.up().T).sin().sum().backward()
    others = [row for e in (0, 2, 3) for row in range(rows(e).start, rows(e).stop)]
    assert torch.allclose(frozen.lora_A.grad, plain.lora_A.grad[others], atol=1e-6)
    assert torch.allclose(frozen.lora_B.grad, plain.lora_B.grad[:, others], atol=1e-6)


def test_single_sites_may_freeze_experts_of_their_own(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    pattern = {"layers.0.self_attn.q_proj": [1], "v_proj": [0, 2]}
    experts = {"kind": "freezing", "num_experts": 3, "r": 2, "frozen": [2], "frozen_pattern": pattern}
    experts["rank_pattern"] = {"v_proj": [1, 2, 3]}
    site = {"target": ["q_proj", "v_proj"], "experts": experts, "router": {"kind": "topk", "top_k": 2}}
    model = moelora.attach(tiny_llama, {"sites": [site]})
    found = {name: container.config.experts for name, container in model.containers().items()}
    assert [config.frozen for config in found.values()] == [[1], [0, 2], [2], [0, 2]]
    assert [config.ranks for config in found.values()] == [(2, 2, 2), (1, 2, 3)] * 2
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_()
    state = {name: value.clone() for name, value in model.adapter_state().items()}
    model.save_pretrained(tmp_path)
    model.unload()
    again = moelora.from_pretrained(tmp_path, backbone=tiny_llama)
    assert again.mixture.sites[0].experts.frozen_pattern == pattern
    loaded = again.adapter_tensors()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    trained = {name.rpartition(".")[2] for name, tensor in loaded.items() if tensor.requires_grad}
    assert trained == {"lora_A", "lora_B", "weight"}


def test_more_ranks_than_features_are_saved_and_loaded(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    experts = {"kind": "freezing", "num_experts": 4, "r": 20, "frozen": [0, 3]}
    site = {"target": "q_proj", "experts": experts, "router": {"kind": "topk", "top_k": 2}}
    model = moelora.attach(tiny_llama, {"sites": [site]})
    model.save_pretrained(tmp_path)
    model.unload()
    again = moelora.from_pretrained(tmp_path, backbone=tiny_llama)
    assert all(container.lora_A.shape == (80, 32) for container in again.containers().values())


@pytest.mark.parametrize("mlp", ["gate_proj", "mlp"])
def test_in_a_block_every_projection_freezes_the_same_experts(tiny_llama: LlamaForCausalLM, mlp: str) -> None:
    site = {
        "target": mlp,
        "experts": {"kind": "freezing", "num_experts": 3, "r": 2, "frozen": [1]},
        "router": {"kind": "topk", "top_k": 2},
    }
    model = moelora.attach(tiny_llama, {"sites": [site]})
    for container in model.containers().values():
        for bank in container.banks():
            assert bank.old_lora_A.shape[0] == 2 and bank.lora_A.shape[0] == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frozen": [4]}, r"frozen is \[4\]: name each of 0\.\.3 at most once"),
        ({"frozen": [1, 1]}, r"frozen is \[1, 1\]: name each"),
        ({"frozen_pattern": {"q_proj": [0, 9]}}, r"frozen_pattern\.q_proj is \[0, 9\]"),
    ],
)
def test_only_experts_that_are_can_be_frozen(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FreezingConfig.parse({"num_experts": 4, **options})


def test_where_all_are_frozen_nothing_is_left_to_train() -> None:
    site = {
        "target": "any",
        "experts": {"kind": "freezing", "num_experts": 2, "r": 2, "frozen": [0, 1]},
        "router": {"kind": "topk", "top_k": 1},
    }
    built = moelora.experts.build(nn.Linear(8, 6), site)
    before = [tensor.detach().clone() for tensor in built.adapter_tensors().values()]
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    built(torch.randn(4, 8)).sum().backward()
    torch.nn.utils.clip_grad_norm_(built.parameters(), 1.0)
    optimizer.step()
    names = [name for name in built.adapter_tensors() if "router" not in name]
    assert all(torch.equal(built.adapter_tensors()[n], b) for n, b in zip(names, before, strict=False))
