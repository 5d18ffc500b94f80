"""The layout of MeteoRA's authors: a tiny Llama in it, their own layer (tests/fixtures/meteora_moelinear), sizes."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from meteora_made import ALPHA, CONFIG, EXPERTS, PREFIX, RANK, published, reference, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.checkpoints.folder import Folder
from moelora.errors import CheckpointError, ConfigError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "meteora_moelinear"
ONE_GATE = "router 'meteora' with top_k 1"


@pytest.fixture
def state(tiny_llama: LlamaForCausalLM) -> dict[str, Tensor]:
    return published(tiny_llama)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 64, (2, 9))


@pytest.mark.parametrize(
    ("top_k", "temperature", "rslora"), [(1, 1.0, False), (2, 1.0, False), (2, 20.0, False), (3, 1.0, True)]
)
def test_logits_are_those_of_the_published_formula(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    state: dict[str, Tensor],
    ids: Tensor,
    top_k: int,
    temperature: float,
    rslora: bool,
) -> None:
    folder = write(tmp_path / "run", state, top_k=top_k, temperature=temperature, use_rslora=rslora)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ONE_GATE)
        model = moelora.from_pretrained(folder, tiny_llama)
    with torch.no_grad():
        logits = model(ids).logits
    experts = model.mixture.sites[0].experts
    assert (experts.kind, experts.num_experts, experts.dropout) == ("frozen", EXPERTS, 0.1)
    assert len(model.containers()) == 14
    model.unload()
    scale = ALPHA / (RANK**0.5 if rslora else RANK)
    assert (logits - reference(tiny_llama, state, top_k, temperature, scale, ids)).abs().max() <= 1e-5


def test_their_own_layer_gives_their_own_numbers(tmp_path: Path) -> None:
    own = load_file(FIXTURE / "model.safetensors")
    io = load_file(FIXTURE / "io.safetensors")
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=24,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=10,
    )
    backbone = LlamaForCausalLM(config).eval()
    q_proj = backbone.model.layers[0].self_attn.q_proj
    folder = write(tmp_path / "run", own, lora_alpha=8, r=4)
    with pytest.raises(CheckpointError, match=r"base_layer.weight: expected the weight 'model.layers.0.self_attn.q_pr"):
        moelora.from_pretrained(folder, backbone)
    q_proj.weight.data.copy_(own[f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.weight"])
    model = moelora.from_pretrained(folder, backbone)
    (container,) = model.containers().values()
    with torch.no_grad():
        assert (container(io["x"]) - io["y.k2.T1.loop"]).abs().max() <= 1e-5
        assert (container(io["x"]) - io["y.k2.T1.orig"]).abs().max() <= 1e-5


def test_shards_are_read_as_one_file(tmp_path: Path, tiny_llama: LlamaForCausalLM, state: dict[str, Tensor]) -> None:
    single = write(tmp_path / "single", state)
    shards = write(tmp_path / "shards", state)
    (shards / "model.safetensors").unlink()
    names = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    places = {key: names[index % 2] for index, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key in state if places[key] == name}, shards / name)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    read = [checkpoints.read(folder) for folder in (single, shards)]
    one, two = (stored.tensors(stored.declared()) for stored in read)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert moelora.from_pretrained(shards, tiny_llama).containers()


def test_the_backbone_of_the_same_files_is_there_for_the_asking(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, state: dict[str, Tensor], ids: Tensor
) -> None:
    folder = write(tmp_path / "run", state)
    with pytest.raises(ConfigError, match="pass backbone='meta-llama/Meta-Llama-3-8B'"):
        moelora.from_pretrained(folder)
    tiny_llama.config.save_pretrained(folder)
    tiny_llama.save_pretrained(tmp_path / "plain")
    for quantization in (None, "nf4"):
        alone = moelora.from_pretrained(folder, quantization=quantization)
        backbone, _ = moelora.load_backbone(tmp_path / "plain", quantization=quantization, tokenizer=False)
        given = moelora.from_pretrained(folder, backbone)
        with torch.no_grad():
            assert torch.equal(alone(ids).logits, given(ids).logits)
        assert alone.backbone_config.name == str(folder)
        assert alone.backbone_config.quantization == quantization
    assert type(alone.containers()["model.layers.0.mlp.up_proj"].base).__name__ == "Linear4bit"


def test_a_configuration_of_another_model_is_refused_before_anything_is_allocated(
    tmp_path: Path, tiny_config: LlamaConfig, state: dict[str, Tensor]
) -> None:
    folder = write(tmp_path / "run", state)
    for change, said in (
        ({"vocab_size": 65}, r"misshapen: base_model.model.lm_head.weight: expected \(65, 32\), found \(64, 32\)"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected 2, as many layers as"),
        ({"attention_bias": True}, r"missing: model.layers.0.self_attn.q_proj.bias"),
    ):
        (folder / "config.json").write_text(json.dumps({**tiny_config.to_dict(), **change}))
        with pytest.raises(CheckpointError, match=said):
            moelora.from_pretrained(folder)


def test_a_backbone_with_other_weights_is_refused_by_their_names(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, state: dict[str, Tensor]
) -> None:
    half = {key: value.bfloat16() for key, value in state.items()}
    folder = write(tmp_path / "run", half)
    # The published files are bfloat16: a backbone in float32 that rounds to them is the same.
    assert moelora.from_pretrained(folder, tiny_llama).unload() is tiny_llama
    weight = tiny_llama.model.norm.weight
    weight.data[0] *= 1.01
    with pytest.raises(
        CheckpointError, match=r"1 of 21 are not this one's:\n  base_model.model.model.norm.weight: exp"
    ):
        moelora.from_pretrained(folder, tiny_llama)
    assert not any(isinstance(module, moelora.experts.Container) for module in tiny_llama.modules())
    tiny_llama.resize_token_embeddings(70)
    with pytest.raises(CheckpointError, match=r"3 of 21.*\n.*found the shape \(64, 32\) in place of \(70, 32\)"):
        moelora.from_pretrained(folder, tiny_llama)


def test_a_quantised_backbone_cannot_be_compared_and_a_warning_says_so(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "run", state)
    tiny_llama.save_pretrained(tmp_path / "plain")
    backbone, _ = moelora.load_backbone(tmp_path / "plain", quantization="nf4", tokenizer=False)
    with caplog.at_level(logging.WARNING):
        moelora.from_pretrained(folder, backbone)
    assert "14 of 21 could not be compared with this one's" in caplog.text


def test_without_a_scale_it_is_refused_and_told_what_to_put_where(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = write(tmp_path / "run", state)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoints.read(folder)
    assert str(folder / "adapter_config.json") in str(error.value)
    with pytest.raises(CheckpointError, match="have no scale"):  # on the hub before the large file is fetched
        checkpoints.LAYOUTS.create("meteora").further_files(Folder(folder))
    for part in ("have no scale", "one of the adapters", "r, lora_alpha"):
        assert part in str(error.value)


def test_adapters_have_numbers_for_names_unless_the_configuration_names_them(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "run", state)
    with caplog.at_level(logging.WARNING):
        mixture = checkpoints.read(folder).mixture
    assert mixture.sites[0].experts.names == ["expert_00", "expert_01", "expert_02", "expert_03", "expert_04"]
    assert "names of the adapters are not in the file" in caplog.text
    caplog.clear()
    names = ["alpaca", "cnn_dailymail", "gsm8k", "strategyqa", "winowhy"]
    assert checkpoints.read(write(folder, state, names=names)).mixture.sites[0].experts.names == names
    assert not caplog.text
    with pytest.raises(CheckpointError, match="names lists"):
        checkpoints.read(write(folder, state, names=names[:4]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_A.weight": (21, 32)}, r"misshapen: \S+q_proj.lora_A.weight: expected \(20, 32\), found \(21, 32\)"),
        ({"lora_B.weight": (32, 16)}, r"misshapen: \S+q_proj.lora_B.weight: expected \(32, 20\), found \(32, 16\)"),
        ({"lora_B.weight": None}, r"missing: \S+q_proj.lora_B.weight"),
        ({"moe_gate.weight": (6, 32)}, r"misshapen: \S+q_proj.moe_gate.weight: expected \(5, 32\), found \(6, 32\)"),
        ({"moe_gate.weight": (0, 32)}, r"moe_gate.weight: expected a row for each adapter, found the shape \(0, 32\)"),
        ({"moe_gate.bias": (5,)}, r"unexpected: \S+q_proj.moe_gate.bias"),
        ({"lora_embedding_A.weight": (5,)}, r"unexpected: \S+q_proj.lora_embedding_A"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, state: dict[str, Tensor], change: dict[str, tuple[int, ...] | None], said: str
) -> None:
    for tail, shape in change.items():
        state.pop(key := f"{PREFIX}model.layers.1.self_attn.q_proj.{tail}", None)
        if shape is not None:
            state[key] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=said):
        checkpoints.read(write(tmp_path / "run", state))


def test_a_key_without_the_authors_prefix_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32)
    with pytest.raises(CheckpointError, match=r"unexpected: model.layers.0.self_attn.q_proj.weight"):
        checkpoints.read(write(tmp_path / "run", state))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank_pattern": {"q_proj": 8}}, 'rank_pattern: {"q_proj": 8}'),
        ({"use_dora": True}, "use_dora: true"),
        ({"top_k": 6}, "top_k is 6 but there are 5 experts"),
        ({"temperature": 0}, "temperature"),
        ({"r": 8}, r"lora_A.weight: expected \(40, 32\)"),
    ],
)
def test_a_configuration_of_something_else_is_refused(
    tmp_path: Path, state: dict[str, Tensor], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        checkpoints.read(write(tmp_path / "run", state, **change))


@pytest.mark.parametrize("through", [[], ["native"], ["native", "meteora", "native"]])
def test_written_again_the_adapter_is_the_same_bit_for_bit(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, state: dict[str, Tensor], ids: Tensor, through: list[str]
) -> None:
    half = {key: value.bfloat16() if "lora" in key else value for key, value in state.items()}
    names = [f"task {index}" for index in range(EXPERTS)]
    first = source = write(tmp_path / "run", half, top_k=3, temperature=15.0, use_rslora=True, names=names)
    for step, layout in enumerate([*through, "meteora"]):
        checkpoints.convert(source, tmp_path / str(step), to=layout)
        source = tmp_path / str(step)
    written = load_file(source / "model.safetensors")
    assert written.keys() == {key for key in half if "lora" in key or "moe_gate" in key}
    assert all(torch.equal(written[key], half[key]) and written[key].dtype == half[key].dtype for key in written)
    assert checkpoints.read(source).mixture == checkpoints.read(first).mixture
    with pytest.raises(ConfigError, match="pass backbone="):
        moelora.from_pretrained(source)
    with torch.no_grad():
        before = moelora.from_pretrained(first, tiny_llama)
        logits = before(ids).logits
        assert torch.equal(moelora.from_pretrained(source, before.unload())(ids).logits, logits)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"router": {"kind": "topk", "top_k": 2}}, "its routers are meteora, found topk"),
        (
            {"experts": {"kind": "dora", "num_experts": 3, "r": 2}},
            "its experts are frozen or lora or rslora, found dora",
        ),
        ({"experts": {"kind": "frozen", "num_experts": 2, "r": 2, "scaling": [1.0, 2.0]}}, "one scale"),
        ({"experts": {"kind": "frozen", "num_experts": 2, "r": [2, 3]}}, "one r and one alpha"),
    ],
)
def test_what_it_cannot_express_is_not_written(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, change: dict[str, Any], said: str
) -> None:
    site = {"target": "q_proj", "experts": {"kind": "frozen", "num_experts": 2, "r": 2}, "router": {"kind": "meteora"}}
    moelora.attach(tiny_llama, {"sites": [{**site, **change}]}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match=said):
        checkpoints.convert(tmp_path / "native", tmp_path / "out", to="meteora")


def test_sizes_are_those_of_the_published_llama_3_8b() -> None:
    """llama3_8b_meteora/top_2/model.safetensors has 17,304,793,984 bytes, of which its header takes a few kB."""
    layers = 32
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        backbone = LlamaForCausalLM(config)
    whole = sum(parameter.numel() for parameter in backbone.parameters())
    layer = sum(parameter.numel() for parameter in backbone.model.layers[0].parameters())
    site = {
        "target": CONFIG["target_modules"],
        "experts": {"kind": "frozen", "num_experts": 28, "r": 8, "alpha": 16},
        "router": {"kind": "meteora", "top_k": 2},
    }
    tensors = moelora.attach(backbone, {"sites": [site]}).adapter_tensors()
    gates = 2 * layers * sum(value.numel() for name, value in tensors.items() if name.endswith("router.weight"))
    factors = 2 * layers * sum(value.numel() for name, value in tensors.items() if ".lora_" in name)
    assert (gates, factors) == (69_730_304, 1_174_405_120)
    file = 2 * (whole + (layers - 1) * layer) + gates + factors
    assert 0 < 17_304_793_984 - file < 200_000
