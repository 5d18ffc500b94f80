"""LoRA-Mixer's loss against an independent float64 computation (tests/fixtures/lora_mixer_sbl); no code was released.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moelora import routers
from moelora.routers import Router
from moelora.routing import RoutingContext, RoutingRecord, SiteInfo

ROOT = Path(__file__).parents[1] / "fixtures" / "lora_mixer_sbl"
CONFIG = json.loads((ROOT / "config.json").read_text())
T = load_file(ROOT / "sbl.safetensors")
E = CONFIG["E"]
SITE = SiteInfo(name="s", layer=0, in_features=4, out_features=4, ranks=(2,) * E, scales=(1.0,) * E)


def router(**options: Any) -> Router[Any]:
    entry = routers.get("rsl")
    options = {"balance_coef": CONFIG["alpha"], "entropy_coef": CONFIG["lam"], "top_k": CONFIG["K"], **options}
    return entry(entry.Config.parse({"kind": "lora_mixer", **options}), SITE)


def record_of(logits_NE: Tensor) -> RoutingRecord:
    probs = logits_NE.softmax(-1)
    return RoutingRecord(None, probs, E, logits=logits_NE, probs=probs)


def objective(logits_NE: Tensor, **options: Any) -> Tensor:
    """The loss as it enters the total: every part times its coefficient."""
    made = router(**options)
    losses = made.losses([record_of(logits_NE)], RoutingContext())
    return sum(made.config.coefficients()[name] * value for name, value in losses.items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "loss_printed_sign"),
        ({"objective": "rsl"}, "loss_printed_sign"),
        ({"entropy_sign": "sharpen"}, "loss_sharpen_sign"),
        ({"usage": "topk_share"}, "loss_printed_topkshare"),
    ],
)
def test_the_loss_is_that_of_the_reference(options: dict[str, str], expected: str) -> None:
    assert objective(T["logits"], **options).item() == pytest.approx(CONFIG[expected], abs=1e-12)


def test_the_gradient_is_that_of_the_reference() -> None:
    logits = T["logits"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(logits), logits)
    assert (grad - T["grad_logits_printed"]).abs().max() <= 1e-12


def test_the_parts_are_those_of_the_reference() -> None:
    losses = router().losses([record_of(T["logits"])], RoutingContext())
    assert losses["token_entropy"].item() == pytest.approx(CONFIG["H_mean0"], abs=1e-12)
    assert losses["specialization_balance"].item() == pytest.approx((T["p_bar"] @ T["f_top1"]).item(), abs=1e-12)


def test_the_share_of_the_first_k_has_no_gradient_of_its_own() -> None:
    """As usage by first choice has none: both say how often an expert was used."""
    logits = T["logits"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(logits, usage="topk_share"), logits)
    probs = logits.softmax(-1)
    entropy = -(probs * probs.log()).sum(-1).mean()
    loss = CONFIG["alpha"] * probs.mean(0) @ T["f_topk_share"] - CONFIG["lam"] * entropy
    (expected,) = torch.autograd.grad(loss, logits)
    assert (grad - expected).abs().max() <= 1e-12


def test_every_intermediate_is_that_of_the_reference() -> None:
    probs = record_of(T["logits"]).probs
    assert (probs - T["p"]).abs().max() <= 1e-12
    for row in range(len(probs)):  # each token by itself, so that no error averages out
        losses = router().losses([record_of(T["logits"][row : row + 1])], RoutingContext())
        assert losses["token_entropy"].item() == pytest.approx(T["entropy"][row].item(), abs=1e-12)
    for usage, stored in (("top1", "f_top1"), ("topk_share", "f_topk_share")):
        losses = router(usage=usage).losses([record_of(T["logits"])], RoutingContext())
        assert losses["specialization_balance"].item() == pytest.approx((T["p_bar"] @ T[stored]).item(), abs=1e-12)


@pytest.mark.parametrize("usage", ["top1", "topk_share"])
def test_even_probabilities_have_the_balance_1_over_E(usage: str) -> None:
    losses = router(usage=usage).losses([record_of(torch.zeros(7, E, dtype=torch.float64))], RoutingContext())
    assert losses["specialization_balance"].item() == pytest.approx(CONFIG["balance_uniform_value"], abs=1e-15)
    assert losses["token_entropy"].item() == pytest.approx(CONFIG["logE"], abs=1e-12)


@pytest.mark.parametrize(
    ("sign", "expected"), [("printed", "H_after_descent_printed"), ("sharpen", "H_after_descent_sharpen")]
)
def test_descent_ends_where_the_reference_does(sign: str, expected: str) -> None:
    """As printed the loss flattens routing, against the paper's prose; the other sign does what the prose says."""
    logits = T["logits"].clone().requires_grad_()
    for _ in range(400):
        (grad,) = torch.autograd.grad(objective(logits, entropy_sign=sign), logits)
        with torch.no_grad():
            logits -= 50 * grad
    entropy = router().losses([record_of(logits)], RoutingContext())["token_entropy"].item()
    assert entropy == pytest.approx(CONFIG[expected], abs=1e-9)
    assert (entropy > CONFIG["H_mean0"]) == (sign == "printed")
