"""LoRA-Mixer's stages: what each one trains, the preserve term, and runs that are killed anywhere and go on."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from mixer_runs import (
    FROZEN,
    HARD,
    KEPT,
    SITES,
    TASKS,
    die,
    mixer_model,
    mixer_trainer,
    moved_step,
    ranks_of_mixer,
    recipe,
    tensors,
)

import moelora
from moelora import checkpoints
from moelora.config import Recipe, load_recipe
from moelora.errors import CheckpointError, ConfigError

run = moelora.trainers.get("lora_mixer").run


def logs(folder: Path) -> list[dict[str, Any]]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    clock = ("runtime", "per_second", "preparation_time")
    return [{k: v for k, v in line.items() if not k.endswith(clock)} for line in lines if "train_loss" not in line]


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of a hard and a soft stage with the preserve term, and where it lies."""
    values = recipe(tmp_path_factory.mktemp("kept"), backbone_folder, [HARD, KEPT])
    run(load_recipe(values))
    return values


def test_each_stage_moves_its_parameters_alone(backbone_folder, tmp_path):
    values = recipe(tmp_path, backbone_folder, [HARD, FROZEN])
    folder = run(load_recipe(values))
    fresh = moelora.trainers.get("lora_mixer").model_of(load_recipe(values)).adapter_tensors()
    hard, soft, final = (tensors(folder / name) for name in ("stage-1", "stage-2", "."))
    assert hard.keys() == fresh.keys() == soft.keys() and any("router" in name for name in hard)
    for name, value in fresh.items():
        router = "router" in name
        assert torch.equal(hard[name], value.detach()) == router, name
        assert torch.equal(soft[name], hard[name]) != router, name
        assert torch.equal(final[name], soft[name])
    assert load_recipe(folder / "recipe.yaml") == load_recipe(values)
    results = json.loads((folder / "all_results.json").read_text())
    assert results["eval_task_loss"] > 0
    first, second = logs(folder / "stage-1"), logs(folder / "stage-2")
    assert first[0]["aux/specialization_balance"] == 0 < second[0]["aux/specialization_balance"]
    assert "lr/routers" not in first[0] and "lr/experts" not in second[0]
    assert first[-1]["eval_task_loss"] < math.log(260)
    for path in (".", "stage-1/checkpoint-4", "stage-2/checkpoint-4"):
        checkpoints.verify(folder / path)
    # Four steps of four rows see each of the 16 samples once.
    assert second[-1]["epoch"] == pytest.approx(1.0)


def test_in_the_hard_stage_an_expert_learns_from_its_task_alone(tmp_path):
    """The rows of a step are of tasks 0, 1, 2, 0; without the third, expert 2 has no gradient."""
    model = mixer_model()
    trainer = mixer_trainer(tmp_path, model, phase="hard", max_steps=1)
    before = {name: tensor.detach().clone() for name, tensor in model.adapter_tensors().items()}
    trainer.train_dataset = [row for row in trainer.train_dataset if row["task_ids"] != 2]
    trainer.train()
    for name, tensor in model.adapter_tensors().items():
        moved = (tensor != before[name]).any(dim=0 if name.endswith("lora_B") else 1)
        if "router" in name:
            assert not moved.any(), name
        else:
            assert moved.tolist() == [True] * 4 + [False] * 2, name
        assert tensor.requires_grad  # as before the stage


def test_the_preserve_term_is_in_the_log_and_holds_experts_back(kept, backbone_folder, tmp_path):
    folder = Path(kept["output_dir"])
    values = [line["aux/preserve"] for line in logs(folder / "stage-2") if "loss" in line]
    assert values[0] < values[-1] and 0 < values[-1] < 1
    free = {**KEPT, "preserve_coef": 0.0}
    other = run(load_recipe(recipe(tmp_path, backbone_folder, [HARD, free])))
    start = tensors(folder / "stage-1")
    assert all(torch.equal(value, start[name]) for name, value in tensors(other / "stage-1").items())

    def distance(where: Path) -> float:
        end = tensors(where)
        return sum(float((end[name] - value).square().sum()) for name, value in start.items() if "lora_" in name)

    assert distance(folder) < 0.9 * distance(other)


