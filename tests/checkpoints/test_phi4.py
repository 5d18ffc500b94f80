"""The layout of Phi-4-multimodal's LoRAs, in both published forms, against transformers with PEFT on a tiny model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from phi4_made import AUDIO, CHOSEN, IMAGE, OPTIONS, TARGETS, batch, logits, theirs, tiny_phi4
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Phi4MultimodalConfig, Phi4MultimodalForCausalLM, PreTrainedTokenizerFast

import moelora
from moelora import checkpoints
from moelora.checkpoints.phi4 import input_modes
from moelora.errors import CheckpointError, ConfigError, UserError

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model with its two adapters in subfolders, written by PEFT."""
    root = tmp_path_factory.mktemp("phi4")
    tiny_phi4().save_pretrained(root)
    for name, options in OPTIONS.items():
        adapted = get_peft_model(tiny_phi4(), LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **options))
        torch.manual_seed(len(name))
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.2)
        adapted.save_pretrained(root / f"{name}-lora")
    return root


@pytest.fixture
def adapters(published: Path, tmp_path: Path) -> Path:
    """The two subfolders alone."""
    for name in OPTIONS:
        shutil.copytree(published / f"{name}-lora", tmp_path / "adapters" / f"{name}-lora")
    return tmp_path / "adapters"


