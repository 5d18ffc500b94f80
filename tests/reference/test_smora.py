"""SMoRA against numbers of the authors' own code (tests/fixtures/smora_layer, see its README.txt)."""

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
from moelora.routers.smora import SMoRARouter

ROOT = Path(__file__).parents[1] / "fixtures" / "smora_layer"
CONFIG: dict[str, Any] = json.loads((ROOT / "config.json").read_text())
CASES = [name for name in CONFIG if not name.startswith("_")]
LAYER = load_file(ROOT / "smora_layer.safetensors")


def container(case: str) -> tuple[LinearContainer, dict[str, Tensor]]:
    """The case's layer as a linear site, and the case's tensors by name."""
    config = CONFIG[case]
    T = {name.partition(".")[2]: value for name, value in LAYER.items() if name.startswith(f"{case}.")}
    base = nn.Linear(config["in_features"], config["out_features"], bias=False).requires_grad_(False)
    site = {
        "target": "any",
        # Their scaling is alpha / k; the scale of the bank is alpha / r, and the router's weights make up for it.
        "experts": {"kind": "lora", "num_experts": 1, "r": config["r"], "alpha": config["lora_alpha"]},
        "router": {
            "kind": "smora",
            "top_k": config["activate_r"],
            "partition": config["rank_partition"],
            "bias_rate": config["bias_update_rate"],
        },
    }
    built = build(base, site)
    assert isinstance(built, LinearContainer) and isinstance(built.router, SMoRARouter)
    with torch.no_grad():
        base.weight.copy_(T["W0"])
        built.experts.lora_A.copy_(T["A"])
        built.experts.lora_B.copy_(T["B"])
        built.router.weight.copy_(T["W_router"])
        built.router.bias.copy_(T["bias_before"])
    return built.train(config["train"]), T


@pytest.mark.parametrize("case", CASES)
def test_layer(case: str) -> None:
    built, T = container(case)
    config = CONFIG[case]
    x = T["x"].clone().requires_grad_()
    with moelora.trace(built) as tape:
        y = built(x)
    record = tape[""][0]
    assert torch.equal(record.indices.sort(-1).values, T["topk_indices"].sort(-1).values)
    gates = record.dense_weights() * config["activate_r"] / config["r"]
    assert (gates - T["gates"]).abs().max() <= 1e-5
    assert (y - T["y"]).abs().max() <= 1e-5
    y.backward(T["cotangent"])
    found = {"grad_x": x.grad, "grad_A": built.experts.lora_A.grad, "grad_B": built.experts.lora_B.grad}
    found["grad_router"] = built.router.weight.grad
    for name, grad in found.items():
        assert (grad - T[name]).norm() <= 1e-4 * T[name].norm() + 1e-6, name
    if config["train"]:
        built.router.on_step_end(record.counts())
    assert (built.router.bias - T["bias_after"]).abs().max() <= 1e-8


def test_a_zero_router_over_all_ranks_is_plain_lora() -> None:
    case = "k_eq_r_zero_router"
    built, T = container(case)
    scale = CONFIG[case]["lora_alpha"] / CONFIG[case]["r"]
    with torch.no_grad():
        y = built(T["x"])
    assert (y - (T["x"] @ T["W0"].T + scale * T["x"] @ T["A"].T @ T["B"].T)).abs().max() <= 1e-5
