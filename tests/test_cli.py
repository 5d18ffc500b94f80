"""The command line: exit codes, messages, and each verb in the process that the user would start."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import LlamaForCausalLM

import moelora
from moelora import Recipe, __version__
from moelora.cli.app import app, main
from moelora.cli.common import allowed_backbone
from moelora.config import BackboneConfig
from moelora.errors import ConfigError, TrainingError
from moelora.registry import TRAINERS

FIXTURES = Path(__file__).parent / "fixtures"

pytestmark = pytest.mark.smoke

VERBS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True, scope="module")
def _process_as_before() -> Iterator[None]:
    """The command sets up logging and the environment for its own process; this one goes on with other tests."""
    logger = logging.getLogger("moelora")
    before = logger.handlers, logger.level, logger.propagate
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOMP_SPINCOUNT", "20000")
        yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("MOELORA_DEBUG", raising=False)


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


# -- verbs on a trained checkpoint -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a mixture that ``moelora train`` trained for two steps."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {"prompt": f"say {letter}", "answer": letter * 2, "task": str(n % 2)} for n, letter in enumerate("abcdefgh")
    ]
    table = folder / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_file(
        folder,
        backbone={"name": str(backbone_folder), "quantization": None},
        data={"kind": "dataset", "path": str(table), "test_fraction": 0.5, "columns": {"task": "task"}},
        trainer={"kind": "sft", "args": {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True}},
    )
    assert run("train", str(recipe), f"output_dir={folder / 'out'}") == 0
    return folder / "out"


def test_info_describes_the_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", str(trained), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "native"
    assert found["mixture"]["sites"][0]["experts"]["num_experts"] == 4
    assert found["parameters"] > 0
    assert run("info", str(trained)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"layout: native", "damage: none", "sites: 2, mlp x 2 in layers 0-1"} <= set(lines)
    assert any(line.startswith("backbone: ") and "hidden_size 32" in line for line in lines)
    assert f"parameters: {found['parameters']:,} (float32)" in lines
    assert any(line.startswith("  experts: 4 x lora, r 4, alpha 8, scale 2, ") for line in lines)
    assert any(line.startswith("  router: topk, ") and "top_k 2" in line for line in lines)


def test_info_says_what_is_damaged(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "README.md").write_text("changed")
    assert run("info", str(copy)) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("damage: 1")
    assert lines[at + 1].startswith(f"  {copy / 'README.md'}: expected ")


def test_info_shows_a_terminal_nothing_that_it_would_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(FIXTURES / "loramoe_tiny" / "loramoe_n8_noblc", tmp_path / "copy")
    path = copy / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "\x1b[2Jmodel\n[red]"}))
    assert run("info", str(copy)) == 0
    assert "backbone: \\x1b[2Jmodel\\n[red]" in capsys.readouterr().out.splitlines()


SITES = {
    "loramoe_tiny/loramoe_n8_noblc": [
        "layout: loramoe",
        "backbone: tiny-llama",
        "damage: unknown, since this layout has no manifest",
        "sites: 6, gate_proj x 2, down_proj x 2, up_proj x 2 in layers 0-1",
    ],
    "moram_trace/round1": [
        "layout: moram (temperature 0.03, threshold 0.2)",
        "  experts: 3 x rank1, r 4, alpha [4, 4, 8], scale [1, 1, 2], dropout 0.1, expert_dropout shared, init kaiming",
    ],
    "mixlora_tiny/mixlora": ["layout: mixlora (generation 2)", "  router: none, the expert is always on"],
}


@pytest.mark.parametrize("name", SITES)
def test_info_names_hundreds_of_sites_in_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", str(FIXTURES / name)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(SITES[name]) <= set(lines)
    assert max(map(len, lines)) < 200


def test_info_keeps_sites_with_other_ranks_apart(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = {"num_experts": 1, "r": 4, "alpha": 8, "rank_pattern": {"layers.1.self_attn.v_proj": 2}}
    model = moelora.attach(tiny_llama, {"sites": [{"target": ["q_proj", "v_proj"], "experts": experts}]})
    model.save_pretrained(tmp_path)
    assert run("info", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    wide, narrow = (lines.index(line) for line in SPLIT)
    assert lines[wide + 1].startswith("  experts: 1 x lora, r 4, alpha 8, scale 2, ")
    assert lines[narrow + 1].startswith("  experts: 1 x lora, r 2, alpha 8, scale 4, ")


SPLIT = ("sites: 3, q_proj x 2, v_proj x 1 in layers 0-1", "sites: 1, v_proj x 1 in layers 1")


def test_generate_answers_and_repeats_itself(
    trained: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(trained), "--backbone", str(backbone_folder), "--max-new-tokens", "4", "--json"]
    assert run(*words, "say a") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["prompt"] == "say a"
    monkeypatch.setattr("sys.stdin", io.StringIO("say a\n"))
    assert run(*words) == 0
    assert json.loads(capsys.readouterr().out) == first
    answers = set()
    for seed in ("1", "1", "2"):
        assert run(*words, "say a", "--temperature", "5", "--seed", seed) == 0
        answers.add(json.loads(capsys.readouterr().out)["answer"])
    assert len(answers) == 2, "the same seed gives the same answer, another seed another one"


def test_generate_needs_a_prompt(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("  \n"))
    assert run("generate", str(trained)) == 2
    assert "error: the prompt is empty" in capsys.readouterr().err


class Terminal(io.StringIO):
    """Standard input that somebody types into."""

    def isatty(self) -> bool:
        return True


def test_a_backbone_that_only_the_checkpoint_names_is_not_loaded(
    trained: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run("generate", str(trained), "hello") == 2
    text = capsys.readouterr().err
    assert f"{trained} was trained on {str(backbone_folder)!r}" in text and "--backbone auto" in text
    assert "Load it?" not in text, "nobody is there to answer"


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), ("", 2)])
def test_a_terminal_asks_before_it_loads_the_backbone_that_a_checkpoint_names(
    answer: str,
    code: int,
    trained: Path,
    backbone_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    assert run("generate", str(trained), "hello", "--max-new-tokens", "2", "--json") == code
    captured = capsys.readouterr()
    asked = f"The checkpoint {trained} names the folder {str(backbone_folder)!r} as its backbone. Load it? [y/N]"
    assert asked in captured.err
    assert ("--backbone auto" in captured.err) == (code == 2)
    assert bool(captured.out) == (code == 0), "the answer alone is on standard output"


def test_a_repository_is_called_one_and_its_revision_is_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = BackboneConfig(name="owner/model", quantization=None, revision="abc")
    monkeypatch.setattr("sys.stdin", Terminal("\n"))
    with pytest.raises(ConfigError, match=r"was trained on 'owner/model'.* give --backbone auto"):
        allowed_backbone("runs/x", named)
    assert "names the repository 'owner/model' at 'abc' as its backbone" in capsys.readouterr().err


def test_a_checkpoint_that_names_no_backbone_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    with pytest.raises(ConfigError, match="does not say which backbone it was trained on: name it with --backbone"):
        allowed_backbone("runs/x", BackboneConfig(name="unknown"))


def test_backbone_auto_is_the_one_that_the_checkpoint_names(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", str(trained), "hello", "--backbone", "auto", "--max-new-tokens", "2") == 0
    assert "Load it?" not in capsys.readouterr().err


TO_HUB = {
    "info": ["info", "owner/name"],
    "convert": ["convert", "owner/name", "OUT"],
    "generate": ["generate", "owner/name", "hello", "--backbone", "auto"],
    "generate, asking": ["generate", "owner/name", "hello"],
    "eval": ["eval", "owner/name", "--recipe", "RECIPE"],
    "analyze": ["analyze", "owner/name", "--recipe", "RECIPE"],
}


@pytest.mark.parametrize("words", TO_HUB.values(), ids=TO_HUB)
def test_every_verb_with_a_checkpoint_takes_the_options_of_the_hub(
    words: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        raise LocalEntryNotFoundError("nothing here")

    monkeypatch.setattr("moelora.checkpoints.hub.snapshot_download", download)
    paths = {"OUT": str(tmp_path / "out"), "RECIPE": str(trained / "recipe.yaml")}
    options = ["--revision", "v1", "--subfolder", "inner", "--token", "hf_secret", "--cache-dir", str(tmp_path)]
    assert run(*(paths.get(word, word) for word in words), *options, "--local-files-only") == 2
    given = ("repo_id", "revision", "token", "cache_dir", "local_files_only")
    assert [asked[name] for name in given] == ["owner/name", "v1", "hf_secret", tmp_path, True]
    assert all(pattern.startswith("inner/") for pattern in asked["allow_patterns"])
    captured = capsys.readouterr()
    assert "owner/name (inner): no such folder here, and from the hub it cannot be had" in captured.err
    assert "hf_secret" not in captured.out + captured.err


def test_the_backbone_is_fetched_with_the_token_of_its_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load(config: BackboneConfig, **options: Any) -> Any:
        asked.update(options, name=config.name, revision=config.revision)
        raise ConfigError("enough")

    monkeypatch.setattr("moelora.backbone.load_backbone", load)
    words = ["--token", "hf_secret", "--cache-dir", str(tmp_path), "--revision", "v1", "--local-files-only"]
    assert run("generate", str(trained), "hello", "--backbone", "owner/model", *words) == 2
    assert asked == {
        **{"name": "owner/model", "revision": None, "device_map": None},
        **{"token": "hf_secret", "cache_dir": tmp_path, "local_files_only": True},
    }


def test_a_checkpoint_in_a_subfolder_brings_its_recipe(
    trained: Path, backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(trained.parent), "--subfolder", trained.name, "--backbone", str(backbone_folder)]
    assert run(*words, "--max-new-tokens", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["mixture"]["tasks"]


def test_eval_scores_the_recipes_test_data(
    trained: Path, backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(trained), "--backbone", str(backbone_folder), "--baseline", "--max-new-tokens", "3"]
    assert run(*words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(task["count"] for task in report["mixture"]["tasks"].values()) == 4
    assert set(report["mixture"]["tasks"]) == set(report["backbone"]["tasks"]) <= {"0", "1"}
    assert report["difference"]["low"] <= report["difference"]["difference"] <= report["difference"]["high"]
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert "mixture - backbone: " in text
    assert all(f" {task} " in text for task in report["mixture"]["tasks"])


def test_eval_without_data_says_how_to_name_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "recipe.yaml").unlink()
    assert run("eval", str(copy)) == 2
    text = capsys.readouterr().err
    assert "--recipe" in text and "data={kind: dataset" in text
    assert run("eval", str(trained), "trainer.kind=sft") == 2
    assert "unknown key 'trainer': known keys are data, max_length" in capsys.readouterr().err
    assert run("eval", str(trained), "data.test_fraction=0") == 2
    assert "no test examples" in capsys.readouterr().err


def test_analyze_writes_a_report(
    trained: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    out = tmp_path / "report"
    assert run("analyze", str(trained), "--backbone", str(backbone_folder), "--out", str(out)) == 0
    assert f"wrote {out / 'routing.html'}" in capsys.readouterr().out
    assert "<html" in (out / "routing.html").read_text()
    assert json.loads((out / "routing.json").read_text())["tasks"]


def test_convert_there_and_back_keeps_every_tensor(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    there, back = tmp_path / "there", tmp_path / "back"
    assert run("convert", str(trained), str(there), "--to", "mixlora") == 0
    assert run("convert", str(there), str(back)) == 0
    capsys.readouterr()
    before, after = load_file(trained / "moelora.safetensors"), load_file(back / "moelora.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert run("convert", str(trained), str(there)) == 2
    assert f"{there}: expected a new or empty folder" in capsys.readouterr().err
    assert run("convert", str(trained), str(tmp_path / "x"), "--to", "mixlorra") == 2
    assert "did you mean 'mixlora'" in capsys.readouterr().err


def test_convert_says_what_it_wrote_and_what_is_not_the_same(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = {"kind": "lora", "num_experts": 1, "r": 4, "alpha": 8}
    router = {"kind": "smora", "top_k": 2, "bias_rate": 0.25}
    model = moelora.attach(tiny_llama, {"sites": [{"target": "q_proj", "experts": experts, "router": router}]})
    model.save_pretrained(tmp_path / "native")
    assert run("convert", str(tmp_path / "native"), str(tmp_path / "out"), "--to", "smora") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"wrote {tmp_path / 'out'} (smora): 2 files, ") and lines[0].endswith(" kB")
    assert [line.partition(":")[0] for line in lines[1:3]] == ["  adapter_config.json", "  adapter_model.safetensors"]
    assert lines[3] == "not the same in layout smora:"
    assert "  router.bias_rate: 0.25, now 1e-05 (2 sites)" in lines
    assert any(line.startswith("  architecture: model_type, hidden_size") for line in lines)
    assert not any("experts." in line for line in lines)
    assert run("convert", str(tmp_path / "out"), str(tmp_path / "again"), "--to", "smora", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    size = (tmp_path / "again" / "adapter_model.safetensors").stat().st_size
    assert found["files"]["adapter_model.safetensors"] == size
    assert (found["layout"], found["lost"]) == ("smora", [])


def test_convert_names_the_layouts_that_can_be_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moelora.checkpoints import LAYOUTS, Layout

    monkeypatch.setattr(LAYOUTS.get("mola"), "write", Layout.write)
    assert run("convert", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    listed = text.partition("Layout to write: ")[2].partition(".")[0].split(", ")
    assert listed == [name for name in LAYOUTS if name != "mola"]
    assert run("convert", str(trained), str(tmp_path / "out"), "--to", "mola") == 2
    assert "layout 'mola' is read only" in capsys.readouterr().err
