"""Pruning of growing banks: what goes, what stays, what is saved, and how far the outputs move."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError, ConfigError, DataError, UserError
from moelora.experts.rank1 import Rank1Config
from moelora.mixture import MoELoRAModel
from moelora.pruning import atom_weights, prune
from moelora.shift import outputs_of, shift_between, task_shift

SITE: dict[str, Any] = {
    "target": ["q_proj", "v_proj"],
    "experts": {"kind": "rank1", "r": 4, "alpha": 8},
    "router": {"kind": "moram", "temperature": 0.1, "top_k": 3, "threshold": 0.1},
}
IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
BATCHES = [{"input_ids": IDS, "attention_mask": MASK}]
Q = "model.layers.0.self_attn.q_proj"


def trained(backbone: LlamaForCausalLM, tasks: int = 3, **changes: Any) -> MoELoRAModel:
    """A model of several tasks whose atoms all do something."""
    model = moelora.attach(backbone, {"sites": [{**SITE, **changes}]})
    for task in range(tasks):
        if task:
            model.begin_task()
        for container in model.containers().values():
            torch.nn.init.normal_(container.experts.lora_B, std=0.5)
    return model.eval()


def logits(model: MoELoRAModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, attention_mask=MASK).logits


def test_the_weights_are_the_mean_over_real_tokens(tiny_llama: LlamaForCausalLM) -> None:
    model = trained(tiny_llama)
    found = atom_weights(model.train(), BATCHES)
    assert model.training, "the mode is as before"
    with moelora.trace(model.eval()) as tape:
        logits(model)
    for name, mean in found.items():
        dense = tape[name][0].dense_weights()
        rows = [dense[b, s].double() for b in range(3) for s in range(9) if MASK[b, s]]
        assert len(rows) == 23
        assert torch.allclose(mean, torch.stack(rows).mean(0), atol=1e-12)
        assert mean.shape == (12,) and 0 < mean.sum() <= 1
    assert set(found) == set(model.containers())


def test_several_batches_count_token_by_token(tiny_llama: LlamaForCausalLM) -> None:
    model = trained(tiny_llama)
    halves = [{"input_ids": IDS[:1], "attention_mask": MASK[:1]}, {"input_ids": IDS[1:], "attention_mask": MASK[1:]}]
    whole, parts = atom_weights(model, BATCHES), atom_weights(model, halves)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_eps_of_zero_changes_nothing(tiny_llama: LlamaForCausalLM) -> None:
    model = trained(tiny_llama)
    before, parameters, mixture = logits(model), dict(model.adapter_tensors()), model.mixture
    done = prune(model, BATCHES, 0.0)
    assert done.removed == 0 and done.shift.max_abs == 0 and done.shift.relative == 0
    assert torch.equal(logits(model), before) and model.mixture == mixture
    assert all(tensor is parameters[name] for name, tensor in model.adapter_tensors().items())


def test_exactly_the_light_atoms_go_and_the_others_stay_bitwise(tiny_llama: LlamaForCausalLM) -> None:
    model = trained(tiny_llama)
    mean = atom_weights(model, BATCHES)
    eps = float(torch.cat(list(mean.values())).median())
    factors = {name: (c.lora_A.clone(), c.lora_B.clone()) for name, c in model.containers().items()}
    before = outputs_of(model, BATCHES)
    done = prune(model, BATCHES, eps)
    assert 0 < done.removed < 12 * len(mean)
    assert done.shift == shift_between(before, outputs_of(model, BATCHES)) and done.shift.max_abs > 1e-4
    for name, container in model.containers().items():
        stays = [atom for atom in range(12) if mean[name][atom] >= eps]
        assert torch.equal(container.lora_A, factors[name][0][stays])
        assert torch.equal(container.lora_B, factors[name][1][:, stays])
        tasks = tuple(sum(atom // 4 == task for atom in stays) for task in range(3))
        assert container.site.ranks == container.router.site.ranks == container.experts.ranks == tasks
        assert done.before[name] == (4, 4, 4) and done.after[name] == tasks
        assert container.site.scales == (2.0, 2.0, 2.0), "alpha / r of the atoms that the task brought"
    assert done.to_dict()["removed"] == done.removed


def test_what_is_left_computes_the_definition_on_fewer_atoms(tiny_llama: LlamaForCausalLM) -> None:
    model = trained(tiny_llama)
    prune(model, BATCHES, 0.08)
    container = model.containers()[Q]
    x = torch.randn(5, 32)
    with torch.no_grad():
        z = x @ container.lora_A.T
        s = z / z.norm(dim=-1, keepdim=True)
        wanted = torch.zeros(5, 32)
        for token in range(5):
            chosen = s[token].topk(min(3, len(s[token]))).indices
            w = (s[token, chosen] / 0.1).softmax(0) * (s[token, chosen] >= 0.1)
            wanted[token] = 2.0 * container.lora_B[:, chosen] @ (w * z[token, chosen])
        assert torch.allclose(container(x) - container.base(x), wanted, atol=1e-5)


def test_pruned_it_is_saved_loaded_and_goes_on(
    tiny_llama: LlamaForCausalLM, tiny_config: LlamaConfig, tmp_path: Path
) -> None:
    fresh = copy.deepcopy(tiny_llama)
    model = trained(tiny_llama)
    prune(model, BATCHES, 0.08)
    ranks = model.containers()[Q].site.ranks
    assert sum(ranks) < 12
    model.save_pretrained(tmp_path / "saved")
    loaded = moelora.from_pretrained(tmp_path / "saved", backbone=fresh)
    assert loaded.mixture == model.mixture and torch.equal(logits(loaded), logits(model))
    both = [{name: t.requires_grad for name, t in each.adapter_tensors().items()} for each in (model, loaded)]
    assert both[0] == both[1]
    old = {name: container.lora_B.clone() for name, container in loaded.containers().items()}
    loaded.begin_task()
    container = loaded.containers()[Q]
    assert container.site.ranks == (*ranks, 4), "the next task brings all of its atoms"
    assert container.site.scales == (2.0,) * 4
    loaded.train()(IDS, labels=IDS).loss.backward()
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    optimizer.step()
    for name, container in loaded.containers().items():
        assert torch.equal(container.lora_B[:, :-4], old[name]) and container.lora_B[:, -4:].any()
    prune(loaded, BATCHES, 0.05)
    loaded.save_pretrained(tmp_path / "again")
    again = moelora.from_pretrained(tmp_path / "again", backbone=copy.deepcopy(loaded.unload()))
    assert len(again.containers()[Q].site.ranks) == 4


def test_a_site_keeps_its_heaviest_atom_and_tasks_may_lose_all(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    fresh = copy.deepcopy(tiny_llama)
    model = trained(tiny_llama)
    heaviest = {name: int(mean.argmax()) for name, mean in atom_weights(model, BATCHES).items()}
    done = prune(model, BATCHES, 2.0)
    for name, ranks in done.after.items():
        assert sum(ranks) == 1 and ranks[heaviest[name] // 4] == 1
    assert model.mixture.sites[0].experts.num_experts == 3
    model.save_pretrained(tmp_path / "saved")
    loaded = moelora.from_pretrained(tmp_path / "saved", backbone=fresh)
    assert torch.equal(logits(loaded), logits(model))
    loaded.begin_task()
    assert all(sum(container.site.ranks) == 5 for container in loaded.containers().values())
    logits(loaded)


def test_ranks_of_single_sites_are_kept_apart(tiny_llama: LlamaForCausalLM) -> None:
    experts = {"kind": "rank1", "r": 4, "alpha": 8, "rank_pattern": {"v_proj": 2}}
    model = trained(tiny_llama, 2, experts=experts)
    v = Q.replace("q_proj", "v_proj")
    prune(model, BATCHES, 0.2)
    before = model.containers()[v].site.ranks
    model.begin_task()
    assert model.containers()[v].site.ranks == (*before, 2)
    assert model.containers()[v].site.scales == (4.0,) * 3 and model.containers()[Q].site.scales == (2.0,) * 3


def test_what_cannot_be_pruned_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    model = trained(tiny_llama)
    with pytest.raises(UserError, match=r"eps is -1.*give 0 or more"):
        prune(model, BATCHES, -1)
    with pytest.raises(DataError, match="no real token of the calibration set reached"):
        prune(model, [{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}], 0.1)
    other = trained(model.unload(), 1, router={"kind": "smora", "top_k": 2})
    with pytest.raises(ConfigError, match=r"found router 'smora': take router 'moram'"):
        prune(other, BATCHES, 0.1)
    plain = moelora.attach(other.unload(), {"sites": [{"target": "q_proj", "experts": {"num_experts": 1}}]})
    with pytest.raises(ConfigError, match=r"no experts of this mixture are atoms \(they are of kind lora\)"):
        prune(plain, BATCHES, 0.1)


def test_layouts_without_a_place_for_it_refuse_a_pruned_bank(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = trained(tiny_llama)
    model.save_pretrained(tmp_path / "whole")
    checkpoints.convert(tmp_path / "whole", tmp_path / "theirs", to="moram")
    prune(model, BATCHES, 0.08)
    model.save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match="each task has all of its atoms, some of this mixture's were pruned"):
        checkpoints.convert(tmp_path / "native", tmp_path / "out", to="moram")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"kept": [4]}, "kept lists 1 values for 2 tasks"),
        ({"kept": [5, 4]}, r"kept is \[5, 4\], but the tasks brought \[4, 4\]"),
        ({"kept": [0, 0]}, "one in all"),
        ({"kept_pattern": {"q_proj": [4, 4, 4]}}, "kept_pattern.q_proj lists 3 values"),
        ({"rank_pattern": {"v_proj": 2}, "kept_pattern": {"v_proj": [3, 1]}}, r"brought \[2, 2\]"),
    ],
)
def test_a_configuration_that_keeps_what_there_never_was_is_refused(kept: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rank1Config.parse({"num_experts": 2, "r": 4, **kept})


def test_a_pattern_that_fits_no_site_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    experts = {"kind": "rank1", "r": 4, "kept_pattern": {"up_proj": [2]}}
    with pytest.raises(ConfigError, match=r"kept_pattern has 'up_proj', which fits none"):
        moelora.attach(tiny_llama, {"sites": [{**SITE, "experts": experts}]})


def test_a_task_that_nothing_has_trained_moves_the_outputs_from_the_second_on(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [SITE]})
    first = task_shift(model, BATCHES)
    assert first.max_abs == 0 and first.relative == 0, "nothing was trained: there is nothing to take weight from"
    for container in model.containers().values():
        torch.nn.init.normal_(container.experts.lora_B, std=0.5)
    before = outputs_of(model, BATCHES)
    second = task_shift(model, BATCHES)
    assert model.mixture.sites[0].experts.num_experts == 3
    after = outputs_of(model, BATCHES)
    assert second.max_abs == pytest.approx(float((after[0] - before[0]).abs().max()))
    assert second.relative == pytest.approx(float((after[0] - before[0]).norm() / before[0].norm()), rel=1e-5)
    assert second.max_abs > 1e-3 and after[0].shape == (23, 64), "padding is left out"


def test_without_batches_there_is_no_shift_to_tell(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [SITE]})
    with pytest.raises(DataError, match="no batches were given"):
        task_shift(model, [])
    assert model.mixture.sites[0].experts.num_experts == 1, "and no task was begun"
