"""FlyLoRA against numbers of the authors' own code (tests/fixtures/flylora_layer, see its README.txt).

Shapes: D in, O out, R ranks, K picks.
"""

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
from moelora.routers.flylora import FlyLoRARouter

ROOT = Path(__file__).parents[1] / "fixtures" / "flylora_layer"
CASES: dict[str, Any] = json.loads((ROOT / "config.json").read_text())["cases"]
LAYER = load_file(ROOT / "flylora_layer.safetensors")
FORK_CONFIG = json.loads((ROOT / "config_peft_fork.json").read_text())
FORK = load_file(ROOT / "flylora_peft_fork.safetensors")


def container(A: Tensor, B: Tensor, bias: Tensor, base: nn.Linear, alpha: float, **options: Any) -> LinearContainer:
    """A linear site with the given tensors; what begins with ``experts_`` is an option of the bank."""
    experts = {key.removeprefix("experts_"): options.pop(key) for key in list(options) if key.startswith("experts_")}
    site = {
        "target": "any",
        "experts": {"kind": "sparse_projection", "r": A.shape[0], "alpha": alpha, **experts},
        "router": {"kind": "flylora", **options},
    }
    built = build(base.requires_grad_(False), site)
    assert isinstance(built, LinearContainer) and isinstance(built.router, FlyLoRARouter)
    with torch.no_grad():
        built.experts.lora_A.copy_(A)
        built.experts.lora_B.copy_(B)
        built.router.bias.copy_(bias)
    return built


def no_base(inner: int, outer: int) -> nn.Linear:
    base = nn.Linear(inner, outer, bias=False)
    nn.init.zeros_(base.weight)
    return base


@pytest.mark.parametrize("case", CASES)
def test_stand_alone_layer(case: str) -> None:
    config = CASES[case]
    T = {name: LAYER[f"{case}.{name}"] for name in ("A", "B", "d", "x", "y", "cotangent", "grad_x", "grad_B", "mask")}
    base = no_base(config["in_features"], config["out_features"])
    built = container(T["A"], T["B"], T["d"], base, config["alpha"], top_k=config["k"], select="abs_shifted")
    built.train(config["train"])
    x = T["x"].clone().requires_grad_()
    with moelora.trace(built) as tape:
        y = built(x)
    record = tape[""][0]
    assert torch.equal(record.dense_weights(), T["mask"].float().reshape(*x.shape[:-1], -1))
    picked = LAYER[f"{case}.topk_indices_abs"].reshape(record.indices.shape)
    assert torch.equal(record.indices.sort(-1).values, picked.sort(-1).values)
    assert (built.experts.low(x) - LAYER[f"{case}.act"]).abs().max() <= 1e-5
    assert (y - T["y"]).abs().max() <= 1e-5
    y.backward(T["cotangent"])
    assert torch.allclose(x.grad, T["grad_x"], atol=2e-5, rtol=1e-4)
    assert torch.allclose(built.experts.lora_B.grad, T["grad_B"], atol=2e-5, rtol=1e-4)
    assert built.experts.lora_A.grad is None
    never = ~T["mask"].reshape(-1, config["r"]).bool().any(0)
    assert torch.equal((built.experts.lora_B.grad == 0).all(0), never)


