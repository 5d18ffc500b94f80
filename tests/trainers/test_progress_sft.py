"""Supervised training by the progress of its tasks: who is drawn, how it grows, and that it resumes exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections import Counter
from itertools import pairwise
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("progress")
    return write_data(folder), write_backbone(folder / "backbone")


@pytest.fixture(scope="module")
def whole(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> SFTTrainer:
    """An uninterrupted run, with checkpoints on its way."""
    trainer = prepare(*made, tmp_path_factory.mktemp("whole"), {})
    trainer.add_callback(SaveAfter(10, 50, *range(4, 60, 4)))
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


def switches(trainer: SFTTrainer) -> list[int]:
    assert trainer.progress is not None
    return [switch.step for switch in trainer.progress.ledger.switches]


def test_solved_tasks_leave_and_come_back(whole: SFTTrainer) -> None:
    """A plain loop over the evaluations of the log says whose rows each step has; ``hard`` can never be known."""
    host = whole.progress
    assert host is not None
    solves: dict[str, list[int]] = {task: [] for task in TARGETS}
    reopened: dict[str, list[int]] = {task: [] for task in TARGETS}
    active = {step: set(TARGETS) for step in range(1, 63)}
    for step, line in progress_of(whole).items():
        for task, target in TARGETS.items():
            solved = len(solves[task]) > len(reopened[task])
            if (line[f"progress/{task}"] >= target) != solved:
                (reopened if solved else solves)[task].append(step)
        now = {task for task in TARGETS if len(solves[task]) == len(reopened[task])}
        active.update({later: now for later in range(step + 2, 63)})
    drawn = {step: {task for task, _ in host.rows.of_step(step)} for step in range(1, 61)}
    assert all(drawn[step] <= active[step] for step in drawn)
    for since, until in pairwise((*(step for step, _ in host.rows.history), 61)):
        if until - since >= 4:  # 32 rows, so each active task is among them
            assert set().union(*(drawn[step] for step in range(since, until))) == active[since]
    entries = host.ledger.tasks
    assert {task: [solve.step for solve in entries[task].solves] for task in TARGETS} == solves
    assert {task: entries[task].reopened for task in TARGETS} == reopened
    assert sum(map(len, solves.values())) >= 2 and sum(map(len, reopened.values())) >= 1 and not solves["hard"]


def test_the_ledger_counts_what_was_drawn(whole: SFTTrainer) -> None:
    host = whole.progress
    assert host is not None
    rows = [host.rows.of_step(step) for step in range(1, 61)]
    counts = Counter(task for step in rows for task, _ in step)
    ledger = Ledger.load(Path(whole.args.output_dir or "") / "progress.json")
    assert {task: entry.interactions for task, entry in ledger.tasks.items()} == counts
    assert ledger.interactions == 60 * 8 and ledger.arm == "dps" and ledger.unit == "examples"
    numbers = [number for step in rows for task, number in step if task == "hard"]
    whole_passes = [sorted(numbers[start : start + 24]) for start in range(0, len(numbers) - 23, 24)]
    assert len(whole_passes) >= 5 and all(len(set(one)) == 24 for one in whole_passes)  # each pass has every row once


def test_what_became_of_solved_tasks(whole: SFTTrainer) -> None:
    """At the end with the model of then, and with the stages of the solve, whose last evaluation is in the log."""
    assert whole.progress is not None
    ledger, seen = whole.progress.ledger, progress_of(whole)
    ends = [*switches(whole), 60]
    solved = {task: solve for task in TARGETS if (solve := ledger.solved(task)) is not None}
    assert solved
    for task, solve in solved.items():
        entries = ledger.tasks[task].retention
        assert [entry.step for entry in entries if entry.when == "solve"] == [
            one.step for one in ledger.tasks[task].solves
        ]
        end = entries[-1]
        assert end.when == "end" and end.step == 60
        assert end.metric == seen[60][f"progress/{task}"] and end.prefix == seen[ends[solve.stage]][f"progress/{task}"]


def test_stages_grow_and_the_optimizer_follows(whole: SFTTrainer) -> None:
    assert whole.progress is not None
    ledger = whole.progress.ledger
    first, second = switches(whole)
    assert {switch.reason for switch in ledger.switches} <= {"quota", "budget", "both"}
    assert whole.model.mixture.sites[0].experts.num_experts == 3
    assert whole.optimizer is not None
    trained = {id(p) for p in whole.model.adapter_tensors().values() if p.requires_grad}
    assert {id(p) for group in whole.optimizer.param_groups for p in group["params"]} == trained
    state = whole.optimizer.state
    ages = {
        name.split(".experts.")[-1]: int(state[p]["step"]) for name, p in whole.model.named_parameters() if p in state
    }
    # a_0 keeps its moments through both switches, the scale of stage 1 through the second.
    newest = 60 - second
    assert ages == {
        "base_logit": 60,
        "scale_logits.0": 60 - first,
        "scale_logits.1": newest,
        "lora_A": newest,
        "lora_B": newest,
    }


def test_the_prefix_of_a_stage_is_what_the_model_was_then(whole: SFTTrainer, made: tuple[Path, Path]) -> None:
    """The last model with the stages of then has the logits of the checkpoint at the end of each, bit for bit."""
    assert whole.progress is not None
    ids = torch.arange(40, 72).unsqueeze(0)
    banks = [bank for container in whole.model.containers().values() for bank in container.banks()]
    live = logits(whole.model, ids)
    for stage, step in enumerate(switches(whole), start=1):
        folder = Path(whole.args.output_dir or "") / f"checkpoint-{step}"
        with showing(banks, stage):
            shown = logits(whole.model, ids)
        assert torch.equal(shown, logits(moelora.from_pretrained(folder, backbone=str(made[1])), ids))
        assert not torch.equal(shown, live)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with evaluation_mode(model), torch.no_grad():
        return model(ids).logits


def test_all_solved_ends_the_run(made: tuple[Path, Path], tmp_path: Path) -> None:
    targets = {"easy": 0.0, "hard": 0.0, "other": 0.1}
    options = {"targets": targets, "num_stages": 1, "hysteresis": None, "passes": 2}
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
    options = {"targets": {**TARGETS, "other": 0.1}, "num_stages": 1, "prune": False}
    trainer = prepare(*made, tmp_path, options, max_steps=32)
    trainer.train()
    host = trainer.progress
    assert host is not None and host.ledger.tasks["other"].solves and host.ledger.arm == "joint"
    assert host.rows.history == [(1, tuple(TARGETS))]


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["stage 0", "switch", "solved", "reopened", "last stage"])
def test_a_resumed_run_is_the_uninterrupted_one(
    whole: SFTTrainer, made: tuple[Path, Path], tmp_path: Path, when: str
) -> None:
    """Also where a task has left, or is back, and the batch that was read ahead does not know."""
    assert whole.progress is not None
    entries = whole.progress.ledger.tasks.values()
    solved = min(solve.step for entry in entries for solve in entry.solves)
    reopened = min(step for entry in entries for step in entry.reopened)
    moments = {"stage 0": 10, "switch": switches(whole)[0], "solved": solved, "reopened": reopened, "last stage": 50}
    cut = moments[when]
    shutil.copytree(Path(whole.args.output_dir or "") / f"checkpoint-{cut}", tmp_path / f"checkpoint-{cut}")
    trainer = prepare(*made, tmp_path, {})
    trainer.train(resume_from_checkpoint=True)
    assert_identical(everything(trainer), everything(whole))


def test_a_run_killed_in_the_middle_of_a_stage_goes_on_exactly(
    whole: SFTTrainer, made: tuple[Path, Path], tmp_path: Path, processes: Any
) -> None:
    first = switches(whole)[0]
    shutil.copytree(Path(whole.args.output_dir or "") / f"checkpoint-{first}", tmp_path / f"checkpoint-{first}")
    announced = processes.Value("i", 0, lock=False)
    child = processes.Process(target=train_and_announce, args=(announced, *made, tmp_path, {}))
    child.start()
    while announced.value < first + 3 and child.is_alive():
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    newest = checkpoints.latest(tmp_path)
    assert newest is not None and first < int(newest.name.removeprefix("checkpoint-")) < 60
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
    shutil.copytree(Path(whole.args.output_dir or "") / "checkpoint-28", tmp_path / "checkpoint-28")
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
        ({}, {"restore_callback_states_from_checkpoint": True}, "set restore_callback_states_from_checkpoint to false"),
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
