"""Backbones, and adapters that PEFT itself makes and saves on them, with numbers where PEFT would start at zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from moelora import checkpoints

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = FIXTURES / "peft_lora_tiny_llama"
IO = load_file(ROOT / "io.safetensors")
INPUTS = {"input_ids": IO["input_ids"], "attention_mask": IO["attention_mask"]}
# Modules of the fixtures' backbone.
Q0, Q1, V1 = (f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"))


def peft_saved(backbone: PreTrainedModel, folder: Path, *, pickled: bool = False, **options: Any) -> Path:
    """Make an adapter on ``backbone`` and save it; the backbone is PEFT's afterwards.

    Args:
        options: of ``LoraConfig``.
    """
    model = get_peft_model(backbone, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(str(folder), safe_serialization=not pickled)
    return folder


@torch.no_grad()
def peft_logits(backbone: PreTrainedModel, folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """What stock PEFT makes of an adapter in a folder; it warns, and so fails a test, where a tensor is missing."""
    logits: Tensor = PeftModel.from_pretrained(backbone, str(folder)).eval()(**inputs).logits
    return logits


def backbone() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FIXTURES / "tiny_llama_base", dtype=torch.float32).eval()


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(FIXTURES / "tiny_llama_base", num_labels=3, pad_token_id=0)
    return LlamaForSequenceClassification(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(3)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, Tensor] = INPUTS) -> Tensor:
    result: Tensor = model(**inputs).logits
    return result


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits are the same within rounding: 1e-6 of the largest."""
    return bool((ours - theirs).abs().max() <= 1e-6 * theirs.abs().max())


def experts(folder: Path) -> Any:
    return checkpoints.read(folder).mixture.sites[0].experts


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return values


def altered(
    source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object] | None = None, **values: Any
) -> Path:
    """A copy with other values in its configuration, whose tensors ``change`` changes in place."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**config(source), **values}))
    found = tensors(source)
    if change is not None:
        change(found)
    save_file(found, folder / "adapter_model.safetensors")
    return folder
