"""Reports of ScaleZero: the page of a run, films of its tasks, and the table of arms with what they saved."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moelora.errors import DataError
from moelora.trainers import Ledger, ScaleZero
from moelora.trainers.progress_ledger import Solve, Switch
from moelora.trainers.scalezero_figures import pool, retention, returns, totals, when_solved
from moelora.trainers.scalezero_report import read_log, write_arms, write_report

CART = {"id": "CartPole-v1", "max_episode_steps": 20}
TARGETS = {"one": 1.0, "two": 10_000.0}
RULES = {"targets": TARGETS, "num_stages": 3, "t_min": 1, "t_max": 2, "passes": 1, "hysteresis": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ScaleZero:
    """``one`` is solved at once, in stage 0."""
    run = ScaleZero(
        {
            "tasks": [{"name": name, **CART, "target": target} for name, target in TARGETS.items()],
            "learner": {"kind": "ppo", "copies": 2, "horizon": 8, "epochs": 1, "minibatch": 8, "context": 2},
            "agent": {
                "trunk": {"dim": 16, "layers": 1, "heads": 2, "experts": 2},
                "head_dim": 16,
                "support": 10,
            },
            "progress": {key: RULES[key] for key in ("num_stages", "t_min", "t_max", "passes", "hysteresis")},
            "answer": "prefix",
            "eval_every": 1,
            "eval_episodes": 2,
            "max_env_steps": 96,
            "output_dir": str(tmp_path_factory.mktemp("scalezero") / "run"),
        }
    )
    run.run()
    return run


def test_the_page_of_a_run(run: ScaleZero) -> None:
    path = write_report(run.folder)
    first = path.read_bytes()
    assert path.name == "scalezero.html" and write_report(run.folder).read_bytes() == first
    text = path.read_text(encoding="utf-8")
    assert "1 of 2 tasks solved in the end" in text and "Arm dps, answered prefix, seed 0: 96 environment steps" in text
    assert all(f'id="{name}"' in text for name in ("returns", "pool", "spent", "kept"))
    live, prefix = (run.ledger.tasks["one"].retention[-1].metric, run.ledger.tasks["one"].retention[-1].prefix)
    assert f"<td>one</td><td>1</td><td>16</td><td>16</td><td>0</td><td>{prefix:.1f}</td><td>{live:.1f}</td>" in text


def test_figures_show_what_the_log_says(run: ScaleZero) -> None:
    moments = read_log(run.folder / "log.jsonl")
    figure = returns(moments, TARGETS)
    one, two = figure.data
    assert list(one.x) == list(two.x) == [moment.spent for moment in moments] and one.x[-1] == 96
    assert [round(moment.returns["two"], 3) for moment in moments] == list(two.y)
    assert list(one.marker.symbol) == ["star", *["circle-open"] * (len(moments) - 1)]
    assert set(two.marker.symbol) == {"circle"}
    ends = [moment for moment in moments if moment.switched]
    assert [moment.stage for moment in ends] == [switch.stage for switch in run.ledger.switches] and len(ends) == 2
    dashed = [shape.y0 for shape in figure.layout.shapes if shape.line.dash == "dash"]
    dotted = [shape.x0 for shape in figure.layout.shapes if shape.line.dash == "dot"]
    assert dashed == list(TARGETS.values()) and dotted == 2 * [moment.spent for moment in ends]
    solved = pool(moments, 2)
    assert list(solved.data[0].y) == [0, *[1] * len(moments)]
    assert [note.text for note in solved.layout.annotations] == [f"stage {m.stage}: {m.reason}" for m in ends]
    (marks,) = retention({"one": run.ledger.tasks["one"]}, TARGETS).data
    assert list(marks.y) == ["when solved", "end, live", "end, prefix"] and marks.x[0] == marks.x[2]


def test_a_run_that_goes_on_has_a_page_too_and_what_is_no_run_has_none(run: ScaleZero, tmp_path: Path) -> None:
    log = (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "config.yaml").write_text((run.folder / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    for lines, said in ((log[:2], "1 of 2 tasks solved so far"), ([], "0 of 2 tasks solved so far")):
        (tmp_path / "log.jsonl").write_text("".join(lines), encoding="utf-8")
        text = write_report(tmp_path).read_text(encoding="utf-8")
        assert said in text and 'id="kept"' not in text
    (tmp_path / "log.jsonl").write_text(log[0] + log[1].replace('"stage"', '"phase"'), encoding="utf-8")
    with pytest.raises(DataError, match="line 2: stage"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="no run to report on"):
        write_report(tmp_path / "nowhere")


def test_a_film_is_played_with_the_trunk_that_answers_for_the_task(run: ScaleZero, tmp_path: Path) -> None:
    path = tmp_path / "films" / "one.gif"
    assert run.record("one", path) == run.evaluate("one", 0)[0]
    with Image.open(path) as film:
        assert film.n_frames > 2  # type: ignore[attr-defined]


def test_a_task_that_was_opened_again_is_evaluated_at_the_end_too(run: ScaleZero, tmp_path: Path) -> None:
    again = ScaleZero({**run.config.to_dict(), "output_dir": str(tmp_path / "run")})
    again._start(resume=False)
    record = again.ledger.tasks["two"]
    record.solves.append(Solve(step=1, stage=0, interactions=8))
    record.reopened.append(2)
    again._conclude()
    assert again.ledger.solved("two") is None and again.ledger.below_target() == ("two",)
    assert record.retention[-1].when == "end" and record.retention[-1].metric == record.retention[-1].prefix


def ledger(arm: str, seed: int, one: int, two: int, done: bool = True, end: float = 2.0, **rules: Any) -> Ledger:
    """A run that spent so much on either task; ``one`` has the return ``end`` at the end, and more with its prefix."""
    prunes, grows = {"joint": (0, 0), "prune": (1, 0), "adapters": (0, 1), "dps": (1, 1)}[arm]
    made = Ledger({**RULES, **rules}, prunes=bool(prunes), grows=bool(grows), seed=seed)
    for task, count in (("one", one), ("two", two)):
        made.spend(task, count)
        if done or task == "one":
            made.tasks[task].solves.append(Solve(step=1, stage=0, interactions=count))
            made.retain(task, "end", end if task == "one" else 10_000.0, 9, 10_000.0 if grows else None)
    if grows:
        made.switches.append(Switch(step=1, stage=1, reason="quota"))
    return made


def arms() -> dict[str, list[Ledger]]:
    return {
        "joint": [ledger("joint", 0, 500, 500), ledger("joint", 1, 500, 500)],
        "prune": [ledger("prune", 0, 100, 500), ledger("prune", 1, 100, 700, end=0.5)],
        "dps <b>": [ledger("dps", 0, 100, 400, end=0.5), ledger("dps", 1, 100, 1000, done=False, end=0.5)],
    }


def test_arms_side_by_side(tmp_path: Path) -> None:
    path = write_arms(arms(), tmp_path / "a")
    write_arms(arms(), tmp_path / "b")
    names = ["arms.csv", "arms.html", "arms.json", "arms.md"]
    assert sorted(file.name for file in path.parent.iterdir()) == names and path.name == "arms.html"
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    found = json.loads((path.parent / "arms.json").read_text(encoding="utf-8"))
    assert found["arms"]["dps <b>"] == {
        "arm": "dps",
        "seeds": [0, 1],
        "environment_steps": [500, 1100],
        "complete": [True, False],
        "solved": 3,
        "tasks": 4,
        "below_live": 2,
        "below_prefix": 0,
        "last_stage": [1, 1],
    }
    assert found["arms"]["prune"]["below_live"] == 1 and found["arms"]["prune"]["below_prefix"] is None
    told = found["ratios"]
    assert list(told) == ["dps <b>"] and (told["dps <b>"]["value"], told["dps <b>"]["prune"]) == (0.8, 0.7)
    lines = (path.parent / "arms.md").read_text(encoding="utf-8").splitlines()
    assert "| dps <b> | 500, ≥ 1,100 | 3 of 4 | 2 | 0 | 1, 1 |" in lines
    assert lines[-1].endswith("dps >= 0.800; pruning alone = 0.700")
    rows = list(csv.DictReader((path.parent / "arms.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["environment_steps"] for row in rows] == ["1000", "1000", "600", "800", "500", "1100"]
    assert rows[-1]["complete"] == "False" and rows[0]["below_prefix"] == ""
    text = path.read_text(encoding="utf-8")
    assert "dps &lt;b&gt;" in text and "<td>dps <b>" not in text


def test_figures_of_arms_show_every_run_where_it_is() -> None:
    joint, prune, dps = totals(arms()).data
    assert (list(joint.x), list(prune.x), list(dps.x)) == ([1000, 1000], [600, 800], [500, 1100])
    assert list(dps.marker.symbol) == ["diamond", "diamond-open"]
    figure = when_solved(arms())
    assert [list(zip(trace.y, trace.x, strict=True)) for trace in figure.data[1:]] == [
        [("one", 100), ("one", 100), ("two", 500), ("two", 700)],
        [("one", 100), ("one", 100), ("two", 400)],
    ]
    assert {trace.orientation for trace in figure.data} == {"h"}, "arms would be shifted along the numbers"


@pytest.mark.parametrize("missing", ["joint", "prune"])
def test_nothing_is_told_of_a_saving_without_the_arm_that_prunes_alone(tmp_path: Path, missing: str) -> None:
    runs = arms()
    del runs[missing]
    path = write_arms(runs, tmp_path)
    found = json.loads((tmp_path / "arms.json").read_text(encoding="utf-8"))["ratios"]
    assert list(found["dps <b>"]) == ["none"]
    told = (tmp_path / "arms.md").read_text(encoding="utf-8").splitlines()[-1]
    assert told.startswith("- dps <b>: no ratio (") and ("prune" if missing == "prune" else "reference") in told
    assert "pruning alone" not in path.read_text(encoding="utf-8")


def test_arms_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    joint = ledger("joint", 0, 1, 1)
    other = Ledger({**RULES, "targets": {"one": 1.0}}, prunes=False, grows=False, seed=1)
    for runs, message in (
        ({}, "none of any"),
        ({"joint": []}, "none of joint"),
        ({"joint": [joint, ledger("prune", 1, 1, 1)]}, "arms joint, prune"),
        ({"joint": [joint, joint]}, r"seeds \[0, 0\]"),
        ({"joint": [joint, other]}, "joint, seed 1: it has the tasks one, others have one, two"),
    ):
        with pytest.raises(DataError, match=message):
            write_arms(runs, tmp_path / "none")
    assert not (tmp_path / "none").exists()
