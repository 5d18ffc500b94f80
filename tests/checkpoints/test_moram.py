"""The layout of MoRAM's language code, on what that code itself wrote (tests/fixtures/moram_trace), and around the
layers that its vision code computed (tests/fixtures/moram_layer), which differ in the scale alone."""

from __future__ import annotations

import json
import shutil
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

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = FIXTURES / "moram_trace"
IO = load_file(ROOT / "io.safetensors")
CASES = ["unmerged_task1", "round1", "unmerged_task3"]
LAYER = load_file(FIXTURES / "moram_layer" / "moram_layer.safetensors")
META: dict[str, Any] = json.loads((FIXTURES / "moram_layer" / "config.json").read_text())
# Those of the authors' programs that are arguments; our own keys in the file.
ARGUMENTS = {"moram_router_temp", "moram_infer_lora_a_thresh"}


def backbone() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        FIXTURES / "tiny_llama_base", dtype=torch.float32, attn_implementation="eager"
    )


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return moelora.from_pretrained(folder, backbone())(input_ids=IO["input_ids"]).logits


def changed(case: str, folder: Path, **changes: Any) -> Path:
    """A copy of a fixture with other options."""
    shutil.copytree(ROOT / case, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layouts", [[], ["native"], ["moram"], ["native", "moram"]], ids="-".join)
def test_logits_are_the_authors_own(case: str, layouts: list[str], tmp_path: Path) -> None:
    found = logits(through(ROOT / case, tmp_path, *layouts))
    assert (found - IO[f"{case}.logits"]).abs().max() <= 1e-5
    assert (found - IO["base.logits"]).abs().max() > 0.1


@pytest.mark.parametrize("layouts", [[], ["native", "moram"]], ids="-".join)
def test_arguments_of_their_programs_are_taken_from_the_file(layouts: list[str], tmp_path: Path) -> None:
    folder = changed("round1", tmp_path / "changed", moram_router_temp=0.1, moram_infer_lora_a_thresh=0.0)
    found = logits(through(folder, tmp_path, *layouts))
    assert (found - IO["round1.logits_t0.1_none"]).abs().max() <= 1e-5
    assert (found - IO["round1.logits"]).abs().max() > 1e-3
    assert checkpoints.read(folder).detail == "temperature 0.1, threshold 0"


@pytest.mark.parametrize("case", [name for name in META if not name.startswith("_") and not META[name]["train"]])
def test_layer_is_the_authors_own(case: str, tmp_path: Path) -> None:
    about = META[case]
    rank = about["rank_per_task"]
    A, B = LAYER[f"{case}.A_bank"], LAYER[f"{case}.B_bank"]
    config = {
        "peft_type": "LORA",
        "use_mora": True,
        "r": rank,
        "r_sum": len(A) - rank,
        "lora_alpha": rank,
        "lora_dropout": None,
        "moram_topk": about["topk"],
        "moram_router_temp": about["temperature"],
        "moram_infer_lora_a_thresh": about["threshold"],
        "target_modules": ["fc"],
    }
    parts = {"lora_A": A[:-rank], "lora_B": B[:, :-rank], "loranew_A": A[-rank:], "loranew_B": B[:, -rank:]}
    tensors = {f"{PREFIX}{name}.weight": value.clone() for name, value in parts.items()}
    folder = save(tmp_path / "layer", config, tensors, pickled=True)
    model = moelora.from_pretrained(folder, OneLinear(LAYER[f"{case}.W"], LAYER[f"{case}.bias"]))
    with torch.no_grad():
        assert (model(x=LAYER[f"{case}.x"]).y - LAYER[f"{case}.y"]).abs().max() <= 1e-5


@pytest.mark.parametrize("case", ["round1", "unmerged_task3"])
@pytest.mark.parametrize("layouts", [["moram"], ["native", "moram"]], ids="-".join)
def test_written_again_it_is_the_same_bit_for_bit(case: str, layouts: list[str], tmp_path: Path) -> None:
    written = through(ROOT / case, tmp_path, *layouts)
    assert_same_tensors(written, ROOT / case)
    ours, theirs = config_of(written), config_of(ROOT / case)
    assert ours.keys() - theirs.keys() == ARGUMENTS
    assert {**theirs, **{key: ours[key] for key in ARGUMENTS}, "moram_topk": 4} == {
        **{"init_lora_weights": True, "modules_to_save": None, "use_mora": False},
        **ours,
    }


def test_before_the_second_task_there_may_be_no_older_tensors(tmp_path: Path) -> None:
    written = through(ROOT / "unmerged_task1", tmp_path, "moram")
    stored = torch.load(written / "adapter_model.bin", weights_only=True)
    assert not any(".lora_" in key for key in stored)
    assert torch.equal(logits(written), logits(ROOT / "unmerged_task1"))


def test_the_tensors_are_believed_where_the_sum_of_ranks_is_another(tmp_path: Path) -> None:
    assert torch.equal(logits(changed("round1", tmp_path / "stale", r_sum=0)), logits(ROOT / "round1"))


def test_scales_of_older_tasks_are_multiplied_into_their_tensors(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bank of ours keeps the scale of every task, theirs only that of the newest."""
    site = {
        "target": "q_proj",
        "experts": {"kind": "rank1", "num_experts": 3, "r": 4, "alpha": [8, 2, 12]},
        "router": {"kind": "moram", "top_k": 4, "temperature": 0.1},
    }
    model = moelora.attach(tiny_llama, {"sites": [site]})
    fill(model)
    model.save_pretrained(tmp_path / "native")
    ids = torch.arange(1, 9).view(1, 8)
    model.train(False)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        written = through(tmp_path / "native", tmp_path, "moram")
        assert "no scale for old_lora_B" in caplog.text
        assert checkpoints.read(written).mixture.sites[0].experts.scales == (1, 1, 3)
        model.unload()
        found = moelora.from_pretrained(written, tiny_llama)(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_growing_bank_goes_on(tmp_path: Path) -> None:
    model = moelora.from_pretrained(ROOT / "unmerged_task3", backbone())
    model.begin_task()
    experts = model.mixture.sites[0].experts
    assert (experts.num_experts, experts.scales) == (4, (1, 1, 2, 2))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a rank that does not divide": ({"r": 3}, "expected a divisor of the 8 atoms of older tasks"),
    "another rank": ({"r": 2}, r"misshapen: .*loranew_A\.weight: expected \(2, 32\), found \(4, 32\)"),
    "biases": ({"bias": "all"}, "bias"),
    "modules saved whole": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "another method of their repository": ({"use_moram": False}, "named as in none"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_mean_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(changed("round1", tmp_path / "changed", **changes))


UNWRITABLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "ranks that differ": ({"r": [4, 2]}, {}, "all its experts have one r and one alpha"),
    "a threshold at zero": ({}, {"threshold": 0.0}, r"its threshold is above 0, or none .* found 0\.0"),
    "other experts": ({"kind": "lora"}, {}, "its experts are rank1, found lora"),
}


@pytest.mark.parametrize(("experts", "router", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_it_cannot_express_is_not_written(
    experts: dict[str, Any], router: dict[str, Any], message: str, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    site = {
        "target": "q_proj",
        "experts": {"kind": "rank1", "num_experts": 2, "r": 4, **experts},
        "router": {"kind": "moram", **router},
    }
    moelora.attach(tiny_llama, {"sites": [site]}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.convert(tmp_path / "native", tmp_path / "out", to="moram")
