"""MoE-Adapters on a sequence: what a task freezes, what it leaves alone, and what is saved, resumed and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_runs import SITES, TARGETS, die, recipe, run, tensors
from test_continual import logs, scores
from test_continual_methods import IDS, learn, logits, method_of
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.config import MixtureConfig
from moelora.errors import ConfigError
from moelora.mixture import MoELoRAModel, put_on
from moelora.trainers.continual_methods import CONTINUAL_METHODS
from moelora.trainers.continual_moe_adapter import freeze_and_add

EXPERTS = 5
SITE: dict[str, Any] = {
    "target": TARGETS,
    "experts": {"kind": "freezing", "num_experts": EXPERTS, "r": 2, "alpha": 4},
    "router": {"kind": "moe_adapter", "top_k": 2},
}


def model_of(backbone: LlamaForCausalLM, **router: Any) -> MoELoRAModel:
    torch.manual_seed(0)
    site = {**SITE, "router": {**SITE["router"], **router}}
    return moelora.attach(backbone, {"sites": [site]})


def of_experts(model: MoELoRAModel) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The factors of each expert, by site."""
    with torch.no_grad():
        return {
            name: [(A.clone(), B.clone()) for A, B in zip(c.lora_A.split(2), c.lora_B.split(2, dim=1), strict=True)]
            for name, c in model.containers().items()
        }


