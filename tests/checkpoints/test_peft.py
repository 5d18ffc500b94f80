"""The layout of PEFT's LoRA adapters, against PEFT itself and against numbers that it gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft_saves import (
    INPUTS,
    IO,
    Q0,
    Q1,
    ROOT,
    altered,
    backbone,
    classifier,
    close,
    config,
    experts,
    gpt2,
    logits,
    peft_logits,
    peft_saved,
    t5,
    tensors,
)
from torch import Tensor

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError

# PEFT asks transformers by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ADAPTERS = ["plain_r4_a8", "plain_r4_a8_second", "rslora_r4_a8", "alllinear_r2_a4", "rankpattern"]


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "plain_r4_a8_second"])
def test_logits_are_those_that_peft_gave(name: str) -> None:
    model = moelora.from_pretrained(ROOT / name, backbone())
    assert close(logits(model), IO[f"logits.{name}"])
    assert (logits(model) - IO["base_logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("through", [[], ["native"]])
def test_written_again_it_is_the_same_bit_for_bit(name: str, through: list[str], tmp_path: Path) -> None:
    source = ROOT / name
    for step, layout in enumerate([*through, "peft"]):
        checkpoints.convert(source, tmp_path / str(step), to=layout)
        source = tmp_path / str(step)
    ours, theirs = tensors(source), tensors(ROOT / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert experts(source) == experts(ROOT / name)
    for key in ("r", "lora_alpha", "use_rslora", "task_type", "base_model_name_or_path", "modules_to_save"):
        assert config(source)[key] == config(ROOT / name)[key], key
    # PEFT's own numbers come from the written folder as well, without a warning of a missing tensor.
    if f"logits.{name}" in IO:
        assert close(peft_logits(backbone(), source, INPUTS), IO[f"logits.{name}"])


OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"layers.0.self_attn.v_proj": 2}},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 2}},
    "patterns": {"rank_pattern": {"v_proj": 2, Q0: 8}, "alpha_pattern": {Q1: 3, r".*\.0\.self_attn\.v_proj": 5.5}},
    "one layer": {"layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "one target is the end of no other": {"target_modules": ["0.self_attn.q_proj", "v_proj"]},
    "by expression": {"target_modules": r".*\.(q|v)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "an excluded module": {"exclude_modules": [Q1]},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_peft_saves_has_the_logits_of_peft(name: str, pickled: bool, tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **OPTIONS[name]}
    folder = peft_saved(backbone(), tmp_path / "saved", pickled=pickled, **options)
    expected = peft_logits(backbone(), folder, INPUTS)
    model = moelora.from_pretrained(folder, backbone())
    assert close(logits(model), expected)
    assert (expected - IO["base_logits"]).abs().max() > 1e-2
    checkpoints.convert(folder, tmp_path / "native", to="native")
    assert torch.equal(logits(moelora.from_pretrained(tmp_path / "native", backbone())), logits(model))
    checkpoints.convert(tmp_path / "native", tmp_path / "again", to="peft")
    assert close(peft_logits(backbone(), tmp_path / "again", INPUTS), expected)
    ours = tensors(tmp_path / "again")
    theirs = torch.load(folder / "adapter_model.bin", weights_only=True) if pickled else tensors(folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_dora_is_read_under_both_names_of_its_magnitudes(tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": True}
    folder = peft_saved(backbone(), tmp_path / "saved", **options)
    expected = logits(moelora.from_pretrained(folder, backbone()))
    assert sum(key.endswith("q_proj.lora_magnitude_vector") for key in tensors(folder)) == 2

    def rename(found: dict[str, Tensor]) -> None:
        for key in [key for key in found if key.endswith("magnitude_vector")]:
            found[f"{key}.weight"] = found.pop(key)

    other = altered(folder, tmp_path / "other", rename)
    model = moelora.from_pretrained(other, backbone())
    assert torch.equal(logits(model), expected)
    magnitude = model.adapter_tensors()[f"{Q0}.magnitude"]
    assert torch.equal(magnitude, tensors(folder)[f"base_model.model.{Q0}.lora_magnitude_vector"].unsqueeze(0))


@pytest.mark.parametrize("use_dora", [False, True])
def test_linears_of_gpt2_and_their_embeddings_are_those_of_peft(use_dora: bool, tmp_path: Path) -> None:
    targets = ["c_attn", "c_fc", "attn.c_proj"]
    options = {"r": 2, "lora_alpha": 6, "target_modules": targets, "use_dora": use_dora, "fan_in_fan_out": True}
    folder = peft_saved(gpt2(), tmp_path / "saved", **options)
    expected = peft_logits(gpt2(), folder, INPUTS)
    model = moelora.from_pretrained(folder, gpt2())
    assert close(logits(model), expected)
    # The backbone tells that its linears are transposed, which PEFT wants to be told.
    model.save_pretrained(tmp_path / "native")
    checkpoints.convert(tmp_path / "native", tmp_path / "again", to="peft")
    assert config(tmp_path / "again")["fan_in_fan_out"] is True
    assert close(peft_logits(gpt2(), tmp_path / "again", INPUTS), expected)


def test_an_encoder_decoder_is_that_of_peft(tmp_path: Path) -> None:
    inputs = {"input_ids": IO["input_ids"], "decoder_input_ids": IO["input_ids"][:, :4]}
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    folder = peft_saved(t5(), tmp_path / "saved", **options)
    expected = peft_logits(t5(), folder, inputs)
    model = moelora.from_pretrained(folder, t5())
    assert len(model.containers()) == 12
    assert close(logits(model, inputs), expected)
    model.save_pretrained(tmp_path / "native")
    checkpoints.convert(tmp_path / "native", tmp_path / "again", to="peft")
    assert config(tmp_path / "again")["task_type"] is None
    assert close(peft_logits(t5(), tmp_path / "again", inputs), expected)


def test_the_head_of_a_classifier_is_saved_whole(tmp_path: Path) -> None:
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    folder = peft_saved(classifier(), tmp_path / "saved", **options)
    assert set(config(folder)["modules_to_save"]) == {"classifier", "score"}  # as PEFT names them for every backbone
    expected = peft_logits(classifier(), folder, INPUTS)
    model = moelora.from_pretrained(folder, classifier())
    assert model.mixture.modules_to_save == ["score"]
    assert close(logits(model), expected)
    with model.disable_experts():
        assert torch.equal(logits(model), logits(classifier()))
    checkpoints.convert(folder, tmp_path / "again", to="peft")
    assert config(tmp_path / "again")["modules_to_save"] == ["score"]
    assert close(peft_logits(classifier(), tmp_path / "again", INPUTS), expected)


# -- writing ---------------------------------------------------------------------------------------------------------

LINEARS = {"target": ["q_proj", "v_proj", "down_proj"]}
MIXTURES: dict[str, list[dict[str, Any]]] = {
    "lora": [{**LINEARS, "experts": {"kind": "lora", "num_experts": 1, "r": 3, "alpha": 7}}],
    "rslora": [{**LINEARS, "experts": {"kind": "rslora", "num_experts": 1, "r": 3, "alpha": 7}}],
    "dora": [{**LINEARS, "experts": {"kind": "dora", "num_experts": 1, "r": 3, "alpha": 7}}],
    "several kinds and layers": [
        {"target": "q_proj", "layers": [1], "experts": {"kind": "lora", "num_experts": 1, "r": 3, "alpha": 7}},
        {"target": ["v_proj"], "experts": {"kind": "rslora", "num_experts": 1, "r": 2, "alpha": 5}},
        {"target": r"re:.*\.0\.mlp\.up_proj", "experts": {"kind": "lora", "num_experts": 1, "r": 2, "alpha": 5}},
    ],
    "patterns": [
        {
            **LINEARS,
            "experts": {
                "kind": "lora",
                "num_experts": 1,
                "r": 3,
                "rank_pattern": {"0.self_attn.q_proj": 5, "down_proj": [2]},
                "alpha_pattern": {"1.mlp.down_proj": 3.5},
            },
        }
    ],
    "a block": [{"target": "mlp", "experts": {"kind": "lora", "num_experts": 1, "r": 2, "alpha": 5}}],
    "projections of a block": [
        {
            "target": "mlp",
            "projections": ["up_proj", "down_proj"],
            "experts": {"kind": "rslora", "num_experts": 1, "r": 3, "alpha": 5, "rank_pattern": {"0.mlp": 2}},
        }
    ],
    "frozen": [{**LINEARS, "experts": {"kind": "frozen", "num_experts": 1, "r": [3], "alpha": 7}}],
    "frozen by rslora": [
        {**LINEARS, "experts": {"kind": "frozen", "num_experts": 1, "r": 3, "alpha": 7, "scaling": "rslora"}}
    ],
    "frozen by numbers below and at zero": [
        {"target": "q_proj", "experts": {"kind": "frozen", "num_experts": 1, "r": 3, "scaling": [-2.5]}},
        {"target": "v_proj", "experts": {"kind": "frozen", "num_experts": 1, "r": 3, "scaling": [0]}},
    ],
    "frozen by number, nothing at a site": [
        {
            **LINEARS,
            "experts": {
                "kind": "frozen",
                "num_experts": 1,
                "r": 3,
                "scaling": [0.37],
                "rank_pattern": {"1.self_attn.q_proj": [0], "down_proj": [2]},
            },
        }
    ],
}


def filled(sites: list[dict[str, Any]], **mixture: Any) -> moelora.MoELoRAModel:
    model = moelora.attach(backbone(), {"sites": sites, **mixture}).eval()
    with torch.no_grad():
        for value in model.adapter_tensors().values():
            value.add_(torch.randn_like(value), alpha=0.3)
    return model


@pytest.mark.parametrize("saved", [[], ["lm_head"]])
@pytest.mark.parametrize("name", MIXTURES)
def test_stock_peft_loads_what_is_written(name: str, saved: list[str], tmp_path: Path) -> None:
    model = filled(MIXTURES[name], modules_to_save=saved)
    model.save_pretrained(tmp_path / "native")
    checkpoints.convert(tmp_path / "native", tmp_path / "peft", to="peft")
    loaded = PeftModel.from_pretrained(backbone(), str(tmp_path / "peft")).eval()
    assert close(logits(loaded), logits(model))
    assert (logits(model) - IO["base_logits"]).abs().max() > 1e-2
    # Nothing that PEFT has no place for, nothing that it made up.
    theirs, ours = get_peft_model_state_dict(loaded), tensors(tmp_path / "peft")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    # And what PEFT saves of it is read here.
    loaded.save_pretrained(str(tmp_path / "by_peft"))
    again = moelora.from_pretrained(tmp_path / "by_peft", backbone())
    assert close(logits(again), logits(model))


def test_targets_of_the_mixture_are_those_of_peft_where_they_are_plain_names(tmp_path: Path) -> None:
    for name, expected in {
        "lora": ["q_proj", "v_proj", "down_proj"],
        "several kinds and layers": [Q1, "v_proj", "model.layers.0.mlp.up_proj"],
        "frozen by number, nothing at a site": [
            Q0,
            *(f"model.layers.{layer}.{end}" for layer in (0, 1) for end in ("self_attn.v_proj", "mlp.down_proj")),
        ],
    }.items():
        folder = tmp_path / name
        filled(MIXTURES[name]).save_pretrained(folder / "native")
        checkpoints.convert(folder / "native", folder / "peft", to="peft")
        assert sorted(config(folder / "peft")["target_modules"]) == sorted(expected)


def test_patterns_are_written_as_escaped_whole_paths(tmp_path: Path) -> None:
    filled(MIXTURES["patterns"]).save_pretrained(tmp_path / "native")
    checkpoints.convert(tmp_path / "native", tmp_path / "peft", to="peft")
    written = config(tmp_path / "peft")
    assert (written["r"], written["lora_alpha"]) == (3, 32)
    assert written["rank_pattern"] == {
        r"^model\.layers\.0\.self_attn\.q_proj": 5,
        r"^model\.layers\.0\.mlp\.down_proj": 2,
        r"^model\.layers\.1\.mlp\.down_proj": 2,
    }
    assert written["alpha_pattern"] == {r"^model\.layers\.1\.mlp\.down_proj": 3.5}


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "several experts": (
        [{"target": "q_proj", "experts": {"num_experts": 2, "r": 2}, "router": {"kind": "softmax"}}],
        "always on, found router softmax; it has one expert at each module, found 2",
    ),
    "another kind": ([{"target": "q_proj", "experts": {"kind": "rank1", "num_experts": 1}}], "found rank1"),
    "magnitudes in part": (
        [
            {"target": "q_proj", "experts": {"kind": "dora", "num_experts": 1, "r": 2}},
            {"target": "v_proj", "experts": {"kind": "lora", "num_experts": 1, "r": 2}},
        ],
        "magnitudes or none, found both",
    ),
    "two dropouts": (
        [
            {"target": "q_proj", "experts": {"num_experts": 1, "r": 2, "dropout": 0.1}},
            {"target": "v_proj", "experts": {"num_experts": 1, "r": 2}},
        ],
        r"one dropout, found \[0.0, 0.1\]",
    ),
    "nothing": (
        [{"target": "q_proj", "experts": {"kind": "frozen", "num_experts": 1, "r": [0]}}],
        "a rank above 0, found none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_express_is_not_written(name: str, tmp_path: Path) -> None:
    sites, message = REFUSED[name]
    moelora.attach(backbone(), {"sites": sites}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match=f"'peft' cannot express this mixture: .*{message}"):
        checkpoints.convert(tmp_path / "native", tmp_path / "peft", to="peft")
    assert not (tmp_path / "peft").exists()
