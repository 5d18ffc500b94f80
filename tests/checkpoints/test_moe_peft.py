"""MoE-PEFT's layouts of LoRAMoE and MoLA, and its classifiers, on what its own code wrote and computed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from altering import Change, altered, with_tensor, without
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError, ConfigError

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE = FIXTURES / "mixlora_tiny"
INPUTS = load_file(BASE / "inputs.safetensors")
BATCH = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
LORAMOE, MOLA = BASE / "moepeft_loramoe", BASE / "moepeft_mola"
COLA, MNLI, RSLORA = (FIXTURES / "moe_peft_tiny" / name for name in ("loramoe_cola", "mixlora_mnli", "mola_rslora"))
GATE = "loramoe.layers.1.mlp.gate_proj"


def backbone() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(BASE / "backbone", dtype=torch.float32, attn_implementation="eager")


def classifier(labels: int) -> PreTrainedModel:
    """The same backbone under a head that is drawn by chance."""
    model = LlamaForSequenceClassification.from_pretrained(
        BASE / "backbone", dtype=torch.float32, attn_implementation="eager", num_labels=labels
    )
    model.config.pad_token_id = 0
    return model.eval()


@pytest.mark.parametrize("folder", [LORAMOE, MOLA, RSLORA], ids=lambda path: path.name)
def test_logits_are_those_of_the_reference(folder: Path) -> None:
    expected = load_file(folder / "reference.safetensors")
    model = moelora.from_pretrained(folder, backbone())
    with torch.no_grad():
        logits = model(**BATCH).logits
    assert (logits - expected.get("logits_inference_mode", expected["logits"])).abs().max() <= 1e-5


@pytest.mark.parametrize(("folder", "labels"), [(COLA, 2), (MNLI, 3)], ids=["loramoe_cola", "mixlora_mnli"])
def test_a_classifier_is_that_of_the_reference(folder: Path, labels: int, caplog: pytest.LogCaptureFixture) -> None:
    expected = load_file(folder / "reference.safetensors")["pooled_logits"]
    plain = classifier(labels)
    before = plain.score.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        model = moelora.from_pretrained(folder, plain)
    assert "replaces whole modules of the backbone: score" in caplog.text
    with torch.no_grad():
        assert (model(**BATCH).logits - expected).abs().max() <= 1e-5
    assert torch.equal(model.unload().score.weight, before)


def test_a_classifier_needs_a_backbone_with_its_head_and_labels() -> None:
    model = backbone()
    with pytest.raises(
        ConfigError, match="modules_to_save names 'score', which matches no module of LlamaForCausalLM"
    ) as caught:
        moelora.from_pretrained(COLA, model)
    assert "AutoModelForSequenceClassification" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"misshapen: classifier: expected \(3, 32\), found \(2, 32\)"):
        moelora.from_pretrained(COLA, classifier(3))


def test_what_the_configurations_mean() -> None:
    loramoe, mola, cola = (checkpoints.read(folder).mixture for folder in (LORAMOE, MOLA, COLA))
    assert (loramoe.sites[0].router.kind, loramoe.sites[0].router.aux_loss_coef) == ("softmax", 0.0)
    router = mola.sites[0].router
    assert (router.kind, router.top_k, router.balance, router.aux_loss_coef) == ("mola", 2, "pooled", 0.0)
    routed, plain = cola.sites
    assert plain.router is None and all(".self_attn." in name for name in plain.target) and len(plain.target) == 4
    assert (
        routed.experts.num_experts == 3 and all(".mlp." in name for name in routed.target) and len(routed.target) == 4
    )
    assert cola.modules_to_save == ["score"] and not loramoe.modules_to_save
    assert checkpoints.read(RSLORA).mixture.sites[0].experts.kind == "rslora"


def test_the_balance_loss_of_mola_is_read_where_it_is_on(tmp_path: Path) -> None:
    on = altered(MOLA, tmp_path / "on", router_loss=True)
    assert checkpoints.read(on).mixture.sites[0].router.aux_loss_coef == 0.001
    stronger = altered(MOLA, tmp_path / "stronger", router_loss=True, router_aux_loss_coef=0.5)
    checkpoints.convert(stronger, tmp_path / "native", to="native")
    checkpoints.convert(tmp_path / "native", tmp_path / "again", to="moe_peft")
    assert checkpoints.read(tmp_path / "again").mixture.sites[0].router.aux_loss_coef == 0.5


@pytest.mark.parametrize("folder", [LORAMOE, MOLA, COLA, RSLORA, MNLI], ids=lambda path: path.name)
@pytest.mark.parametrize("through", [[], ["native"]])
def test_written_again_it_is_the_same_byte_for_byte(folder: Path, through: list[str], tmp_path: Path) -> None:
    source = folder
    for step, layout in enumerate([*through, checkpoints.read(folder).layout]):
        checkpoints.convert(source, tmp_path / str(step), to=layout)
        source = tmp_path / str(step)
    for name in ("adapter_config.json", "adapter_model.bin"):
        assert (source / name).read_bytes() == (folder / name).read_bytes()


def test_lists_and_mappings_of_targets_and_a_task_of_any_kind_are_read(tmp_path: Path) -> None:
    targets = {"q_proj": False, "gate_proj": True, "down_proj": True, "up_proj": True}
    folder = altered(
        LORAMOE, tmp_path / "other", target_modules=targets, task_type=None, task_name="arc-e", peft_version=None
    )
    assert checkpoints.read(folder).mixture == checkpoints.read(LORAMOE).mixture


def test_safetensors_instead_of_bin(tmp_path: Path) -> None:
    folder = altered(COLA, tmp_path / "safe")
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    save_file({key: value.detach() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_model.bin").unlink()
    ours, theirs = checkpoints.read(folder), checkpoints.read(COLA)
    values, wanted = (stored.tensors(stored.declared()) for stored in (ours, theirs))
    assert "score.weight" in values
    assert values.keys() == wanted.keys() and all(torch.equal(values[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("folder", "change", "config", "message"),
    [
        (LORAMOE, without(f"{GATE}.moe_gate"), {}, f"missing: {GATE}.moe_gate.weight: expected a tensor"),
        (
            LORAMOE,
            without(f"{GATE}.experts.2.lora_A"),
            {},
            f"missing: {GATE}.experts.2.lora_A.weight: expected (4, 32)",
        ),
        (LORAMOE, without(f"{GATE}."), {}, "expected tensors of model.layers.1.mlp.gate_proj, as of the other layers"),
        (LORAMOE, without("layers.0"), {}, "expected tensors of model.layers.0.mlp.gate_proj"),
        (LORAMOE, without("down_proj"), {}, "expected tensors of down_proj, which target_modules names, found none"),
        (LORAMOE, None, {"target_modules": ["up_proj"]}, "expected no tensors of model.layers.0.mlp.gate_proj"),
        (LORAMOE, None, {"num_experts": 3}, f"unexpected: {GATE}.experts.3.lora_A.weight"),
        (LORAMOE, None, {"num_experts": 10**12}, "num_experts: expected at most 56"),
        (LORAMOE, None, {"r": 2}, f"misshapen: {GATE}.experts.0.lora_A.weight: expected (2, 32), found (4, 32)"),
        (LORAMOE, None, {"r": 10**40}, "r: expected at most 56"),
        (LORAMOE, None, {"use_dora": True}, "the reference neither trains nor saves DoRA's magnitudes"),
        (LORAMOE, None, {"bias": "all"}, "bias: expected 'none', found 'all'"),
        (LORAMOE, None, {"routing_strategy": "mola"}, "routing_strategy: expected 'loramoe', found 'mola'"),
        (LORAMOE, None, {"target_modules": ["embed"]}, "target_modules: 'embed' is not known"),
        (LORAMOE, None, {"peft_type": "MOLA", "routing_strategy": "mola"}, "which target_modules names, found none"),
        (LORAMOE, None, {"router_temperature": 2}, "keys that are not known here and may change what the tensors mean"),
        (LORAMOE, None, {"task_type": "SEQ_CLS"}, "missing: classifier"),
        (LORAMOE, None, {"task_type": "TOKEN_CLS"}, "task_type: expected 'CAUSAL_LM' or"),
        (COLA, None, {"task_type": "CAUSAL_LM"}, "unexpected: classifier"),
        (COLA, without("classifier"), {}, "missing: classifier"),
        (COLA, with_tensor("classifier", torch.full((2, 32), torch.nan)), {}, "not finite: classifier"),
        (MNLI, None, {"task_type": "CAUSAL_LM"}, "unexpected: classifier"),
        (MNLI, without("classifier"), {}, "missing: classifier"),
        (MOLA, None, {"top_k": 5}, "top_k is 5"),
        (MOLA, with_tensor("mola.norm.weight", torch.ones(32)), {}, "unexpected: mola.norm.weight"),
        (
            MOLA,
            with_tensor("loramoe.layers.0.mlp.up_proj.moe_gate.weight", torch.ones(4, 32)),
            {},
            "unexpected: loramoe.",
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else value.name if isinstance(value, Path) else "",
)
def test_what_does_not_hold_together_is_refused(
    folder: Path, change: Change | None, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    labels = {COLA: 2, MNLI: 3}.get(folder)
    with pytest.raises(CheckpointError) as caught:
        moelora.from_pretrained(
            altered(folder, tmp_path / "altered", change, **config), classifier(labels) if labels else backbone()
        )
    assert message in str(caught.value)


def site(**changes: Any) -> dict[str, Any]:
    plain = {
        "target": ["gate_proj", "up_proj", "down_proj"],
        "experts": {"num_experts": 4, "r": 2, "alpha": 8},
        "router": {"kind": "softmax", "aux_loss_coef": 0.0},
    }
    merged = {
        key: {**plain[key], **value} if isinstance(value, dict) else value
        for key, value in {**plain, **changes}.items()
    }
    if merged["router"] is not None and merged["router"]["kind"] != "softmax":
        merged["router"].pop("aux_loss_coef")
    return merged


ONE = {"experts": {"num_experts": 1}, "router": None}


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        ([site(experts={"kind": "shared_a"})], "its experts are lora or rslora, found shared_a"),
        ([site(router={"kind": "topk"})], "a router softmax or mola of its own, or none, found topk"),
        ([site(target="mlp", router={"kind": "topk"})], "it has no place for 'model.layers.0.mlp'"),
        ([site(target="q_proj")], "with the router softmax it has plain LoRA on attention, found experts there"),
        ([site(), site(target="q_proj", **ONE, layers=[0])], "has none at model.layers.1.self_attn.q_proj"),
        ([site(target=["gate_proj"]), site(target="up_proj", **ONE)], "its FFN is routed, found plain LoRA there"),
        ([site(router={"kind": "mola"}), site(target="q_proj", **ONE)], "with the router mola all its sites are"),
        ([site(layers=[0]), site(layers=[1], experts={"num_experts": 2})], "one num_experts and one router"),
        ([site(), site(target="q_proj", experts={"num_experts": 1, "r": 3}, router=None)], "one kind, r, alpha"),
        ([site(experts={"alpha": [1, 2, 3, 4]})], "it has one r and one alpha, found several"),
        ([site(target="q_proj", **ONE)], "one num_experts and one router for all, found 0"),
    ],
)  # fmt: skip
def test_mixtures_that_it_cannot_express(
    sites: list[dict[str, Any]], reason: str, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    moelora.attach(tiny_llama, {"sites": sites}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.convert(tmp_path / "native", tmp_path / "moe_peft", to="moe_peft")
    assert reason in str(caught.value) and "Keep the native layout" in str(caught.value)


def test_a_head_with_a_bias_or_another_module_saved_whole_is_refused(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    moelora.attach(tiny_llama, {"sites": [site()], "modules_to_save": ["lm_head"]}).save_pretrained(tmp_path / "native")
    for layout in ("moe_peft", "mixlora"):
        with pytest.raises(CheckpointError, match=r"it has a head 'score' without a bias, found lm_head\.weight"):
            checkpoints.convert(tmp_path / "native", tmp_path / layout, to=layout)


def test_what_the_reference_does_not_do_is_said(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = site(router={"kind": "mola"}, experts={"alpha": 7.5})
    config["router"]["aux_loss_coef"] = 0.1  # per layer, as the authors of MoLA have it
    moelora.attach(tiny_llama, {"sites": [config]}).save_pretrained(tmp_path / "native")
    with caplog.at_level(logging.WARNING):
        checkpoints.convert(tmp_path / "native", tmp_path / "mola", to="moe_peft")
        checkpoints.convert(COLA, tmp_path / "cola", to="moe_peft")
    assert "does not keep: aux_loss_coef 0.1 per layer" in caplog.text
    assert "whole numbers for lora_alpha only, found 7.5" in caplog.text
    assert "add task_name, such as glue:sst2" in caplog.text
    assert json.loads((tmp_path / "mola" / "adapter_config.json").read_text())["lora_alpha"] == 7.5
