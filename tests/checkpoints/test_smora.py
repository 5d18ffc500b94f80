"""The layout of SMoRA's authors, around the layers that their code computed (tests/fixtures/smora_layer)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from one_linear import PREFIX, OneLinear, assert_same_tensors, config_of, fill, save, through
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError

ROOT = Path(__file__).parents[1] / "fixtures" / "smora_layer"
META: dict[str, Any] = json.loads((ROOT / "config.json").read_text())
LAYER = load_file(ROOT / "smora_layer.safetensors")
CASES = [name for name in META if not name.startswith("_")]
# What their ``SRMoLEConfig.save_pretrained`` writes besides: PEFT 0.12's own keys at their defaults.
REST = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
    "bias": "none",
    "dense_compute": False,
    "epsilon_greedy": False,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "SRMOLE",
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["fc"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


def checkpoint(folder: Path, case: str, *, named: bool = False, **changes: Any) -> Path:
    """Their files; ``named`` leaves the name of the adapter in the keys, as a state dict has it."""
    about, infix = META[case], ".default" if named else ""
    config = {
        **REST,
        "r": about["r"],
        "activate_r": about["activate_r"],
        "rank_partition": about["rank_partition"],
        "lora_alpha": about["lora_alpha"],
        **changes,
    }
    values = {
        f"lora_A{infix}.weight": LAYER[f"{case}.A"],
        f"lora_B{infix}.weight": LAYER[f"{case}.B"],
        f"lora_router{infix}.weight": LAYER[f"{case}.W_router"],
        f"lora_biases{infix}": LAYER[f"{case}.bias_before"],
    }
    return save(folder / "smora", config, {PREFIX + name: value for name, value in values.items()})


def output(folder: Path, case: str) -> Tensor:
    model = moelora.from_pretrained(folder, OneLinear(LAYER[f"{case}.W0"]))
    with torch.no_grad():
        return model(x=LAYER[f"{case}.x"]).y


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("named", [False, True])
def test_output_is_the_authors_own(case: str, named: bool, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, case, named=named)
    assert (output(folder, case) - LAYER[f"{case}.y"]).abs().max() <= 1e-5
    for step, layouts in enumerate([["native"], ["smora"], ["native", "smora"]]):
        (tmp_path / str(step)).mkdir()
        assert torch.equal(output(through(folder, tmp_path / str(step), *layouts), case), output(folder, case))


def test_the_bias_moves_as_far_as_in_their_code(tmp_path: Path) -> None:
    case = "default_64_8"
    model = moelora.from_pretrained(checkpoint(tmp_path, case), OneLinear(LAYER[f"{case}.W0"])).train()
    with moelora.trace(model) as tape:
        model(x=LAYER[f"{case}.x"])
    router = model.containers()["fc"].router
    router.on_step_end(tape["fc"][0].counts())
    assert (router.bias - LAYER[f"{case}.bias_after"]).abs().max() <= 1e-8
    assert not torch.equal(router.bias, LAYER[f"{case}.bias_before"])


@pytest.mark.parametrize("layouts", [["smora"], ["native", "smora"]], ids="-".join)
def test_written_again_it_is_the_same_bit_for_bit(layouts: list[str], tmp_path: Path) -> None:
    source = checkpoint(tmp_path, "partition4_k8_of_16", lora_dropout=0.1)
    written = through(source, tmp_path, *layouts)
    assert_same_tensors(written, source)
    ours, theirs = config_of(written), config_of(source)
    assert ours == {key: theirs[key] for key in ours}
    silent = {"megatron_core", "init_lora_weights"}
    assert not any(theirs[key] for key in theirs.keys() - ours.keys() - silent)


def test_keys_with_the_adapters_name_are_written_without(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = checkpoint(tmp_path / "plain", "default_64_8")
    named = checkpoint(tmp_path, "default_64_8", named=True)
    assert_same_tensors(through(named, tmp_path, "smora"), plain)


def test_every_site_of_a_model_comes_back(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    site = {
        "target": ["v_proj", "gate_proj"],
        "experts": {"kind": "lora", "num_experts": 1, "r": 8, "alpha": 4},
        "router": {"kind": "smora", "top_k": 4, "partition": 2},
    }
    model = moelora.attach(tiny_llama, {"sites": [site]})
    fill(model)
    model.save_pretrained(tmp_path / "native")
    back = checkpoints.read(through(tmp_path / "native", tmp_path, "smora"))
    assert sorted(back.sites()[0]) == sorted(model.containers())
    found, wanted = back.tensors(back.declared()), model.adapter_tensors()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ranks by module": ({"rank_pattern": {"fc": 4}}, "rank_pattern"),
    "DoRA": ({"use_dora": True}, "use_dora: true"),
    "another rank": ({"r": 32}, r"lora_router\.weight: expected \(32, 40\), found \(64, 40\)"),
    "another partition": ({"rank_partition": 2}, r"lora_router\.weight: expected \(32, 40\), found \(64, 40\)"),
    "a partition that does not fit": ({"rank_partition": 3}, "partition is 3 but there are 64 ranks"),
    "another method": ({"peft_type": "MOELORA"}, "peft_type.*'SRMOLE'"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_mean_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(checkpoint(tmp_path, "default_64_8", **changes))


def test_keys_half_with_and_half_without_the_adapters_name_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "default_64_8")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[PREFIX + "lora_biases.default"] = tensors.pop(PREFIX + "lora_biases")
    mixed = save(tmp_path / "mixed", json.loads((folder / "adapter_config.json").read_text()), tensors)
    with pytest.raises(CheckpointError, match=r"missing: .*lora_A\.default\.weight"):
        checkpoints.read(mixed)


UNWRITABLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the first version's softmax": ({}, {"score": "softmax_topk"}, "router.score sigmoid, found softmax_topk"),
    "the principled bias": ({}, {"bias_in_value": False}, "router.bias_in_value True, found False"),
    "several experts": ({"num_experts": 2}, {}, "it has one expert, whose ranks are routed, found 2"),
    "other experts": ({"kind": "rslora"}, {}, "its experts are lora, found rslora"),
}


@pytest.mark.parametrize(("experts", "router", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_it_cannot_express_is_not_written(
    experts: dict[str, Any], router: dict[str, Any], message: str, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    site = {
        "target": "q_proj",
        "experts": {"kind": "lora", "num_experts": 1, "r": 8, **experts},
        "router": {"kind": "smora", "top_k": 4, **router},
    }
    moelora.attach(tiny_llama, {"sites": [site]}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.convert(tmp_path / "native", tmp_path / "out", to="smora")
