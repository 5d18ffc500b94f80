"""The layout of FlexMoRE, put together from the authors' formula (tests/fixtures/flexmore_tiny), and FlexOlmo."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FlexOlmoForCausalLM, Olmo2ForCausalLM, PreTrainedTokenizerFast

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "flexmore_tiny"
FULL = FIXTURE / "full_2expert"
IO = load_file(FIXTURE / "io.safetensors")
RANKS = [1, 2, 4, 8, 32]
NAMES = ("gate_proj", "up_proj", "down_proj")


def full_weights() -> dict[str, Tensor]:
    return load_file(FULL / "model.safetensors")


def factors(rank: int, expert: int = 1) -> dict[str, Tensor]:
    stored = load_file(FIXTURE / f"adapters_r{rank}.safetensors")
    return {key.replace("experts.1.", f"experts.{expert}."): value for key, value in stored.items()}


def flexmore(rank: int) -> dict[str, Tensor]:
    """All tensors of a model in which expert 1 was replaced by factors of this rank."""
    return {**{k: v for k, v in full_weights().items() if ".experts.1." not in k}, **factors(rank)}


def write(folder: Path, state: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((FULL / "config.json").read_text())
    values |= {"model_type": "flexmore", "architectures": ["FlexMoREForCausalLM"], **config}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IO["input_ids"] if ids is None else ids).logits
    return result


@pytest.mark.parametrize("rank", RANKS)
def test_the_folder_alone_gives_the_logits_of_the_authors_formula(tmp_path: Path, rank: int) -> None:
    model = moelora.from_pretrained(write(tmp_path / "run", flexmore(rank), expert_ranks=[0, rank]))
    assert (logits(model) - IO[f"r{rank}.logits"]).abs().max() <= 1e-5
    assert isinstance(model.backbone, Olmo2ForCausalLM)
    site = model.mixture.sites[0]
    assert (site.experts.kind, list(site.experts.ranks)) == ("low_rank", [0, rank])
    assert (site.router.top_k, site.router.normalize, site.router.aux_loss_coef) == (2, False, 0.0)
    assert model.backbone_config.name == str(tmp_path / "run")
    assert torch.equal(logits(moelora.from_pretrained(tmp_path / "run", "auto")), logits(model))


def test_full_experts_are_exact_in_a_flexmore_and_in_a_flexolmo(tmp_path: Path) -> None:
    model = moelora.from_pretrained(write(tmp_path / "run", full_weights(), expert_ranks=[0, 0]))
    assert (logits(model) - IO["full.logits"]).abs().max() <= 1e-6
    plain = moelora.from_pretrained(FULL)
    assert torch.equal(logits(plain), logits(model))
    assert plain.mixture == model.mixture and list(plain.mixture.sites[0].experts.ranks) == [0, 32]
    tensors = plain.adapter_tensors()
    weights = full_weights()
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        for name in NAMES:
            product = tensors[f"{block}.{name}.lora_B"] @ tensors[f"{block}.{name}.lora_A"]
            full, first = (weights[f"{block}.experts.{expert}.{name}.weight"] for expert in (1, 0))
            assert torch.equal(product, full - first)


def test_experts_of_several_ranks_and_a_full_one_stand_beside_each_other(tmp_path: Path) -> None:
    """Against transformers' FlexOlmo with each expert written out in full."""
    state = {key: value for key, value in flexmore(4).items() if ".mlp.gate." not in key}
    written = dict(state)
    for key, value in full_weights().items():
        if ".experts.1." in key:
            state[key.replace("experts.1.", "experts.2.")] = value
            written[key.replace("experts.1.", "experts.2.")] = value
    state |= factors(8, expert=3)
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        state[f"{block}.gate.weight"] = written[f"{block}.gate.weight"] = torch.randn(4, 32)
        for name in NAMES:
            first = state[f"{block}.experts.0.{name}.weight"]
            for expert in (1, 3):
                A, B = (state[f"{block}.experts.{expert}.{name}_{side}.weight"] for side in "ab")
                written[f"{block}.experts.{expert}.{name}.weight"] = first + B @ A
    written = {key: value for key, value in written.items() if not key.endswith(("_a.weight", "_b.weight"))}
    options = {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True}
    full = write(tmp_path / "full", written, **options, model_type="flex_olmo")
    theirs = FlexOlmoForCausalLM.from_pretrained(full).eval()
    folder = write(tmp_path / "run", state, **options, expert_ranks=[0, 4, 0, 8])
    ours = moelora.from_pretrained(folder)
    assert list(ours.mixture.sites[0].experts.ranks) == [0, 4, 32, 8]
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5


