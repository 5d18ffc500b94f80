"""What the errors of environments say: of tasks that cannot be built, numbers that are none, states that do not fit."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from rl.tasks_by_hand import CARTPOLE, GRID, HEAVY, NEEDED, PONG, SWING, balance, need

from moelora.errors import CheckpointError, ConfigError, UserError
from moelora.rl import TaskConfig, TaskEnvironments, TaskError


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


def test_other_recordings_are_refused(tmp_path: Path) -> None:
    with TaskEnvironments(CARTPOLE, 1) as environments, pytest.raises(UserError, match=r"a name that ends in \.gif"):
        environments.record(balance, 0, tmp_path / "film.mp4")


def test_what_cannot_be_drawn_says_what_it_takes(tmp_path: Path) -> None:
    need(SWING)
    if os.environ["MUJOCO_GL"] != "disable":
        pytest.skip("MUJOCO_GL is set: dm_control can draw here")
    task = SWING.model_copy(update={"max_episode_steps": 3})
    with TaskEnvironments(task, 1) as environments, pytest.raises(ConfigError, match=r"cannot be drawn.*MUJOCO_GL=egl"):
        environments.record(lambda observations: np.zeros(1, int), 0, tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())