@pytest.mark.parametrize(
    ("point", "resume"),
    [("1 3", True), ("1 over", True), ("2 0", True), ("2 3", "stage-2/checkpoint-2"), ("2 over", True)],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(kept, processes, backbone_folder, tmp_path, point, resume):
    values = recipe(tmp_path, backbone_folder, [HARD, KEPT])
    child = processes.Process(target=die, args=(point, values))
    child.start()
    child.join(100)
    assert child.exitcode == -9
    folder = run(load_recipe(values), resume=resume if resume is True else str(tmp_path / "run" / resume))
    whole = Path(kept["output_dir"])
    for name in ("stage-1", "stage-2", "."):
        expected = tensors(whole / name)
        for key, value in tensors(folder / name).items():
            assert torch.equal(value, expected[key]), (name, key)
    assert logs(folder / "stage-2") == logs(whole / "stage-2")
    assert json.loads((folder / "stages.json").read_text())["next_stage"] == 3


def test_what_cannot_be_resumed_is_explained(kept, backbone_folder, tmp_path):
    folder = Path(kept["output_dir"])
    with pytest.raises(ConfigError, match=r"holds a run of stages already: go on with --resume latest"):
        run(load_recipe(kept))
    with pytest.raises(CheckpointError, match=r"has the stages \['hard, experts trained', 'soft, experts trained'\]"):
        run(load_recipe(recipe(folder.parent, backbone_folder, [HARD, FROZEN])), resume=True)
    with pytest.raises(ConfigError, match=r"is no checkpoint of stage 3, in which this run is"):
        run(load_recipe(kept), resume=str(folder / "stage-1" / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="no run of stages to resume"):
        run(load_recipe(recipe(tmp_path, backbone_folder, [HARD])), resume=True)
    assert run(load_recipe(kept), resume=True) == folder  # over already


def test_a_router_is_trained_over_finished_adapters(backbone_folder, tmp_path):
    """Which stay as they are, whatever their rank; the loss of evaluation falls."""
    folders = []
    for seed, rank in enumerate((2, 3)):
        torch.manual_seed(seed)
        backbone, _ = moelora.load_backbone(str(backbone_folder), quantization="fp32")
        site = {"target": ["q_proj", "v_proj"], "experts": {"num_experts": 1, "r": rank}}
        one = moelora.attach(backbone, {"sites": [site]})
        with torch.no_grad():
            for tensor in one.adapter_tensors().values():
                tensor.normal_(std=0.3)
        folders.append(str(tmp_path / f"adapter{seed}"))
        one.save_pretrained(folders[-1])
    stage = {"phase": "soft", "samples": 20, "args": {"max_steps": 12, "learning_rate": 0.05}}
    values = recipe(tmp_path, backbone_folder, [stage])
    values["trainer"]["adapters"] = folders
    experts = {"kind": "frozen", "num_experts": 2}
    values["mixture"] = {"sites": [{**SITES[0], "experts": experts}]}
    before = moelora.compose(folders, SITES[0]["router"], str(backbone_folder)).adapter_tensors()
    folder = run(load_recipe(values))
    after = tensors(folder)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.detach(), after[name]) != ("router" in name), name
    lines = logs(folder / "stage-1")
    assert lines[-2]["task_loss"] < lines[0]["task_loss"]
    loaded = moelora.from_pretrained(folder, backbone=str(backbone_folder))
    assert loaded.mixture.sites[0].experts.names == ["adapter0", "adapter1"]


# -- one step --------------------------------------------------------------------------------------------------------


def check_once(plain: dict[str, Any], kept: dict[str, Any]) -> None:
    """The gradient has grown by beta * 2 * 0.1 for the experts, and by nothing for the routers."""
    assert plain["grads"].keys() == kept["grads"].keys()
    for name, value in plain["grads"].items():
        growth = 0.5 * 2 * 0.1 if "lora_" in name else 0.0
        assert torch.allclose(kept["grads"][name] - value, torch.full_like(value, growth), atol=2e-6), name
    experts = sum(value.numel() for name, value in plain["grads"].items() if "lora_" in name)
    assert kept["log"]["aux/preserve"] == pytest.approx(0.01 * experts, rel=1e-5)
    assert kept["log"]["loss"] - plain["log"]["loss"] == pytest.approx(0.5 * 0.01 * experts, rel=1e-4)
    assert kept["log"]["task_loss"] == plain["log"]["task_loss"]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_preserve_term_counts_once_in_a_step(tmp_path, accumulation):
    steps = [moved_step(tmp_path, coef, gradient_accumulation_steps=accumulation) for coef in (0.0, 0.5)]
    check_once(*steps)


def test_the_preserve_term_warms_up_with_the_other_losses(tmp_path):
    plain, whole, half = (
        moved_step(tmp_path, coef, aux_warmup_steps=warmup)["grads"] for coef, warmup in ((0.0, 2), (0.5, 0), (0.5, 2))
    )
    name = next(name for name in plain if name.endswith("lora_A"))
    assert torch.allclose(half[name] - plain[name], torch.full_like(plain[name], 0.05), atol=2e-6)
    assert not torch.allclose(whole[name], half[name])


@pytest.fixture(scope="module")
def ranks(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [processes.Process(target=ranks_of_mixer, args=(rank, 2, port, folder)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("average", [True, False])
def test_two_processes_count_the_preserve_term_once(ranks, average):
    for found in ranks:
        check_once(found[average][0.0], found[average][0.5])


def test_two_processes_take_the_hard_step_of_one(ranks, tmp_path):
    one = moved_step(tmp_path, 0.0, "hard", gradient_accumulation_steps=4)["grads"]
    assert one.keys() == ranks[0]["hard"]["grads"].keys()
    assert not any("router" in name for name in one)
    for name, value in one.items():
        for found in ranks:
            assert torch.allclose(found["hard"]["grads"][name], value, atol=1e-6), name


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"stages": []}, ["stages", "at least 1"]),
        ({"stages": [{"phase": "warm"}]}, ["phase", "'hard' or 'soft'"]),
        ({"stages": [{"phase": "hard", "experts": "frozen"}]}, ["trains nothing", "leave out experts"]),
        ({"stages": [{"phase": "soft", "preserve_coef": 0.1}]}, ["preserve_coef is 0.1", "experts: trained"]),
        ({"stages": [{"phase": "soft", "args": {"max_step": 3}}]}, ["max_step", "did you mean 'max_steps'"]),
        ({"stages": [{"phase": "soft", "steps": 3}]}, ["unknown key 'steps'"]),
        ({"stages": [HARD], "adapters": ["a", "b"]}, ["stage 1 (hard) would train the experts", "finished"]),
    ],
)
def test_wrong_options_are_explained(trainer, words):
    with pytest.raises(ConfigError) as error:
        Recipe.parse({"mixture": {"sites": SITES}, "trainer": {"kind": "lora_mixer", **trainer}})
    assert all(word in str(error.value) for word in words), error.value


