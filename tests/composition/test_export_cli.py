"""``moelora export`` as a user types it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import STATIC, TOPK, attached, logits, peft_logits, site
from transformers import LlamaForCausalLM

import moelora
from moelora.cli.app import main
from moelora.composition import read_adapter

pytestmark = pytest.mark.usefixtures("plain_terminal")


@pytest.fixture
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    import logging

    logger = logging.getLogger("moelora")
    before = logger.handlers, logger.level, logger.propagate
    for name, value in {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb", "GOMP_SPINCOUNT": "20000"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    yield
    logger.handlers, logger.level, logger.propagate = before


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return int(exit_.value.code or 0)


def mixture(backbone_folder: Path, folder: Path, *sites: dict[str, Any]) -> moelora.MoELoRAModel:
    """A mixture on the byte backbone, saved in ``folder``."""
    backbone, _ = moelora.load_backbone(backbone_folder, quantization="fp32")
    model = attached(backbone, *sites)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def routed(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of three experts that routes by the token."""
    folder = tmp_path_factory.mktemp("routed")
    mixture(backbone_folder, folder, site("q_proj", "lora", TOPK))
    return folder


def test_experts_are_written_without_the_backbone(
    backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture(backbone_folder, tmp_path / "mixture", site("mlp", "lora", TOPK))
    monkeypatch.setattr("moelora.backbone.load_backbone", None)
    assert run("export", tmp_path / "mixture", "-o", tmp_path / "out", "--names", "a,b,c") == 0
    captured = capsys.readouterr()
    assert "a: exact, 6 modules, rank 2\nb: exact, 6 modules, rank 4\n" in captured.out
    assert captured.out.endswith(f"wrote {tmp_path / 'out'}\n")
    read = read_adapter(tmp_path / "out" / "b").factors["model.layers.1.mlp.up_proj"]
    bank = model.containers()["model.layers.1.mlp"].experts["up_proj"]
    assert torch.equal(read.A, bank.lora_A[2:6]) and torch.equal(read.B, bank.lora_B[:, 2:6])


def test_one_exact_lora_as_json(backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"kind": "task", "num_tasks": 4}
    model = mixture(backbone_folder, tmp_path / "mixture", site("q_proj", "lora", task))
    words = ["export", tmp_path / "mixture", "-o", tmp_path / "out", "--what", "lora"]
    assert run(*words) == 2
    assert "--context task_ids=3" in capsys.readouterr().err
    assert run(*words, "--context", "task_ids=3", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    [adapter] = said["adapters"]
    assert said["what"] == "lora" and said["form"] == "peft" and said["folder"] == str(tmp_path / "out")
    assert adapter["exact"] is True and adapter["ranks"] == [7] and adapter["divergence"] is None
    frozen = LlamaForCausalLM.from_pretrained(backbone_folder, dtype=torch.float32).eval()
    expected = logits(model, task_ids=torch.full((3,), 3))
    assert (peft_logits(frozen, tmp_path / "out") - expected).abs().max() <= 1e-5
    assert (expected - logits(model, task_ids=torch.full((3,), 1))).abs().max() > 1e-3


def test_an_approximation_from_a_text_file(routed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    words = ["export", routed, "-o", tmp_path / "out", "--what", "lora", "--backbone", "auto"]
    assert run(*words) == 2
    assert "--approximate --text FILE" in capsys.readouterr().err
    assert run(*words, "--approximate", "--text", tmp_path / "notes.txt", "--length", "50", "--tokens", "400") == 0
    out = capsys.readouterr().out
    assert "an approximation" in out and "on 200 held-out tokens" in out
    assert "on 200 held-out tokens" in (tmp_path / "out" / "README.md").read_text()


def test_an_approximation_from_the_data_of_a_recipe(
    routed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("train", 20), ("test", 5)):
        rows = [{"prompt": f"{name} {index} + 1 = ?", "answer": str(index + 1)} for index in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"data={{kind: dataset, path: {tmp_path / 'train.jsonl'}, test_path: {tmp_path / 'test.jsonl'}}}"
    common = ["--what", "lora", "--approximate", "--backbone", "auto", "--json"]
    assert run("export", routed, data, "-o", tmp_path / "out", *common) == 0
    divergence = json.loads(capsys.readouterr().out)["adapters"][0]["divergence"]
    assert divergence["held_out"] is True and divergence["tokens"] > 100 and divergence["kl"] > 0
    assert run("export", routed, data, "-o", tmp_path / "less", "--tokens", "100", *common) == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["divergence"]["tokens"] <= 60


def test_a_static_mixture_of_dora_takes_the_backbone_when_it_is_named(backbone_folder: Path, tmp_path: Path) -> None:
    model = mixture(backbone_folder, tmp_path / "mixture", site("q_proj", "dora", STATIC))
    words = ["export", tmp_path / "mixture", "-o", tmp_path / "out", "--what", "lora"]
    assert run(*words) == 2
    assert run(*words, "--backbone", "auto") == 0
    frozen = LlamaForCausalLM.from_pretrained(backbone_folder, dtype=torch.float32).eval()
    assert (peft_logits(copy.deepcopy(frozen), tmp_path / "out") - logits(model)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "3"], "--rank is for one LoRA of the whole mixture: take --what lora"),
        (["--text", "x.txt"], "--text is for one LoRA"),
        (["data.test_size=3"], "KEY=VALUE is for one LoRA"),
        (["--what", "gguf", "--each", "--approximate"], "--approximate is for one LoRA"),
        (["--what", "lora", "--names", "a"], "--names is for --what experts"),
        (["--what", "lora", "--outtype", "f32"], "--outtype is for --what gguf"),
        (["--each"], "--each is for --what gguf"),
        (["--what", "lora", "--context", "task_ids"], "--context 'task_ids': expected NAME=VALUE"),
        (["--what", "lora", "--text", "nowhere.txt"], "--text nowhere.txt: cannot be read as text"),
        (["--what", "lora", "--text", "TEXT", "--data"], "--text and --data are both given"),
        (["--what", "lora", "--data"], "there is no recipe.yaml that says which data to use"),
        (["--what", "gguf"], "convert_lora_to_gguf.py, which is not part of moelora: git clone"),
        (["--names", "a,b"], "for 3 experts"),
    ],
)
def test_a_users_mistake_is_said_and_nothing_is_written(
    words: list[str], message: str, routed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("words " * 50)
    extra = ["--backbone", "auto"] if "--data" in words else []
    given = [str(tmp_path / "text.txt") if word == "TEXT" else word for word in words]
    assert run("export", routed, *given, *extra, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
