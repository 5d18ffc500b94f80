"""Frozen experts and static mixes against numbers of PEFT 0.21.2 (tests/fixtures/peft_lora_tiny_llama)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora.experts.frozen import FrozenExperts
from moelora.mixture import MoELoRAModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = FIXTURES / "peft_lora_tiny_llama"
IO = load_file(ROOT / "io.safetensors")
WEIGHTED = load_file(ROOT / "weighted_adapter_io.safetensors")


def site(targets: list[str], names: list[str], weights: list[float], **experts: Any) -> dict[str, Any]:
    return {
        "target": targets,
        "experts": {"kind": "frozen", "num_experts": len(names), **experts},
        "router": {"kind": "static", "weights": weights},
    }


def filled(sites: list[dict[str, Any]], names: list[str]) -> MoELoRAModel:
    backbone = LlamaForCausalLM.from_pretrained(FIXTURES / "tiny_llama_base", dtype=torch.float32).eval()
    model = moelora.attach(backbone, {"sites": sites}).eval()
    for module, container in model.containers().items():
        assert isinstance(container.experts, FrozenExperts)
        for index, name in enumerate(names):
            tensors = load_file(ROOT / name / "adapter_model.safetensors")
            A, B = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
            container.experts.load_expert(index, A, B)
    return model


def logits(model: MoELoRAModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IO["input_ids"], attention_mask=IO["attention_mask"]).logits
    return result


@pytest.mark.parametrize(
    ("name", "scaling"), [("plain_r4_a8", "lora"), ("rslora_r4_a8", "rslora"), ("alllinear_r2_a4", "lora")]
)
def test_one_adapter_has_the_logits_of_peft(name: str, scaling: str) -> None:
    config = json.loads((ROOT / name / "adapter_config.json").read_text())
    options = {"r": config["r"], "alpha": config["lora_alpha"], "scaling": scaling}
    model = filled([site(config["target_modules"], [name], [1.0], **options)], [name])
    assert (logits(model) - IO[f"logits.{name}"]).abs().max() < 1e-5
    assert (logits(model) - IO["base_logits"]).abs().max() > 1e-2


def test_ranks_that_differ_between_modules_are_sites_of_their_own() -> None:
    special = "model.layers.1.self_attn.q_proj"
    rest = ["model.layers.0.self_attn.q_proj", "v_proj"]
    sites = [site([special], ["rankpattern"], [1.0], r=2, alpha=16), site(rest, ["rankpattern"], [1.0], r=4, alpha=8)]
    model = filled(sites, ["rankpattern"])
    assert (logits(model) - IO["logits.rankpattern"]).abs().max() < 1e-5


def test_given_weights_are_the_concatenation_of_peft() -> None:
    names = ["plain_r4_a8", "plain_r4_a8_second"]
    model = filled([site(["q_proj", "v_proj"], names, [0.7, 0.4], r=4, alpha=8)], names)
    assert (logits(model) - WEIGHTED["logits.cat"]).abs().max() < 1e-5
