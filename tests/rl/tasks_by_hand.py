"""Tasks of reinforcement learning that tests play, and how to keep a pole up."""

from __future__ import annotations

import os

os.environ.setdefault("MUJOCO_GL", "disable")  # dm_control looks for a screen at its import

import numpy as np
import pytest

from moelora.rl import SIX_TASKS, TaskConfig

CARTPOLE, LONG, WEAK, HEAVY, ACROBOT, PENDULUM = SIX_TASKS
PONG = TaskConfig(name="pong", id="ALE/Pong-v5", observation="ram", target=20)
FRAMES = TaskConfig(name="frames", id="ALE/Pong-v5", observation="frames", target=20)
GRID = TaskConfig(name="grid", id="MiniGrid-Empty-5x5-v0", target=0.9)
SWING = TaskConfig(name="swing", id="dm_control/pendulum-swingup-v0", bins=3, target=500, max_episode_steps=150)
NEEDED = {"pong": "ale_py", "frames": "ale_py", "grid": "minigrid", "swing": "dm_control"}


def need(task: TaskConfig) -> None:
    """Skip where what brings the task is not installed."""
    if task.name in NEEDED:
        pytest.importorskip(NEEDED[task.name], reason=f"{task.id} needs {NEEDED[task.name]}: the extra [rl]")
    if task.name == "swing":
        pytest.importorskip("shimmy", reason=f"{task.id} needs shimmy: the extra [rl]")


def balance(observations: np.ndarray) -> np.ndarray:
    """Push to where the pole falls, and a little to the middle."""
    return (observations @ [0.05, 0.15, 3.0, 0.8] > 0).astype(int)
