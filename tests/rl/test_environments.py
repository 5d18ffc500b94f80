"""Copies of real tasks: what they give, that they go on exactly, and what their errors say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv
from PIL import Image

from moelora.errors import CheckpointError, ConfigError, UserError
from moelora.rl import SIX_TASKS, Step, TaskConfig, TaskEnvironments, TaskError

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
    with TaskEnvironments(task, 3, seed=7) as environments, TaskEnvironments(task, 3, seed=8) as others:
        for _ in range(50):
            environments.step(rng.integers(environments.num_actions, size=3))
            others.step(rng.integers(environments.num_actions, size=3))
        others.load_state_dict(json.loads(json.dumps(environments.state_dict())))
        np.testing.assert_array_equal(others.observations, environments.observations)
        assert (others.steps, others.seed) == (150, 7)
        for _ in range(200):
            actions = rng.integers(environments.num_actions, size=3)
            one, other = environments.step(actions), others.step(actions)
            same(one, other, [0, 1, 2])
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


class Poisoned(CartPoleEnv):
    """Gives what is not a number in the fourth step of its episodes, as the option says."""

    def __init__(self, what: str = "reward", **options: Any) -> None:
        super().__init__(**options)
        self.what, self.taken = what, 0

    def reset(self, **options: Any) -> Any:
        self.taken = 0
        return super().reset(**options)

    def step(self, action: int) -> Any:
        self.taken += 1
        observation, reward, *rest = super().step(action)
        if self.taken == 4:
            if self.what == "error":
                raise ZeroDivisionError("the pole is nowhere")
            reward = float("nan") if self.what == "reward" else reward
            observation = np.float32([0, 0, np.inf, 0]) if self.what == "observation" else observation
        return observation, reward, *rest


class Forgetful(CartPoleEnv):
    """Its episodes depend on how many there were in the process, which no seed tells."""

    episodes = 0

    def reset(self, **options: Any) -> Any:
        Forgetful.episodes += 1
        self.gravity = 9.8 + Forgetful.episodes
        return super().reset(**options)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    gymnasium.register("Poisoned-v0", Poisoned)
    gymnasium.register("Forgetful-v0", Forgetful)
    gymnasium.register("Switches-v0", Switches)
    yield
    for name in ("Poisoned-v0", "Forgetful-v0", "Switches-v0"):
        del gymnasium.registry[name]


class Switches(CartPoleEnv):
    """Several choices at once, which are not one of so many."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.action_space = gymnasium.spaces.MultiBinary(2)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("reward", "the reward nan"),
        ("observation", r"not finite at \[2\]"),
        ("error", "ZeroDivisionError.*the pole is nowhere"),
    ],
)
def test_what_is_not_finite_names_task_and_step(what: str, message: str) -> None:
    task = TaskConfig(name="bad", id="Poisoned-v0", options={"what": what}, target=1)
    with TaskEnvironments(task, 2) as environments:
        for _ in range(3):
            environments.step(np.array([0, 1]))
        with pytest.raises(TaskError, match=rf"task bad: .*{message}") as error:
            environments.step(np.array([0, 1]))
        assert "copy 0, step 4" in str(error.value)
        with pytest.raises(TaskError, match=rf"task bad: .*{message}") as error:
            environments.evaluate(lambda observations: np.ones(len(observations), int), 1, seed=9)
        assert "seed 9, step 4" in str(error.value)


def test_a_replay_that_leads_elsewhere_is_refused() -> None:
    task = TaskConfig(name="odd", id="Forgetful-v0", target=1)
    with TaskEnvironments(task, 2) as environments:
        for _ in range(3):
            environments.step(np.array([0, 1]))
        with pytest.raises(CheckpointError, match=r"task odd: copy 0: 3 steps .*led elsewhere.*reset\(\)"):
            environments.load_state_dict(environments.state_dict())


def test_a_replay_that_ends_early_is_refused() -> None:
    with TaskEnvironments(CARTPOLE, 1) as environments:
        state = environments.state_dict()
        state["copies"][0]["actions"] = [1] * 30
        with pytest.raises(CheckpointError, match=r"an episode that went on after step .* ends there now"):
            environments.load_state_dict(state)


