"""Saving under kill -9, with many writers at once, and without room: what was announced is never lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moelora import checkpoints

Fork = Callable[[str, Path, int], int]


@pytest.fixture(scope="module")
def fork() -> Iterator[Fork]:
    """Start a process that saves; see saver.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("saver.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:
        assert server.stdin is not None and server.stdout is not None

        def start(mode: str, folder: Path, value: int) -> int:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(f"{mode} {folder} {value}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield start
        server.kill()


def announced(folder: Path) -> list[int]:
    file = Path(f"{folder}.announced")
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def value_of(folder: Path) -> int:
    """The one number in a checkpoint; an assertion if there are several."""
    stored = checkpoints.read(folder)
    found = {float(n) for tensor in stored.tensors(stored.declared()).values() for n in tensor.unique()}
    assert len(found) == 1, found
    return int(found.pop())


@pytest.mark.parametrize("mode", ["same", "steps"])
def test_kill_while_saving(mode: str, fork: Fork, tmp_path: Path) -> None:
    moments = random.Random(mode)
    folder = tmp_path / "run"
    last, in_between = 0, 0
    for _ in range(10):
        pid = fork(mode, folder, last + 1)
        wait_for(lambda before=last: max(announced(folder), default=0) > before)  # type: ignore[misc]
        time.sleep(moments.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda killed=pid: not alive(killed))  # type: ignore[misc]
        in_between += any(tmp_path.rglob(".moelora-*"))
        known = announced(folder)[-1]
        newest = checkpoints.latest(folder) if mode == "steps" else folder
        assert newest is not None
        checkpoints.verify(newest)
        last = value_of(newest)
        assert last in (known, known + 1)
        if mode == "steps":
            assert newest.name == f"checkpoint-{last}"
            optimizer = torch.load(newest / "state" / "optimizer.pt", weights_only=True)
            assert optimizer.unique().tolist() == [last]
    assert in_between >= 3  # the kills did hit savers at work
    # The next save removes what the killed ones have left.
    if mode == "same":
        fork("some", folder, last + 100)
    else:
        fork("step", folder / f"checkpoint-{last + 100}", last + 100)
    wait_for(lambda: announced(folder)[-1] == last + 100)
    assert not list(tmp_path.rglob(".moelora-*"))


def test_many_writers_of_one_step(fork: Fork, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for value in range(1, 9):
        fork("step", folder / "checkpoint-1", value)
    wait_for(lambda: sorted(announced(folder)) == list(range(1, 9)))
    final = folder / "checkpoint-1"
    checkpoints.verify(final)
    assert torch.load(final / "state" / "optimizer.pt", weights_only=True).unique().tolist() == [value_of(final)]
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]
    assert not [path for path in final.iterdir() if path.name.startswith(".")]


def test_readers_see_whole_checkpoints_while_others_write(fork: Fork, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for value in range(1, 9):
        fork("some", folder, value)
    wait_for(folder.is_dir)
    seen = set()
    while len(announced(folder)) < 8:
        seen.add(value_of(folder))
    assert seen and seen <= set(range(1, 9))
    checkpoints.verify(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_no_room(fork: Fork, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fork("some", folder, 7)
    wait_for(lambda: announced(folder) == [7])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fork("limited", folder, 8)
    wait_for(lambda: announced(folder) == [7, 8])
    message = Path(f"{folder}.error").read_text()
    assert "moelora.safetensors" in message and "MB" in message and "untouched" in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert value_of(folder) == 7
