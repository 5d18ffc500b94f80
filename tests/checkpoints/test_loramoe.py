"""The layout of LoRAMoE's authors, on what their own code wrote (tests/fixtures/loramoe_tiny)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import moelora
from moelora import checkpoints

ROOT = Path(__file__).parents[1] / "fixtures" / "loramoe_tiny"
VARIANTS = ["loramoe_n4_blc", "loramoe_n8_noblc"]


def backbone() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(ROOT / "backbone", dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_authors_own(variant: str) -> None:
    model = moelora.from_pretrained(ROOT / variant, backbone())
    inputs = load_file(ROOT / "inputs.safetensors")
    with torch.no_grad():
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert (logits - load_file(ROOT / variant / "reference.safetensors")["logits"]).abs().max() <= 1e-5
    config = json.loads((ROOT / variant / "adapter_config.json").read_text())
    router = model.mixture.sites[0].router
    assert (router.aux_loss_coef, router.delta) == (config["blc_weight"], config["blc_alpha"])
    assert model.mixture.sites[0].experts.dropout == config["lora_dropout"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("through", [[], ["native"]])
def test_written_again_it_is_the_same_bit_for_bit(variant: str, through: list[str], tmp_path: Path) -> None:
    source = ROOT / variant
    for step, layout in enumerate([*through, "loramoe"]):
        checkpoints.convert(source, tmp_path / str(step), to=layout)
        source = tmp_path / str(step)
    ours, theirs = (json.loads((at / "adapter_config.json").read_text()) for at in (source, ROOT / variant))
    for config in (ours, theirs):
        config["target_modules"].sort()
    assert ours == theirs
    ours, theirs = (torch.load(folder / "adapter_model.bin", weights_only=True) for folder in (source, ROOT / variant))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
