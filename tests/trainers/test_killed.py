"""One of two processes is killed, in a step or while saving: the other ends and says so; the run goes on exactly."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sharded_runs import killed
from tiny_runs import assert_identical

from moelora import checkpoints

LIMIT = 300


def start(processes: Any, folder: Path, kind: str, fault: str = "", resume: bool = False) -> tuple[list[Any], Any]:
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    step = processes.Value("i", 0, lock=False)
    children = [
        processes.Process(target=killed, args=(rank, 2, port, folder, kind, fault, step, resume)) for rank in range(2)
    ]
    for child in children:
        child.start()
    return children, step


def ended(children: list[Any]) -> list[int]:
    """Exit codes; whatever still runs after the limit hangs."""
    for child in children:
        child.join(LIMIT)
    hanging = [child.is_alive() for child in children]
    for child in children:
        child.kill()
    assert hanging == [False, False]
    return [child.exitcode for child in children]


@pytest.mark.timeout(4 * LIMIT)
@pytest.mark.parametrize(("kind", "fault"), [("zero2", "idle"), ("ddp", "save")])
def test_a_killed_process_ends_the_run_and_loses_nothing(processes: Any, tmp_path: Path, kind: str, fault: str) -> None:
    assert ended(start(processes, tmp_path / "whole", kind)[0]) == [0, 0]
    folder = tmp_path / "killed"
    children, step = start(processes, folder, kind, fault)
    if fault == "idle":
        while step.value < 5 and children[1].is_alive():
            time.sleep(0.02)
        os.kill(children[1].pid, signal.SIGKILL)
    codes = ended(children)
    victim = 1 if fault == "idle" else 0
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 3
    said = (folder / f"ended-{1 - victim}.txt").read_text()
    assert "another of the 2 processes of this run has ended" in said and "--resume latest" in said
    newest = checkpoints.latest(folder)
    assert newest is not None and newest.name == "checkpoint-4"
    assert ended(start(processes, folder, kind, resume=True)[0]) == [0, 0]
    whole, resumed = (load_file(tmp_path / run / "final" / "moelora.safetensors") for run in ("whole", "killed"))
    assert_identical(resumed, whole)
