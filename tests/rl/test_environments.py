"""Copies of real tasks: what they give, that they go on exactly, and what their errors say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv
from PIL import Image
from rl.tasks_by_hand import ACROBOT, CARTPOLE, FRAMES, GRID, HEAVY, LONG, PENDULUM, PONG, SWING, WEAK, balance, need

from moelora.rl import Step, TaskConfig, TaskEnvironments


def pump(observations: np.ndarray) -> np.ndarray:
    """Torque with the second joint's motion."""
    return np.where(observations[:, 5] > 0, 2, 0)


def swing_up(observations: np.ndarray) -> np.ndarray:
    """Pendulum: bring its energy to that of standing, then hold it there."""
    cosine, sine, speed = observations.T
    pumping = np.where(speed >= 0, 2, -2) * np.where(speed**2 / 6 + 5 * cosine < 5, 1, -1)
    torque = np.where(cosine > 0.85, -(15 * np.arctan2(sine, cosine) + 3 * speed), pumping)
    return np.round(np.clip(torque, -2, 2) + 2).astype(int)


def same(one: Step, other: Step, rows: list[int]) -> None:
    """Two steps are equal in some rows, to the last bit."""
    for name in ("observations", "rewards", "terminated", "truncated", "final_observations", "restarted"):
        np.testing.assert_array_equal(getattr(one, name)[rows], getattr(other, name)[rows], err_msg=name)


@pytest.mark.parametrize(
    ("task", "shape", "actions", "act"),
    [
        (CARTPOLE, (4,), 2, balance),
        (LONG, (4,), 2, balance),
        (WEAK, (4,), 2, balance),
        (HEAVY, (4,), 2, balance),
        (ACROBOT, (6,), 3, pump),
        (PENDULUM, (3,), 5, swing_up),
    ],
    ids=lambda value: value.name if isinstance(value, TaskConfig) else "",
)
def test_six_tasks_can_be_solved(
    task: TaskConfig, shape: tuple[int, ...], actions: int, act: Callable[[np.ndarray], np.ndarray]
) -> None:
    """By hand; so their targets are within reach of what the agent sees and may do."""
    with TaskEnvironments(task, 1) as environments:
        assert (environments.observation_shape, environments.num_actions) == (shape, actions)
        assert environments.observations.dtype == np.float32
        assert np.mean(environments.evaluate(act, 10, seed=0)) >= task.target


def test_physics_varies_as_said() -> None:
    """The first step from the same state, against the same environment with the constants written into it."""
    for task in (CARTPOLE, LONG, WEAK, HEAVY):
        bare = CartPoleEnv()
        bare.reset(seed=0)
        bare.length = 1.5 if task is LONG else 0.5
        bare.polemass_length = bare.masspole * bare.length
        bare.force_mag = 5.0 if task is WEAK else 10.0
        bare.gravity = 20.0 if task is HEAVY else 9.8
        with TaskEnvironments(task, 1) as environments:
            state = environments.state_dict()["copies"][0]
            bare.reset(seed=state["seed"])
            for action in (1, 1, 0):
                expected = bare.step(action)[0]
                got = environments.step(np.array([action])).observations[0]
            np.testing.assert_array_equal(got, expected)


def test_torques_are_evenly_spaced_with_both_ends() -> None:
    bare = PendulumEnv()
    with TaskEnvironments(PENDULUM, 5, seed=3) as environments:
        seeds = [copy["seed"] for copy in environments.state_dict()["copies"]]
        got = environments.step(np.arange(5))
    for row, torque in enumerate([-2.0, -1.0, 0.0, 1.0, 2.0]):
        bare.reset(seed=seeds[row])
        observation, reward, *_ = bare.step(np.array([torque], np.float32))
        np.testing.assert_array_equal(got.observations[row], observation)
        assert got.rewards[row] == np.float32(reward)


def test_ends_hand_out_the_true_last_observation() -> None:
    """Against Gymnasium's own environment, played with the seeds and actions that the state tells."""
    task = CARTPOLE.model_copy(update={"reward_scale": 0.5, "max_episode_steps": 20})
    rng, ended, cut = np.random.default_rng(0), 0, 0
    with TaskEnvironments(task, 3, seed=5) as environments:
        plain = [gymnasium.make("CartPole-v1", max_episode_steps=20) for _ in range(3)]
        for copy, environment in zip(environments.state_dict()["copies"], plain, strict=True):
            environment.reset(seed=copy["seed"])
        for _ in range(80):
            actions, before = rng.integers(2, size=3), environments.state_dict()["copies"]
            step = environments.step(actions)
            returns, lengths = [], []
            for row, environment in enumerate(plain):
                observation, reward, terminated, truncated, _ = environment.step(int(actions[row]))
                np.testing.assert_array_equal(step.final_observations[row], observation)
                assert step.rewards[row] == 0.5 * reward
                assert (step.terminated[row], step.truncated[row]) == (terminated, truncated)
                if terminated or truncated:
                    length = len(before[row]["actions"]) + 1
                    returns.append(float(length))  # one a step, unscaled
                    lengths.append(length)
                    ended, cut = ended + terminated, cut + truncated
                    following = environments.state_dict()["copies"][row]
                    assert following["seed"] != before[row]["seed"]
                    observation, _ = environment.reset(seed=following["seed"])
                np.testing.assert_array_equal(step.observations[row], observation)
            assert (step.returns, step.lengths) == (returns, lengths)
        assert environments.steps == 240
    assert ended and cut


