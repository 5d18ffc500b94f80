"""QLoRA on a processor: a 4-bit backbone is trained on, saved, reloaded, and left exactly as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.backbone import frozen_checksum, load_backbone
from moelora.data import Collator

SITES = [
    {
        "target": "mlp",
        "experts": {"num_experts": 4, "r": 2, "dropout": 0.1},
        "router": {"kind": "topk", "top_k": 2, "init_std": 0.5},
    },
    {"target": ["q_proj", "o_proj"], "experts": {"num_experts": 1, "r": 2}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def fresh(folder: Path, quantization: str) -> Any:
    backbone, _ = load_backbone(folder, quantization=quantization, tokenizer=False)
    return backbone


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_train_save_reload_on_a_quantised_backbone(
    folder, make_trainer, rows, tmp_path, quantization, activation_checkpointing
):
    torch.manual_seed(1)
    model = moelora.attach(fresh(folder, quantization), {"sites": SITES})
    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    before = frozen_checksum(model)
    trainer = make_trainer(
        model,
        rows[:4],
        max_steps=10,
        activation_checkpointing=activation_checkpointing,
        gradient_accumulation_steps=2,
        logging_steps=5,
        save_strategy="steps",
        save_steps=10,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    losses = [line["task_loss"] for line in trainer.state.log_history if "task_loss" in line]
    assert losses[-1] < losses[0]
    assert frozen_checksum(model) == before

    saved = tmp_path / "run" / "checkpoint-10"
    checkpoints.verify(saved)
    assert sum(path.stat().st_size for path in saved.iterdir()) < 400_000
    assert checkpoints.read(saved).backbone.quantization == quantization
    reloaded = moelora.from_pretrained(saved, backbone=fresh(folder, quantization))
    batch = Collator(0)(rows[:3])
    model.eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, model(**batch).logits)
