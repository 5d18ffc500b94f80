"""The layout of HydraLoRA's authors, on what their own code wrote and computed (tests/fixtures/hydralora_tiny)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from altering import Change, altered, with_tensor, without
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError

pytestmark = pytest.mark.smoke

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = FIXTURES / "hydralora_tiny"
# Their runs and LoRAMoE's were made on one backbone and one batch.
INPUTS = load_file(FIXTURES / "loramoe_tiny" / "inputs.safetensors")
BATCH = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
VARIANTS = ["hydra_n4", "hydra_n3"]
GATE = "base_model.model.model.layers.1.mlp.gate_proj"


def backbone() -> LlamaForCausalLM:
    path = FIXTURES / "loramoe_tiny" / "backbone"
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_weights_and_loss_are_the_authors_own(variant: str) -> None:
    model = moelora.from_pretrained(ROOT / variant, backbone())
    expected = load_file(ROOT / variant / "reference.safetensors")
    with moelora.trace(model) as tape:
        out = model(**BATCH, labels=INPUTS["labels"])
    assert (out.logits - expected["logits"]).abs().max() <= 1e-5
    loss = json.loads((ROOT / "reference.json").read_text())[variant]["loss"]
    # They have no balance loss, and neither has what was read.
    assert abs(out.task_loss.item() - loss) <= 1e-5 and out.loss == out.task_loss
    for projection in ("gate_proj", "up_proj", "down_proj"):
        weights = tape[f"model.layers.1.mlp.{projection}"][0].weights
        theirs = expected[f"base_model.model.model.layers.1.mlp.{projection}.route_weight"]
        assert (weights - theirs).abs().max() <= 1e-5
    config = json.loads((ROOT / variant / "adapter_config.json").read_text())
    experts = model.mixture.sites[0].experts
    assert (experts.kind, experts.num_experts, experts.dropout) == (
        "shared_a",
        config["lora_nums"],
        config["lora_dropout"],
    )


def test_gradients_are_the_authors_own() -> None:
    model = moelora.from_pretrained(ROOT / "hydra_n4", backbone())
    model(**BATCH, labels=INPUTS["labels"]).loss.backward()
    expected = load_file(ROOT / "hydra_n4" / "reference.safetensors")
    tensors = model.adapter_tensors()
    for site in model.containers():
        theirs = f"grad.base_model.model.{site}"
        got = {name: tensors[f"{site}.{name}"].grad for name in ("router.weight", "lora_A", "lora_B")}
        wanted = {
            "router.weight": expected[f"{theirs}.lora_route.weight"],
            "lora_A": expected[f"{theirs}.lora_A.weight"],
            "lora_B": torch.cat([expected[f"{theirs}.lora_B{e}.weight"] for e in range(4)], dim=1),
        }
        for name, value in wanted.items():
            assert (got[name] - value).norm() <= 1e-4 * value.norm(), (site, name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("through", [[], ["native"]])
def test_written_again_it_is_the_same_byte_for_byte(variant: str, through: list[str], tmp_path: Path) -> None:
    source = ROOT / variant
    for step, layout in enumerate([*through, "hydralora"]):
        checkpoints.convert(source, tmp_path / str(step), to=layout)
        source = tmp_path / str(step)
    ours, theirs = (json.loads((at / "adapter_config.json").read_text()) for at in (source, ROOT / variant))
    for config in (ours, theirs):
        config["target_modules"].sort()
    assert ours == theirs
    ours, theirs = (torch.load(folder / "adapter_model.bin", weights_only=True) for folder in (source, ROOT / variant))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without(f"{GATE}.lora_B2"), {}, f"missing: {GATE}.lora_B2.weight: expected (56, 4), found nothing"),
        (without(f"{GATE}.lora_A."), {}, f"missing: {GATE}.lora_A.weight"),
        (
            without(f"{GATE}."),
            {},
            "expected tensors of model.layers.1.mlp.gate_proj, as of the other layers, found none",
        ),
        (without("up_proj"), {}, "expected tensors of up_proj, which target_modules names, found none"),
        (
            None,
            {"target_modules": ["gate_proj", "up_proj"]},
            "layers.0.mlp.down_proj, model.layers.1.mlp.down_proj, which",
        ),
        (None, {"lora_nums": 3}, f"unexpected: {GATE}.lora_B3.weight"),
        (None, {"lora_nums": 5}, f"missing: {GATE}.lora_B4.weight"),
        (None, {"lora_nums": 10**12}, "lora_nums: expected at most 56, as adapter_model.bin holds nothing longer"),
        (None, {"r": 10**40}, "r: expected at most 56"),
        (None, {"r": 8}, f"misshapen: {GATE}.lora_A.weight: expected (8, 32), found (4, 32)"),
        (without("lora_route"), {}, f"missing: {GATE}.lora_route.weight: expected a tensor, found nothing"),
        (
            with_tensor(f"{GATE}.lora_route.weight", torch.ones(5, 32)),
            {},
            f"misshapen: {GATE}.lora_route.weight: expected (4, 32), found (5, 32)",
        ),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (None, {"enable_lora": [True, False, True]}, "enable_lora"),
        (None, {"bias": "lora_only"}, "bias"),
        (None, {"lora_nums": ...}, "lora_nums"),
        (None, {"use_rslora": True}, "use_rslora: true"),
        (
            with_tensor("base_model.model.lm_head.weight", torch.ones(96, 32)),
            {},
            "unexpected: base_model.model.lm_head.weight",
        ),
        (
            with_tensor(f"{GATE}.lora_B0.weight", torch.ones(56, 2)),
            {},
            "expected (56, 4), found (56, 2)",
        ),
        (
            with_tensor(f"{GATE}.lora_A.weight", torch.full((4, 32), torch.nan)),
            {},
            f"not finite: {GATE}.lora_A.weight: expected finite numbers, found 128 NaN",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_what_does_not_hold_together_is_refused(
    change: Change | None, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = altered(ROOT / "hydra_n4", tmp_path / "altered", change, **config)
    model = backbone()
    before = list(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        moelora.from_pretrained(folder, model)
    assert message in str(caught.value)
    assert list(model.state_dict()) == before


def test_a_file_in_another_order_reads_the_same(tmp_path: Path) -> None:
    folder = altered(
        ROOT / "hydra_n4", tmp_path / "altered", lambda tensors: dict(sorted(tensors.items(), reverse=True))
    )
    ours, theirs = (checkpoints.read(at) for at in (folder, ROOT / "hydra_n4"))
    values, wanted = (stored.tensors(stored.declared()) for stored in (ours, theirs))
    assert values.keys() == wanted.keys() and all(torch.equal(values[name], wanted[name]) for name in wanted)


def test_it_is_not_taken_for_loramoe_nor_loramoe_for_it() -> None:
    assert checkpoints.read(ROOT / "hydra_n4").layout == "hydralora"
    assert checkpoints.read(FIXTURES / "loramoe_tiny" / "loramoe_n8_noblc").layout == "loramoe"


def mixture(**changes: Any) -> dict[str, Any]:
    site = {
        "target": ["gate_proj", "up_proj", "down_proj"],
        "experts": {"kind": "shared_a", "num_experts": 3, "r": 2},
        "router": {"kind": "hydra", "aux_loss_coef": 0.0},
    }
    return {"sites": [{**site, **changes}]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"experts": {"kind": "lora", "num_experts": 3, "r": 2}}, "its experts are shared_a, found lora"),
        ({"router": {"kind": "topk", "top_k": 2}}, "its routers are softmax, found topk"),
        ({"experts": {"kind": "shared_a", "num_experts": 2, "alpha": [1, 2]}}, "one r and one alpha, found several"),
        ({"target": ["mlp"]}, "its sites are linears"),
        ({"layers": [1]}, "its readers put experts into every layer, this mixture has none at model.layers.0.mlp"),
        ({"layers": [0]}, "its readers put experts into every layer, this mixture has none at model.layers.1.mlp"),
        ({"target": ["down_proj"]}, "breaks with a single target module, found down_proj"),
        (
            {"router": {"kind": "hydra", "aux_loss_coef": 0.0, "share": "layer"}, "target": ["gate_proj", "up_proj"]},
            "share",
        ),
    ],
)
def test_mixtures_that_it_cannot_express(
    changes: dict[str, Any], reason: str, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    moelora.attach(tiny_llama, mixture(**changes)).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.convert(tmp_path / "native", tmp_path / "hydralora", to="hydralora")
    assert reason in str(caught.value) and "Keep the native layout" in str(caught.value)
    assert not (tmp_path / "hydralora").exists()


def test_what_their_code_does_not_do_is_said(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = mixture(
        target=["q_proj", "v_proj"], router={"kind": "softmax", "aux_loss_coef": 0.5, "expert_types": [0, 1, 1]}
    )
    moelora.attach(tiny_llama, config).save_pretrained(tmp_path / "native")
    with caplog.at_level(logging.WARNING):
        checkpoints.convert(tmp_path / "native", tmp_path / "hydralora", to="hydralora")
    assert "does not keep: aux_loss_coef 0.5" in caplog.text
    assert "runs only with experts at gate_proj, up_proj and down_proj" in caplog.text
    assert checkpoints.read(tmp_path / "hydralora").mixture.sites[0].router.aux_loss_coef == 0
