"""What each continual-learning method does between tasks, to the data and to the loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_runs import SITES, TARGETS
from tiny_runs import build_rows
from torch import Tensor
from transformers import LlamaForCausalLM, TrainingArguments

import moelora
from moelora.config import MixtureConfig
from moelora.data import Collator, Example
from moelora.data.sequences import Task
from moelora.errors import ConfigError
from moelora.mixture import MoELoRAModel
from moelora.trainers.continual import ContinualTrainer
from moelora.trainers.continual_methods import CONTINUAL_METHODS, Method
from moelora.trainers.optimizer import GroupOptions, parameter_groups, sync_optimizer

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
Q = "model.layers.0.self_attn.q_proj"


def tasks_of(count: int, size: int = 10) -> list[Task]:
    def examples(task: str, first: int, count: int) -> tuple[Example, ...]:
        return tuple(Example(f"{task} {number}", "aa", task) for number in range(first, first + count))

    def task(name: str) -> Task:
        train, val, test = (examples(name, first, size) for first, size in ((0, size), (size, 1), (size + 1, 1)))
        return Task(name, train, val, test, "accuracy")

    return [task(f"t{number}") for number in range(count)]


def method_of(kind: str, count: int = 3, seed: int = 0, **options: Any) -> Method[Any]:
    entry = CONTINUAL_METHODS.get(kind)
    method: Method[Any] = entry(entry.Config.parse({"kind": kind, **options}), tasks_of(count), seed)
    return method


def model_of(backbone: LlamaForCausalLM, kind: str) -> MoELoRAModel:
    site = copy.deepcopy(SITES[kind])
    site["experts"]["dropout"] = 0.0
    return moelora.attach(backbone, {"sites": [{"target": TARGETS, **site}]})


def learn(folder: Path, model: MoELoRAModel, method: Method[Any], number: int, **args: Any) -> ContinualTrainer:
    """Train a stage on random rows of the task of that number."""
    method.begin_task(model, number)
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **args,
    }
    rows = [{**row, "task_ids": number - 1} for row in build_rows(12, seed=number)]
    trainer = ContinualTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **arguments),
        method=method,
        data_collator=Collator(0, with_task_ids=True),
        train_dataset=rows,
    )
    trainer.train()
    method.end_task(model, number)
    return trainer


@torch.no_grad()
def logits(model: MoELoRAModel, place: int) -> Tensor:
    model.train(False)
    found: Tensor = model(IDS, task_ids=torch.tensor([place])).logits
    return found


# -- banks that grow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moram", "o_lora"])
def test_after_eight_tasks_the_old_atoms_are_bitwise_what_they_were(tiny_llama, tmp_path, kind):
    model, method = model_of(tiny_llama, kind), method_of(kind, 8)
    newest: list[dict[str, tuple[Tensor, Tensor]]] = []
    for number in range(1, 9):
        learn(tmp_path, model, method, number)
        banks = {name: bank for name, container in model.containers().items() for bank in container.banks()}
        newest.append({n: (b.lora_A.detach().clone(), b.lora_B.detach().clone()) for n, b in banks.items()})
    for name, bank in banks.items():
        assert bank.down().shape[0] == 16
        for place, state in enumerate(newest):
            assert torch.equal(bank.down()[2 * place : 2 * place + 2], state[name][0])
            assert torch.equal(bank.up()[:, 2 * place : 2 * place + 2], state[name][1])
            assert state[name][1].any()


def test_with_an_oracle_nothing_is_forgotten(tiny_llama, tmp_path):
    """The answers of a task are those it had when it was learnt, and of one to come those of the frozen model."""
    with torch.no_grad():
        base = tiny_llama(IDS).logits
    model, method = model_of(tiny_llama, "per_task"), method_of("per_task")
    learned = []
    for number in (1, 2, 3):
        learn(tmp_path, model, method, number)
        learned.append(logits(model, number - 1))
        for place, expected in enumerate(learned):
            assert torch.allclose(logits(model, place), expected, atol=1e-6)  # a wider product rounds differently
        assert torch.equal(logits(model, number), base)
    assert not any(torch.equal(one, base) for one in learned)


def test_o_lora_adds_up_what_all_tasks_learnt(tiny_llama, tmp_path):
    model, method = model_of(tiny_llama, "o_lora"), method_of("o_lora")
    for number in (1, 2):
        learn(tmp_path, model, method, number)
    container = model.containers()[Q]
    bank = next(iter(container.banks()))
    x = torch.randn(5, 32)
    assert container.config.experts.scales == (2.0, 2.0)
    with torch.no_grad():
        expected = container.base(x) + 2.0 * (x @ bank.down().T) @ bank.up().T
        assert torch.allclose(container(x), expected, atol=1e-6)
    model.begin_task()  # and fresh ones add nothing
    with torch.no_grad():
        assert torch.allclose(container(x), expected, atol=1e-6)


def test_a_router_that_sites_share_grows_once(tiny_llama):
    sites = [{"target": TARGETS, **SITES["per_task"]}]
    sites[0]["router"] = {**sites[0]["router"], "share": "all"}
    model = moelora.attach(tiny_llama, {"sites": sites})
    model.begin_task()
    routers = {id(c.router): c.router for c in model.containers().values()}
    [router] = routers.values()
    assert router.indices.tolist() == [[0], [1], [-1]] and router.site.num_experts == 2


# -- the loss of O-LoRA ----------------------------------------------------------------------------------------------


@torch.no_grad()
def overlap(model: MoELoRAModel) -> float:
    banks = [bank for container in model.containers().values() for bank in container.banks()]
    return float(sum((bank.old_lora_A @ bank.lora_A.T).abs().sum() for bank in banks))


def test_the_overlap_with_older_tasks_is_in_the_loss_and_falls(tiny_llama, tmp_path):
    found = {}
    for coef in (0.0, 5.0):
        model = model_of(copy.deepcopy(tiny_llama), "o_lora")
        method = method_of("o_lora", orthogonal_coef=coef)
        torch.manual_seed(0)
        first = learn(tmp_path, model, method, 1)
        assert not any("aux/orthogonal" in line for line in first.state.log_history)
        second = learn(tmp_path, model, method, 2, max_steps=10, gradient_accumulation_steps=2)
        found[coef] = overlap(model), second.state.log_history
    assert found[5.0][0] < 0.5 * found[0.0][0]
    assert not any("aux/orthogonal" in line for line in found[0.0][1])
    values = [line["aux/orthogonal"] for line in found[5.0][1] if "loss" in line]
    # The first step was made from fresh atoms, before any update.
    assert len(values) == 10 and values[-1] < 0.6 * values[0]
    line = found[5.0][1][0]
    assert line["loss"] == pytest.approx(line["task_loss"] + 5.0 * line["aux/orthogonal"], rel=1e-4)


def test_the_norm_of_the_newest_factors_may_be_in_the_loss(tiny_llama):
    model, method = model_of(tiny_llama, "o_lora"), method_of("o_lora", norm_coef=0.1)
    [(name, (coef, value))] = method.penalties(model).items()
    factors = [tensor for tensor in model.adapter_tensors().values() if tensor.requires_grad]
    assert (name, coef) == ("norm", 0.1)
    norms = sum(float(tensor.detach().norm()) for tensor in factors)
    assert float(value.detach()) == pytest.approx(norms, rel=1e-5)


# -- data ------------------------------------------------------------------------------------------------------------


def test_replay_keeps_a_share_of_each_older_task_within_its_budget():
    method, other = method_of("replay", budget=5), method_of("replay", budget=5, seed=1)
    assert [example.task for example in method.examples(1)] == ["t0"] * 10
    second, third = method.examples(2)[10:], method.examples(3)[10:]
    assert [example.task for example in second] == ["t0"] * 5
    assert [example.task for example in third] == ["t0"] * 3 + ["t1"] * 2
    assert set(third[:3]) < set(second)  # the memory of a task shrinks, it is not drawn again
    assert method.examples(3)[10:] == third == method_of("replay", budget=5).examples(3)[10:]
    assert other.examples(2)[10:] != second
    with pytest.raises(ConfigError, match=r"budget is 1, but the last of 3 tasks comes after 2 others"):
        method_of("replay", budget=1).check()


def test_joint_training_has_one_stage_of_all_tasks():
    method = method_of("joint")
    assert [[task.name for task in stage] for stage in method.stages()] == [["t0", "t1", "t2"]]
    assert len(method.examples(1)) == 30


# -- FlyLoRA ---------------------------------------------------------------------------------------------------------


def test_flylora_averages_tasks_that_have_projections_of_their_own(tiny_llama, tmp_path):
    method = method_of("flylora")
    config = MixtureConfig.parse({"sites": [{"target": TARGETS, **SITES["flylora"]}]})
    x, deltas, projections = torch.randn(5, 32), [], []
    folders = [tmp_path / f"stage-{number}" for number in (1, 2)]
    for number, folder in enumerate(folders, 1):
        model = moelora.attach(tiny_llama, method.mixture(config, number))
        learn(tmp_path / "run", model, method, number)
        model.save_pretrained(folder)
        container = model.containers()[Q].train(False)
        with torch.no_grad():
            deltas.append(container(x) - container.base(x))
        projections.append(container.lora_A.detach().clone())
        model.unload()
    assert not torch.equal(*projections)
    merged = method.learned(folders, tiny_llama)
    container = merged.containers()[Q]
    with torch.no_grad():
        assert torch.allclose(container(x) - container.base(x), (deltas[0] + deltas[1]) / 2, atol=1e-6)
    assert deltas[0].abs().max() > 1e-3


# -- an optimizer over the whole sequence ----------------------------------------------------------------------------


def test_an_optimizer_that_goes_on_has_no_orphans_and_keeps_what_survives(tiny_llama):
    sites = [
        {"target": ["q_proj"], **SITES["moram"]},
        {
            "target": ["v_proj"],
            "experts": {"num_experts": 2, "r": 2},
            "router": {"kind": "softmax", "aux_loss_coef": 0},
        },
    ]
    model = moelora.attach(tiny_llama, {"sites": sites})

    def groups() -> list[dict[str, Any]]:
        return parameter_groups(model, [], 1e-2, 0.0, GroupOptions())

    def step() -> None:
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = torch.optim.AdamW(groups())
    optimizer.param_groups[0]["lr"] = 5e-3
    step()
    before = {name: tensor for name, tensor in model.adapter_tensors().items() if tensor.requires_grad}
    moments = {name: optimizer.state[tensor]["exp_avg"].clone() for name, tensor in before.items()}
    model.begin_task()
    sync_optimizer(optimizer, groups())
    now = {name: tensor for name, tensor in model.adapter_tensors().items() if tensor.requires_grad}
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    assert held == {id(tensor) for tensor in now.values()}
    survivors = [name for name, tensor in now.items() if tensor is before.get(name)]
    assert survivors and all("v_proj" in name for name in survivors)
    assert {id(tensor) for tensor in optimizer.state} == {id(now[name]) for name in survivors}
    assert all(torch.equal(optimizer.state[now[name]]["exp_avg"], moments[name]) for name in survivors)
    assert optimizer.param_groups[0]["lr"] == 5e-3
    step()
    assert {id(tensor) for tensor in optimizer.state} == held
    routers = [group for group in groups() if group["name"].startswith("routers")]
    sync_optimizer(optimizer, routers)  # a kind that is trained no longer takes its group with it
    assert [group["name"] for group in optimizer.param_groups] == [group["name"] for group in routers]
    sync_optimizer(optimizer, groups())
    assert {group["name"] for group in optimizer.param_groups} == {group["name"] for group in groups()}


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sites", "says"),
    [
        ("moram", SITES["sequential"], r"'moram' needs experts.kind 'rank1', but mixture.sites.0 has 'lora': set"),
        ("moram", SITES["per_task"], r"'moram' needs router.kind 'moram', but mixture.sites.0 has 'mask'"),
        ("per_task", SITES["sequential"], r"'per_task' needs experts.kind 'rank1'"),
        ("o_lora", {**SITES["o_lora"], "router": {"kind": "static"}}, r"router.weights 'ones', .* has 'learned'"),
        ("loramoe", SITES["sequential"], r"'loramoe' needs router.kind 'softmax', but mixture.sites.0 has None"),
        ("flylora", SITES["moram"], r"'flylora' needs experts.kind 'sparse_projection'"),
    ],
)
def test_a_mixture_without_what_the_method_works_on_is_refused(kind, sites, says):
    with pytest.raises(ConfigError, match=says):
        CONTINUAL_METHODS.get(kind).check_mixture(MixtureConfig.parse({"sites": [{"target": TARGETS, **sites}]}))


def test_every_method_takes_the_mixture_that_is_tested_with_it():
    assert set(SITES) == set(CONTINUAL_METHODS)
    for kind, site in SITES.items():
        CONTINUAL_METHODS.get(kind).check_mixture(MixtureConfig.parse({"sites": [{"target": TARGETS, **site}]}))
