"""MeteoRA against numbers of the authors' own layer (tests/fixtures/meteora_moelinear, see its README.txt)."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moelora.experts import LinearContainer, build
from moelora.experts.frozen import FrozenExperts

ROOT = Path(__file__).parents[1] / "fixtures" / "meteora_moelinear"
IO = load_file(ROOT / "io.safetensors")
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj."
WEIGHTS = {key.removeprefix(PREFIX): value for key, value in load_file(ROOT / "model.safetensors").items()}
EXPERTS, RANK = 5, 4


def layer(top_k: int, temperature: float = 1.0, train_temperature: bool = False) -> LinearContainer:
    base = nn.Linear(24, 20, bias=False)
    base.weight = nn.Parameter(WEIGHTS["base_layer.weight"], requires_grad=False)
    router = {
        "kind": "meteora",
        "top_k": top_k,
        "temperature": temperature,
        "train_temperature": train_temperature,
    }
    experts = {"kind": "frozen", "num_experts": EXPERTS, "r": RANK, "alpha": 8.0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="router 'meteora' with top_k 1")
        container = build(base, {"target": "any", "experts": experts, "router": router})
    assert isinstance(container, LinearContainer) and isinstance(container.experts, FrozenExperts)
    A, B = WEIGHTS["lora_A.weight"].split(RANK), WEIGHTS["lora_B.weight"].split(RANK, dim=1)
    for index in range(EXPERTS):
        container.experts.load_expert(index, A[index], B[index])
    with torch.no_grad():
        container.router.weight.copy_(WEIGHTS["moe_gate.weight"])
    return container


def test_splitting_and_stacking_the_published_tensors_changes_no_bit() -> None:
    bank = layer(2).experts
    assert torch.equal(bank.down(), WEIGHTS["lora_A.weight"]) and torch.equal(bank.up(), WEIGHTS["lora_B.weight"])


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1, 20])
@pytest.mark.parametrize("path", ["orig", "loop", "bmm"])
def test_outputs_are_those_of_every_released_path(top_k: int, temperature: int, path: str) -> None:
    # The path that trains, "orig", has no temperature; the two that infer have one.
    container = layer(top_k, float(temperature)).train(path == "orig")
    out = container(IO["x"])
    assert (out - IO[f"y.k{top_k}.T{temperature}.{path}"]).abs().max() < 2e-6


def test_the_temperature_matters_and_reaches_training_if_wanted() -> None:
    cold, warm = IO["y.k2.T20.orig"], IO["y.k2.T20.loop"]
    assert (cold - warm).abs().max() > 0.1
    container = layer(2, 20.0, train_temperature=True).train()
    assert (container(IO["x"]) - warm).abs().max() < 2e-6


def test_gate_logits_are_the_released_ones() -> None:
    record = layer(2).decide(IO["x"])
    assert record is not None
    assert (record.logits - IO["gate_logits"]).abs().max() < 2e-6
