"""MoRAM against numbers of the authors' own code (tests/fixtures/moram_layer, see its README.txt)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import moelora
from moelora.experts import LinearContainer, build
from moelora.experts.rank1 import Rank1Experts

ROOT = Path(__file__).parents[1] / "fixtures" / "moram_layer"
CONFIG: dict[str, Any] = json.loads((ROOT / "config.json").read_text())
CASES = [name for name in CONFIG if not name.startswith("_")]
LAYER = load_file(ROOT / "moram_layer.safetensors")


def container(case: str) -> tuple[LinearContainer, dict[str, Tensor]]:
    """The case's layer as a linear site, and the case's tensors by name."""
    config = CONFIG[case]
    T = {name.partition(".")[2]: value for name, value in LAYER.items() if name.startswith(f"{case}.")}
    base = nn.Linear(config["in_features"], config["out_features"]).requires_grad_(False)
    rank = config["rank_per_task"]
    site = {
        "target": "any",
        "experts": {"kind": "rank1", "num_experts": config["num_tasks"], "r": rank, "alpha": rank},
        "router": {
            "kind": "moram",
            "top_k": config["topk"],
            "temperature": config["temperature"],
            "threshold": config["threshold"],
        },
    }
    built = build(base, site)
    assert isinstance(built, LinearContainer)
    bank = built.experts
    assert isinstance(bank, Rank1Experts)
    with torch.no_grad():
        base.weight.copy_(T["W"])
        base.bias.copy_(T["bias"])
        bank.lora_A.copy_(T["A_bank"][-rank:])
        bank.lora_B.copy_(T["B_bank"][:, -rank:])
        if bank.old_lora_A is not None and bank.old_lora_B is not None:
            bank.old_lora_A.copy_(T["A_bank"][:-rank])
            bank.old_lora_B.copy_(T["B_bank"][:, :-rank])
    assert torch.equal(built.lora_A, T["A_bank"]) and torch.equal(built.lora_B, T["B_bank"])
    return built.train(config["train"]), T


@pytest.mark.parametrize("case", CASES)
def test_layer(case: str) -> None:
    built, T = container(case)
    x = T["x"].clone().requires_grad_()
    with moelora.trace(built) as tape:
        y = built(x)
    record = tape[""][0]
    assert record.indices.shape[-1] == CONFIG[case]["effective_k"]
    assert (record.logits - T["s"]).abs().max() <= 1e-6
    assert (record.dense_weights() - T["w"]).abs().max() <= 1e-5
    assert (y - T["y"]).abs().max() <= 1e-5
    y.backward(T["cotangent"])
    found = {"grad_x": x.grad, "grad_A_new": built.experts.lora_A.grad, "grad_B_new": built.experts.lora_B.grad}
    for name, grad in found.items():
        assert torch.allclose(grad, T[name], atol=2e-5, rtol=1e-4), name
    assert all(p.grad is None for name, p in built.experts.named_parameters() if name.startswith("old_"))


def test_a_threshold_that_no_atom_reaches_leaves_the_frozen_layer() -> None:
    built, T = container("eval_thr_kills_all")
    with torch.no_grad():
        assert torch.equal(built(T["x"]), built.base(T["x"]))


def test_at_an_infinite_temperature_it_is_all_tasks_divided_by_the_number_of_atoms() -> None:
    built, T = container("all_ranks_hot_tau1e6")
    with torch.no_grad():
        delta = built(T["x"]) - built.base(T["x"])
    wanted = T["x"] @ T["A_bank"].T @ T["B_bank"].T / len(T["A_bank"])
    assert (delta - wanted).abs().max() <= 1e-6
