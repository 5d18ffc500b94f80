"""Runs of reinforcement learning in stages: what leaves, what grows, what is kept, kills, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from moelora.errors import CheckpointError, ConfigError, UserError
from moelora.trainers.progress_ledger import Ledger
from moelora.trainers.scalezero import ScaleZero

UNREACHABLE = 10_000.0
CART = {"id": "CartPole-v1", "max_episode_steps": 20}
TASKS = [
    {"name": "one", **CART, "target": UNREACHABLE},
    {"name": "two", **CART, "attributes": {"gravity": 20.0}, "target": UNREACHABLE},
]
AGENT = {"trunk": {"dim": 16, "layers": 1, "heads": 2, "experts": 2}, "head_dim": 16, "support": 10}


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "tasks": TASKS,
        "learner": {"kind": "ppo", "copies": 2, "horizon": 8, "epochs": 1, "minibatch": 8, "context": 2},
        "agent": AGENT,
        "progress": {"num_stages": 3, "t_min": 1, "t_max": 2, "passes": 1, "hysteresis": None},
        "eval_every": 1,
        "eval_episodes": 2,
        "max_env_steps": 192,  # six iterations
        "save_every": 2,
        "output_dir": str(folder),
        **changes,
    }


def weights(run: ScaleZero) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.agent.state_dict().items()}


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ScaleZero:
    run = ScaleZero(options(tmp_path_factory.mktemp("whole") / "run"))
    run.run()
    return run


def test_stages_end_by_their_budget_and_the_optimizer_follows(whole: ScaleZero) -> None:
    assert whole.staged is not None and whole.staged.stage == 2 and whole.iteration == 6
    assert [switch.reason for switch in whole.ledger.switches] == ["budget", "budget"]
    held = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in whole.agent.parameters() if p.requires_grad}
    trained = next(iter(whole.staged.linears.values())).stages
    assert trained is not None and any(p.abs().sum() > 0 for n, p in trained.named_parameters() if "lora_B" in n)
    assert whole.ledger.arm == "dps" and whole.ledger.interactions == 192
    lines = [json.loads(line) for line in (whole.folder / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [0, 1, 1, 2, 2, 2] and set(lines[0]["returns"]) == {"one", "two"}
    assert Ledger.load(whole.folder / "ledger.json").to_dict() == whole.ledger.to_dict()


@pytest.mark.parametrize("moment", [3, 5])
def test_a_killed_run_goes_on_as_if_it_had_not_been(whole: ScaleZero, tmp_path: Path, moment: int) -> None:
    def kill(what: str, numbers: Mapping[str, Any]) -> None:
        if what == "iteration" and run.iteration == moment:
            raise Killed

    run = ScaleZero(options(tmp_path / "run"), kill)
    with pytest.raises(Killed):
        run.run()
    again = ScaleZero(options(tmp_path / "run"))
    again.run(resume=True)
    assert same(weights(again), weights(whole))
    assert again.ledger.to_dict() == whole.ledger.to_dict()
    assert (again.folder / "log.jsonl").read_text() == (whole.folder / "log.jsonl").read_text()


def test_the_end_of_a_stage_is_kept_exactly(tmp_path: Path) -> None:
    run = ScaleZero(options(tmp_path / "run", eval_every=100))
    run.folder.mkdir()
    (run.folder / "log.jsonl").touch()
    run.iterate()
    found, context = [], run.learner.contexts["one"]
    assert run.staged is not None
    with torch.no_grad():
        for _ in range(2):
            found.append(run.agent.trunk(*run.agent.tokens("one", context))[0])
            run.staged.advance()
            run._follow(run.scheduler.decide(run.iteration))
            before = found[-1]
            with run.staged.at(len(found) - 1):
                assert torch.equal(run.agent.trunk(*run.agent.tokens("one", context))[0], before)
    assert run.staged.stage == 2


def test_a_solved_task_leaves_and_what_it_had_stays(tmp_path: Path) -> None:
    easy = [{**TASKS[0], "target": 1.0}, TASKS[1]]
    run = ScaleZero(options(tmp_path / "run", tasks=easy, answer="prefix"))
    parts: list[dict[str, torch.Tensor]] = []
    returns: list[list[float]] = []

    def look(what: str, numbers: Mapping[str, Any]) -> None:
        if what == "evaluation":
            parts.append({name: t.clone() for name, t in run.agent.part("one").state_dict().items()})
            if run.staged is not None and run.staged.stage > 0:
                returns.append(run.evaluate("one", 0))

    run.watch = look
    ledger = run.run()
    assert ledger.tasks["one"].interactions == 16 and ledger.tasks["two"].interactions > 100
    assert all(same(part, parts[0]) for part in parts[1:])
    assert len(returns) > 2 and all(each == returns[0] for each in returns), "the prefix plays another game"
    solve = ledger.solved("one")
    assert solve is not None and (solve.step, solve.stage) == (1, 0)
    (end,) = [entry for entry in ledger.tasks["one"].retention if entry.when == "end"]
    assert end.prefix is not None and end.prefix == pytest.approx(sum(returns[0]) / 2)


def test_a_run_ends_when_all_is_solved_and_arms_have_names(tmp_path: Path) -> None:
    easy = [{**task, "target": 1.0} for task in TASKS]
    for arm, changes in {"joint": {"stages": None, "prune": False}, "prune": {"stages": None}}.items():
        ledger = ScaleZero(options(tmp_path / arm, tasks=easy, **changes)).run()
        assert ledger.arm == arm and ledger.complete and ledger.interactions == 32 and not ledger.switches
        assert all(record.retention[-1].prefix is None for record in ledger.tasks.values())


class Broken(gymnasium.Env[np.ndarray, np.int64]):
    """Rewards are numbers for thirty steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, render_mode: None = None) -> None:
        self.steps = 0

    def reset(self, **options: Any) -> Any:
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return np.zeros(2, np.float32), float("nan") if self.steps > 30 else 1.0, self.steps % 10 == 0, False, {}


def test_a_task_whose_rewards_are_no_numbers_is_given_up_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gymnasium.register("Broken-v0", Broken)
    try:
        tasks = [{"name": "bad", "id": "Broken-v0", "target": UNREACHABLE}, TASKS[1]]
        ledger = ScaleZero(options(tmp_path / "run", tasks=tasks)).run()
    finally:
        gymnasium.registry.pop("Broken-v0")
    assert "'bad'" in str(ledger.tasks["bad"].stopped) and "task bad" in caplog.text
    assert ledger.tasks["two"].stopped is None and ledger.tasks["two"].interactions > ledger.tasks["bad"].interactions


def test_what_cannot_be_is_refused(whole: ScaleZero, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        ScaleZero(options(whole.folder)).run()
    with pytest.raises(UserError, match="no checkpoint to go on with"):
        ScaleZero(options(tmp_path / "run")).run(resume=True)
    with pytest.raises(CheckpointError, match="other learning_rate"):
        ScaleZero(options(whole.folder, learning_rate=0.5)).run(resume=True)
    for changes, message in {
        "tasks": ([TASKS[0], TASKS[0]], "each needs a name of its own"),
        "progress": ({"targets": {"one": 1}}, "leave it out"),
    }.items():
        with pytest.raises(ConfigError, match=message[1]):
            ScaleZero(options(tmp_path / "run", **{changes: message[0]}))
    with pytest.raises(ConfigError, match="there is no prefix"):
        ScaleZero(options(tmp_path / "run", stages=None, answer="prefix"))
