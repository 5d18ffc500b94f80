"""The layout of LoRAMoE's authors, on what their own code wrote (tests/fixtures/loramoe_tiny)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from altering import Change, altered, with_tensor, without
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError

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
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)


GATE = "base_model.model.model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without(f"{GATE}.lora_A2"), {}, f"missing: {GATE}.lora_A2.weight: expected (4, 32), found nothing"),
        (without("lora_route"), {}, f"missing: {GATE}.lora_route.weight"),
        (
            without(f"{GATE}."),
            {},
            "expected tensors of model.layers.1.mlp.gate_proj, as of the other layers, found none",
        ),
        (without("layers.0."), {}, "expected tensors of model.layers.0.mlp.gate_proj, model.layers.0.mlp.down_proj"),
        (without("up_proj"), {}, "expected tensors of up_proj, which target_modules names, found none"),
        (None, {"target_modules": ["gate_proj"]}, "expected no tensors of model.layers.0.mlp.down_proj"),
        (None, {"lora_nums": 2}, f"unexpected: {GATE}.lora_A3.weight"),
        (None, {"lora_nums": 5, "blc_weight": 0}, f"missing: {GATE}.lora_B4.weight"),
        (None, {"lora_nums": 5}, "each of two types one half of the experts, but there are 5"),
        (None, {"lora_nums": 10**12}, "lora_nums: expected at most 56, as adapter_model.bin holds nothing longer"),
        (None, {"r": 10**40}, "r: expected at most 56"),
        (None, {"r": 2}, f"misshapen: {GATE}.lora_A0.weight: expected (2, 32), found (4, 32)"),
        (
            with_tensor(f"{GATE}.lora_A1.weight", torch.ones(2, 32)),
            {},
            "lora_A1.weight: expected (4, 32), found (2, 32)",
        ),
        (
            with_tensor(f"{GATE}.lora_B1.weight", torch.ones(56, 2)),
            {},
            "lora_B1.weight: expected (56, 4), found (56, 2)",
        ),
        (
            with_tensor(f"{GATE}.lora_A1.weight", torch.ones(4, 31)),
            {},
            "lora_A1.weight: expected (4, 32), found (4, 31)",
        ),
        (with_tensor(f"{GATE}.lora_route.weight", torch.ones(3, 32)), {}, "expected (4, 32), found (3, 32)"),
        (with_tensor(f"{GATE}.lora_A0.weight", torch.ones(4, 32).long()), {}, f"wrong dtype: {GATE}.lora_A0.weight"),
        (with_tensor(f"{GATE}.weight", torch.ones(56, 32)), {}, f"unexpected: {GATE}.weight"),
        (with_tensor(f"{GATE}.lora_A00.weight", torch.ones(4, 32)), {}, f"unexpected: {GATE}.lora_A00.weight"),
        (with_tensor(f"{GATE}.lora_B3.weight", torch.full((56, 4), torch.inf)), {}, "found 224 NaN or infinite"),
        (
            with_tensor(f"{GATE}.lora_A0.weight", torch.zeros(1).expand(2**31, 2**31)),
            {},
            "without the bytes for it",
        ),
        (None, {"blc_alpha": 1.5}, "blc_alpha"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (None, {"enable_lora": [True, False, True]}, "enable_lora"),
        (None, {"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_what_does_not_hold_together_is_refused(
    change: Change | None, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = altered(ROOT / "loramoe_n4_blc", tmp_path / "altered", change, **config)
    with pytest.raises(CheckpointError) as caught:
        moelora.from_pretrained(folder, backbone())
    assert message in str(caught.value)


def test_three_experts_are_read_where_no_loss_needs_two_halves(tmp_path: Path) -> None:
    def three(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {key: value for key, value in tensors.items() if "lora_A3" not in key and "lora_B3" not in key}
        return {key: value[:3].clone() if "lora_route" in key else value for key, value in tensors.items()}

    folder = altered(ROOT / "loramoe_n4_blc", tmp_path / "three", three, lora_nums=3, blc_weight=None, blc_alpha=None)
    model = moelora.from_pretrained(folder, backbone())
    site = model.mixture.sites[0]
    assert (site.experts.num_experts, site.router.aux_loss_coef, site.router.delta) == (3, 0.0, 0.0)
    raw = torch.load(folder / "adapter_model.bin", weights_only=True)
    x_TD = torch.randn(5, 32)
    weights_TE = (x_TD @ raw[f"{GATE}.lora_route.weight"].T).softmax(-1)
    pairs = [(raw[f"{GATE}.lora_A{e}.weight"], raw[f"{GATE}.lora_B{e}.weight"]) for e in range(3)]
    updates = torch.stack([2 * (x_TD @ A.T @ B.T) for A, B in pairs], dim=-1)
    container = model.containers()["model.layers.1.mlp.gate_proj"]
    expected = container.base(x_TD) + (updates * weights_TE.unsqueeze(1)).sum(-1)
    with torch.no_grad():
        assert (container(x_TD) - expected).abs().max() <= 1e-5
    checkpoints.convert(folder, tmp_path / "again", to="loramoe")
    assert checkpoints.read(tmp_path / "again").mixture == model.mixture


def test_a_file_in_another_order_reads_the_same(tmp_path: Path) -> None:
    source = ROOT / "loramoe_n8_noblc"
    folder = altered(source, tmp_path / "mixed", lambda tensors: dict(sorted(tensors.items(), reverse=True)))
    ours, theirs = (checkpoints.read(at) for at in (folder, source))
    values, wanted = (stored.tensors(stored.declared()) for stored in (ours, theirs))
    assert values.keys() == wanted.keys() and all(torch.equal(values[name], wanted[name]) for name in wanted)


def site(**changes: Any) -> dict[str, Any]:
    plain = {
        "target": ["gate_proj", "up_proj", "down_proj"],
        "experts": {"kind": "lora", "num_experts": 2, "r": 2},
        "router": {"kind": "loramoe", "aux_loss_coef": 0.0},
    }
    return {**plain, **changes}


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        ([site(experts={"kind": "rslora", "num_experts": 2, "r": 2})], "its experts are lora, found rslora"),
        ([site(experts={"num_experts": 2, "r": [1, 2]})], "one r and one alpha, found several"),
        ([site(experts={"num_experts": 2, "r": 2, "rank_pattern": {"up_proj": 4}})], "one r and one alpha"),
        ([site(router={"kind": "topk", "top_k": 1})], "softmax, found topk"),
        ([site(layers=[1])], "its readers put experts into every layer"),
        ([site(target="down_proj")], "breaks with a single target module"),
    ],
)
def test_mixtures_that_it_cannot_express(
    sites: list[dict[str, Any]], reason: str, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    moelora.attach(tiny_llama, {"sites": sites}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.convert(tmp_path / "native", tmp_path / "loramoe", to="loramoe")
    assert reason in str(caught.value) and "Keep the native layout" in str(caught.value)


def test_options_of_the_loss_that_their_code_does_not_have_are_named(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    router = {"kind": "softmax", "aux_loss_coef": 0.2, "delta": 0.3, "form": "paper", "expert_types": [0, 1]}
    moelora.attach(tiny_llama, {"sites": [site(router=router)]}).save_pretrained(tmp_path / "native")
    with caplog.at_level(logging.WARNING):
        checkpoints.convert(tmp_path / "native", tmp_path / "loramoe", to="loramoe")
    assert "does not keep: form paper, expert_types [0, 1]" in caplog.text
    kept = checkpoints.read(tmp_path / "loramoe").mixture.sites[0].router
    assert (kept.aux_loss_coef, kept.delta, kept.form) == (0.2, 0.3, "released")
