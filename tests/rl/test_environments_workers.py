"""Copies in processes of their own: the same numbers, and a process that dies takes nothing with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moelora.rl import SIX_TASKS, TaskEnvironments, TaskError
from moelora.rl import environments as module

CARTPOLE = SIX_TASKS[0]


def kill(pid: int) -> None:
    """Kill a process, and wait until it is dead (and not yet reaped)."""
    os.kill(pid, signal.SIGKILL)
    for _ in range(200):
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} lives")


def test_a_killed_worker_is_replaced_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    with (
        TaskEnvironments(CARTPOLE, 3, seed=2, workers=True) as environments,
        TaskEnvironments(CARTPOLE, 3, seed=2) as here,
    ):
        assert (len(set(environments.pids)), here.pids) == (3, [])
        for _ in range(40):
            actions = rng.integers(2, size=3)
            one, other = environments.step(actions), here.step(actions)
            for name in ("observations", "rewards", "terminated", "truncated", "final_observations", "restarted"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
            assert (one.returns, one.lengths) == (other.returns, other.lengths)
        assert environments.state_dict() == here.state_dict()

        before, pids = environments.observations, environments.pids
        kill(pids[1])
        actions = rng.integers(2, size=3)
        step, plain = environments.step(actions), here.step(actions)
        assert step.restarted.tolist() == [False, True, False]
        assert environments.restarts == 1
        assert "task cartpole: the process of copy 1 died" in caplog.text
        assert (step.rewards[1], step.truncated[1], step.terminated[1]) == (0, True, False)
        np.testing.assert_array_equal(step.final_observations[1], before[1])
        for name in ("observations", "rewards", "terminated", "truncated", "final_observations"):
            np.testing.assert_array_equal(getattr(step, name)[[0, 2]], getattr(plain, name)[[0, 2]], err_msg=name)
        assert [environments.pids[0], environments.pids[2]] == [pids[0], pids[2]]
        assert environments.pids[1] != pids[1]

        # The new process is in an episode of its own, which a copy in this process can play again.
        here.load_state_dict(environments.state_dict())
        assert here.restarts == 1
        for _ in range(40):
            actions = rng.integers(2, size=3)
            np.testing.assert_array_equal(environments.step(actions).observations, here.step(actions).observations)
        # And the other way round.
        environments.load_state_dict(here.state_dict())
        np.testing.assert_array_equal(environments.observations, here.observations)
        assert environments.restarts == 1
        pids = environments.pids
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}"), "close() ends the processes"


def test_a_worker_that_dies_again_and_again_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CRASHES", 1)
    with TaskEnvironments(CARTPOLE, 1, workers=True) as environments:
        kill(environments.pids[0])
        environments.reset()  # found out by a reset as well as by a step
        assert environments.restarts == 1
        environments.step(np.array([0]))
        kill(environments.pids[0])
        with pytest.raises(TaskError, match=r"task cartpole: the process of copy 0 died 2 times"):
            environments.step(np.array([0]))


def test_a_script_without_its_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from moelora.rl import SIX_TASKS, TaskEnvironments\nTaskEnvironments(SIX_TASKS[0], 1, workers=True)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "moelora.rl.checks.TaskError: task cartpole: the process of copy 0 died at its start"
    )
    assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]