def test_a_recipe_that_does_not_hold_together_is_refused_before_the_backbone_is_loaded(tmp_path):
    values = recipe(tmp_path, tmp_path / "nowhere", [HARD])
    site = SITES[0]
    six = {**site, "experts": {"num_experts": 6}}
    with pytest.raises(ConfigError, match=rf"has 6 experts and the data 3 tasks \({', '.join(TASKS)}\): set"):
        run(load_recipe({**values, "mixture": {"sites": [six]}}))
    with pytest.raises(ConfigError, match=r"the mixture has 'topk': use router kind lora_mixer"):
        run(load_recipe({**values, "mixture": {"sites": [{**site, "router": "topk"}]}}))
    frozen = {**site, "experts": {"kind": "frozen", "num_experts": 3}}
    with pytest.raises(ConfigError, match=r"list their folders in trainer\.adapters"):
        run(load_recipe({**values, "mixture": {"sites": [frozen]}}))
    values["trainer"] = {"kind": "lora_mixer", "stages": [FROZEN], "adapters": ["a", "b"]}
    with pytest.raises(ConfigError, match=r"one site with experts \{kind: frozen, num_experts: 2\}"):
        run(load_recipe({**values, "mixture": {"sites": [frozen]}}))


def test_a_stage_that_would_train_frozen_experts_is_refused(tmp_path, tiny_llama):
    site = {**SITES[0], "experts": {"kind": "frozen", "num_experts": 3, "r": 2}}
    model = moelora.attach(tiny_llama, {"sites": [site]})
    with pytest.raises(ConfigError, match="the experts of this mixture are frozen ones"):
        mixer_trainer(tmp_path, model, phase="hard")