@pytest.mark.parametrize("case", CASES)
def test_stand_alone_layer_has_as_many_non_zeros_as_ours(case: str) -> None:
    config = CASES[case]
    site = {
        "target": "any",
        "experts": {"kind": "sparse_projection", "r": config["r"], "density": config["sparsity_ratio"]},
    }
    ours = build(nn.Linear(config["in_features"], 4), site).experts.lora_A
    assert ((ours != 0).sum(1) == config["nnz_per_row"]).all()
    assert ((LAYER[f"{case}.A"] != 0).sum(1) == config["nnz_per_row"]).all()


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case]["train"]])
def test_counts_are_theirs_and_their_bias_is_that_of_a_count_taken_for_a_frequency(case: str) -> None:
    """flylora.py compares counts with k / r, so that every rank that is used at all goes down; ours compares counts."""
    config = CASES[case]
    T = {name: LAYER[f"{case}.{name}"] for name in ("A", "B", "d", "x", "assignment_count")}
    base, rate = no_base(config["in_features"], config["out_features"]), config["bias_lr"]
    options = {"top_k": config["k"], "select": "abs_shifted", "bias_rate": rate}
    built = container(T["A"], T["B"], T["d"], base, config["alpha"], **options)
    with moelora.trace(built) as tape, torch.no_grad():
        built(T["x"])
    counts = tape[""][0].counts()
    assert torch.equal(counts.float(), T["assignment_count"])
    assert (LAYER[f"{case}.expected_frequency"] == config["k"] / config["r"]).all()
    built.router.on_step_end(counts)
    assert (built.router.bias - (T["d"] + rate * (counts.mean() - counts).sign())).abs().max() <= 1e-8
    if f"{case}.d_after_update_bias" in LAYER:
        theirs = LAYER[f"{case}.d_after_update_bias"]
        frequency = config["k"] / config["r"]
        assert (theirs - (T["d"] + rate * (frequency - counts).sign())).abs().max() <= 1e-8
        used = counts > 0
        assert (theirs[used] < T["d"][used]).all()
        assert not torch.equal(theirs, built.router.bias)


@pytest.mark.parametrize("case", CASES)
def test_signed_choice(case: str) -> None:
    config = CASES[case]
    T = {name: LAYER[f"{case}.{name}"] for name in ("A", "B", "d", "x")}
    base = no_base(config["in_features"], config["out_features"])
    built = container(T["A"], T["B"], T["d"], base, config["alpha"], top_k=config["k"], select="signed")
    with moelora.trace(built) as tape, torch.no_grad():
        built(T["x"])
    got, wanted = tape[""][0].indices, LAYER[f"{case}.topk_indices_signed"]
    assert torch.equal(got.sort(-1).values, wanted.long().reshape(got.shape).sort(-1).values)


def test_fork_of_peft_with_its_bias_trajectory() -> None:
    """The fork moves the bias in every forward, in evaluation too; here the test does, by a call after each."""
    config = FORK_CONFIG["config"]
    W, A, B, x = (FORK[name] for name in ("W0", "A", "B", "x"))
    base = nn.Linear(W.shape[1], W.shape[0], bias=False)
    with torch.no_grad():
        base.weight.copy_(W)
    steps = ("y_step0_train", "y_step1_train", "y_step2_eval")
    trajectory = FORK["bias_trajectory"]
    options = {"top_k": config["top_k"], "select": "signed", "bias_rate": config["bias_u"]}
    built = container(A, B, trajectory[0], base, config["lora_alpha"], experts_stop_gradient=True, **options)
    for step, name in enumerate(steps):
        built.train(name.endswith("train"))
        assert (built.router.bias - trajectory[step]).abs().max() <= 1e-8
        hidden = x.clone().requires_grad_()
        with moelora.trace(built) as tape:
            y = built(hidden)
        assert (y - FORK[name]).abs().max() <= 1e-5
        if step == 0:
            y.backward(FORK["cotangent"])
            assert torch.allclose(hidden.grad, FORK["grad_x_step0"], atol=2e-5, rtol=1e-4)
            assert torch.allclose(built.experts.lora_B.grad, FORK["grad_B_step0"], atol=2e-5, rtol=1e-4)
        built.router.on_step_end(tape[""][0].counts())
    assert (built.router.bias - trajectory[len(steps)]).abs().max() <= 1e-8


def test_without_parity_the_gradient_below_is_whole() -> None:
    config = FORK_CONFIG["config"]
    W, A, B, x = (FORK[name] for name in ("W0", "A", "B", "x"))
    base = nn.Linear(W.shape[1], W.shape[0], bias=False)
    with torch.no_grad():
        base.weight.copy_(W)
    bias = FORK["bias_trajectory"][0]
    built = container(A, B, bias, base, config["lora_alpha"], top_k=config["top_k"], select="signed")
    hidden = x.clone().requires_grad_()
    with moelora.trace(built) as tape:
        built(hidden).backward(FORK["cotangent"])
    mask = tape[""][0].dense_weights()
    through = FORK_CONFIG["scaling"] * ((FORK["cotangent"] @ B) * mask) @ A
    assert torch.allclose(hidden.grad, FORK["grad_x_step0"] + through, atol=2e-5, rtol=1e-4)
    assert through.norm() > 0.01 * FORK["grad_x_step0"].norm()
