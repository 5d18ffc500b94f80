"""The command line: exit codes, messages, and each verb in the process that the user would start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from moelora import Recipe, __version__
from moelora.cli.app import app, main
from moelora.errors import TrainingError
from moelora.registry import TRAINERS

pytestmark = pytest.mark.smoke

VERBS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("MOELORA_DEBUG", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def run(*words: str) -> int:
    """The exit code of ``moelora WORDS``, run in this process."""
    with pytest.raises(SystemExit) as exit_:
        main(words)
    return int(exit_.value.code or 0)


def recipe_file(folder: Path, **changes: Any) -> Path:
    experts = {"num_experts": 4, "r": 4, "alpha": 8}
    sites = [{"target": "mlp", "experts": experts, "router": {"kind": "topk", "top_k": 2}}]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"mixture": {"sites": sites}, **changes}))
    return path


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert {"train", "eval", "generate", "analyze", "info", "convert", "schema", "env"} <= set(VERBS)
    for verb in VERBS:
        assert f" {verb} " in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Example: moelora {verb}" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("command", [["-m", "moelora"], [str(Path(sys.executable).parent / "moelora")]])
def test_both_ways_to_start_it(command: list[str], tmp_path: Path) -> None:
    words = command if command[0] != "-m" else [sys.executable, *command]
    if not Path(words[0]).exists():
        pytest.skip("moelora is not installed in this environment")
    done = subprocess.run([*words, "--version"], cwd=tmp_path, env=_importable(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n"), done.stderr


def _importable() -> dict[str, str]:
    """The environment of a process that imports the same moelora as this one, from any folder."""
    import moelora

    return {**os.environ, "PYTHONPATH": str(Path(moelora.__file__).parents[1])}


# -- exit codes -------------------------------------------------------------------------------------------------------


def test_no_verb_shows_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    captured = capsys.readouterr()
    assert "Usage: moelora" in captured.out + captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "mixlora", "--fast"], "No such option"),
        (["generate", "x", "hello", "--max-new-tokens", "0"], "greater than or equal to 1"),
    ],
)
def test_usage_error_is_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
        (["train", "nowhere"], "error: 'nowhere' is neither a recipe file (.yaml, .json) nor a model card"),
        (["train", "RECIPE", "max_length"], "'max_length' is not an override: write key=value"),
        (["train", "RECIPE", "max_lenght=3"], "unknown key 'max_lenght': known keys are"),
        (["train", "RECIPE", "mixture.sites.0.router.top_k=9"], "router.top_k is 9 but there are 4 experts"),
    ],
)
def test_a_users_mistake_is_one_paragraph_and_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(recipe_file(tmp_path))
    assert run(*[recipe if word == "RECIPE" else word for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1, "one paragraph, whatever the width of the terminal"
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("words", [["--debug", "train", "nowhere"], ["train", "nowhere", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert text.splitlines()[-1].startswith("error: 'nowhere' is neither")


def test_debug_by_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MOELORA_DEBUG", "1")
    assert run("train", "nowhere") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (TrainingError("the loss of step 3 is not finite"), 3, "error: the loss of step 3 is not finite"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("oops"), 1, "error: this is a bug in moelora"),
    ],
    ids=["training", "interrupt", "bug"],
)
def test_exit_code_of_what_a_trainer_raises(
    raised: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Path:
        raise raised

    monkeypatch.setattr(TRAINERS.get("sft"), "run", stop)
    assert run("train", str(recipe_file(tmp_path))) == code
    text = capsys.readouterr().err
    assert said in text
    assert ("ZeroDivisionError: oops" in text) == (code == 1)


# -- verbs that load no model -----------------------------------------------------------------------------------------


def test_dry_run_prints_the_whole_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe_file(tmp_path, seed=3)
    assert run("train", str(path), "max_length=99", "--dry-run") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["max_length"] == 99
    assert Recipe.parse(printed) == Recipe.parse({**yaml.safe_load(path.read_text()), "max_length": 99})


def test_schema_is_the_schema_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema") == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["properties"]) == set(Recipe.model_fields)
    assert printed["additionalProperties"] is False


def test_env_as_json_and_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert run("env", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == torch.__version__
    assert report["torch_threads"] == torch.get_num_threads()
    assert "float32" in report["dtypes"]
    assert run("env") == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == set(report)
    assert lines["gpus"] == (", ".join(report["gpus"]) or "none")


def test_output_can_be_cut_short(tmp_path: Path) -> None:
    """`moelora schema | head -1`: a reader that leaves is no error of ours."""
    command = f"{sys.executable} -m moelora schema | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=_importable(), capture_output=True, text=True)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
