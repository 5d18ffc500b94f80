"""PEFT's layout of X-LoRA, on what PEFT wrote (tests/fixtures/peft_xlora_*) and against stock PEFT itself."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xlora_made as made
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.checkpoints.folder import Folder
from moelora.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = FIXTURES / "peft_xlora_tiny_llama_v0171"
NEWER = FIXTURES / "peft_xlora_tiny_llama"
CASES = sorted(path.name for path in ROOT.iterdir() if path.is_dir())
CORRUPT = {
    "CORRUPT_save_depth1_layerwise_peft0212": "depth1_layerwise",
    "CORRUPT_save_depth3_layerwise_T05_peft0212": "depth3_layerwise_T05",
}
# Of every kind in which adapters of one mixture may differ.
RAGGED: dict[str, dict[str, Any]] = {
    "math": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "bio": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "code": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["v_proj", "q_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"v_proj": 7},
    },
}
ALIKE: dict[str, dict[str, Any]] = {
    name: {"r": 2, "lora_alpha": 4, "target_modules": ["down_proj", "q_proj"]} for name in ("one", "two")
}


def backbone() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        FIXTURES / "tiny_llama_base", dtype=torch.float32, attn_implementation="eager", use_cache=False
    )


def fixture_logits(model: Any) -> Tensor:
    stored = load_file(NEWER / "io.safetensors")
    with torch.no_grad():
        logits: Tensor = model(input_ids=stored["input_ids"], attention_mask=stored["attention_mask"]).logits
    return logits


def far(value: Tensor, other: Tensor) -> float:
    return float((value - other).abs().max())


def copy(case: Path, folder: Path) -> Path:
    """A fixture's own files, with its adapters beside them."""
    shutil.copytree(case, folder, ignore=shutil.ignore_patterns("0", "1", "2"))
    for adapter in (NEWER / "adapters").iterdir():
        shutil.copytree(adapter, folder / adapter.name)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str) -> None:
    model = moelora.from_pretrained(ROOT / case, backbone())
    logits = fixture_logits(model)
    assert far(logits, load_file(NEWER / "io.safetensors")[f"{case}.logits"]) <= 1e-5
    old = far(logits, load_file(ROOT / "io.safetensors")[f"{case}.logits"])
    # PEFT 0.17.1 took this one softmax over the flattened batch.
    assert old > 0.1 if case == "depth2_topk2_softmaxtopk" else old <= 1e-5
    experts, config = model.mixture.sites[0].experts, json.loads((ROOT / case / "adapter_config.json").read_text())
    assert (experts.kind, experts.names) == ("frozen", ["math", "bio", "code"])
    assert model.mixture.sites[0].router.depth == config["xlora_depth"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        value.numel() for value in load_file(ROOT / case / "adapter_model.safetensors").values()
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("through", [[], ["native", "xlora"]])
def test_written_again_it_is_the_same_bit_for_bit_and_peft_reads_it(
    case: str, through: list[str], tmp_path: Path
) -> None:
    source = ROOT / case
    for step, layout in enumerate([*through, "peft_xlora"]):
        checkpoints.convert(source, tmp_path / str(step), to=layout)
        source = tmp_path / str(step)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (source, ROOT / case))
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for adapter in (NEWER / "adapters").iterdir():
        ours, theirs = (load_file(at / adapter.name / "adapter_model.safetensors") for at in (source, adapter.parent))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    written, original = (json.loads((folder / "adapter_config.json").read_text()) for folder in (source, ROOT / case))
    assert written.pop("adapters") == {"0": "math", "1": "bio", "2": "code"}
    assert written.pop("peft_version") is None
    assert {**written, "adapters": original["adapters"]} == original
    stored = load_file(NEWER / "io.safetensors")
    expected = fixture_logits(moelora.from_pretrained(ROOT / case, backbone()))
    for opened in (made.stock, made.stock_from_elsewhere):
        found = fixture_logits(opened(source, backbone()))
        assert far(found, expected) <= 1e-6
        assert far(found, stored[f"{case}.logits"]) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16},
        {"scaling_pass_value": 0.3, "global_scaling_weight": 0.5},
    ],
)
def test_adapters_that_differ_in_rank_scale_and_linears_are_mixed_as_peft_does(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter that has nothing at a linear adds nothing there; the linears of all together count."""
    expected = made.make(tmp_path / "made", RAGGED, **options)
    model = moelora.from_pretrained(tmp_path / "made", made.llama())
    assert far(made.logits_of(model), expected) <= 1e-5
    assert "math, bio, code adapt fewer linears than the 6" in caplog.text
    with model.disable_experts():
        assert far(made.logits_of(model), expected) > 0.1
    experts = model.mixture.sites[0].experts
    assert experts.scaling == ["lora", "rslora", "lora"]
    assert experts.at("model.layers.1.self_attn.q_proj").ranks == (4, 2, 6)
    assert experts.at("model.layers.1.mlp.down_proj").ranks == (0, 2, 0)
    assert experts.at("model.layers.0.self_attn.v_proj").alphas == (8, 3, 7)
    for layout in ("native", "xlora", "peft_xlora"):
        checkpoints.convert(tmp_path / "made", tmp_path / layout, to=layout)
        again = moelora.from_pretrained(tmp_path / layout, made.llama())
        assert again.mixture == model.mixture
        assert torch.equal(made.logits_of(again), made.logits_of(model))
    assert far(made.logits_of(made.stock(tmp_path / "peft_xlora", made.llama())), expected) == 0


def test_rows_of_the_classifier_follow_the_backbones_modules_not_the_file(tmp_path: Path) -> None:
    """In the file layer 10 comes before layer 2, and down_proj before q_proj."""
    expected = made.make(tmp_path / "made", ALIKE, layers=12, layerwise_scalings=True)
    keys = list(load_file(tmp_path / "made" / "one" / "adapter_model.safetensors"))
    assert [f".{word}" in keys[0] for word in ("layers.0", "down_proj")] == [True, True]
    assert next(i for i, key in enumerate(keys) if ".10." in key) < next(i for i, k in enumerate(keys) if ".2." in k)
    source = tmp_path / "made"
    for layout in ("native", "peft_xlora"):
        checkpoints.convert(source, tmp_path / layout, to=layout)
        source = tmp_path / layout
        model = moelora.from_pretrained(source, made.llama(12))
        assert far(made.logits_of(model), expected) <= 1e-5
        assert len(model.containers()) == 24
    assert far(made.logits_of(made.stock(source, made.llama(12))), expected) == 0
    # Natively saved from the model itself, its sites are in the order of the backbone.
    model.save_pretrained(tmp_path / "saved")
    again = moelora.from_pretrained(tmp_path / "saved", made.llama(12))
    assert torch.equal(made.logits_of(again), made.logits_of(model))
    checkpoints.convert(tmp_path / "saved", tmp_path / "back", to="peft_xlora")
    ours, theirs = (load_file(tmp_path / at / "adapter_model.safetensors") for at in ("back", "made"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_more_than_ten_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """PEFT itself sorts the names as text when it saves, and then takes expert 10 for expert 2."""
    adapters = {f"a{i}": {"r": 1 + i % 3, "lora_alpha": 4, "target_modules": ["q_proj"]} for i in range(12)}
    expected = made.make(tmp_path / "made", adapters)
    assert list(json.loads((tmp_path / "made" / "adapter_config.json").read_text())["adapters"])[2] == "10"
    model = moelora.from_pretrained(tmp_path / "made", made.llama())
    assert far(made.logits_of(model), expected) <= 1e-5
    assert model.mixture.sites[0].experts.names == list(adapters)
    checkpoints.convert(tmp_path / "made", tmp_path / "written", to="peft_xlora")
    assert far(made.logits_of(made.stock(tmp_path / "written", made.llama())), expected) == 0
    assert far(made.logits_of(made.stock(tmp_path / "made", made.llama())), expected) > 1e-3


def test_without_dropout_the_classifiers_linears_are_numbered_by_twos(tmp_path: Path) -> None:
    expected = made.make(tmp_path / "made", ALIKE, xlora_depth=3, xlora_size=8, xlora_dropout_p=0.0)
    checkpoints.convert(tmp_path / "made", tmp_path / "written", to="peft_xlora")
    keys = set(load_file(tmp_path / "written" / "adapter_model.safetensors"))
    prefix = "base_model.internal_xlora_classifier.layers"
    assert keys == {f"{prefix}.{k}.{name}" for k in (0, 2, 4) for name in ("weight", "bias")}
    assert far(made.logits_of(moelora.from_pretrained(tmp_path / "written", made.llama())), expected) <= 1e-5
    assert far(made.logits_of(made.stock(tmp_path / "written", made.llama())), expected) == 0


@pytest.mark.parametrize("name", CORRUPT)
def test_a_save_of_new_peft_is_refused_and_can_be_repaired_as_the_message_says(name: str, tmp_path: Path) -> None:
    lost = "base_model.internal_xlora_classifier.layers.0.weight"
    with pytest.raises(CheckpointError, match=r"PEFT 0\.20 and newer leave some out") as raised:
        checkpoints.read(NEWER / name)
    assert f"missing: {lost}; expected" in str(raised.value)
    left = "base_model.internal_xlora_classifier.layers"
    assert f"{left}.weight and .bias of 0/adapter_model.safetensors as {left}.0.weight and .bias" in str(raised.value)
    folder = copy(NEWER / name, tmp_path / "repaired")
    with pytest.raises(CheckpointError, match=r"layers\.weight in the folders '0' .*, or train the classifier again"):
        checkpoints.read(folder)  # the subfolders are not here
    found = load_file(NEWER / name / "0" / "adapter_model.safetensors")
    whole = {f"{left}.0.{which}": found[f"{left}.{which}"] for which in ("weight", "bias")}
    save_file({**load_file(folder / "adapter_model.safetensors"), **whole}, folder / "adapter_model.safetensors")
    expected = load_file(NEWER / "io.safetensors")[f"{CORRUPT[name]}.logits"]
    assert far(fixture_logits(moelora.from_pretrained(folder, backbone())), expected) <= 1e-5


@pytest.mark.parametrize("case", [ROOT / "depth1_layerwise", *(NEWER / name for name in CORRUPT)])
@pytest.mark.parametrize("expert", ["0", "1", "2"])
def test_the_subfolders_that_peft_writes_for_experts_are_refused(case: Path, expert: str, tmp_path: Path) -> None:
    folder = copy(ROOT / "depth1_layerwise", tmp_path / "checkpoint")
    shutil.rmtree(folder / ["math", "bio", "code"][int(expert)])
    shutil.copytree(case / expert, folder / expert)
    with pytest.raises(
        CheckpointError, match=f"expected the adapter of expert {expert}, found what PEFT writes"
    ) as raised:
        checkpoints.read(folder)
    assert "copy the adapter that the expert was made from" in str(raised.value)


def test_an_adapter_is_found_by_the_end_of_its_path_or_by_its_number(tmp_path: Path) -> None:
    folder = copy(ROOT / "depth1_layerwise", tmp_path / "checkpoint")
    (folder / "bio").rename(folder / "adapter_2")
    (folder / "code").rename(folder / "2")
    edit(folder, adapters={"0": "/home/someone/math", "1": "someone/biology", "2": "C:\\else\\where"})
    expected = load_file(NEWER / "io.safetensors")["depth1_layerwise.logits"]
    assert far(fixture_logits(moelora.from_pretrained(folder, backbone())), expected) <= 1e-5


def test_a_path_may_lead_two_folders_up_and_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(ROOT / "depth1_layerwise", tmp_path / "a" / "b" / "checkpoint")
    shutil.move(folder / "math", tmp_path / "a" / "math")
    edit(folder, adapters={"0": "../../math", "1": str(folder / "bio"), "2": "code"})
    assert checkpoints.read(folder).mixture.sites[0].experts.names == ["math", "bio", "code"]
    edit(folder, adapters={"0": str(tmp_path / "a" / "math"), "1": "bio", "2": "code"})
    assert checkpoints.read(folder)
    monkeypatch.chdir(tmp_path / "a")
    edit(folder, adapters={"0": "math", "1": "bio", "2": "code"})
    assert checkpoints.read(folder)  # as PEFT reads it, from where it runs
    shutil.move(tmp_path / "a" / "math", tmp_path / "math")
    for path in ("../../../math", str(tmp_path / "math"), "x/../../../../math", "../math", "no\0where", "x" * 300):
        edit(folder, adapters={"0": path, "1": "bio", "2": "code"})
        with pytest.raises(CheckpointError, match=r"adapters\.0: expected the folder of an adapter in this checkpoint"):
            checkpoints.read(folder)
    edit(folder, adapters={"0": "someone/lora-math", "1": "bio", "2": "code"})
    with pytest.raises(CheckpointError, match=r"copy that adapter's folder to .*lora-math"):
        checkpoints.read(folder)


def test_adapters_that_were_trained_are_not_taken_from_where_they_were_before(tmp_path: Path) -> None:
    folder = copy(ROOT / "depth1_layerwise", tmp_path / "checkpoint")
    edit(folder, use_trainable_adapters=True, adapters={"0": "math", "1": "bio", "2": "code"})
    model = moelora.from_pretrained(folder, backbone())
    assert model.mixture.sites[0].experts.kind == "lora"
    assert all(c.experts.lora_A.requires_grad for c in model.containers().values())
    checkpoints.convert(folder, tmp_path / "written", to="peft_xlora")
    assert json.loads((tmp_path / "written" / "adapter_config.json").read_text())["use_trainable_adapters"] is True
    shutil.move(folder / "bio", tmp_path / "bio")
    edit(folder, adapters={"0": "math", "1": "../bio", "2": "code"})
    with pytest.raises(CheckpointError, match=r"PEFT saves none of them whole, and .* holds adapters\.1 as it was"):
        checkpoints.read(folder)


def test_only_adapters_are_fetched_of_a_repository_not_copies_of_the_backbone(tmp_path: Path) -> None:
    folder = copy(ROOT / "depth1_layerwise", tmp_path / "checkpoint")
    edit(folder, adapters={"0": "someone/math", "1": "../../../bio[1]", "2": "/x/code"})
    patterns = checkpoints.LAYOUTS.create("peft_xlora").further_files(Folder(folder))
    assert {"math/adapter_config.json", "adapter_2/adapter_model.bin", "bio[[]1]/adapter_config.json"} < set(patterns)
    assert not any(fnmatch.fnmatch(f"{n}/adapter_model.safetensors", p) for n in "012" for p in patterns)
    assert not any(pattern.startswith(("..", "/")) for pattern in patterns)


def test_what_peft_cannot_load_is_not_written(tmp_path: Path) -> None:
    router = {"kind": "xlora", "depth": 2, "size": 4, "relu": False, "bias": False}
    site = {"target": "c_attn", "experts": {"kind": "frozen", "num_experts": 2, "r": 2}, "router": router}
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    moelora.attach(GPT2LMHeadModel(config), {"sites": [site]}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError) as raised:
        checkpoints.convert(tmp_path / "native", tmp_path / "written", to="peft_xlora")
    for reason in ("begin with 'model.', found 'transformer.h.0.attn.c_attn'", "relu: false", "bias: false"):
        assert reason in str(raised.value)
    assert not (tmp_path / "written").exists()


def test_a_classifier_of_other_adapters_is_refused(tmp_path: Path) -> None:
    folder = copy(ROOT / "depth1_layerwise", tmp_path / "checkpoint")
    edit(folder, adapters={"0": "math", "1": "bio"})
    with pytest.raises(
        CheckpointError, match="expected 12 rows, one for each of the 2 adapters for each of the 6 linears"
    ):
        checkpoints.read(folder)
    edit(folder, adapters={"0": "math", "1": "bio", "2": "code"}, hidden_size=31)
    with pytest.raises(
        CheckpointError,
        match=r"layers\.0\.weight \(in adapter_model\.safetensors\): expected \(18, 31\), found \(18, 32\)",
    ):
        checkpoints.read(folder)


def test_dropout_of_the_adapters_is_one_and_the_largest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapters = {name: {**ALIKE["one"], "lora_dropout": p} for name, p in (("one", 0.1), ("two", 0.3))}
    expected = made.make(tmp_path / "made", adapters, scaling_pass_value=0.1, top_k_lora=2)
    model = moelora.from_pretrained(tmp_path / "made", made.llama())
    assert far(made.logits_of(model), expected) <= 1e-5
    experts = model.mixture.sites[0].experts
    assert (experts.dropout, experts.expert_dropout) == (0.3, "separate")
    assert "training goes on with the largest: {'one': 0.1, 'two': 0.3}" in caplog.text
    assert "scaling_pass_value 0.1 with top_k_lora 2" in caplog.text
    checkpoints.convert(tmp_path / "made", tmp_path / "written", to="peft_xlora")
    for name in adapters:
        config = json.loads((tmp_path / "written" / name / "adapter_config.json").read_text())
        assert config["lora_dropout"] == 0.3


def test_a_configuration_that_was_edited_is_told_from_a_spoilt_save(tmp_path: Path) -> None:
    folder = copy(ROOT / "depth3_layerwise_T05", tmp_path / "checkpoint")
    edit(folder, adapters={"0": "math", "1": "bio", "2": "code"}, xlora_dropout_p=0.0)
    with pytest.raises(CheckpointError, match=r"missing: .*layers\.2\.weight(.|\n)*unexpected: .*layers\.3\.weight"):
        checkpoints.read(folder)
    edit(folder, xlora_depth=10**9)
    with pytest.raises(CheckpointError, match="xlora_depth: Input should be less than or equal to 100"):
        checkpoints.read(folder)
