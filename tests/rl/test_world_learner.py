"""The learner of world models: what it keeps, what segments it cuts, how it acts, and runs that were killed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moelora.errors import CheckpointError, ConfigError
from moelora.rl.environments import Step
from moelora.rl.learners import LEARNERS
from moelora.rl.replay import Replay
from moelora.rl.world_learner import WorldModelLearner
from moelora.trainers.scalezero import ScaleZero

CART = {"id": "CartPole-v1", "max_episode_steps": 6, "target": 10_000.0}
TASKS = [{"name": "one", **CART}, {"name": "two", **CART, "attributes": {"gravity": 20.0}}]
AGENT = {"trunk": {"dim": 16, "layers": 1, "heads": 2, "experts": 1}, "head_dim": 16, "support": 10}
LEARNER = {
    "kind": "world_model",
    "copies": 2,
    "horizon": 4,
    "context": 2,
    "search": {"simulations": 3},
    "buffer": 20,
    "segment": 4,
    "batch": 4,
    "updates": 2,
}


def options(folder: Path, learner: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "tasks": TASKS,
        "learner": {**LEARNER, **(learner or {})},
        "agent": AGENT,
        "progress": {"num_stages": 3, "t_min": 1, "t_max": 2, "passes": 1, "hysteresis": None},
        "eval_every": 1,
        "eval_episodes": 1,
        "max_env_steps": 96,  # six iterations
        "save_every": 1,
        "output_dir": str(folder),
        **changes,
    }


# -- what is kept ----------------------------------------------------------------------------------------------------


def played(rows: int, ends: Mapping[tuple[int, int], str], steps: int, most: int = 100) -> Replay:
    """Two copies; the observation of step t of copy n is 100 n + t, its reward that and a half, what follows t + 1,
    and 1000 more than that where the episode ended.
    """
    replay = Replay(most, 2, (1,), 3)
    for t in range(steps):
        how = [ends.get((t, n), "") for n in range(2)]
        now = np.array([[t], [100 + t]], np.float32)
        following = now + 1 + 1000 * np.array([[each in ("terminated", "truncated")] for each in how])
        terminated = np.array([each == "terminated" for each in how])
        truncated = np.array([each in ("truncated", "died") for each in how])
        died = np.array([each == "died" for each in how])
        step = Step(now, now[:, 0] + 0.5, terminated, truncated, following.astype(np.float32), died, [], [])
        replay.keep(torch.from_numpy(now), torch.tensor([t % 3, 1]), torch.full((2, 3), 1 / 3), step)
        if t % rows == rows - 1:
            replay.settle()
    replay.settle()
    return replay


def cut(replay: Replay, length: int = 4, absorbing: int = 0, count: int = 400) -> dict[int, dict[str, Any]]:
    """Segments by their first observation, of which each says the same every time, but for the actions behind ends."""
    segments = replay.draw(count, length, absorbing, torch.Generator().manual_seed(0))
    found: dict[int, dict[str, Any]] = {}
    for b in range(count):
        real = segments.mask[b] & (segments.policies[b].sum(-1) > 0)
        each = {
            "observations": segments.observations[b, : int(segments.mask[b].sum()) + 1, 0].tolist(),
            "actions": segments.actions[b][real].tolist(),
            "rewards": segments.rewards[b][segments.mask[b]].tolist(),
            "mask": segments.mask[b].tolist(),
            "terminated": bool(segments.terminated[b]),
        }
        assert found.setdefault(int(segments.observations[b, 0, 0]), each) == each
    return found


def test_segments_do_not_go_over_the_ends_of_episodes() -> None:
    found = cut(played(3, {(4, 0): "terminated", (2, 1): "truncated"}, 8))
    assert set(found) == {*range(8), *range(100, 108)}
    assert found[0] == {
        "observations": [0, 1, 2, 3, 4],
        "actions": [0, 1, 2, 0],
        "rewards": [0.5, 1.5, 2.5, 3.5],
        "mask": [True] * 4,
        "terminated": False,
    }
    assert found[3] == {
        "observations": [3, 4, 1005],
        "actions": [0, 1],
        "rewards": [3.5, 4.5],
        "mask": [True, True, False, False],
        "terminated": True,
    }
    assert found[1]["observations"] == [1, 2, 3, 4, 1005] and found[1]["terminated"]
    assert found[5]["observations"] == [5, 6, 7, 8] and not found[5]["terminated"]  # what is not known yet
    assert found[101]["observations"] == [101, 102, 1103] and not found[101]["terminated"]
    assert found[103]["observations"] == [103, 104, 105, 106, 107]


def test_segments_go_on_behind_a_termination_and_nowhere_else() -> None:
    found = cut(played(3, {(4, 0): "terminated", (2, 1): "truncated"}, 8), absorbing=2, length=5)
    assert found[4] == {
        "observations": [4, 1005, 1005, 1005],
        "actions": [1],
        "rewards": [4.5, 0, 0],
        "mask": [True, True, True, False, False],
        "terminated": True,
    }
    assert found[1]["observations"] == [1, 2, 3, 4, 1005, 1005] and found[1]["rewards"][-1] == 0
    assert found[0]["observations"] == [0, 1, 2, 3, 4, 1005] and found[0]["terminated"]
    assert found[102]["mask"] == [True] + [False] * 4 and found[6]["mask"] == [True, True, False, False, False]
    segments = played(3, {(0, 0): "terminated", (0, 1): "terminated"}, 1).draw(300, 3, 2, torch.Generator())
    assert set(segments.actions[:, 1:].unique().tolist()) == {0, 1, 2} and not segments.policies[:, 1:].any()


def test_steps_in_which_a_process_died_are_not_learnt() -> None:
    found = cut(played(3, {(4, 0): "died"}, 8))
    assert set(found) == {*range(4), *range(5, 8), *range(100, 108)}
    assert found[2]["observations"] == [2, 3, 4] and not found[2]["terminated"]


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_bound_keeps_the_newest(rows: int) -> None:
    replay = played(rows, {}, 11, most=5)
    assert len(replay) == 5 and set(cut(replay, length=2)) == {*range(6, 11), *range(106, 111)}
    other = Replay(5, 2, (1,), 3)
    other.load_state_dict(replay.state_dict())
    ours, theirs = (each.draw(8, 3, 2, torch.Generator().manual_seed(1)) for each in (replay, other))
    assert all(torch.equal(value, getattr(theirs, name)) for name, value in vars(ours).items())
    with pytest.raises(CheckpointError, match="do not fit the task"):
        Replay(5, 2, (2,), 3).load_state_dict(replay.state_dict())


# -- runs ------------------------------------------------------------------------------------------------------------


def everything(value: Any) -> Any:
    """Equal where two states are, bit for bit."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: everything(each) for key, each in value.items()}
    return [everything(each) for each in value] if isinstance(value, list | tuple) else value


