"""What a task may say, without any environment."""

from __future__ import annotations

import json
import sys

import pytest

from moelora.errors import ConfigError
from moelora.rl import SIX_TASKS, TaskConfig, TaskEnvironments

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("task", SIX_TASKS, ids=lambda task: task.name)
def test_task_survives_json(task: TaskConfig) -> None:
    assert TaskConfig.parse(json.loads(task.to_json())) == task


def test_options_keep_their_types() -> None:
    options = {"continuous": True, "mode": 1, "wind": 1.0, "kind": "a"}
    read = TaskConfig.parse({"name": "a", "id": "A-v0", "target": 1, "options": options}).options
    assert [type(value) for value in read.values()] == [bool, int, float, str]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "a.b"}, "name: "),
        ({"id": "os:CartPole-v1"}, "would import the module 'os'"),
        ({"options": {"render_mode": "human"}}, "options.render_mode: this is not an option"),
        ({"options": {"max_episode_steps": 3}}, "it is a key of the task"),
        ({"observation": "ram"}, "set 'vector' for 'CartPole-v1'"),
        ({"id": "ALE/Pong-v5"}, "'ram' or as 'frames'"),
        ({"id": "ALE/Pong-v5", "observation": "ram", "options": {"obs_type": "rgb"}}, "the key 'observation' decides"),
        ({"id": "ALE/Pong-v5", "observation": "frames", "options": {"frameskip": 2}}, "the key 'observation' decides"),
        ({"bins": 1}, "bins: "),
        ({"bin": 5}, "unknown key 'bin'"),
        ({"reward_scale": 0}, "reward_scale: "),
        ({"target": float("nan")}, "target: "),
    ],
)
def test_wrong_task_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TaskConfig.parse({"name": "a", "id": "CartPole-v1", "target": 1, **given})
    assert message in str(error.value)


def test_without_gymnasium_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r"task cartpole: .* needs gymnasium .*pip install 'moelora\[rl\]'"):
        TaskEnvironments(SIX_TASKS[0], 1)
