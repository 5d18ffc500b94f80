"""What of PEFT's adapters is refused and why, and keys of its patterns, of which none is run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from peft_saves import (
    FIXTURES,
    INPUTS,
    IO,
    Q0,
    Q1,
    ROOT,
    V1,
    altered,
    backbone,
    close,
    experts,
    logits,
    peft_logits,
    peft_saved,
)
from torch import Tensor

import moelora
from moelora import checkpoints
from moelora.checkpoints.peft_patterns import parse_pattern, site_patterns
from moelora.errors import CheckpointError
from moelora.experts.lora import LoRAConfig

# PEFT asks transformers by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


# -- what is not read ------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "trained biases": ({"bias": "lora_only"}, 'bias: "lora_only": biases of the backbone'),
    "bias of B": ({"lora_bias": True}, "lora_bias: true: lora_B has a bias"),
    "layers used twice": ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication: \[\[0, 2\], \[1, 2\]\]"),
    "parameters": ({"target_parameters": ["experts.up"]}, "target_parameters: .*no weight of a linear"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: .*rows of the embeddings"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens: \[5\]: the adapter is off until"),
    "QALoRA": ({"use_qalora": True}, "use_qalora: true"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, 'use_bdlora: {"nblocks": 2}'),
    "KaSA": ({"kasa_config": {"beta": 0.1}}, "kasa_config: "),
    "MonteCLoRA": ({"monteclora_config": {"num_samples": 8}}, "monteclora_config: "),
    "Megatron": ({"megatron_config": {"a": 1}}, "megatron_config: "),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: .*path_initial_model_for_weight_conversion"),
    "LoftQ": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights: "),
    "tied": ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "ensure_weight_tying: true"),
    "a key of the future": ({"use_magic": True}, "use_magic: true.*upgrade moelora"),
    "a target without tensors": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "'k_proj' fits no module"),
    "tensors without a target": ({"target_modules": ["q_proj"]}, f"'{V1}' has tensors, but no name fits it"),
    "another layer": ({"layers_to_transform": [0]}, f"'{Q1}' has tensors, but layers_to_transform is"),
    "a rank that is another": ({"rank_pattern": {"v_proj": 2}}, "the rank 2, its tensors have 4"),
    "a saved module without tensors": ({"modules_to_save": ["lm_head"]}, "modules_to_save: 'lm_head': no tensors"),
    "a head that the task does not bring": ({"modules_to_save": ["score"]}, "modules_to_save: 'score': no tensors"),
    "an expression that decides": (
        {"alpha_pattern": {r"(.*q_proj)+": 3}},
        r"alpha_pattern: '\(\.\*q_proj\)\+': regular",
    ),
    "no rank": ({"r": 0}, "r: "),
    "a wrong type": ({"lora_alpha": "much"}, "lora_alpha: "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_configuration_that_changes_the_numbers_is_refused(name: str, tmp_path: Path) -> None:
    changes, message = CHANGES[name]
    folder = altered(ROOT / "plain_r4_a8", tmp_path / "changed", **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.read(folder)
    assert str(folder) in str(error.value)


def test_a_configuration_that_matters_to_the_start_or_the_backward_pass_only_is_read(tmp_path: Path) -> None:
    harmless = {
        "init_lora_weights": "eva",
        "eva_config": {"rho": 2.0},
        "velora_config": {"num_groups": 64},
        "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
        "use_something_new": False,
        "megatron_core": "megatron.core",
        "ensure_weight_tying": True,
        "inference_mode": False,
    }
    folder = altered(ROOT / "plain_r4_a8", tmp_path / "changed", **harmless)
    model = moelora.from_pretrained(folder, backbone())
    assert close(logits(model), IO["logits.plain_r4_a8"])


def test_the_few_keys_of_the_oldest_peft_are_enough(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(ROOT / "plain_r4_a8", folder)
    old = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "enable_lora": None, "merge_weights": False, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**old, "target_modules": ["q_proj", "v_proj"]}))
    model = moelora.from_pretrained(folder, backbone())
    assert close(logits(model), IO["logits.plain_r4_a8"])


KEY = f"base_model.model.{Q0}"


def drop(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.pop(key)


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.update({key: value})


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "half a pair": (drop(f"{KEY}.lora_B.weight"), f"missing: {KEY}.lora_B.weight"),
    "the other half": (drop(f"{KEY}.lora_A.weight"), f"missing: {KEY}.lora_A.weight"),
    "ranks that differ": (put(f"{KEY}.lora_B.weight", torch.zeros(32, 3)), r"misshapen: .*expected \(out, 4\)"),
    "a convolution": (put(f"{KEY}.lora_A.weight", torch.zeros(4, 32, 1, 1)), r"misshapen: .*expected \(r, in\)"),
    "no rank": (put(f"{KEY}.lora_A.weight", torch.zeros(0, 32)), r"misshapen: .*expected \(r, in\)"),
    "a weight of the backbone": (put(f"{KEY}.base_layer.weight", torch.zeros(2, 2)), "unexpected: .*base_layer"),
    "another weight of it": (put("base_model.model.model.norm.weight", torch.zeros(2)), "unexpected: .*norm"),
    "embeddings that nobody named": (
        put("base_model.model.model.embed_tokens.weight", torch.zeros(4, 32)),
        "whole embeddings.*add embed_tokens to modules_to_save",
    ),
    "embeddings with factors": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 32)),
        "LoRA of embeddings",
    ),
    "magnitudes that are not told": (put(f"{KEY}.lora_magnitude_vector", torch.ones(32)), "unexpected: .*magnitude"),
    "whole numbers": (put(f"{KEY}.lora_A.weight", torch.zeros(4, 32, dtype=torch.int8)), "wrong dtype: "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_tensors_that_do_not_fit_are_refused_before_a_number_is_read(name: str, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    folder = altered(ROOT / "plain_r4_a8", tmp_path / "changed", change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(folder)


def test_magnitudes_must_be_whole_and_of_their_shape(tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": True}
    folder = peft_saved(backbone(), tmp_path / "saved", **options)
    for index, (change, message) in enumerate(
        [
            (drop(f"{KEY}.lora_magnitude_vector"), f"missing: {KEY}.lora_magnitude_vector"),
            (put(f"{KEY}.lora_magnitude_vector", torch.ones(1)), r"misshapen: .*expected \(32,\), found \(1,\)"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.read(altered(folder, tmp_path / str(index), change))


def test_numbers_that_are_not_finite_leave_the_backbone_as_it_was(tmp_path: Path) -> None:
    folder = altered(
        ROOT / "plain_r4_a8", tmp_path / "changed", lambda found: found[f"{KEY}.lora_A.weight"].fill_(torch.nan)
    )
    model = backbone()
    with pytest.raises(CheckpointError, match=f"not finite: {KEY}.lora_A.weight"):
        moelora.from_pretrained(folder, model)
    assert torch.equal(logits(model), logits(backbone()))


def test_an_adapter_of_another_class_of_the_model_is_refused_by_the_names_of_its_modules(tmp_path: Path) -> None:
    folder = peft_saved(backbone().model, tmp_path / "saved", r=2, target_modules=["q_proj"])
    model = backbone()
    with pytest.raises(CheckpointError, match=r"has tensors such as 'layers.0.*it would need 'model.layers.0"):
        moelora.from_pretrained(folder, model)
    assert torch.equal(logits(model), logits(backbone()))
    assert len(moelora.from_pretrained(folder, model.model).containers()) == 2


def test_resized_embeddings_are_read_once_they_are_named(tmp_path: Path) -> None:
    weight = torch.randn(backbone().model.embed_tokens.weight.shape)
    folder = altered(
        ROOT / "plain_r4_a8",
        tmp_path / "changed",
        put("base_model.model.model.embed_tokens.weight", weight),
        modules_to_save=["embed_tokens"],
    )
    model = moelora.from_pretrained(folder, backbone())
    assert torch.equal(model.get_input_embeddings().weight, weight)


# -- patterns --------------------------------------------------------------------------------------------------------

PATHS = [
    "q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.my_q_proj",
    "encoder.model.layers.1.self_attn.q_proj",
    "model.layers.1.self-attn.q_proj",
    "model.layersX1.self_attn.q_proj",
]
PLAIN = [
    "q_proj",
    "1.self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    r"model\.layers\.1\.self_attn\.q_proj",
    "^model.layers.1.self_attn.q_proj",
    r"^model\.layers\.1\.self_attn\.q_proj$",
    r".*\.q_proj",
    r".*\.model\.layers\.1\.self_attn\.q_proj",
    ".*q_proj",
    r"^.*\.self_attn\.q_proj",
    r"self\-attn.q_proj",
    "_proj",
]
BEYOND = [
    "[qv]_proj",
    "(q|v)_proj",
    "q_proj|v_proj",
    r"layers\.\d+\.q",
    "layers.*.q_proj",
    "q_proj+",
    "a{2}",
    "x?",
    "^",
    "\\",
]


@pytest.mark.parametrize("key", PLAIN)
def test_plain_keys_fit_where_peft_would_take_them(key: str) -> None:
    pattern = parse_pattern(key)
    assert pattern is not None
    for path in PATHS:
        assert pattern.fits(path) == bool(re.match(rf"(.*\.)?({key})$", path)), path
        assert pattern.fits(path) <= (get_pattern_key([key], path) == key)
    assert any(pattern.fits(path) for path in PATHS) or key == "_proj"


@pytest.mark.parametrize("key", BEYOND)
def test_keys_that_are_more_than_names_are_known_as_such(key: str) -> None:
    assert parse_pattern(key) is None


def test_the_first_key_that_fits_decides_as_in_peft(tmp_path: Path) -> None:
    patterns = {
        Q0: 2.0,
        "q_proj": 3.0,
        "layers.1.self_attn.q_proj": 5.0,
        "layers.1.self_attn.v_proj": 7.0,
        "v_proj": 4.0,
    }
    folder = altered(ROOT / "plain_r4_a8", tmp_path / "changed", alpha_pattern=patterns)
    read = experts(folder)
    found = {site: read.at(site).alphas[0] for site in checkpoints.read(folder).sites()[0]}
    assert found == {site: patterns[get_pattern_key(patterns, site)] for site in found}
    assert sorted(found.values()) == [2, 3, 4, 7]
    assert close(logits(moelora.from_pretrained(folder, backbone())), peft_logits(backbone(), folder, INPUTS))


def test_an_expression_is_no_riddle_where_all_that_it_might_mean_is_the_same(tmp_path: Path) -> None:
    folder = altered(ROOT / "plain_r4_a8", tmp_path / "same", alpha_pattern={"(q|v)_proj": 8, "[k]_proj": 8})
    assert experts(folder).at(Q0).alphas == (8,)
    # What comes before it is decided already.
    patterns = {"q_proj": 3, "v_proj": 3, "(q|v)_proj": 5}
    assert experts(altered(ROOT / "plain_r4_a8", tmp_path / "late", alpha_pattern=patterns)).at(Q0).alphas == (3,)


def test_an_expression_is_no_riddle_where_its_rank_tells_what_it_means(tmp_path: Path) -> None:
    expression = r".*\.1\.self_attn\.[q]_proj"
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {expression: 2, "0.self_attn.v_proj": 3},
        "alpha_pattern": {expression: 6, "0.self_attn.v_proj": 1},
    }
    folder = peft_saved(backbone(), tmp_path / "saved", **options)
    model = moelora.from_pretrained(folder, backbone())
    assert close(logits(model), peft_logits(backbone(), folder, INPUTS))
    # Another key with that rank, or another order, and it tells nothing.
    for index, (ranks, alphas) in enumerate(
        [
            ({expression: 2, "0.self_attn.v_proj": 3, "k_proj": 2}, {expression: 6, "0.self_attn.v_proj": 1}),
            ({"0.self_attn.v_proj": 3, expression: 2}, {expression: 6, "0.self_attn.v_proj": 1}),
            ({}, {expression: 6}),
        ]
    ):
        changed = altered(folder, tmp_path / str(index), rank_pattern=ranks, alpha_pattern=alphas)
        with pytest.raises(CheckpointError, match=r"rank_pattern|regular expressions from a file are not run"):
            checkpoints.read(changed)


def test_an_expression_from_a_file_is_never_run(tmp_path: Path) -> None:
    evil = r"(([a-z._0-9])+)+!"  # takes for ever on any path
    folder = altered(
        ROOT / "plain_r4_a8", tmp_path / "evil", alpha_pattern={evil: 8}, rank_pattern={evil: 3}, target_modules=evil
    )
    assert close(logits(moelora.from_pretrained(folder, backbone())), IO["logits.plain_r4_a8"])


def test_a_path_that_is_the_end_of_another_has_its_own_values() -> None:
    values = {"layers.0.q": 2, "decoder.layers.0.q": 4, "x.decoder.layers.0.q": 2, "layers.1.q": 4, "y.layers.1.q": 3}
    for default in (2, 3, 4):
        pattern = site_patterns(values, default)
        config = LoRAConfig.parse({"num_experts": 1, "r": default, "rank_pattern": pattern})
        assert {path: config.at(path).r for path in values} == values
    assert site_patterns({"a": 2, "b": 3}, 2) == {"b": 3}


# -- detection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted({path.parent for path in FIXTURES.rglob("adapter_config.json")}))
def test_no_folder_of_another_layout_is_taken_for_peft(folder: Path) -> None:
    wanted = folder.parent.name in ("peft_lora_tiny_llama", "adapters") or re.fullmatch(
        r"(task|gen|adapter)_\d", folder.name
    )
    layouts = {name: checkpoints.LAYOUTS.create(name) for name in checkpoints.LAYOUTS}
    found = [name for name, layout in layouts.items() if layout.detect(checkpoints.folder.Folder(folder))]
    assert ("peft" in found) == bool(wanted)
    assert len(found) <= 1
