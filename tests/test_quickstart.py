"""The quickstart from data to reloaded checkpoint, on a tiny backbone; and what it plans with."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from moelora import quickstart
from moelora.config import DatasetData, SiteConfig
from moelora.data import Example
from moelora.errors import CheckpointError, UserError
from moelora.evaluation.scoring import Report, TaskScore, compare
from moelora.mixture import attach
from moelora.quickstart import plan as planning
from moelora.quickstart import tell
from moelora.trainers.comparison import equal_rank, find_targets, peak_memory, trainable_parameters

TASKS = {"upper": str.upper, "twice": lambda word: word + word}


@pytest.fixture
def settings(backbone_folder: Path, tmp_path: Path) -> quickstart.Settings:
    """A run on the tiny backbone, over two tasks of the user's own."""
    words = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st"]
    rows = [{"q": f"{t} {w}", "a": make(w), "kind": t} for w in words for t, make in TASKS.items()]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"prompt": "q", "answer": "a", "task": "kind"}
    data = DatasetData.parse({"path": str(path), "test_fraction": 0.3, "columns": columns})
    return quickstart.Settings(
        minutes=10,
        steps=None,
        backbone=str(backbone_folder),
        quantization="fp32",
        data=data,
        output=tmp_path / "out",
        seed=0,
        threads=None,
    )


@pytest.mark.timeout(300)
def test_from_data_to_reloaded_checkpoint(settings: quickstart.Settings) -> None:
    console = Console(record=True, width=160, file=io.StringIO())
    found = quickstart.run(replace(settings, steps=4), console)
    said = console.export_text()
    for part in ("mean of tasks", "tokens per second", "peak memory", "Logits agree", "MixLoRA"):
        assert part in said
    assert found == json.loads((settings.output / "results.json").read_text())
    methods = found["methods"]
    assert methods["LoRA"]["tokens"] == methods["MixLoRA"]["tokens"] > 0
    assert methods["LoRA"]["trainable"] == pytest.approx(methods["MixLoRA"]["trainable"], rel=0.1)
    assert sum(task["count"] for task in found["backbone_alone"]["tasks"].values()) == 6
    html = (settings.output / "routing.html").read_text(encoding="utf-8")
    assert "upper" in html and "twice" in html
    card = (settings.output / "mixlora" / "README.md").read_text(encoding="utf-8")
    assert "mean of tasks" in card and found["verdict"] in card

    again = quickstart.check(settings.output)
    assert again["agrees"] and again["max_difference"] == 0.0
    assert [item["task"] for item in again["answers"]] == ["twice", "upper"]
    weights = settings.output / "mixlora" / "moelora.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"moelora\.safetensors"):
        quickstart.check(settings.output)


def test_too_few_minutes_are_said_before_training(settings: quickstart.Settings) -> None:
    plan = planning.prepare(replace(settings, minutes=1.0), Console(quiet=True))
    with pytest.raises(UserError, match=r"--minutes 1 leave time for 0 training steps .* give at least --minutes"):
        planning.plan_steps(plan, planning.plan_mixtures(plan), eval_seconds=100.0)


def test_steps_fill_the_minutes(settings: quickstart.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "seconds_per_step", lambda *_: 2.0)
    plan = planning.prepare(settings, Console(quiet=True))
    steps = planning.plan_steps(plan, planning.plan_mixtures(plan), eval_seconds=30.0)
    assert steps == pytest.approx((600 - 2 * 30 * 1.1 - 45) / (4 * 1.1), abs=6)


def test_check_of_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="moelora quickstart --output"):
        quickstart.check(tmp_path)


def test_targets_of_families(tiny_llama: LlamaForCausalLM) -> None:
    tiny: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 0}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2))
    phi3 = Phi3ForCausalLM(Phi3Config(intermediate_size=24, num_hidden_layers=2, num_key_value_heads=2, **tiny))
    found = find_targets(tiny_llama)
    assert (found.ffn, found.layers) == ("mlp", 2)
    assert set(found.projections) == {"gate_proj", "up_proj", "down_proj"}
    assert found.attention == ["k_proj", "o_proj", "q_proj", "v_proj"]
    found = find_targets(gpt2)
    assert (found.ffn, found.projections, found.attention, found.layers) == (
        "mlp",
        ["c_fc", "c_proj"],
        ["c_attn", "c_proj"],
        3,
    )
    found = find_targets(phi3)
    assert found.projections == ["gate_up_proj", "down_proj"] and found.attention == ["o_proj", "qkv_proj"]


def test_equal_rank_gives_about_equal_parameters(tiny_llama: LlamaForCausalLM) -> None:
    experts = {"num_experts": 8, "r": 4}
    block = {"target": "mlp", "experts": experts, "router": {"kind": "topk"}}
    mixture = attach(tiny_llama, {"sites": [block]})
    wanted = trainable_parameters(mixture)
    backbone = mixture.unload()
    site = SiteConfig.parse({"target": ["gate_proj", "up_proj", "down_proj"], "experts": {"num_experts": 1}})
    rank = equal_rank(backbone, site, wanted)
    lora = {"target": site.target, "experts": {"num_experts": 1, "r": rank}}
    assert trainable_parameters(attach(backbone, {"sites": [lora]})) == pytest.approx(wanted, rel=0.03)


def report(scores: list[float]) -> Report:
    mean = sum(scores) / len(scores)
    return Report({"t": TaskScore(mean, 0.0, 1.0, len(scores))}, mean, [""] * len(scores), scores)


@pytest.mark.parametrize(
    ("lora", "mixlora", "words"),
    [
        ([0.0] * 20, [1.0] * 20, "MixLoRA scores higher"),
        ([1.0] * 20, [0.0] * 20, "does not win here: LoRA scores higher"),
        ([0.0, 1.0] * 10, [1.0, 0.0] * 10, "does not win here: the difference to LoRA is within chance"),
    ],
)
def test_the_verdict_is_plain(lora: list[float], mixlora: list[float], words: str) -> None:
    questions = [Example("question", "answer", "t")] * 20
    assert words in tell.verdict(compare(questions, report(mixlora), report(lora)))


def test_peak_memory_sees_what_was_freed_again() -> None:
    with peak_memory() as peak:
        before = peak()
        block = torch.ones(50_000_000)
        time_to_look = torch.ones(1000, 1000)
        for _ in range(20):
            time_to_look = time_to_look @ time_to_look / 1000
        del block
        assert peak() - before > 150
