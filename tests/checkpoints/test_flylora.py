"""The layout of FlyLoRA's authors, around the layer that their fork of PEFT computed (tests/fixtures/flylora_layer)."""

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

ROOT = Path(__file__).parents[1] / "fixtures" / "flylora_layer"
FORK = load_file(ROOT / "flylora_peft_fork.safetensors")
META = json.loads((ROOT / "config_peft_fork.json").read_text())
# What their ``LoraConfig.save_pretrained`` writes besides: PEFT 0.15's own keys at their defaults.
REST = {
    "alpha_pattern": {},
    "auto_mapping": {"base_model_class": "OneLinear", "parent_library": "one_linear"},
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "rank_pattern": {},
    "revision": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}


def tensors(step: int) -> dict[str, Tensor]:
    """Those of a checkpoint before the call ``step`` of the fixture; keys as recorded from their saver."""
    values = {"lora_A.weight": FORK["A"], "lora_B.weight": FORK["B"], "lora_topk_bias": FORK["bias_trajectory"][step]}
    named = {PREFIX + name: value for name, value in values.items()}
    assert {key: list(value.shape) for key, value in named.items()} == META["checkpoint_keys"]
    return named


def checkpoint(folder: Path, step: int = 2, **changes: Any) -> Path:
    config = {**REST, **META["config"], "auto_mapping": None, **changes}
    return save(folder / "flylora", config, tensors(step))


@pytest.mark.parametrize(("step", "wanted"), [(0, "y_step0_train"), (1, "y_step1_train"), (2, "y_step2_eval")])
@pytest.mark.parametrize("layouts", [[], ["native"], ["flylora"], ["native", "flylora"]], ids="-".join)
def test_output_is_the_authors_own(step: int, wanted: str, layouts: list[str], tmp_path: Path) -> None:
    folder = through(checkpoint(tmp_path, step), tmp_path, *layouts)
    model = moelora.from_pretrained(folder, OneLinear(FORK["W0"]))
    with torch.no_grad():
        assert (model(x=FORK["x"]).y - FORK[wanted]).abs().max() <= 1e-5
        assert (model(x=FORK["x"]).y - FORK[wanted]).abs().max() <= 1e-5, "evaluation leaves the bias alone"


def test_training_goes_on_as_theirs(tmp_path: Path) -> None:
    model = moelora.from_pretrained(checkpoint(tmp_path, 0), OneLinear(FORK["W0"])).train()
    x = FORK["x"].clone().requires_grad_()
    with moelora.trace(model) as tape:
        model(x=x).y.backward(FORK["cotangent"])
    assert torch.allclose(x.grad, FORK["grad_x_step0"], atol=2e-5, rtol=1e-4)
    container = model.containers()["fc"]
    assert torch.allclose(container.experts.lora_B.grad, FORK["grad_B_step0"], atol=2e-5, rtol=1e-4)
    container.router.on_step_end(tape["fc"][0].counts())
    assert (container.router.bias - FORK["bias_trajectory"][1]).abs().max() <= 1e-8


def test_rows_of_a_fresh_matrix_have_as_many_non_zeros_as_theirs(tmp_path: Path) -> None:
    experts = checkpoints.read(checkpoint(tmp_path)).mixture.sites[0].experts
    site = {"target": "any", "experts": experts.to_dict()}
    fresh = moelora.experts.build(OneLinear(FORK["W0"]).fc, site).experts.lora_A
    assert (fresh != 0).sum(1).unique().tolist() == META["nnz_per_row"]


@pytest.mark.parametrize("layouts", [["flylora"], ["native", "flylora"]], ids="-".join)
def test_written_again_it_is_the_same_bit_for_bit(layouts: list[str], tmp_path: Path) -> None:
    source = checkpoint(tmp_path, lora_dropout=0.1)
    written = through(source, tmp_path, *layouts)
    assert_same_tensors(written, source)
    ours, theirs = config_of(written), config_of(source)
    assert ours == {**{key: theirs[key] for key in ours}, "base_model_name_or_path": "unknown"}
    assert not any(theirs[key] for key in theirs.keys() - ours.keys() - {"megatron_core"})


def test_every_site_of_a_model_comes_back(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    experts = {"kind": "sparse_projection", "r": 8, "alpha": 4}
    router = {"kind": "flylora", "top_k": 2, "select": "signed"}
    model = moelora.attach(
        tiny_llama, {"sites": [{"target": ["q_proj", "down_proj"], "experts": experts, **{"router": router}}]}
    )
    fill(model)
    model.save_pretrained(tmp_path / "native")
    back = checkpoints.read(through(tmp_path / "native", tmp_path, "flylora"))
    assert sorted(back.sites()[0]) == sorted(model.containers())
    found, wanted = back.tensors(back.declared()), model.adapter_tensors()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another scale": ({"use_rslora": True}, "use_rslora: true"),
    "ranks by module": ({"rank_pattern": {"fc": 4}}, "rank_pattern"),
    "a changed backbone": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "another rank": ({"r": 16}, r"misshapen: base_model.model.fc.lora_A.weight: expected \(16, 48\), found \(32, 48\)"),
    "more picks than ranks": ({"top_k": 33}, "top_k is 33"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_mean_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(checkpoint(tmp_path, **changes))


def test_a_tensor_too_few_or_too_many_is_refused(tmp_path: Path) -> None:
    config = {**REST, **META["config"], "auto_mapping": None}
    without = {key: value for key, value in tensors(0).items() if "lora_B" not in key}
    with pytest.raises(CheckpointError, match=r"missing: base_model\.model\.fc\.lora_B\.weight"):
        checkpoints.read(save(tmp_path / "few", config, without))
    more = {**tensors(0), "base_model.model.fc.weight": FORK["W0"]}
    with pytest.raises(CheckpointError, match=r"unexpected: base_model\.model\.fc\.weight"):
        checkpoints.read(save(tmp_path / "many", config, more))


UNWRITABLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another choice": ({}, {"select": "abs"}, "select: signed.*found abs"),
    "several experts": ({"num_experts": 2}, {}, "it has one expert, whose ranks are routed, found 2"),
    "other experts": ({"kind": "lora"}, {}, "its experts are sparse_projection, found lora"),
}


@pytest.mark.parametrize(("experts", "router", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_it_cannot_express_is_not_written(
    experts: dict[str, Any], router: dict[str, Any], message: str, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    site = {
        "target": "q_proj",
        "experts": {"kind": "sparse_projection", "num_experts": 1, "r": 8, **experts},
        "router": {"kind": "flylora", "top_k": 2, "select": "signed", **router},
    }
    moelora.attach(tiny_llama, {"sites": [site]}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.convert(tmp_path / "native", tmp_path / "out", to="flylora")
    assert not (tmp_path / "out").exists()