def test_the_backbone_is_quantised_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "run", flexmore(4), expert_ranks=[0, 4])
    dense = moelora.from_pretrained(folder).unload()
    dense.save_pretrained(tmp_path / "dense")
    with caplog.at_level(logging.WARNING):
        alone = moelora.from_pretrained(folder, quantization="nf4")
    assert "could not be compared" not in caplog.text
    backbone, _ = moelora.load_backbone(tmp_path / "dense", quantization="nf4", tokenizer=False)
    assert torch.equal(logits(alone), logits(moelora.from_pretrained(folder, backbone)))
    assert type(alone.containers()["model.layers.0.mlp"].base.up_proj).__name__ == "Linear4bit"
    assert (logits(alone) - IO["r4.logits"]).abs().max() > 1e-3
    half = moelora.from_pretrained(folder, quantization="bf16")
    assert half.backbone.dtype == torch.bfloat16 and torch.isfinite(logits(half)).all()
    assert alone.backbone_config.quantization == "nf4"


def test_its_tokenizer_and_generation_settings_come_along(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = write(tmp_path / "run", flexmore(4), expert_ranks=[0, 4])
    byte_tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    model = moelora.from_pretrained(folder)
    assert model.tokenizer.pad_token is not None
    assert model.generation_config.eos_token_id == [2, 7]


def test_a_head_that_is_tied_to_the_embeddings_need_not_be_in_the_file(tmp_path: Path) -> None:
    state = flexmore(4)
    del state["lm_head.weight"]
    model = moelora.from_pretrained(write(tmp_path / "run", state, expert_ranks=[0, 4], tie_word_embeddings=True))
    head, embeddings = model.backbone.get_output_embeddings(), model.backbone.get_input_embeddings()
    assert head.weight is embeddings.weight
    assert torch.equal(embeddings.weight, state["model.embed_tokens.weight"])


def test_a_given_backbone_is_compared_with_the_dense_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "run", flexmore(4), expert_ranks=[0, 4])
    dense = moelora.from_pretrained(folder).unload()
    with caplog.at_level(logging.WARNING):
        assert (logits(moelora.from_pretrained(folder, dense)) - IO["r4.logits"]).abs().max() <= 1e-5
    assert "could not be compared" not in caplog.text
    other = moelora.from_pretrained(folder).unload()
    other.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] += 1
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.experts.0.up_proj.weight: expected the weight 'model.layers"
    ):
        moelora.from_pretrained(folder, other)


def test_the_configuration_of_the_dense_model_is_the_sparse_ones(tmp_path: Path) -> None:
    """Where a file says nothing, FlexOlmo and OLMo 2 differ in what they take."""
    folder = write(tmp_path / "run", flexmore(4), expert_ranks=[0, 4])
    values = json.loads((folder / "config.json").read_text())
    for key in ("rms_norm_eps", "rope_parameters", "pad_token_id", "num_key_value_heads"):
        del values[key]
    values |= {"rope_theta": 12345.0, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(values))
    config = moelora.from_pretrained(folder).unload().config
    assert config.rms_norm_eps == 1e-6  # 1e-5 in OLMo 2
    assert config.rope_parameters["rope_theta"] == 12345.0
    assert not hasattr(config, "expert_ranks") and not hasattr(config, "num_experts")
    shutil.copytree(FULL, tmp_path / "full")
    (tmp_path / "full" / "config.json").write_text(json.dumps({**values, "model_type": "flex_olmo"}))
    theirs = FlexOlmoForCausalLM.from_pretrained(tmp_path / "full").eval()
    assert (logits(moelora.from_pretrained(tmp_path / "full")) - logits(theirs)).abs().max() <= 1e-6


