"""The growing bank: what a new task adds, what it leaves alone, and what is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora.errors import CheckpointError, ConfigError
from moelora.experts.rank1 import Rank1Config
from moelora.mixture import MoELoRAModel

SITE: dict[str, Any] = {
    "target": ["q_proj", "v_proj"],
    "experts": {"kind": "rank1", "r": 4, "alpha": 8},
    "router": {"kind": "moram", "temperature": 0.1, "top_k": 4},
}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
Q = "model.layers.0.self_attn.q_proj"


def model_of(backbone: LlamaForCausalLM, **changes: Any) -> MoELoRAModel:
    return moelora.attach(backbone, {"sites": [{**SITE, **changes}]})


def train(model: MoELoRAModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    model.train()
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: MoELoRAModel, training: bool = False) -> Tensor:
    model.train(training)
    with torch.no_grad():
        return model(IDS).logits


def banks(model: MoELoRAModel) -> dict[str, tuple[Tensor, Tensor]]:
    return {n: (c.lora_A.detach().clone(), c.lora_B.detach().clone()) for n, c in model.containers().items()}


def test_a_new_task_adds_atoms_and_freezes_those_that_are(tiny_llama: LlamaForCausalLM) -> None:
    model = model_of(tiny_llama)
    train(model)
    before = banks(model)
    model.begin_task()
    for name, container in model.containers().items():
        assert container.lora_A.shape == (8, 32) and container.lora_B.shape[1] == 8
        assert torch.equal(container.lora_A[:4], before[name][0])
        assert torch.equal(container.lora_B[:, :4], before[name][1])
        assert container.lora_A[4:].std() > 0.05 and not container.lora_B[:, 4:].any()
    train(model)
    for name, container in model.containers().items():
        assert torch.equal(container.lora_A[:4], before[name][0])
        assert torch.equal(container.lora_B[:, :4], before[name][1])
        assert container.lora_B[:, 4:].any()
    trained = {n.rpartition(".")[2] for n, t in model.adapter_tensors().items() if t.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_everything_that_counts_experts_follows(tiny_llama: LlamaForCausalLM) -> None:
    model = model_of(tiny_llama)
    for tasks in (2, 3):
        model.begin_task()
        container = model.containers()[Q]
        assert container.site.ranks == (4,) * tasks == container.router.site.ranks == container.experts.ranks
        assert container.site.scales == (2.0,) * tasks and container.router.num_units == 4 * tasks
        assert container.config == model.mixture.sites[0]
        assert model.mixture.sites[0].experts.num_experts == tasks
        with moelora.trace(model) as tape:
            logits(model)
        assert tape[Q][0].num_experts == 4 * tasks
    assert f"{tasks} x rank1" in model.trainable_report()


def test_the_first_task_begins_as_the_backbone_and_later_ones_do_not(tiny_llama: LlamaForCausalLM) -> None:
    """Fresh atoms add nothing, but they change the norm and take a share of the softmax: no no-op, and not ours."""
    with torch.no_grad():
        base = tiny_llama(IDS).logits
    model = model_of(tiny_llama)
    assert torch.equal(logits(model, training=True), base)
    train(model)
    trained = logits(model, training=True)
    model.begin_task()
    assert (logits(model, training=True) - trained).abs().max() > 1e-3


def test_saved_after_several_tasks_it_loads_and_goes_on(
    tiny_llama: LlamaForCausalLM, tiny_config: LlamaConfig, tmp_path: Path
) -> None:
    fresh = copy.deepcopy(tiny_llama)
    model = model_of(tiny_llama, experts={"kind": "rank1", "r": 16, "alpha": 8})
    for _ in range(3):  # more ranks than any tensor of the backbone is wide
        train(model, 1)
        model.begin_task()
    train(model, 1)
    model.save_pretrained(tmp_path / "saved")
    loaded = moelora.from_pretrained(tmp_path / "saved", backbone=fresh)
    assert loaded.mixture == model.mixture
    assert torch.equal(logits(loaded), logits(model))
    assert {n: t.requires_grad for n, t in loaded.adapter_tensors().items()} == {
        n: t.requires_grad for n, t in model.adapter_tensors().items()
    }
    assert moelora.checkpoints.describe(tmp_path / "saved").mixture.sites[0].experts.num_experts == 4
    loaded.begin_task()
    assert loaded.containers()[Q].lora_A.shape == (80, 32)


def test_a_file_that_asks_for_more_atoms_than_it_has_is_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    fresh = copy.deepcopy(tiny_llama)
    model = model_of(tiny_llama)
    model.begin_task()
    object.__setattr__(model.mixture.sites[0].experts, "num_experts", 10**6)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="stacked rank of 4000000"):
        moelora.from_pretrained(tmp_path / "saved", backbone=fresh)


def test_ranks_and_alphas_that_differ_go_on_with_the_last(tiny_llama: LlamaForCausalLM) -> None:
    model = model_of(tiny_llama, experts={"kind": "rank1", "num_experts": 2, "r": [4, 2], "alpha": [4, 6]})
    model.begin_task()
    experts = model.mixture.sites[0].experts
    assert experts.r == [4, 2, 2] and experts.alpha == [4, 6, 6] and experts.scales == (1.0, 3.0, 3.0)
    assert model.containers()[Q].lora_A.shape == (8, 32)


def test_tasks_can_be_turned_off_one_by_one(tiny_llama: LlamaForCausalLM) -> None:
    model = model_of(tiny_llama)
    train(model)
    model.begin_task()
    train(model)
    with model.disable_experts():
        base = logits(model)
    with model.expert_scale({0: 0.0, 1: 0.0}):
        assert torch.allclose(logits(model), base, atol=1e-6)
    with model.expert_scale({0: 0.0}):
        assert not torch.allclose(logits(model), base, atol=1e-4)


def test_without_a_router_a_bank_of_one_task_is_lora() -> None:
    torch.manual_seed(0)
    site = {"target": "any", "experts": {"kind": "rank1", "r": 4, "alpha": 8}}
    built = moelora.experts.build(nn.Linear(8, 6), site)
    nn.init.normal_(built.experts.lora_B)
    x = torch.randn(5, 8)
    wanted = built.base(x) + 2.0 * x @ built.lora_A.T @ built.lora_B.T
    assert torch.allclose(built(x), wanted, atol=1e-5)


def test_what_cannot_grow_is_refused_and_left_as_it_was(tiny_llama: LlamaForCausalLM) -> None:
    model = model_of(tiny_llama, router={"kind": "smora", "top_k": 2})
    names = list(model.adapter_tensors())
    with pytest.raises(ConfigError, match=r"router 'smora' has tensors for the experts there are.*take router 'moram'"):
        model.begin_task()
    assert list(model.adapter_tensors()) == names and model.mixture.sites[0].experts.num_experts == 1
    plain = moelora.attach(model.unload(), {"sites": [{"target": "q_proj", "experts": {"num_experts": 1}}]})
    with pytest.raises(ConfigError, match=r"no experts of this mixture grow \(they are of kind lora\): take kind"):
        plain.begin_task()


def test_the_next_task_of_a_configuration() -> None:
    assert Rank1Config().next_task() == Rank1Config(num_experts=2)
