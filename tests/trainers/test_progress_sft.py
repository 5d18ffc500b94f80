"""Supervised training by the progress of its tasks: who is drawn, how it grows, and that it resumes exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from progress_runs import (
    TARGETS,
    SaveAfter,
    prepare,
    recipe,
    train_and_announce,
    two_processes,
    write_backbone,
    write_data,
)
from tiny_runs import assert_identical, outcome

import moelora
from moelora import checkpoints
from moelora.config import load_recipe
from moelora.errors import ConfigError
from moelora.experts.staged import showing
from moelora.modes import evaluation_mode
from moelora.trainers import SFTTrainer
from moelora.trainers.progress_ledger import Ledger
from moelora.trainers.sft import SFT

SWITCHES = [24, 48]
# Mid stage 0; at a switch; when a decision waits for its step; mid stage 1; a task is back; in the last stage.
CUTS = [3, 24, 25, 31, 42, 50]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("progress")
    return write_data(folder), write_backbone(folder / "backbone")


@pytest.fixture(scope="module")
def whole(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> SFTTrainer:
    """An uninterrupted run, with checkpoints on its way."""
    trainer = prepare(*made, tmp_path_factory.mktemp("whole"), {})
    trainer.add_callback(SaveAfter(*CUTS, *SWITCHES))
    trainer.train()
    return trainer


def everything(trainer: SFTTrainer) -> dict[str, Any]:
    host = trainer.progress
    assert host is not None
    ledger = json.loads((Path(trainer.args.output_dir or "") / "progress.json").read_text())
    return {**outcome(trainer), "history": host.rows.history, "scheduler": host.scheduler.state_dict(), "file": ledger}


def progress_of(trainer: SFTTrainer) -> dict[int, dict[str, float]]:
    """The evaluations of the log, by step."""
    return {line["step"]: line for line in trainer.state.log_history if "progress/stage" in line}


# -- what a run does -------------------------------------------------------------------------------------------------


def test_solved_tasks_leave_and_come_back(whole: SFTTrainer) -> None:
    """``other`` passes twice, falls below its target later, and passes again; ``hard`` can never be known."""
    host, seen = whole.progress, progress_of(whole)
    assert host is not None
    entry = host.ledger.tasks["other"]
    first, again = entry.solves[0].step, entry.reopened[0]
    assert seen[first]["progress/other"] == seen[first - 4]["progress/other"] == 1.0
    assert seen[again]["progress/other"] < TARGETS["other"]
    drawn = {step: {task for task, _ in host.rows.of_step(step)} for step in range(1, 61)}
    assert all("other" not in drawn[step] for step in range(first + 2, again + 2))
    assert any("other" in drawn[step] for step in range(again + 2, again + 6))
    assert "other" in drawn[first] | drawn[first - 1]
    assert host.ledger.solved("hard") is None
    assert set(drawn[60]) == {"hard"}


def test_the_ledger_counts_what_was_drawn(whole: SFTTrainer) -> None:
    host = whole.progress
    assert host is not None
    rows = [host.rows.of_step(step) for step in range(1, 61)]
    counts = Counter(task for step in rows for task, _ in step)
    ledger = Ledger.load(Path(whole.args.output_dir or "") / "progress.json")
    assert {task: entry.interactions for task, entry in ledger.tasks.items()} == counts
    assert ledger.interactions == 60 * 8 and ledger.arm == "dps" and ledger.unit == "examples"
    for task in ("easy", "other"):
        end = ledger.tasks[task].retention[-1]
        assert end.when == "end" and end.step == 60 and end.prefix is not None
        assert ledger.tasks[task].retention[0].when == "solve"
    numbers = [number for step in rows for task, number in step if task == "hard"]
    whole_passes = [sorted(numbers[start : start + 24]) for start in range(0, len(numbers) - 23, 24)]
    assert len(whole_passes) >= 5 and all(len(set(one)) == 24 for one in whole_passes)  # each pass has every row once


def test_stages_grow_and_the_optimizer_follows(whole: SFTTrainer) -> None:
    assert whole.progress is not None
    ledger = whole.progress.ledger
    assert [switch.step for switch in ledger.switches] == SWITCHES
    assert {switch.reason for switch in ledger.switches} <= {"quota", "budget", "both"}
    assert whole.model.mixture.sites[0].experts.num_experts == 3
    assert whole.optimizer is not None
    trained = {id(p) for p in whole.model.adapter_tensors().values() if p.requires_grad}
    assert {id(p) for group in whole.optimizer.param_groups for p in group["params"]} == trained
    state = whole.optimizer.state
    ages = {
        name.split(".experts.")[-1]: int(state[p]["step"]) for name, p in whole.model.named_parameters() if p in state
    }
    # a_0 keeps its moments through both switches, the scale of stage 1 through the second; the newest is 12 steps old.
    assert ages == {"base_logit": 60, "scale_logits.0": 36, "scale_logits.1": 12, "lora_A": 12, "lora_B": 12}


def test_the_prefix_of_a_stage_is_what_the_model_was_then(whole: SFTTrainer, made: tuple[Path, Path]) -> None:
    """The last model with the stages of then has the logits of the checkpoint at the end of each, bit for bit."""
    assert whole.progress is not None
    ids = torch.arange(40, 72).unsqueeze(0)
    banks = [bank for container in whole.model.containers().values() for bank in container.banks()]
    live = logits(whole.model, ids)
    for stage, step in enumerate(SWITCHES, start=1):
        folder = Path(whole.args.output_dir or "") / f"checkpoint-{step}"
        with showing(banks, stage):
            shown = logits(whole.model, ids)
        assert torch.equal(shown, logits(moelora.from_pretrained(folder, backbone=str(made[1])), ids))
        assert not torch.equal(shown, live)
    solved = whole.progress.ledger.solved("easy")
    assert solved is not None and solved.stage == 1
    end = whole.progress.ledger.tasks["easy"].retention[-1]
    assert end.prefix == progress_of(whole)[SWITCHES[1]]["progress/easy"]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with evaluation_mode(model), torch.no_grad():
        return model(ids).logits


def test_all_solved_ends_the_run(made: tuple[Path, Path], tmp_path: Path) -> None:
    targets = {"easy": 0.0, "hard": 0.0, "other": 0.5}
    options = {"targets": targets, "num_stages": 1, "hysteresis": None}
    trainer = prepare(*made, tmp_path, options, save_strategy="steps", save_steps=4)
    trainer.train()
    end = trainer.state.global_step
    assert end < 60 and trainer.progress is not None and trainer.progress.ledger.complete
    expected = everything(trainer)
    again = prepare(*made, tmp_path, options, save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == end
    assert_identical(everything(again), expected)


def test_a_run_that_does_not_prune(made: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"targets": {**TARGETS, "other": 0.5}, "num_stages": 1, "prune": False, "passes": 1}
    trainer = prepare(*made, tmp_path, options, max_steps=28)
    trainer.train()
    host = trainer.progress
    assert host is not None and host.ledger.tasks["other"].solves and host.ledger.arm == "joint"
    assert host.rows.history == [(1, tuple(TARGETS))]


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
def test_a_resumed_run_is_the_uninterrupted_one(
    whole: SFTTrainer, made: tuple[Path, Path], tmp_path: Path, cut: int
) -> None:
    shutil.copytree(Path(whole.args.output_dir or "") / f"checkpoint-{cut}", tmp_path / f"checkpoint-{cut}")
    trainer = prepare(*made, tmp_path, {})
    trainer.train(resume_from_checkpoint=True)
    assert_identical(everything(trainer), everything(whole))


def test_a_run_killed_in_the_middle_of_a_stage_goes_on_exactly(
    whole: SFTTrainer, made: tuple[Path, Path], tmp_path: Path, processes: Any
) -> None:
    shutil.copytree(Path(whole.args.output_dir or "") / f"checkpoint-{SWITCHES[0]}", tmp_path / "checkpoint-24")
    announced = processes.Value("i", 0, lock=False)
    child = processes.Process(target=train_and_announce, args=(announced, *made, tmp_path, {}))
    child.start()
    while announced.value < 29 and child.is_alive():
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    newest = checkpoints.latest(tmp_path)
    assert newest is not None and SWITCHES[0] < int(newest.name.removeprefix("checkpoint-")) < 60
    trainer = prepare(*made, tmp_path, {})
    trainer.train(resume_from_checkpoint=True)
    assert_identical(everything(trainer), everything(whole))


def test_two_processes_prune_alike(made: tuple[Path, Path], tmp_path: Path, processes: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = processes.Queue()
    children = [
        processes.Process(target=two_processes, args=(rank, port, results, *made, tmp_path)) for rank in range(2)
    ]
    for child in children:
        child.start()
    found = dict(results.get(timeout=100) for _ in children)
    for child in children:
        child.join(30)
    whole, again = found[0]
    assert found[1][0] == whole and found[1][1] == again == whole
    history, ledger, _, _ = whole
    assert len(history) > 1 and sum(task["interactions"] for task in ledger["tasks"].values()) == 32 * 16


def test_a_run_without_progress_is_not_resumed_with_it(made: tuple[Path, Path], tmp_path: Path) -> None:
    given = recipe(*made, tmp_path, {}, max_steps=1, save_strategy="steps", save_steps=1)
    progress = given["trainer"].pop("progress")
    SFT.run(load_recipe(given))
    given["trainer"]["progress"] = progress
    given["trainer"]["args"]["max_steps"] = 2
    with pytest.raises(moelora.errors.CheckpointError, match="step 1 is of a run without it"):
        SFT.run(load_recipe(given), resume=True)


def test_another_rule_is_not_resumed(whole: SFTTrainer, made: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(Path(whole.args.output_dir or "") / "checkpoint-31", tmp_path / "checkpoint-31")
    with pytest.raises(moelora.errors.CheckpointError, match="t_max was 24 and is 30"):
        prepare(*made, tmp_path, {"t_max": 30}).train(resume_from_checkpoint=True)


# -- what is refused -------------------------------------------------------------------------------------------------


BEST = {"load_best_model_at_end": True, "save_strategy": "best", "metric_for_best_model": "loss"}


@pytest.mark.parametrize(
    ("progress", "args", "message"),
    [
        ({"targets": {"easy": 1.0}}, {}, "targets is about easy, and the tasks of the training data are easy, hard"),
        ({}, {"max_steps": -1}, "set trainer.args.max_steps"),
        ({}, {"dataloader_num_workers": 2}, "2 workers would read ahead"),
        ({"num_stages": 4}, {}, "num_stages is 4.*experts.num_stages is 4: raise it to 5"),
        (
            {},
            {"load_best_model_at_end": True, "save_strategy": "best", "metric_for_best_model": "x"},
            "without load_best",
        ),
    ],
)
def test_what_cannot_be_hosted_is_said(
    made: tuple[Path, Path], tmp_path: Path, progress: dict[str, Any], args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(*made, tmp_path, progress, **args)


def test_other_mixtures_data_and_trainers_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    given = recipe(*made, tmp_path, {})
    given["mixture"]["sites"][0]["experts"] = {"kind": "lora", "num_experts": 1, "r": 2}
    with pytest.raises(ConfigError, match="no experts of kind 'staged': take them, or set it to 1"):
        SFT.prepare(load_recipe(given))
    given["trainer"]["progress"]["num_stages"] = 1
    assert SFT.prepare(load_recipe(given)).progress is not None
    with pytest.raises(ConfigError, match=r"set data\.streaming and packing to false"):
        SFT.prepare(load_recipe({**given, "packing": True}))
    with pytest.raises(ConfigError, match="progress: trainer 'remix' chooses its examples by itself"):
        load_recipe({**given, "trainer": {**given["trainer"], "kind": "remix"}})