@pytest.mark.parametrize("task", [CARTPOLE, ACROBOT, PENDULUM, PONG, FRAMES, GRID, SWING], ids=lambda task: task.name)
def test_state_goes_on_exactly(task: TaskConfig) -> None:
    """Saved in the middle of episodes, through JSON, into copies that were elsewhere."""
    need(task)
    rng = np.random.default_rng(1)
    with TaskEnvironments(task, 2, seed=7) as environments, TaskEnvironments(task, 2, seed=8) as others:
        for _ in range(50):
            environments.step(rng.integers(environments.num_actions, size=2))
            others.step(rng.integers(environments.num_actions, size=2))
        others.load_state_dict(json.loads(json.dumps(environments.state_dict())))
        np.testing.assert_array_equal(others.observations, environments.observations)
        assert (others.steps, others.seed) == (100, 7)
        for _ in range(200):
            actions = rng.integers(environments.num_actions, size=2)
            one, other = environments.step(actions), others.step(actions)
            same(one, other, [0, 1])
            assert (one.returns, one.lengths) == (other.returns, other.lengths)
        assert others.state_dict() == environments.state_dict()


def test_copies_of_other_packages_look_as_said() -> None:
    for task, shape, actions in ((PONG, (128,), 6), (FRAMES, (4, 64, 64), 6), (GRID, (980,), 7), (SWING, (3,), 3)):
        need(task)
        with TaskEnvironments(task, 1) as environments:
            assert (environments.observation_shape, environments.num_actions) == (shape, actions)
            assert environments.observations.shape == (1, *shape)
            if task is not SWING:
                assert environments.observations.min() >= 0
                assert 0.5 < environments.observations.max() <= 1
            if task is GRID:
                assert environments.observations.sum() == 7 * 7 * 3  # one object, colour and state a cell


def test_evaluation_does_not_depend_on_the_copies() -> None:
    with TaskEnvironments(CARTPOLE, 1) as one, TaskEnvironments(CARTPOLE, 4, seed=3) as four:
        before = four.state_dict()

        def poor(observations: np.ndarray) -> np.ndarray:
            return (observations[:, 2] > 0).astype(int)

        returns = one.evaluate(poor, 6, seed=11)
        assert four.evaluate(poor, 6, seed=11) == returns == one.evaluate(poor, 6, seed=11)
        assert one.evaluate(poor, 2, seed=12) == returns[1:3]
        assert len(set(returns)) > 1
        assert four.state_dict() == before


def test_evaluation_keeps_rows_in_place() -> None:
    """An ended episode keeps its row and its last observation, so that an agent may remember by row."""
    seen: list[np.ndarray] = []

    def act(observations: np.ndarray) -> np.ndarray:
        seen.append(observations)
        return np.array([1, 1, 0])

    with TaskEnvironments(CARTPOLE, 1) as environments:
        returns = environments.evaluate(act, 3, seed=0)
    assert {observations.shape for observations in seen} == {(3, 4)}
    assert len(seen) == max(returns) > min(returns)
    for row, total in enumerate(returns):
        moved = [bool((seen[i][row] != seen[i + 1][row]).any()) for i in range(len(seen) - 1)]
        assert moved == [i < total for i in range(len(seen) - 1)]


def test_a_solved_episode_is_recorded(tmp_path: Path) -> None:
    task = CARTPOLE.model_copy(update={"max_episode_steps": 60})
    with TaskEnvironments(task, 1) as environments:
        total = environments.record(balance, 4, tmp_path / "films" / "cartpole.gif")
        assert [total] == environments.evaluate(balance, 1, 4) == [60]
    with Image.open(tmp_path / "films" / "cartpole.gif") as film:
        assert film.size == (320, 213)
        # 61 pictures at 50 a second become every second one, 40 ms each; Pillow joins those that are equal.
        assert 20 < film.n_frames <= 31
        shown = 0
        for frame in range(film.n_frames):
            film.seek(frame)
            shown += film.info["duration"]
        assert shown == 31 * 40


def test_copies_in_processes_play_what_other_packages_bring() -> None:
    """Their registered environments reach the processes, whatever they are made of."""
    need(SWING)
    with (
        TaskEnvironments(SWING, 1, workers=True) as environments,
        TaskEnvironments(SWING, 1) as here,
    ):
        for action in (0, 2, 1):
            same(environments.step(np.array([action])), here.step(np.array([action])), [0])
