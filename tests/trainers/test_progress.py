"""The progress scheduler: LightZero's controller, our own rules, and what must hold whatever is observed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora.errors import CheckpointError, ConfigError, DataError, UserError
from moelora.trainers import progress
from moelora.trainers.progress import Decision, ProgressConfig, ProgressScheduler

FIXTURES = Path(__file__).parents[1] / "fixtures"
LIGHTZERO: dict[str, Any] = {"measured": "zero", "passes": 1, "hysteresis": None}


def scheduler(tasks: int = 4, start: int = 0, **options: Any) -> ProgressScheduler:
    """Tasks ``a``, ``b`` and so on, solved at 1; stages of 10 to 50 steps, and one passing evaluation is enough."""
    targets = {chr(ord("a") + number): 1.0 for number in range(tasks)}
    rules = {"targets": targets, "num_stages": 3, "t_min": 10, "t_max": 50, "passes": 1, **options}
    return ProgressScheduler(rules, start)


class LightZero:
    """The controller in the words of specs and code: counts alone, and no idea of which task is which."""

    def __init__(self, num_stages: int, t_min: int, t_max: int) -> None:
        self.num_stages, self.t_min, self.t_max = num_stages, t_min, t_max
        self.stage = self.last_switch = self.last_solved = 0

    def tick(self, step: int, solved: int, total: int) -> bool:
        if self.stage == 0 and step < self.t_min:
            return False
        left = self.num_stages - 1 - self.stage
        if left <= 0:
            return False
        quota = max(1, math.ceil((total - solved) / left))
        if not (solved - self.last_solved >= quota or step - self.last_switch >= self.t_max):
            return False
        self.stage, self.last_switch, self.last_solved = self.stage + 1, step, solved
        return True


# -- LightZero ---------------------------------------------------------------------------------------------------------


def test_the_trace_of_lightzero() -> None:
    trace = json.loads((FIXTURES / "lightzero_curriculum_lora" / "controller_trace.json").read_text())
    ours = scheduler(
        trace["total_tasks"],
        num_stages=trace["stage_num"],
        t_min=trace["min_stage0_iters"],
        t_max=trace["max_stage_iters"],
        **LIGHTZERO,
    )
    tasks, reasons = list(ours.config.targets), {}
    assert len(trace["trace"]) == 32
    for line in trace["trace"]:
        for task in tasks[len(ours.solved) : line["solved"]]:
            ours.observe(task, 1.0, line["iter"])
        decision = ours.decide(line["iter"])
        assert (decision.stage, decision.switched) == (line["stage"], line["switched"])
        if decision.switched:
            reasons[decision.step] = decision.reason
    assert reasons == {10_000: "both", 15_000: "both", 20_000: "budget", 25_000: "budget"}
    assert ours.solved == tuple(tasks)


Ticks = list[tuple[int, list[float]]]


@st.composite
def ticks(draw: st.DrawFn, tasks: int = 4, most: int = 30) -> Ticks:
    """Steps that grow, and at each the metric of every task."""
    gaps = draw(st.lists(st.integers(0, 20), max_size=most))
    metrics = st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0, 2.0]), min_size=tasks, max_size=tasks)
    step, found = 0, []
    for gap in gaps:
        step += gap
        found.append((step, draw(metrics)))
    return found


def run(ours: ProgressScheduler, given: Ticks) -> list[Decision]:
    decisions = []
    for step, metrics in given:
        for task, metric in zip(ours.config.targets, metrics, strict=True):
            ours.observe(task, metric, step)
        decisions.append(ours.decide(step))
    return decisions


@settings(deadline=None)
@given(ticks(), st.integers(1, 5), st.sampled_from([0, 7, 40]), st.sampled_from([1, 15, 60]), st.booleans())
def test_every_course_of_lightzero(given: Ticks, stages: int, t_min: int, t_max: int, reopens: bool) -> None:
    """One stage, T_min = 0, T_max below T_min, everything solved, several at once, and solved tasks that are lost."""
    rules = {**LIGHTZERO, "hysteresis": 0.2 if reopens else None}
    ours = scheduler(4, num_stages=stages, t_min=t_min, t_max=t_max, **rules)
    theirs = LightZero(stages, t_min, t_max)
    for step, metrics in given:
        for task, metric in zip(ours.config.targets, metrics, strict=True):
            ours.observe(task, metric, step)
        switched = theirs.tick(step, len(ours.solved), 4)
        decision = ours.decide(step)
        assert (decision.stage, decision.switched) == (theirs.stage, switched)


def test_lightzero_switches_for_nothing_and_stage_does_not() -> None:
    for rules, stage in ((LIGHTZERO, 1), ({"measured": "stage"}, 0)):
        ours = scheduler(2, **rules)
        for task in "ab":
            ours.observe(task, 1.0, 5)
        assert ours.active == () and ours.quota == 1
        assert ours.decide(9).stage == 0
        assert ours.decide(60).stage == stage


def test_the_budget_of_lightzero_runs_out_at_t_min() -> None:
    """T_max counts from step 0, so that where it is not above T_min stage 0 ends there, whatever was solved."""
    ours = scheduler(4, t_min=50, t_max=20, **LIGHTZERO)
    assert [ours.decide(step).reason for step in (20, 49, 50)] == ["none", "none", "budget"]
    with pytest.raises(ConfigError, match=r"t_max is 20 and t_min 50.*measured: zero"):
        scheduler(4, t_min=50, t_max=20)


def test_a_lost_task_counts_against_lightzeros_quota() -> None:
    for rules, newly in (({**LIGHTZERO, "hysteresis": 0.0}, 0), ({}, 1)):
        ours = scheduler(4, num_stages=4, **rules)
        ours.observe("a", 1.0, 5)
        assert ours.decide(50).switched
        ours.observe("a", 0.0, 51)
        assert ours.newly == (-1 if rules else 0)
        ours.observe("b", 1.0, 52)
        assert ours.newly == newly


# -- our own rules -----------------------------------------------------------------------------------------------------


def test_both_clocks_start_with_the_stage() -> None:
    ours = scheduler(6, num_stages=4, start=1000)
    ours.observe("a", 1.0, 1001)
    ours.observe("b", 1.0, 1002)
    assert ours.quota == 2
    assert ours.decide(1009).reason == "none"  # the quota is met, and T_min is not
    assert ours.decide(1010).reason == "quota"
    ours.observe("c", 1.0, 1011)
    ours.observe("d", 1.0, 1011)
    assert ours.decide(1019).reason == "none"
    assert ours.decide(1020).reason == "quota"
    assert ours.decide(1069).reason == "none"
    assert ours.decide(1070).reason == "budget"
    assert ours.stage == 3
    ours.observe("e", 1.0, 1071)
    assert ours.decide(5000).reason == "none"  # the last stage has no end


def test_the_quota_is_an_even_share_of_the_stages_left() -> None:
    """n tasks over S stages: with one solved at a time, each stage ends after its share."""
    ours = scheduler(8, num_stages=4, t_min=0, t_max=10**6)
    ends = []
    for step, task in enumerate(ours.config.targets):
        ours.observe(task, 1.0, step)
        if ours.decide(step).switched:
            ends.append(step + 1)
    assert ends == [2, 4, 6]
    fixed = scheduler(8, num_stages=4, t_min=0, t_max=10**6, quota=3)
    assert [fixed.observe(task, 1.0, 0) or fixed.decide(0).stage for task in "abcdef"] == [0, 0, 1, 1, 1, 2]


def test_one_stage_never_ends() -> None:
    ours = scheduler(2, num_stages=1)
    ours.observe("a", 1.0, 20)
    decision = ours.decide(1000)
    assert decision.solved == ("a",) and decision.active == ("b",) and not decision.switched


def test_passes_in_a_row() -> None:
    ours = scheduler(2, passes=3)
    for step, metric in enumerate([1.0, 1.0, 0.99, 1.0, 1.0]):
        ours.observe("a", metric, step)
    assert ours.decide(5).solved == ()
    ours.observe("a", [0.5, 1.5], 6)
    assert ours.decide(6).solved == ("a",)
    assert ours.decide(7).solved == () and ours.solved == ("a",)


def test_mean_less_standard_errors() -> None:
    """Mean 1.5 and standard error 0.5 of (1, 2): one passes at a target of 1, two do not."""
    for errors, expected in ((0.0, ("a",)), (1.0, ("a",)), (2.0, ())):
        ours = scheduler(1, standard_errors=errors)
        ours.observe("a", [1.0, 2.0], 1)
        assert ours.solved == expected
    with pytest.raises(DataError, match="task 'a': one result has no standard error"):
        scheduler(1, standard_errors=1.0).observe("a", [1.0], 1)


def test_hysteresis_and_opening_again() -> None:
    ours = scheduler(2, hysteresis={"a": 0.2, "b": 0.0})
    for task in "ab":
        ours.observe(task, 1.0, 1)
    ours.decide(1)
    for task in "ab":
        ours.observe(task, 0.85, 2)
    decision = ours.decide(2)
    assert decision.reopened == ("b",) and decision.active == ("b",) and ours.solved == ("a",)
    ours.observe("a", 0.7, 3)
    assert ours.decide(3).reopened == ("a",)
    never = scheduler(2, hysteresis=None)
    never.observe("a", 1.0, 1)
    never.observe("a", -1e9, 2)
    assert never.solved == ("a",)
    with pytest.raises(ConfigError, match="hysteresis is about a, but the tasks are a, b"):
        scheduler(2, hysteresis={"a": 0.1})


def test_a_task_solved_again_is_not_new() -> None:
    ours = scheduler(6, num_stages=4)
    ours.observe("a", 1.0, 1)
    assert ours.decide(50).reason == "budget"
    for metric in (0.0, 1.0):
        ours.observe("a", metric, 51)
    assert ours.newly == 0
    ours.observe("b", 1.0, 52)
    assert ours.newly == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_stops_its_task_alone(bad: float) -> None:
    ours = scheduler(3, num_stages=3)
    ours.observe("a", 1.0, 1)
    ours.observe("b", [0.5, bad], 2)
    decision = ours.decide(10)
    assert decision.stopped == {"b": f"task 'b': its metric is {bad} at 2 steps (result 2 of 2)"}
    assert decision.active == ("c",) and decision.solved == ("a",)
    assert decision.reason == "quota"  # of three tasks two are to be solved, of two one
    ours.observe("b", 5.0, 11)
    ours.observe("a", bad, 11)
    decision = ours.decide(12)
    assert ours.solved == () and decision.reopened == () and set(decision.stopped) == {"a"}
    ours.observe("c", 1.0, 13)
    assert ours.decide(500).active == () and ours.stage == 1


def test_mistakes_say_what_to_do() -> None:
    ours = scheduler(2)
    with pytest.raises(ConfigError, match="task 'A' has no target: targets has a, b"):
        ours.observe("A", 1.0, 0)
    with pytest.raises(DataError, match="task 'a': an evaluation at 3 steps without results"):
        ours.observe("a", [], 3)
    with pytest.raises(UserError, match="2 steps were given after 3 steps"):
        ours.decide(2)
    with pytest.raises(UserError, match="2 steps were given after 3 steps"):
        ours.observe("a", 1.0, 2)
    with pytest.raises(ConfigError, match="targets"):
        ProgressConfig.parse({"targets": {}})
    with pytest.raises(ConfigError, match=r"targets\.a"):
        ProgressConfig.parse({"targets": {"a": math.nan}})


# -- whatever is observed ----------------------------------------------------------------------------------------------


RULES = st.fixed_dictionaries(
    {
        "num_stages": st.integers(1, 5),
        "t_min": st.integers(0, 30),
        "t_max": st.integers(31, 80),
        "passes": st.integers(1, 3),
        "hysteresis": st.sampled_from([None, 0.0, 0.3]),
        "quota": st.sampled_from([None, 1, 2]),
    }
)


@settings(deadline=None)
@given(ticks(), RULES)
def test_what_holds_of_every_run(given: Ticks, rules: dict[str, Any]) -> None:
    decisions = run(scheduler(4, **rules), given)
    switches = [decision for decision in decisions if decision.switched]
    assert len(switches) <= rules["num_stages"] - 1
    began = 0
    for decision in switches:
        assert decision.step - began >= rules["t_min"] and decision.active
        began = decision.step
    for before, after in pairwise(decisions):
        assert after.stage - before.stage == after.switched
        assert set(after.active) == (set(before.active) - set(after.solved)) | set(after.reopened)
        assert not set(after.solved) & set(after.reopened)
    assert all(decision.quota >= 1 for decision in decisions)


@settings(deadline=None)
@given(ticks(), RULES, st.sampled_from(["stage", "zero"]), st.data())
def test_a_resumed_scheduler_goes_on_as_if_it_had_not_stopped(
    given: Ticks, rules: dict[str, Any], measured: str, data: st.DataObject
) -> None:
    given = [
        (step, [math.nan if number == 2 and step > 90 else m for number, m in enumerate(ms)]) for step, ms in given
    ]
    whole = scheduler(4, measured=measured, **rules)
    expected = run(whole, given)
    cut = data.draw(st.integers(0, len(given)))
    first = scheduler(4, measured=measured, **rules)
    begun = run(first, given[:cut])
    late = cut < len(given) and data.draw(st.booleans())
    if late:  # between an evaluation and the decision about it
        step, metrics = given[cut]
        for task, metric in zip(first.config.targets, metrics, strict=True):
            first.observe(task, metric, step)
    second = scheduler(4, measured=measured, **rules)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    if late:
        begun.append(second.decide(given[cut][0]))
    assert begun + run(second, given[cut + late :]) == expected
    assert second.state_dict() == whole.state_dict()


def test_states_that_do_not_fit_are_refused() -> None:
    ours = scheduler(2)
    ours.observe("a", 1.0, 7)
    state = ours.state_dict()
    with pytest.raises(CheckpointError, match="t_max was 50 and is 60: resume with the rules"):
        scheduler(2, t_max=60).load_state_dict(state)
    for key, value in {"stage": 3, "solved": ["c"], "streaks": {"a": 1}}.items():
        with pytest.raises(CheckpointError, match="damaged"):
            scheduler(2).load_state_dict({**state, key: value})
    other = scheduler(2)
    with pytest.raises(CheckpointError, match=r"stage: .*greater than or equal to 0"):
        other.load_state_dict({**state, "stage": -1})
    with pytest.raises(CheckpointError, match="unknown key 'more'"):
        other.load_state_dict({**state, "more": 1})
    assert other.state_dict() == scheduler(2).state_dict()


def test_the_scheduler_knows_nothing_of_what_is_trained() -> None:
    """Its file alone, with the package's configuration in place, imports no torch, no trainer, no environment."""
    source = Path(progress.__file__).read_text(encoding="utf-8")
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    allowed = ("__future__", "math", "statistics", "collections.abc", "dataclasses", "typing", "pydantic")
    local = ("..errors", "..registry", "..schema")
    assert {line.split()[1] for line in imports} <= {*allowed, *local}
    # and the three of ours import none either
    code = (
        "import sys, types; package = types.ModuleType('moelora'); "
        f"package.__path__ = [{str(Path(sys.modules['moelora'].__file__ or '').parent)!r}]; "
        "sys.modules['moelora'] = package; import moelora.schema, moelora.registry, moelora.errors; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