@pytest.fixture
def original(published: Path, tmp_path: Path) -> Path:
    """The form of the original: a state dict of the whole model with both adapters, and their options beside it."""
    folder = tmp_path / "original"
    folder.mkdir()
    state = {key: value.clone() for key, value in tiny_phi4().state_dict().items()}
    state["model.embed_tokens_extend.image_embed.glb_GN"] = torch.zeros(1)  # of a name that transformers changes
    for name in OPTIONS:
        for key, value in load_file(published / f"{name}-lora" / "adapter_model.safetensors").items():
            path, _, tail = key.removeprefix("base_model.model.").rpartition(".lora_")
            state[f"{path}.lora_{tail[0]}.{name}.weight"] = value
            if f"{path}.weight" in state:
                state[f"{path}.base_layer.weight"] = state.pop(f"{path}.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    lora = {f"{name}_lora": {**options, "dp": 0.01, "layer": "(" * 40} for name, options in OPTIONS.items()}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "hidden_act": "silu"}
    config = {"model_type": "phi4mm", "_name_or_path": "microsoft/Phi-4-multimodal-instruct", **sizes, **lora}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("form", ["published", "adapters", "original"])
def test_each_mode_gives_what_transformers_gives_with_its_adapter(
    published: Path, form: str, mode: int, request: pytest.FixtureRequest
) -> None:
    model = moelora.from_pretrained(request.getfixturevalue(form), tiny_phi4())
    inputs = batch(mode)
    modes = input_modes(inputs["input_ids"], model.config)
    assert modes.tolist() == [mode]
    ours = logits(model, inputs, task_types=modes)
    assert (ours - logits(theirs(published, mode), inputs)).abs().max() <= 1e-5
    others = [logits(model, inputs, task_types=torch.tensor([m])) for m in range(4) if CHOSEN[m] != CHOSEN[mode]]
    assert all((ours - other).abs().max() > 1e-2 for other in others)


def test_sequences_of_one_batch_have_modes_of_their_own(published: Path) -> None:
    model = moelora.from_pretrained(published)
    ids = torch.randint(3, 50, (1, 8))
    together = logits(model, {"input_ids": ids.repeat(4, 1)}, task_types=torch.tensor([2, 0, 3, 1]))
    for row, mode in enumerate([2, 0, 3, 1]):
        alone = logits(theirs(published, mode), {"input_ids": ids})
        assert (together[row] - alone[0]).abs().max() <= 1e-5
    with pytest.raises(UserError, match="task_types"):
        model(input_ids=ids)


@pytest.mark.parametrize("mode", [1, 2])
def test_what_is_generated_goes_on_with_the_adapter_of_the_prompt(published: Path, mode: int) -> None:
    inputs = {**batch(mode), "max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE, AUDIO]}
    ours = moelora.from_pretrained(published).generate(**inputs, task_types=torch.tensor([mode]))
    assert ours.tolist() == theirs(published, mode).generate(**inputs).tolist()
    assert ours.tolist() != theirs(published, 0).generate(**inputs).tolist()


def test_a_converted_folder_loads_alone_and_quantised(published: Path, adapters: Path) -> None:
    with pytest.raises(ConfigError, match="backbone"):
        moelora.from_pretrained(adapters)
    alone = moelora.from_pretrained(published, quantization="nf4")
    backbone, _ = moelora.load_backbone(published, quantization="nf4", tokenizer=False)
    given = moelora.from_pretrained(adapters, backbone)
    inputs, modes = batch(1), torch.tensor([1])
    assert torch.equal(logits(alone, inputs, task_types=modes), logits(given, inputs, task_types=modes))
    assert alone.tokenizer is None and alone.backbone_config.name == str(published)
    assert type(alone.containers()["model.layers.0.self_attn.qkv_proj"].base).__name__ == "Linear4bit"


def test_the_tokenizer_of_a_converted_folder_comes_along(
    published: Path, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    shutil.copytree(published, tmp_path / "run")
    byte_tokenizer.save_pretrained(tmp_path / "run")
    assert moelora.from_pretrained(tmp_path / "run").tokenizer.pad_token is not None


def test_both_forms_hold_the_same_mixture(adapters: Path, original: Path) -> None:
    folders, whole = checkpoints.read(adapters), checkpoints.read(original)
    site = whole.mixture.sites[0]
    assert folders.mixture == whole.mixture
    assert (site.experts.kind, list(site.experts.ranks), site.experts.scales) == ("frozen", [4, 3], (2.0, 3.0))
    assert site.experts.names == ["vision", "speech"]
    one, two = (stored.tensors(stored.declared()) for stored in (folders, whole))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert whole.backbone.name == "microsoft/Phi-4-multimodal-instruct"
    assert (folders.detail, whole.detail) == ("subfolders", "whole model")


def test_keys_without_the_prefix_of_peft_are_read_as_those_with_it(adapters: Path) -> None:
    """As transformers' converter writes them."""
    before = checkpoints.read(adapters)
    tensors = before.tensors(before.declared())
    for name in OPTIONS:
        path = adapters / f"{name}-lora" / "adapter_model.safetensors"
        save_file({key.removeprefix("base_model.model."): value for key, value in load_file(path).items()}, path)
    after = checkpoints.read(adapters)
    assert after.mixture == before.mixture
    values = after.tensors(after.declared())
    assert all(torch.equal(values[name], tensors[name]) for name in tensors)


def test_where_both_forms_are_there_the_subfolders_count(adapters: Path, original: Path) -> None:
    for name in OPTIONS:
        shutil.copytree(adapters / f"{name}-lora", original / f"{name}-lora")
    assert checkpoints.read(original).detail == "subfolders"
    layout = checkpoints.LAYOUTS.create("phi4")
    assert layout.further_files(checkpoints.access.Folder(original)) == ()
    shutil.rmtree(original / "vision-lora")
    assert "model-*.safetensors" in layout.further_files(checkpoints.access.Folder(original))


def test_the_decoder_of_the_original_is_compared_with_the_backbone(
    original: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny_phi4()
    other.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] += 1
    with pytest.raises(
        CheckpointError, match=r"\n  model.layers.1.mlp.down_proj.base_layer.weight: expected the weight"
    ):
        moelora.from_pretrained(original, other)
    other = tiny_phi4()
    other.get_submodule("model.embed_tokens_extend.image_embed.img_projection_up").weight.data += 1
    moelora.from_pretrained(original, other).unload().save_pretrained(original.parent / "plain")
    backbone, _ = moelora.load_backbone(original.parent / "plain", quantization="nf4", tokenizer=False)
    with caplog.at_level(logging.WARNING):
        moelora.from_pretrained(original, backbone)
    assert "8 of 15 could not be compared" in caplog.text


def test_a_backbone_of_another_kind_is_refused(original: Path, tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(CheckpointError, match="found none"):
        moelora.from_pretrained(original, tiny_llama)


def test_adapters_may_differ_in_where_they_are(adapters: Path) -> None:
    """A vision LoRA on the attention alone, with another rank in one layer."""
    folder = adapters / "vision-lora"
    shutil.rmtree(folder)
    pattern = {"layers.1.self_attn.o_proj": 2}
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj"], exclude_modules=r".*_extend.*", rank_pattern=pattern
    )
    adapted = get_peft_model(tiny_phi4(), config)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.2)
    adapted.save_pretrained(folder)
    model = moelora.from_pretrained(adapters, tiny_phi4())
    ranks = {name: list(container.site.ranks) for name, container in model.containers().items()}
    assert ranks["model.layers.0.mlp.down_proj"] == [0, 3] and ranks["model.layers.1.self_attn.o_proj"] == [2, 3]
    for mode in range(4):
        ours = logits(model, batch(mode), task_types=torch.tensor([mode]))
        assert (ours - logits(theirs(adapters, mode), batch(mode))).abs().max() <= 1e-5
    checkpoints.convert(adapters, adapters.parent / "again", to="phi4")
    read, again = checkpoints.read(adapters), checkpoints.read(adapters.parent / "again")
    assert read.mixture == again.mixture
    one, two = (stored.tensors(stored.declared()) for stored in (read, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("through", [[], ["native"]])
@pytest.mark.parametrize("form", ["adapters", "original"])
def test_what_is_written_peft_loads_and_holds_the_same_bits(
    published: Path, tmp_path: Path, form: str, through: list[str], request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(form)
    for step, layout in enumerate([*through, "phi4"]):
        checkpoints.convert(source, tmp_path / str(step), to=layout)
        source = tmp_path / str(step)
    for name in OPTIONS:
        files = [root / f"{name}-lora" / "adapter_model.safetensors" for root in (published, source)]
        one, two = (load_file(file) for file in files)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for mode in range(3):
        assert torch.equal(logits(theirs(source, mode), batch(mode)), logits(theirs(published, mode), batch(mode)))
    assert checkpoints.read(source).mixture == checkpoints.read(published).mixture


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_lora": {"r": 5, "lora_alpha": 8}}, r"misshapen: \S+lora_A.vision.weight: expected \(5, 32\)"),
        ({"vision_lora": {"lora_alpha": 8}}, "r: this key is missing"),
        ({"vision_lora": {"r": 4, "lora_alpha": 8, "use_dora": True}}, "use_dora"),
        ({"vision_lora": {"r": 4, "lora_alpha": 0}}, "lora_alpha"),
    ],
)
def test_options_of_the_original_that_do_not_hold_are_refused(
    original: Path, change: dict[str, Any], said: str
) -> None:
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=said):
        checkpoints.read(original)


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        ({"lora_A.vision": "lora_A.default"}, r"unexpected: \S+lora_A.default.weight"),
        ({".speech.": ".other."}, r"expected tensors named lora_A.speech.weight"),
        ({"0.self_attn.o_proj.lora_B.speech": None}, r"missing: \S+0.self_attn.o_proj.lora_B.speech.weight"),
    ],
)
def test_tensors_of_the_original_that_do_not_fit_are_named(
    original: Path, rename: dict[str, str | None], said: str
) -> None:
    (old, new), path = next(iter(rename.items())), original / "model.safetensors"
    state = {key.replace(old, new or ""): value for key, value in load_file(path).items() if new or old not in key}
    save_file(state, path)
    with pytest.raises(CheckpointError, match=said):
        checkpoints.read(original)


def test_without_the_model_there_is_nothing_to_read(original: Path) -> None:
    (original / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected the adapters vision-lora and speech-lora, or a whole model"):
        checkpoints.read(original)


def test_an_adapter_that_is_no_plain_lora_is_refused(adapters: Path) -> None:
    shutil.rmtree(adapters / "speech-lora")
    adapted = get_peft_model(tiny_phi4(), LoraConfig(target_modules=TARGETS, use_dora=True, r=2))
    adapted.save_pretrained(adapters / "speech-lora")
    with pytest.raises(CheckpointError, match="expected a plain LoRA adapter"):
        checkpoints.read(adapters)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"router": {"kind": "mask", "by": "modality"}}, "its router is mask by task_type with the table"),
        ({"router": {"kind": "mask", "by": "task_type", "table": [[], [0], [1], [0, 1]]}}, "its router is mask"),
        ({"router": {"kind": "topk"}}, "its router is mask"),
        ({"experts": {"kind": "frozen", "num_experts": 3, "r": 2}}, "its experts are two plain LoRAs, found 3"),
        ({"experts": {"kind": "frozen", "num_experts": 2, "r": [2, 0]}}, "that of speech has none"),
        ({"target": "mlp"}, "'model.layers.0.mlp' is an FFN block"),
    ],
)
def test_what_it_cannot_express_is_not_written(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    site = {
        "target": "mlp.down_proj",
        "experts": {"kind": "frozen", "num_experts": 2, "r": 2},
        "router": {"kind": "mask", "by": "task_type", "table": [[], [0], [1], [0]]},
    }
    backbone = tiny_phi4()
    if change.get("target"):
        change = {"target": [f"model.layers.{layer}.mlp" for layer in range(2)]}
    moelora.attach(backbone, {"sites": [{**site, **change}]}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match=said):
        checkpoints.convert(tmp_path / "native", tmp_path / "out", to="phi4")


def test_sizes_are_those_of_the_published_files() -> None:
    """vision-lora has 738 MB and speech-lora 923 MB in bfloat16, by the listing of the hub."""
    config = Phi4MultimodalConfig(
        num_hidden_layers=1,
        num_attention_heads=24,
        vision_config={"num_hidden_layers": 1},
        audio_config={"num_blocks": 1},
    )
    with torch.device("meta"):
        layer = Phi4MultimodalForCausalLM(config).model.layers[0]
    widths = sum(sum(module.weight.shape) for module in layer.modules() if isinstance(module, torch.nn.Linear))
    assert [round(2 * 32 * widths * rank / 1e6) for rank in (256, 320)] == [738, 923]
