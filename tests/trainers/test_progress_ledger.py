"""The ledger of a run: what it counts, that its file says all of it, and which comparisons it refuses."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from moelora.errors import CheckpointError, ConfigError, DataError, UserError
from moelora.trainers.progress import ProgressScheduler
from moelora.trainers.progress_gather import gather_evaluations, gather_solved
from moelora.trainers.progress_ledger import Ledger, Solve, Switch, ratio

RULES: dict[str, Any] = {"targets": {"a": 1.0, "b": 5.0}, "num_stages": 3, "t_min": 10, "t_max": 50, "passes": 1}


def run_of_two(**options: Any) -> Ledger:
    """``a`` is solved at 20, lost at 30, solved again at 40 in stage 1; ``b`` at 90. Each step costs each task 2."""
    scheduler, ledger = ProgressScheduler(RULES), Ledger(RULES, **options)
    a = {20: 1.0, 30: 0.5, 40: 1.5}
    for step in range(10, 100, 10):
        for task in scheduler.active:
            ledger.spend(task, 20)
        scheduler.observe("a", a.get(step, 1.0 if step > 20 else 0.0), step)
        scheduler.observe("b", 6.0 if step == 90 else 0.0, step)
        decision = scheduler.decide(step)
        ledger.record(decision)
        for task in decision.solved:
            ledger.retain(task, "solve", 1.5 if task == "a" else 6.0, step)
    return ledger


def spent(arm: str, seed: int, count: int, done: bool = True) -> Ledger:
    """A run that spent so much on ``a``."""
    prunes, grows = {"joint": (0, 0), "prune": (1, 0), "adapters": (0, 1), "dps": (1, 1)}[arm]
    ledger = Ledger(RULES, prunes=bool(prunes), grows=bool(grows), seed=seed)
    ledger.spend("a", count)
    if done:
        for record in ledger.tasks.values():
            record.solves.append(Solve(step=1, stage=0, interactions=count))
    return ledger


def test_what_a_run_writes_down() -> None:
    ledger = run_of_two()
    a, b = ledger.tasks["a"], ledger.tasks["b"]
    assert ledger.switches == [
        Switch(step=20, stage=1, reason="quota"),
        Switch(step=70, stage=2, reason="budget"),
    ]
    assert a.solves == [Solve(step=20, stage=0, interactions=40), Solve(step=40, stage=1, interactions=60)]
    assert a.reopened == [30] and a.interactions == 60
    assert b.solves == [Solve(step=90, stage=2, interactions=180)]
    assert ledger.solved("a") == a.solves[-1] and ledger.complete and ledger.interactions == 240


def test_the_file_says_all_of_it(tmp_path: Path) -> None:
    ledger = run_of_two(seed=3)
    ledger.retain("a", "end", 0.9, 99, prefix=1.5)
    path = tmp_path / "run" / "ledger.json"
    ledger.save(path)
    again = Ledger.load(path)
    assert again.to_dict() == ledger.to_dict() == json.loads(path.read_text())
    assert again.seed == 3 and again.arm == "dps" and again.tasks["a"] == ledger.tasks["a"]
    assert [file.name for file in path.parent.iterdir()] == ["ledger.json"]
    for change, message in (
        ({"seed": "x"}, "seed: "),
        ({"more": 1}, "more"),
        ({"tasks": {"a": {}}}, "its tasks are not those of its targets, a, b"),
        ({"tasks": {"a": {"interactions": 1, "spent": 2}, "b": {}}}, "spent"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Ledger.from_dict({**ledger.to_dict(), **change})


def test_what_became_of_solved_tasks() -> None:
    ledger = run_of_two()
    with pytest.raises(DataError, match="task 'a' was not evaluated at the end of the run"):
        ledger.below_target()
    ledger.retain("a", "end", 0.9, 99, prefix=1.5)
    ledger.retain("b", "end", 6.0, 99)
    assert ledger.below_target() == ("a",)
    with pytest.raises(DataError, match="task 'b' was not evaluated with its prefix"):
        ledger.below_target(prefix=True)
    ledger.retain("b", "end", 6.0, 99, prefix=6.0)
    assert ledger.below_target(prefix=True) == ()
    assert [entry.when for entry in ledger.tasks["a"].retention] == ["solve", "solve", "end"]
    with pytest.raises(DataError, match="not a finite number"):
        ledger.retain("b", "end", float("nan"), 99)
    with pytest.raises(DataError, match="task 'a' was not solved"):
        Ledger(RULES).retain("a", "end", 1.0, 1)


def test_a_stopped_task_is_not_solved() -> None:
    scheduler, ledger = ProgressScheduler(RULES), Ledger(RULES)
    scheduler.observe("a", 1.0, 1)
    ledger.record(scheduler.decide(1))
    scheduler.observe("a", float("nan"), 2)
    scheduler.observe("b", 9.0, 2)
    ledger.record(scheduler.decide(2))
    assert ledger.tasks["a"].stopped == "task 'a': its metric is nan at 2 steps"
    assert ledger.solved("a") is None and ledger.solved("b") is not None and not ledger.complete
    json.dumps(ledger.to_dict(), allow_nan=False)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="task 'c' has no target"):
        Ledger(RULES).spend("c", 1)
    with pytest.raises(UserError, match="-1 interactions"):
        Ledger(RULES).spend("a", -1)


def test_a_saving_is_told_beside_pruning_alone() -> None:
    """The sums of the measured small setting of three seeds."""
    joint = [spent("joint", seed, count) for seed, count in enumerate((276_480, 368_640, 368_640))]
    prune = [spent("prune", seed, count) for seed, count in enumerate((240_640, 245_760, 220_160))]
    dps = [spent("dps", seed, count) for seed, count in enumerate((250_880, 245_760, 215_040))]
    found = ratio(dps, joint, prune)
    assert str(found) == "interactions over those of the joint runs (3 seeds): dps = 0.702; pruning alone = 0.697"
    assert (found.value, found.prune) == (711_680 / 1_013_760, 706_560 / 1_013_760)
    with pytest.raises(ConfigError, match="a saving says nothing about stages without them"):
        ratio(dps, joint, [])
    with pytest.raises(ConfigError, match="prune: a run of the arm 'dps' is among them, expected 'prune' alone"):
        ratio(dps, joint, dps)
    with pytest.raises(ConfigError, match="reference: a run of the arm 'prune'"):
        ratio(dps, prune, prune)
    with pytest.raises(ConfigError, match="runs: no runs"):
        ratio([], joint, prune)
    with pytest.raises(ConfigError, match="reference: no runs"):
        ratio(dps, [], prune)
    with pytest.raises(ConfigError, match=r"prune: seeds \[0, 1\], and those of the reference are \[0, 1, 2\]"):
        ratio(dps, joint, prune[:2])
    with pytest.raises(ConfigError, match="one run for each seed"):
        ratio([dps[0]] * 3, [joint[0]] * 3, [prune[0]] * 3)
    with pytest.raises(ConfigError, match="the joint runs spent no interactions"):
        ratio(dps[:1], [spent("joint", 0, 0)], prune[:1])


@pytest.mark.parametrize("change", [{"targets": {"a": 1.0, "b": 4.0}}, {"unit": "tokens"}, {"passes": 2}])
def test_other_targets_are_not_compared(change: dict[str, Any]) -> None:
    other = Ledger(RULES, **change) if "unit" in change else Ledger({**RULES, **change})
    with pytest.raises(ConfigError, match=f"runs: {next(iter(change))} is .* and .* in the reference"):
        ratio([other], [spent("joint", 0, 10)], [spent("prune", 0, 5)])


def test_a_run_that_did_not_solve_all_is_a_bound() -> None:
    def signs(run: bool, reference: bool) -> tuple[str, str]:
        found = ratio([spent("adapters", 0, 9, run)], [spent("joint", 0, 10, reference)], [spent("prune", 0, 5)])
        return found.sign, found.prune_sign

    assert signs(True, True) == ("=", "=")
    assert signs(False, True) == (">=", "=")
    assert signs(True, False) == ("<=", "<=")
    assert signs(False, False) == ("?", "<=")


def gather(rank: int, port: int, results: Any) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mine = {"b": [1.0, float(rank)], "ac"[rank]: [float(rank)]}
    scheduler = ProgressScheduler({**RULES, "targets": {"a": 0.0, "b": 0.75, "c": 2.0}})
    for task, values in gather_evaluations(mine).items():
        scheduler.observe(task, values, 1)
    results.put((rank, gather_evaluations(mine), gather_solved(["a", "b"][rank:]), scheduler.state_dict()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_processes_find_out_the_same(processes: Any) -> None:
    assert gather_solved(["b", "a"]) == ("a", "b")
    assert gather_evaluations({"b": [1.0], "a": [2.0]}) == {"a": [2.0], "b": [1.0]}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = processes.Queue()
    children = [processes.Process(target=gather, args=(rank, port, results)) for rank in range(2)]
    for child in children:
        child.start()
    found = sorted((results.get(timeout=90) for _ in children), key=lambda entry: entry[0])
    for child in children:
        child.join(30)
    assert found[0][1:] == found[1][1:]
    assert found[0][1] == {"a": [0.0], "b": [1.0, 0.0, 1.0, 1.0], "c": [1.0]}
    assert found[0][2] == ("a", "b") and found[0][3]["solved"] == ["a", "b"]