def state(run: ScaleZero) -> Any:
    return everything([run.agent.state_dict(), run.learner.state_dict(), run.optimizer.state_dict()])


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ScaleZero:
    run = ScaleZero(options(tmp_path_factory.mktemp("whole") / "run"))
    run.run()
    return run


def test_the_registry_finds_it_and_stages_come(whole: ScaleZero) -> None:
    assert LEARNERS.get("world_model") is WorldModelLearner and "ppo" in LEARNERS
    assert whole.staged is not None and whole.staged.stage == 2 and whole.iteration == 6
    for replay in whole.learner.replays.values():
        assert len(replay) == 10  # of two copies, of the 24 that were played
    trained = next(iter(whole.staged.linears.values())).stages
    assert trained is not None and any(p.abs().sum() > 0 for n, p in trained.named_parameters() if "lora_B" in n)
    json.dumps(whole.learner.state_dict()["chance"])


@pytest.mark.parametrize("moment", [3, 4])  # the checkpoint is of just behind a switch, or of between two
def test_a_killed_run_goes_on_as_if_it_had_not_been(whole: ScaleZero, tmp_path: Path, moment: int) -> None:
    def kill(what: str, numbers: Mapping[str, Any]) -> None:
        if what == "iteration" and run.iteration == moment:
            raise Killed

    run = ScaleZero(options(tmp_path / "run"), kill)
    with pytest.raises(Killed):
        run.run()
    again = ScaleZero(options(tmp_path / "run"))
    again.run(resume=True)
    assert state(again) == state(whole)
    assert again.ledger.to_dict() == whole.ledger.to_dict()
    assert (again.folder / "log.jsonl").read_text() == (whole.folder / "log.jsonl").read_text()


def test_evaluation_has_no_chance_and_sees_old_stages(whole: ScaleZero) -> None:
    learner = whole.learner
    before = everything(learner.state_dict())
    context = learner.contexts["one"]
    plan = learner.world.plan("one", context, learner.config.search)
    assert learner.choose("one", context).tolist() == plan.visits.argmax(1).tolist()
    assert whole.evaluate("one") == whole.evaluate("one") and whole.evaluate("one", 0) == whole.evaluate("one", 0)
    assert everything(learner.state_dict()) == before
    with whole._at(0):
        values = learner.world.plan("one", context, learner.config.search).values
    assert not np.array_equal(values, plan.values)


def test_acting_in_training_has_noise_and_keeps_shares(tmp_path: Path) -> None:
    run = ScaleZero(options(tmp_path / "run", stages=None))
    learner = run.learner
    learner.begin(["one", "two"])
    drawn = [learner.choose_all(["one", "two"]) for _ in range(12)]
    assert set(drawn[0]) == {"one", "two"} and len({str(each["one"].tolist()) for each in drawn}) > 1
    assert learner.collect(["two"], lambda task, error: pytest.fail(str(error))) == {"two": 8}
    table = learner.replays["two"].table
    assert len(learner.replays["one"]) == 0 and len(learner.replays["two"]) == 4
    assert torch.allclose(table["policies"].sum(-1), torch.ones(4, 2))
    assert set(np.unique(np.round(table["policies"].numpy() * 3, 4))) <= {0, 1, 2, 3}
    going = ~table["ended"][:-1]
    assert torch.equal(table["following"][:-1][going], table["observations"][1:][going])
    told = learner.update(run.optimizer, ["two"])
    assert set(told) == {"two"} and set(told["two"]) == {"policy", "value", "reward", "latent"}


def test_it_learns_what_it_plays(tmp_path: Path) -> None:
    run = ScaleZero(
        options(tmp_path / "run", {"updates": 30, "batch": 16, "absorbing": 0}, stages=None, learning_rate=1e-2)
    )
    learner = run.learner
    learner.collect(["one"], lambda task, error: pytest.fail(str(error)))
    first, _, later = (learner.update(run.optimizer, ["one"])["one"] for _ in range(3))
    share = 2**0.5 - 1 + 0.001  # where a reward of 1 lies between the points 0 and 1 of the support
    least = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert first["reward"] > least + 0.3 and later["reward"] < least + 0.02
    assert later["latent"] < first["latent"] and later["value"] < first["value"]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for changes, message in {
        "discounts": ({"model": {"discount": 0.9}}, "differ: set both"),
        "buffer": ({"buffer": 1}, "no room for a step"),
    }.values():
        with pytest.raises(ConfigError, match=message):
            ScaleZero(options(tmp_path / "run", changes))