def same(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_a_task_used_most_is_never_changed_again(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """Nor is its router; with weight decay, momentum, accumulation, and until no expert is left."""
    model, method = model_of(tiny_llama), method_of("moe_adapter", 4)
    kept: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    routers: dict[tuple[str, int], Tensor] = {}
    moved = 0
    for number in range(1, 5):
        before = of_experts(model)
        learn(tmp_path, model, method, number, max_steps=3, gradient_accumulation_steps=2)
        after = of_experts(model)
        for name, container in model.containers().items():
            frozen = container.config.experts.frozen
            for expert in range(EXPERTS):
                if expert in frozen:
                    assert same(after[name][expert], before[name][expert])
                else:
                    moved += not same(after[name][expert], before[name][expert])
            router = container.router
            used = router.usage.tolist()
            top = sorted(range(EXPERTS), key=lambda expert, used=used: (-used[expert], expert))[:2]
            assert router.most_used() == sorted(top)
            kept |= {(name, e): after[name][e] for e in router.most_used() if (name, e) not in kept}
            assert [weight.requires_grad for weight in router.weight] == [False] * (number - 1) + [True]
            routers[name, number - 1] = router.weight[number - 1].detach().clone()
            assert len(router.weight) == number and router.weight[number - 1].any()
    assert moved
    for (name, expert), factors in kept.items():
        assert same(of_experts(model)[name][expert], factors)
    for (name, task), weight in routers.items():
        assert torch.equal(model.containers()[name].router.weight[task], weight)
    assert any(len(container.config.experts.frozen) >= 4 for container in model.containers().values())


def test_usage_counts_the_real_tokens_of_a_tasks_steps(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model, method = model_of(tiny_llama), method_of("moe_adapter")
    for number in (1, 2):
        trainer = learn(tmp_path, model, method, number, max_steps=3, gradient_accumulation_steps=1)
        seen = [len(row["input_ids"]) for row in trainer.train_dataset]
        for container in model.containers().values():
            total = container.router.usage.sum()
            assert total == 2 * sum(seen)  # 3 steps of 4 rows are the 12 there are, and each token has two experts
        with torch.no_grad():
            model(IDS, task_ids=torch.tensor([0, 0]))  # what is not training does not count
        assert all(c.router.usage.sum() == total for c in model.containers().values())


def test_a_task_that_is_still_to_come_is_the_backbones(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with torch.no_grad():
        base = tiny_llama(IDS).logits
    model, method = model_of(tiny_llama), method_of("moe_adapter")
    for number in (1, 2):
        learn(tmp_path, model, method, number)
        for place in range(3):
            assert torch.equal(logits(model, place), base) == (place >= number)


def test_what_no_frozen_expert_answers_is_not_forgotten(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """With as many experts as are chosen all of them are frozen after a task, and it answers as it did."""
    model = moelora.attach(tiny_llama, {"sites": [{**SITE, "experts": {**SITE["experts"], "num_experts": 2}}]})
    method = method_of("moe_adapter")
    learn(tmp_path, model, method, 1)
    first = logits(model, 0)
    for number in (2, 3):
        learn(tmp_path, model, method, number)
        assert torch.allclose(logits(model, 0), first, atol=1e-6)
    assert all(bank.lora_A.numel() == 0 for c in model.containers().values() for bank in c.banks())
    assert not torch.allclose(logits(model, 2), first, atol=1e-6)  # the routers of later tasks are their own


def test_a_saved_model_goes_on_as_the_one_in_memory(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model, method = model_of(tiny_llama), method_of("moe_adapter")
    for number in (1, 2):
        learn(tmp_path / "run", model, method, number)
    model.save_pretrained(tmp_path / "saved")
    states = []
    for resumed in (False, True):
        if resumed:
            model.unload()
            model = put_on(tiny_llama, checkpoints.read(tmp_path / "saved"))
        torch.manual_seed(1)
        learn(tmp_path / "run", model, method, 3)
        states.append({name: (value.clone(), value.requires_grad) for name, value in model.adapter_tensors().items()})
        mixture = model.mixture.to_dict()
    assert states[0].keys() == states[1].keys()
    for name, (value, trained) in states[0].items():
        assert torch.equal(value, states[1][name][0]) and trained == states[1][name][1]
    router = mixture["sites"][0]["router"]
    assert (router["num_tasks"], router["frozen_tasks"]) == (3, 2)
    assert set(mixture["sites"][0]["experts"]["frozen_pattern"]) == set(model.containers())


def test_sites_with_one_router_count_together(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model, method = model_of(tiny_llama, share="layer"), method_of("moe_adapter")
    for number in (1, 2, 3):
        learn(tmp_path, model, method, number)
    routers = {id(c.router): c.router for c in model.containers().values()}
    assert len(routers) == 2 and all(len(router.weight) == 3 for router in routers.values())
    for layer in range(2):
        found = [c.config.experts.frozen for c in model.containers().values() if c.site.layer == layer]
        assert len(found) == 2 and found[0] == found[1]


def test_a_block_freezes_the_same_experts_in_every_projection(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model, method = moelora.attach(tiny_llama, {"sites": [{**SITE, "target": "mlp"}]}), method_of("moe_adapter")
    learn(tmp_path, model, method, 1)
    banks = {b.name: b for c in model.containers().values() for b in c.banks()}
    before = {name: (bank.down().detach().clone(), bank.up().detach().clone()) for name, bank in banks.items()}
    freeze_and_add(model)
    for name, bank in banks.items():
        assert torch.equal(bank.down(), before[name][0]) and torch.equal(bank.up(), before[name][1])
        assert bank.old_lora_A.shape[0] == 4 and len(bank.config.frozen) == 2
    learn(tmp_path, model, method_of("sequential"), 2)
    moved = [name for name, bank in banks.items() if not torch.equal(bank.up(), before[name][1])]
    assert moved and all(bank.old_lora_A.grad is None for bank in banks.values())


def test_gradient_checkpointing_leaves_the_same_model(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        model, method = model_of(tiny_llama), method_of("moe_adapter")
        torch.manual_seed(2)
        for number in (1, 2):
            learn(tmp_path, model, method, number, activation_checkpointing=checkpointing)
        states.append({name: value.detach().clone() for name, value in model.adapter_tensors().items()})
        model.unload()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    return run(recipe(tmp_path_factory.mktemp("whole"), backbone_folder, "moe_adapter"))


def test_the_folder_of_a_run_has_the_history(whole: Path) -> None:
    site = checkpoints.describe(whole).mixture.sites[0]
    assert (site.router.num_tasks, site.router.frozen_tasks) == (3, 2)
    final = tensors(whole)
    for stage in (1, 2):
        for name, value in tensors(whole / f"stage-{stage}").items():
            if ".weight." in name or "noise_weight." in name:
                assert torch.equal(final[name], value)
    assert json.loads((whole / "metrics.json").read_text())["growth"]["trained"][0] > 0
    rows = json.loads((whole / "R.json").read_text())["scores"]
    assert rows[1][1:] == rows[0][1:] and rows[2][2] == rows[0][2]  # what is still to come is as before


@pytest.mark.parametrize("point", ["1 step 2", "2 step 2", "2 over"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    whole: Path, processes: Any, backbone_folder: Path, tmp_path: Path, point: str
) -> None:
    values = recipe(tmp_path, backbone_folder, "moe_adapter")
    child = processes.Process(target=die, args=(point, values))
    child.start()
    child.join(200)
    assert child.exitcode == -9
    folder = run(values, resume=True)
    for name in ("stage-1", "stage-2", "stage-3", "."):
        other = tensors(whole / name)
        found = tensors(folder / name)
        assert found.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in found.items())
        assert checkpoints.describe(folder / name).mixture == checkpoints.describe(whole / name).mixture
    for stage in range(4):
        assert scores(folder, stage) == scores(whole, stage)
        assert stage == 0 or logs(folder / f"stage-{stage}") == logs(whole / f"stage-{stage}")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"experts": {"num_experts": 3}}, r"'moe_adapter' needs experts.kind 'freezing', .* has 'lora'"),
        ({"router": {"kind": "topk"}}, r"needs router.kind 'moe_adapter', but mixture.sites.0 has 'topk'"),
        ({"router": {"kind": "moe_adapter", "num_tasks": 3}}, r"needs router.num_tasks 1, .* has 3"),
    ],
)
def test_another_mixture_is_refused(changes: dict[str, Any], says: str) -> None:
    site = {"target": TARGETS, **SITES["moe_adapter"], **changes}
    with pytest.raises(ConfigError, match=says):
        CONTINUAL_METHODS.get("moe_adapter").check_mixture(MixtureConfig.parse({"sites": [site]}))


def test_a_router_is_no_more_than_its_parameters(tiny_llama: LlamaForCausalLM) -> None:
    """The optimizer sees the newest router and the experts that are not frozen, and nothing else."""
    model = model_of(tiny_llama)
    for container in model.containers().values():
        container.router.on_step_end(torch.tensor([0.0, 3, 1, 3, 0]))
    freeze_and_add(model)
    container = next(iter(model.containers().values()))
    trained = {name for name, p in container.named_parameters() if isinstance(p, nn.Parameter) and p.requires_grad}
    assert trained == {"experts.lora_A", "experts.lora_B", "router.weight.1", "router.noise_weight.1"}
    assert container.config.experts.frozen == [1, 3] and container.experts.lora_A.shape[0] == 6
