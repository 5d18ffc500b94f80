"""``moelora eval`` in the process that the user would start: ways of scoring, harness tasks, recorded routing."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager
from questions import ROWS, build_model, write_questions, write_task

from moelora.analysis import RoutingStats
from moelora.cli.app import main

pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(autouse=True, scope="module")
def _process_as_before() -> Iterator[None]:
    logger = logging.getLogger("moelora")
    before = logger.handlers, logger.level, logger.propagate
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"GOMP_SPINCOUNT": "20000", "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}.items():
            patch.setenv(name, value)
        yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, backbone_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    build_model(backbone_folder).save_pretrained(folder)
    data = write_questions(folder)
    train = folder / "train.jsonl"
    train.write_text(json.dumps({**ROWS[0], "prompt": "something else"}) + "\n")
    columns = {"options": "choices", "task": "kind"}
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"data": {"kind": "dataset", "path": str(train), "test_path": str(data), "columns": columns}})
    )
    return folder


class Run:
    """``moelora eval CHECKPOINT WORDS``: exit code, output and errors."""

    def __init__(self, checkpoint: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.words = ["eval", str(checkpoint), "--backbone", str(backbone)]
        self.capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*self.words, *words])
        captured = self.capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    def json(self, *words: str) -> dict[str, Any]:
        code, out, err = self(*words, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found


@pytest.fixture
def run(checkpoint: Path, backbone_folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(checkpoint, backbone_folder, capsys)


@pytest.mark.parametrize(
    ("score", "metric"), [("generate", "score"), ("exact", "exact_match"), ("options", "acc"), ("labels", "acc")]
)
def test_each_way_of_scoring_compares_and_records(run: Run, tmp_path: Path, score: str, metric: str) -> None:
    words = ["--score", score, "--max-new-tokens", "2"]
    found = run.json(*words, "--baseline", "--routing", str(tmp_path / "out"))
    assert found["metric"] == metric
    counts = {task: result["count"] for task, result in found["mixture"]["tasks"].items()}
    assert counts == {"animals": 2, "facts": 3} and set(found["backbone"]["tasks"]) == set(counts)
    assert found["difference"]["low"] <= found["difference"]["difference"] <= found["difference"]["high"]
    assert ("acc_norm" in found) == (score == "options")
    site = found["routing"]["sites"][0]
    assert set(site["tasks"]) == {"animals", "facts"}
    for task in site["tasks"].values():
        assert sum(task["load"]) == pytest.approx(1, abs=1e-5) and 0 < task["entropy"] <= 1 and task["tokens"] > 0
        assert all(task["load"][expert] < 0.05 / 4 for expert in task["dead"])
    stats = RoutingStats.from_json(tmp_path / "out" / "routing.json")
    assert stats.tasks == ("animals", "facts") and stats.tokens == found["routing"]["tokens"]
    rows = list(csv.DictReader((tmp_path / "out" / "routing.csv").open()))
    assert len(rows) == len(stats.sites) * 2 * 4
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores == {name: value for name, value in found.items() if name != "routing"}
    # The backbone alone has no routing, and recording changes no score.
    assert run.json(*words)["mixture"] == found["mixture"]


def test_tables_for_people_and_a_limit(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--score", "options", "--baseline", "--limit", "1", "--routing", str(tmp_path))
    assert code == 0, err
    assert "Acc [95 % interval]" in out and "Acc_norm [95 % interval]" in out and "mixture - backbone: " in out
    assert " animals " in out and f"wrote {tmp_path}/routing.json" in out
    found = run.json("--score", "options", "--limit", "1")
    assert {task: result["count"] for task, result in found["mixture"]["tasks"].items()} == {"animals": 1, "facts": 1}


def test_harness_tasks(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    task = str(write_task(tmp_path, "mine", checkpoint / "questions.jsonl"))
    found = run.json("--tasks", task, "--baseline", "--routing", str(tmp_path / "out"))
    value = found["mixture"]["results"]["mine"]["acc,none"]
    assert value in [n / 5 for n in range(6)] and found["mixture"]["results"]["mine"]["acc_stderr,none"] is not None
    assert found["difference"]["mine"]["acc,none"]["difference"] == pytest.approx(
        value - found["backbone"]["results"]["mine"]["acc,none"]
    )
    assert list(found["routing"]["sites"][0]["tasks"]) == ["mine"]
    code, out, _ = run("--tasks", task, "--limit", "1")
    assert code == 0
    row = next(line.split() for line in out.splitlines() if " acc " in line)
    assert row[1:8:2] == ["mine", "0", "1", "acc"] and "n/a" not in row  # one question has no standard error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "x.yaml", "--score", "exact"], "--score exact has no meaning with --tasks"),
        (["--tasks", "x.yaml", "data.test_size=3"], "KEY=VALUE has no meaning with --tasks"),
        (["--tasks", "nothing.yaml"], "--tasks nothing.yaml: no such file"),
        (["--num-fewshot", "0"], "--num-fewshot belongs to --tasks"),
        (["--chat-template"], "--chat-template belongs to --tasks"),
        (["--score", "options", "data.columns={task: kind}"], "has questions without options"),
        (["--score", "best"], "Invalid value for '--score'"),
        (["--limit", "0"], "Invalid value for '--limit'"),
        (["--routing", "FILE/inside"], "cannot be written to"),
    ],
)
def test_mistakes_are_2_and_say_what_to_do(run: Run, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = run(*(word.replace("FILE", str(tmp_path / "file")) for word in words))
    assert code == 2 and message in err and not out


def test_help_teaches_each_way(run: Run) -> None:
    code, out, _ = run("--help")
    text = " ".join(out.split())
    assert code == 0 and "pip install 'moelora[eval]'" in text
    for example in (
        "--score options data.columns.options=choices",
        "--tasks arc_easy,my_task.yaml",
        "--routing report",
    ):
        assert example in " ".join(text.replace("│", " ").split())


def test_an_unknown_task_names_the_closest(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_task(tmp_path, "my_task", tmp_path / "none.jsonl")
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **options: TaskManager(include_path=str(tmp_path), include_defaults=False)
    )
    code, _, err = run("--tasks", "my_tusk", "--include-path", str(tmp_path))
    assert code == 2 and "has no task 'my_tusk'" in err and "'my_task'" in err


def test_a_mixture_without_a_router_has_no_routing(
    backbone_folder: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import moelora

    backbone, _ = moelora.load_backbone(str(backbone_folder), quantization=None)
    experts = {"num_experts": 1, "r": 2, "alpha": 2}
    moelora.attach(backbone, {"sites": [{"target": "q_proj", "experts": experts}]}).save_pretrained(tmp_path / "lora")
    run = Run(tmp_path / "lora", backbone_folder, capsys)
    code, _, err = run("--recipe", str(recipe_of(checkpoint, tmp_path)), "--routing", str(tmp_path / "out"))
    assert code == 2 and "this mixture has no router" in err


def recipe_of(checkpoint: Path, folder: Path) -> Path:
    """A whole recipe with the data of the checkpoint's."""
    data = yaml.safe_load((checkpoint / "recipe.yaml").read_text())
    path = folder / "whole.yaml"
    path.write_text(
        yaml.safe_dump({**data, "mixture": {"sites": [{"target": "q_proj", "experts": {"num_experts": 1}}]}})
    )
    return path
