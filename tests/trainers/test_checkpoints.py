"""Checkpoints of a run: whole or not there, resumed exactly, one process per folder."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    ROWS,
    assert_identical,
    build_model,
    build_trainer,
    outcome,
    start,
    train_and_wait,
    train_for_long,
)

from moelora import checkpoints
from moelora.errors import CheckpointError, UserError


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "step_balance"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = start(folder, step_balance=request.param)
    trainer.train()
    return folder, request.param, outcome(trainer)


# The epoch has seven batches, so three steps and a half: cuts within an epoch, at its end, and within a log window.
@pytest.mark.parametrize("cut", [1, 2, 4, 5, 7])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(uninterrupted, tmp_path, cut):
    folder, step_balance, expected = uninterrupted
    shutil.copytree(folder / f"checkpoint-{cut}", tmp_path / f"checkpoint-{cut}")
    trainer = start(tmp_path, step_balance=step_balance)
    trainer.train(resume_from_checkpoint=True)
    assert_identical(outcome(trainer), expected)


def test_resume_from_a_named_folder(uninterrupted, tmp_path):
    folder, step_balance, expected = uninterrupted
    trainer = start(tmp_path, step_balance=step_balance)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert_identical(outcome(trainer), expected)


def test_every_checkpoint_is_whole_and_nothing_else_is_left(uninterrupted):
    folder, _, _ = uninterrupted
    assert sorted(path.name for path in folder.iterdir()) == ["_run.lock", *(f"checkpoint-{n}" for n in range(1, 9))]
    for step in range(1, 9):
        checkpoints.verify(folder / f"checkpoint-{step}")
        state = torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
        assert len(state) == len(build_model().adapter_tensors())


def test_resume_falls_back_to_the_newest_whole_checkpoint(tmp_path, caplog):
    start(tmp_path, max_steps=3, eval_strategy="no").train()
    with (tmp_path / "checkpoint-3" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    resumed = start(tmp_path, max_steps=3, eval_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is not whole" in caplog.text
    checkpoints.verify(tmp_path / "checkpoint-3")  # replaced by the one that the resumed run wrote
    assert resumed.state.global_step == 3


def test_nothing_to_resume_and_the_wrong_mixture_are_said(tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint to resume from"):
        start(tmp_path).train(resume_from_checkpoint=True)
    start(tmp_path, max_steps=1).train()
    other = build_trainer(tmp_path, build_model(router={"top_k": 1}), ROWS, max_steps=2)
    with pytest.raises(CheckpointError, match="another mixture"):
        other.train(resume_from_checkpoint=True)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    trainer = start(tmp_path, eval_strategy="no", save_total_limit=1)
    save = trainer._save_rng_state

    def full(folder: str) -> None:
        if trainer.state.global_step == 3:
            raise OSError(errno.ENOSPC, "No space left on device", folder)
        save(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_run.lock", "checkpoint-2"]
    checkpoints.verify(tmp_path / "checkpoint-2")


def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    seen = []
    import moelora.trainers.checkpointing as module

    real = module.rotate_checkpoints

    def watch(folder: str, *args: Any, **kwargs: Any) -> None:
        newest = checkpoints.latest(folder)
        assert newest is not None
        seen.append((newest.name, len(list(Path(folder).glob("checkpoint-*")))))
        real(folder, *args, **kwargs)

    monkeypatch.setattr(module, "rotate_checkpoints", watch)
    start(tmp_path, max_steps=4, save_total_limit=2, eval_strategy="no").train()
    assert seen == [("checkpoint-1", 1), ("checkpoint-2", 2), ("checkpoint-3", 3), ("checkpoint-4", 3)]


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    trainer = start(
        tmp_path,
        learning_rate=0.5,  # so large that the first evaluation is the best
        load_best_model_at_end=True,
        save_steps=1,
        eval_steps=1,
        save_total_limit=1,
        metric_for_best_model="eval_task_loss",
    )
    trainer.train()
    losses = {line["step"]: line["eval_task_loss"] for line in trainer.state.log_history if "eval_task_loss" in line}
    best = tmp_path / f"checkpoint-{min(losses, key=losses.__getitem__)}"
    assert best.name != "checkpoint-8"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    stored = checkpoints.read(best)
    declared = {name: tuple(value.shape) for name, value in trainer.model.adapter_tensors().items()}
    for name, value in stored.tensors(declared).items():
        assert torch.equal(value, trainer.model.adapter_tensors()[name])


# -- other processes -------------------------------------------------------------------------------------------------


def test_a_folder_is_trained_in_by_one_process(processes, tmp_path):
    ready, go = processes.Event(), processes.Event()
    child = processes.Process(target=train_and_wait, args=(tmp_path, ready, go))
    child.start()
    try:
        while not ready.wait(0.1):
            assert child.is_alive()
        with pytest.raises(UserError, match=f"process {child.pid} on .* is training in this folder"):
            start(tmp_path).train()
    finally:
        go.set()
        child.join(60)
    assert child.exitcode == 0
    start(tmp_path, max_steps=1, eval_strategy="no").train()


def test_twenty_kills_leave_twenty_resumable_runs(processes, tmp_path):
    """kill -9 at a random moment; steps take a few milliseconds, so most kills hit a save."""
    draw = random.Random(0)
    inside = 0
    for _ in range(20):
        announced = processes.Value("i", 0, lock=False)
        child = processes.Process(target=train_for_long, args=(tmp_path, announced))
        child.start()
        until = time.monotonic() + 30
        before = announced.value
        while announced.value == before and child.is_alive() and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        assert child.is_alive()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        inside += any(tmp_path.glob("_staging-*"))
        newest = checkpoints.latest(tmp_path)
        assert newest is not None
        assert int(newest.name.rpartition("-")[2]) >= announced.value
    assert inside >= 5
    resumed = start(tmp_path, max_steps=int(newest.name.rpartition("-")[2]) + 1, eval_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    checkpoints.verify(tmp_path / f"checkpoint-{resumed.state.global_step}")
    assert not list(tmp_path.glob("_staging-*"))