@pytest.mark.parametrize("through", [[], ["native"], ["native", "flexmore", "native"]])
def test_written_again_the_adapter_is_the_same_bit_for_bit(tmp_path: Path, through: list[str]) -> None:
    options = {"expert_ranks": [0, 8], "output_router_logits": True, "router_aux_loss_coef": 0.02}
    state = flexmore(8)
    state |= {key: value.bfloat16() for key, value in state.items() if key.endswith("_a.weight")}
    first = source = write(tmp_path / "run", state, **options)
    for step, layout in enumerate([*through, "flexmore"]):
        checkpoints.convert(source, tmp_path / str(step), to=layout)
        source = tmp_path / str(step)
    written = load_file(source / "model.safetensors")
    assert written.keys() == {*factors(8), *(f"model.layers.{layer}.mlp.gate.weight" for layer in range(2))}
    assert all(torch.equal(written[key], state[key]) and written[key].dtype == state[key].dtype for key in written)
    read = checkpoints.read(source)
    assert read.mixture == checkpoints.read(first).mixture
    assert read.backbone.name == str(first)
    assert read.mixture.sites[0].router.aux_loss_coef == 0.02
    model = moelora.from_pretrained(first)
    before = logits(model)
    assert torch.equal(logits(moelora.from_pretrained(source, model.unload())), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expert_ranks": [0, 2]}, r"misshapen: \S+experts.1.down_proj_a.weight: expected \(2, 48\), found \(4, 48\)"),
        ({"expert_ranks": [4, 4]}, "expert_ranks: expected 2 ranks"),
        ({"expert_ranks": [0, 4, 4]}, "expert_ranks: expected 2 ranks"),
        ({"expert_ranks": [0, 4, 4], "num_experts": 3}, r"missing: \S+experts.2.gate_proj_a.weight"),
        ({}, "expert_ranks: this key is missing"),
        ({"expert_ranks": [0, 4], "num_experts_per_tok": 3}, "top_k is 3 but there are 2 experts"),
        ({"expert_ranks": [0, 4], "num_hidden_layers": 3}, r"model.layers.2.mlp: expected experts in each of 3 layers"),
        ({"expert_ranks": [0, 4], "num_hidden_layers": 10**12}, "expected experts in each of 1000000000000 layers"),
        ({"expert_ranks": [0, 0]}, r"misshapen: \S+experts.1.gate_proj_a.weight: expected \(32, 32\), found \(4, 32\)"),
        ({"model_type": "flex_olmo", "num_experts": 10**9}, "expert_ranks"),
    ],
)
def test_a_configuration_that_does_not_hold_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        checkpoints.read(write(tmp_path / "run", flexmore(4), **change))


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("model.layers.0.mlp.gate.bias", (2,), r"unexpected: model.layers.0.mlp.gate.bias"),
        ("model.layers.0.mlp.experts.2.up_proj_a.weight", (4, 32), r"unexpected: \S+experts.2.up_proj_a.weight"),
        ("model.layers.0.mlp.experts.0.up_proj_a.weight", (4, 32), r"unexpected: \S+experts.0.up_proj_a.weight"),
        ("model.layers.0.mlp.up_proj.weight", (48, 32), r"unexpected: model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0.mlp.experts.1.up_proj_a.weight", None, r"missing: \S+experts.1.up_proj_a.weight"),
        ("model.layers.1.mlp.gate.weight", (3, 32), r"misshapen: \S+gate.weight: expected \(2, 32\), found \(3, 32\)"),
        ("model.layers.0.mlp.experts.1.up_proj.weight", (48, 31), r"expected the shape of \S+experts.0.up_proj.weight"),
        (
            "model.layers.0.mlp.experts.1.up_proj.weight",
            (48, 32),
            r"expected \S+up_proj.weight or \S+_a.weight, found bo",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, key: str, shape: tuple[int, ...] | None, said: str) -> None:
    state = flexmore(4)
    state.pop(key, None)
    if shape is not None:
        state[key] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=said):
        checkpoints.read(write(tmp_path / "run", state, expert_ranks=[0, 4]))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model.layers.0.mlp.experts.0.up_proj.weight", r"missing: model.layers.0.mlp.up_proj.weight"),
        ("model.norm.weight", r"missing: model.norm.weight"),
    ],
)
def test_a_backbone_with_a_hole_is_not_built(tmp_path: Path, key: str, said: str) -> None:
    state = flexmore(4)
    del state[key]
    folder = write(tmp_path / "run", state, expert_ranks=[0, 4])
    with pytest.raises(CheckpointError, match=said):
        moelora.from_pretrained(folder)


def test_numbers_that_are_not_finite_are_refused_in_full_experts_too(tmp_path: Path) -> None:
    state = full_weights()
    state["model.layers.1.mlp.experts.1.down_proj.weight"][0, 0] = float("nan")
    folder = write(tmp_path / "run", state, expert_ranks=[0, 0])
    with pytest.raises(CheckpointError, match=r"not finite: \S+layers.1.mlp.experts.1.down_proj_a.weight"):
        moelora.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"experts": {"r": [2, 0]}},
            r"its expert 0 is the frozen FFN, of rank 0, and no other is, found ranks \[2, 0\]",
        ),
        ({"experts": {"alpha": 2.0}}, "it has no scale, so alpha must be 1"),
        ({"experts": {"kind": "lora", "r": 2}}, "low_rank experts under a topk router of each layer, found lora"),
        ({"router": {"kind": "topp"}}, "found low_rank and topp"),
        ({"target": "model.layers.1.mlp"}, "its sites are the FFN of every layer"),
        ({"projections": ["up_proj"]}, "found no model.layers.0.mlp.gate_proj.lora_A"),
    ],
)
def test_what_it_cannot_express_is_not_written(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    backbone = moelora.from_pretrained(write(tmp_path / "run", flexmore(4), expert_ranks=[0, 4])).unload()
    site: dict[str, Any] = {
        "target": "mlp",
        "experts": {"kind": "low_rank", "num_experts": 2, "r": [0, 2], "alpha": 1.0},
        "router": {"kind": "topk", "top_k": 2},
    }
    site |= {**change, "experts": {**site["experts"], **change.get("experts", {})}}
    moelora.attach(backbone, {"sites": [site]}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match=said):
        checkpoints.convert(tmp_path / "native", tmp_path / "out", to="flexmore")


def test_the_backbone_of_another_kind_is_not_written(tmp_path: Path, tiny_llama: Any) -> None:
    site = {
        "target": "mlp",
        "experts": {"kind": "low_rank", "num_experts": 2, "r": [0, 2], "alpha": 1.0},
        "router": {"kind": "topk", "top_k": 2},
    }
    moelora.attach(tiny_llama, {"sites": [site]}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match="its backbone is an OLMo 2, found llama"):
        checkpoints.convert(tmp_path / "native", tmp_path / "out", to="flexmore")