def test_states_that_do_not_fit_are_refused() -> None:
    with TaskEnvironments(CARTPOLE, 2) as environments, TaskEnvironments(HEAVY, 1) as other:
        state = environments.state_dict()
        with pytest.raises(
            CheckpointError, match=r"attributes \{\}, here \{'gravity': 20.0\}; 2 copies, here 1"
        ) as error:
            other.load_state_dict(state)
        assert "name" not in str(error.value)
        with pytest.raises(CheckpointError, match=r"steps: this key is missing"):
            environments.load_state_dict({key: value for key, value in state.items() if key != "steps"})
        with pytest.raises(CheckpointError, match="actions that are not among the 2 here"):
            copies = [{**copy, "actions": [2]} for copy in state["copies"]]
            environments.load_state_dict({**state, "copies": copies})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"id": "CartPol-v1"}, "id 'CartPol-v1' is not registered with Gymnasium; did you mean 'CartPole-v1'"),
        ({"id": "CartPole-v9"}, "not registered"),
        ({"id": "CartPole-v1", "attributes": {"lenght": 1.0}}, r"attributes.lenght: .*did you mean 'length'"),
        ({"id": "CartPole-v1", "options": {"wind": 1.0}}, r"could not be made with options \{'wind': 1.0\}"),
        ({"id": "CartPole-v1", "bins": 3}, "bins: CartPole-v1 has 2 discrete actions already"),
        ({"id": "Pendulum-v1"}, "actions of Pendulum-v1 are continuous.*set bins"),
        ({"id": "Pendulum-v1", "bins": 2000}, "2000 actions, more than 1024: set fewer bins"),
        ({"id": "Switches-v0"}, "only choices and bounded arrays can be played"),
    ],
)
def test_what_cannot_be_built_says_what_to_set(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"task a: .*{message}"):
        TaskEnvironments(TaskConfig(name="a", target=1, **given), 1)


def test_missions_that_change_are_refused() -> None:
    pytest.importorskip("minigrid", reason="MiniGrid tasks need minigrid: the extra [rl]")
    with pytest.raises(ConfigError, match="task a: the mission of MiniGrid-Fetch-5x5-N2-v0 is text that changes"):
        TaskEnvironments(TaskConfig(name="a", id="MiniGrid-Fetch-5x5-N2-v0", target=1), 1)


@pytest.mark.parametrize("task", [PONG, GRID, SWING], ids=lambda task: task.name)
def test_a_missing_package_is_named(task: TaskConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    if task is SWING:
        need(task)
        importlib.import_module("shimmy")
    monkeypatch.setitem(sys.modules, NEEDED[task.name], None)
    with pytest.raises(ConfigError, match=rf"task {task.name}: .*{NEEDED[task.name]}.*pip install 'moelora\[rl\]'"):
        TaskEnvironments(task, 1)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([0]), r"shape \(1,\).*2 whole numbers"),
        (np.array([0.0, 1.0]), "dtype float64: 2 whole numbers"),
        (np.array([0, 2]), "no action 2: actions are 0 to 1"),
        (np.array([-1, 0]), "no action -1"),
    ],
)
def test_wrong_actions_are_refused_before_anything_is_stepped(actions: np.ndarray, message: str) -> None:
    with TaskEnvironments(CARTPOLE, 2) as environments:
        before = environments.state_dict()
        with pytest.raises(UserError, match=message):
            environments.step(actions)
        assert environments.state_dict() == before


@pytest.mark.parametrize(("episodes", "seed"), [(0, 0), (1, -1)])
def test_no_episodes_and_no_seed_are_refused(episodes: int, seed: int) -> None:
    with (
        TaskEnvironments(CARTPOLE, 1) as environments,
        pytest.raises(UserError, match=r"task cartpole: .*at least 1, and 0, are needed"),
    ):
        environments.evaluate(balance, episodes, seed)
    with pytest.raises(ConfigError, match="num_copies is 0"):
        TaskEnvironments(CARTPOLE, 0)


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


def test_other_recordings_are_refused(tmp_path: Path) -> None:
    with TaskEnvironments(CARTPOLE, 1) as environments, pytest.raises(UserError, match=r"a name that ends in \.gif"):
        environments.record(balance, 0, tmp_path / "film.mp4")
