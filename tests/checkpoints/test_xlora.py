"""The layout of X-LoRA's own package, on what it wrote (tests/fixtures/xlora_standalone_tiny_llama)."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xlora_made as made
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

import moelora
from moelora import checkpoints
from moelora.checkpoints.folder import Folder
from moelora.errors import CheckpointError
from moelora.mixture import trace

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = FIXTURES / "xlora_standalone_tiny_llama"
CASES = sorted(path.name for path in ROOT.iterdir() if path.is_dir())
NAMES = ["adapter_1", "adapter_2", "adapter_3"]


def backbone() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        FIXTURES / "tiny_llama_base", dtype=torch.float32, attn_implementation="eager"
    )


def logits_of(model: moelora.MoELoRAModel) -> Tensor:
    stored = load_file(ROOT / "io.safetensors")
    with torch.no_grad():
        logits: Tensor = model(stored["input_ids"], attention_mask=stored["attention_mask"]).logits
    return logits


def far_from_the_authors(folder: Path, case: str) -> float:
    expected = load_file(ROOT / "io.safetensors")[f"{case}.logits"]
    return float((logits_of(moelora.from_pretrained(folder, backbone())) - expected).abs().max())


def copy(case: str, folder: Path) -> Path:
    shutil.copytree(ROOT / case, folder, ignore=shutil.ignore_patterns("README.md"))
    return folder


def edit(folder: Path, without: str = "", **changes: Any) -> None:
    path = folder / "xlora_config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if key != without}))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_authors_own(case: str) -> None:
    assert far_from_the_authors(ROOT / case, case) <= 1e-5
    model = moelora.from_pretrained(ROOT / case, backbone())
    with model.disable_experts():
        base = logits_of(model)
    assert (base - logits_of(model)).abs().max() > 1e-2
    assert model.mixture.sites[0].experts.names == NAMES
    assert checkpoints.describe(ROOT / case).backbone.name == "tiny"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("through", [[], ["native"], ["peft_xlora"]])
def test_written_again_it_is_the_same_bit_for_bit(case: str, through: list[str], tmp_path: Path) -> None:
    source = ROOT / case
    for step, layout in enumerate([*through, "xlora"]):
        checkpoints.convert(source, tmp_path / str(step), to=layout)
        source = tmp_path / str(step)
    files = ["xlora_classifier.safetensors", *(f"{name}/adapter_model.safetensors" for name in NAMES)]
    for file in files:
        ours, theirs = load_file(source / file), load_file(ROOT / case / file)
        stray = {key for key in theirs if key.startswith("internal_xlora_classifier.")}
        assert len(stray) == (
            0 if file == files[0] else json.loads((ROOT / case / "xlora_config.json").read_text())["xlora_depth"]
        )
        assert ours.keys() == theirs.keys() - stray and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((folder / "xlora_config.json").read_text()) for folder in (source, ROOT / case))
    assert ours == theirs
    for name in NAMES:
        ours, theirs = (json.loads((at / name / "adapter_config.json").read_text()) for at in (source, ROOT / case))
        assert {key: ours[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias")} == {
            key: theirs[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias")
        }


@pytest.mark.parametrize(
    "adapters",
    [
        {"adapter_1": "someone/x-lora/adapter_1", "adapter_2": "b", "adapter_3": "/home/someone/adapter_3/"},
        {"math": "someone/x-lora/adapter_1/", "bio": "./adapter_2", "code": "adapter_3"},
        None,
        [],
        {},
        "left out",
    ],
)
def test_adapters_are_found_as_edited_configurations_name_them(adapters: Any, tmp_path: Path) -> None:
    folder = copy("depth1_layerwise", tmp_path / "checkpoint")
    left_out = adapters == "left out"
    edit(folder, without="adapters" if left_out else "", adapters=None if left_out else adapters, stop_token_id=2)
    assert far_from_the_authors(folder, "depth1_layerwise") <= 1e-5


def test_the_order_of_the_adapters_is_that_of_the_configuration(tmp_path: Path) -> None:
    folder = copy("depth1_layerwise", tmp_path / "checkpoint")
    edit(folder, adapters=[NAMES[1], NAMES[0], NAMES[2]])
    assert far_from_the_authors(folder, "depth1_layerwise") > 1e-3


def test_adapters_without_names_in_the_configuration_are_taken_by_number(tmp_path: Path) -> None:
    """As text adapter_10 comes before adapter_2."""
    adapters = {f"adapter_{i + 1}": {"r": 2, "lora_alpha": 2, "target_modules": ["v_proj"]} for i in range(11)}
    expected = made.make(tmp_path / "peft", adapters)
    checkpoints.convert(tmp_path / "peft", tmp_path / "own", to="xlora")
    edit(tmp_path / "own", without="adapters")
    model = moelora.from_pretrained(tmp_path / "own", made.llama())
    assert (made.logits_of(model) - expected).abs().max() <= 1e-5
    assert model.mixture.sites[0].experts.names == list(adapters)
    (tmp_path / "own" / "adapter_10").rename(tmp_path / "own" / "biology")
    with pytest.raises(CheckpointError, match=r"the folders here tell no order .*biology"):
        checkpoints.read(tmp_path / "own")
    edit(tmp_path / "own", adapters=[*list(adapters)[:9], "adapter_10", "adapter_11"])
    with pytest.raises(CheckpointError, match=r"adapters\.9: .* found 'adapter_10' and no adapter_config"):
        checkpoints.read(tmp_path / "own")


def test_a_torch_save_file_of_the_classifier_is_read_too(tmp_path: Path) -> None:
    folder = copy("depth3_layerwise", tmp_path / "checkpoint")
    torch.save(load_file(folder / "xlora_classifier.safetensors"), folder / "xlora_classifier.pt")
    with pytest.raises(CheckpointError, match=r"xlora_classifier\.safetensors and xlora_classifier\.pt: remove one"):
        checkpoints.read(folder)
    (folder / "xlora_classifier.safetensors").unlink()
    assert far_from_the_authors(folder, "depth3_layerwise") <= 1e-5


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_classifiers_that_only_the_package_can_have_are_written_and_read(
    relu: bool, bias: bool, tmp_path: Path
) -> None:
    router = {
        "kind": "xlora",
        "depth": 3,
        "size": 6,
        "relu": relu,
        "bias": bias,
        "scaling_pass_value": None,
        "top_k": 1,
    }
    site = {"target": ["q_proj", "up_proj"], "experts": {"kind": "rslora", "num_experts": 2, "r": 2}, "router": router}
    model = moelora.attach(made.llama(), {"sites": [site]})
    with torch.no_grad():
        for value in model.adapter_tensors().values():
            value.normal_(std=0.3)
    model.eval().save_pretrained(tmp_path / "native")
    checkpoints.convert(tmp_path / "native", tmp_path / "written", to="xlora")
    keys = load_file(tmp_path / "written" / "xlora_classifier.safetensors")
    assert {key.rpartition(".")[0] for key in keys} == {"inner.0", f"inner.{3 if relu else 1}", "last"}
    assert any(key.endswith(".bias") for key in keys) == bias
    config = json.loads((tmp_path / "written" / "xlora_config.json").read_text())
    assert (config["scaling_pass_value"], config["use_trainable_adapters"]) == (0.5, True)
    assert config["adapters"] == ["adapter_1", "adapter_2"]
    again = moelora.from_pretrained(tmp_path / "written", made.llama())
    assert again.mixture.sites[0].experts.kind == "rslora"
    assert torch.equal(made.logits_of(again), made.logits_of(model))


def test_a_checkpoint_of_the_shape_of_the_published_one_gives_each_linear_its_rows(tmp_path: Path) -> None:
    """lamm-mit/x-lora: nine adapters on five linears of each of 32 blocks; order as in mistral.rs, orderings/
    xlora-paper-ordering.json. Here it is 16 wide.
    """
    order = [
        f"model.layers.{layer}.{name}"
        for layer in range(32)
        for name in [*(f"self_attn.{which}_proj" for which in "qkvo"), "mlp.gate_proj"]
    ]
    bias = torch.randn(len(order), 9)
    values = {"hidden_size": 16, "base_model_id": "HuggingFaceH4/zephyr-7b-beta", "layerwise_scalings": True}
    names = {f"adapter_{i}": f"lamm-mit/x-lora/adapter_{i}/" for i in range(1, 10)}
    (tmp_path / "xlora_config.json").write_text(json.dumps({**values, "adapters": names, "stop_token_id": 2}))
    classifier = {"last.weight": torch.zeros(9 * 160, 16), "last.bias": bias.flatten()}
    save_file({key: value.bfloat16() for key, value in classifier.items()}, tmp_path / "xlora_classifier.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    config["target_modules"].append("gate_proj")
    widths = {"k_proj": 8, "v_proj": 8, "gate_proj": 24}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        factors = {}
        for path in order:
            factors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(2, 16)
            factors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(widths.get(path.rpartition(".")[2], 16), 2)
        save_file(factors, tmp_path / name / "adapter_model.safetensors")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = moelora.from_pretrained(tmp_path, MistralForCausalLM(MistralConfig(**sizes, **heads)))
    assert list(model.containers()) == order
    with torch.no_grad(), trace(model) as tape:
        model(torch.tensor([[1, 2, 3]]))
    scales = bias.bfloat16().float().softmax(dim=-1)
    for row, path in enumerate(order):
        found = tape.records[path][0].weights
        assert torch.allclose(found, scales[row].expand_as(found), atol=1e-6)
    experts = next(iter(model.containers().values())).experts
    stored = load_file(tmp_path / "adapter_3" / "adapter_model.safetensors")
    assert torch.equal(experts.lora_A[4:6], stored[f"base_model.model.{order[0]}.lora_A.weight"])


def test_generation_with_a_cache_is_that_of_recomputing_everything() -> None:
    model = moelora.from_pretrained(ROOT / "depth3_layerwise", backbone())
    stored = load_file(ROOT / "io.safetensors")
    prompt = {"input_ids": stored["input_ids"].flip(-1), "attention_mask": stored["attention_mask"].flip(-1)}
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached, whole = (model.generate(**prompt, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    assert (torch.stack(cached.logits) - torch.stack(whole.logits)).abs().max() <= 1e-5
    mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 23), value=1)
    with torch.no_grad():
        once = model(cached.sequences[:, :-1], attention_mask=mask).logits[:, -24:]
    assert (torch.stack(cached.logits, dim=1) - once).abs().max() <= 1e-5
    with model.disable_experts():
        assert not torch.equal(model.generate(**prompt, **options).sequences, cached.sequences)


def test_a_4_bit_backbone_gives_what_its_own_weights_give_in_full(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)
    MistralForCausalLM(config).save_pretrained(tmp_path / "backbone")
    quantized, _ = moelora.load_backbone(tmp_path / "backbone", quantization="nf4", dtype="float32", tokenizer=False)
    full = MistralForCausalLM.from_pretrained(tmp_path / "backbone", dtype=torch.float32)
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            full.get_submodule(name).weight.data.copy_(weight.float())
    site = {"target": ["q_proj", "down_proj"], "experts": {"kind": "frozen", "num_experts": 2, "r": 4}}
    model = moelora.attach(full, {"sites": [{**site, "router": {"kind": "xlora", "layerwise": True}}]}).eval()
    for value in model.adapter_tensors().values():
        value.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "native")
    checkpoints.convert(tmp_path / "native", tmp_path / "written", to="xlora")
    loaded = moelora.from_pretrained(tmp_path / "written", quantized)
    ours, expected = made.logits_of(loaded), made.logits_of(model)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    with loaded.disable_experts():
        assert (made.logits_of(loaded) - ours).abs().max() > 1e-2 * expected.abs().max()


def test_what_is_fetched_of_a_repository_is_enough(tmp_path: Path) -> None:
    layout = checkpoints.LAYOUTS.create("xlora")
    for adapters in (NAMES, None):
        whole = copy("depth1_shared", tmp_path / f"whole{adapters}")
        edit(whole, adapters=adapters)
        shutil.copytree(whole / "adapter_1", whole / "checkpoint-100" / "deep")
        first = tmp_path / f"first{adapters}"
        first.mkdir()
        for name in layout.files:
            if (whole / name).is_file():
                shutil.copy(whole / name, first / name)
        assert layout.detect(Folder(first))
        patterns = layout.further_files(Folder(first))
        for path in [path for path in whole.rglob("*") if path.is_file()]:
            name = path.relative_to(whole).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                (first / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, first / name)
        assert (first / "checkpoint-100").exists() == (adapters is None)
        assert far_from_the_authors(first, "depth1_shared") <= 1e-5


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("internal_xlora_classifier.last.weight", "unexpected"),
        ("base_model.model.model.norm.weight", "unexpected"),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", "unexpected"),
    ],
)
def test_tensors_beside_an_adapters_own_are_refused(key: str, reason: str, tmp_path: Path) -> None:
    folder = copy("depth1_shared", tmp_path / "checkpoint")
    path = folder / "adapter_2" / "adapter_model.safetensors"
    save_file({**load_file(path), key: torch.zeros(3, 3)}, path)
    with pytest.raises(CheckpointError, match=reason) as raised:
        checkpoints.read(folder)
    assert key in str(raised.value) and "adapter_2" in str(raised.value)


def test_a_key_that_may_change_the_meaning_is_refused_and_an_adapter_that_is_no_plain_lora(tmp_path: Path) -> None:
    folder = copy("depth1_shared", tmp_path / "checkpoint")
    edit(folder, enable_gumbel=True)
    with pytest.raises(CheckpointError, match=r"keys that are not known here .*enable_gumbel"):
        checkpoints.read(folder)
    edit(folder, without="enable_gumbel")
    path = folder / "adapter_2"
    values = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**values, "use_dora": True}))
    tensors = load_file(path / "adapter_model.safetensors")
    dora = {
        k.replace("lora_B.weight", "lora_magnitude_vector.weight"): v[:, 0] for k, v in tensors.items() if "_B" in k
    }
    save_file({**tensors, **{k: v.clone() for k, v in dora.items()}}, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"expected a plain LoRA adapter, .*found experts of kind dora"):
        checkpoints.read(folder)


def test_a_mixture_that_the_layout_cannot_express_is_refused_with_all_reasons(tmp_path: Path) -> None:
    router = {"kind": "topk", "top_k": 1}
    sites = [
        {"target": "q_proj", "experts": {"kind": "dora", "num_experts": 2, "r": 2}, "router": router},
        {"target": "v_proj", "experts": {"num_experts": 1, "r": 2}},
    ]
    moelora.attach(made.llama(), {"sites": sites}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError) as raised:
        checkpoints.convert(tmp_path / "native", tmp_path / "written", to="xlora")
    for reason in ("for all linears, this mixture has 2", "its router is xlora, found topk", "found dora"):
        assert reason in str(raised.value)
    assert not (tmp_path / "written").exists()
