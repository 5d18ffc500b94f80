"""Modules that are trained and saved whole beside the experts."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, PreTrainedModel

import moelora
from moelora.errors import CheckpointError, ConfigError
from moelora.experts import SavedModule

SITE: dict[str, Any] = {
    "target": ["q_proj", "v_proj"],
    "experts": {"num_experts": 3, "r": 2},
    "router": {"kind": "topk", "top_k": 2},
}
IDS = torch.arange(3, 15).reshape(2, 6)


def attached(backbone: PreTrainedModel, *names: str, fill: bool = True) -> moelora.MoELoRAModel:
    """A mixture with modules that are saved whole; with random numbers added to all of it, or fresh."""
    model = moelora.attach(backbone, {"sites": [SITE], "modules_to_save": list(names)}).eval()
    if fill:
        changed(model)
    return model


@torch.no_grad()
def changed(model: moelora.MoELoRAModel) -> None:
    generator = torch.Generator().manual_seed(5)
    for value in model.adapter_tensors().values():
        value.add_(torch.randn(value.shape, generator=generator).to(value.dtype), alpha=0.1)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model(ids).logits
    return result


def classifier(config: LlamaConfig) -> LlamaForSequenceClassification:
    config.num_labels = 3
    return LlamaForSequenceClassification(config).eval()


# -- forward ---------------------------------------------------------------------------------------------------------


def test_a_fresh_copy_changes_nothing_and_a_changed_one_does(tiny_llama: LlamaForCausalLM) -> None:
    before = logits(tiny_llama)
    model = attached(tiny_llama, "lm_head", fill=False)
    assert torch.equal(logits(model), before)
    trained = model.saved_modules()["lm_head"].trained
    with torch.no_grad():
        trained.weight += 0.5
    assert torch.equal(logits(model), tiny_llama.model(IDS).last_hidden_state @ trained.weight.T)
    assert not torch.equal(logits(model), before)


def test_without_experts_the_frozen_module_is_back_bit_for_bit(tiny_llama: LlamaForCausalLM) -> None:
    before = logits(tiny_llama)
    model = attached(tiny_llama, "lm_head", "embed_tokens", "input_layernorm")
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with model.disable_experts():
        assert torch.equal(logits(model), before)
        assert model.get_input_embeddings().weight is tiny_llama.model.embed_tokens.base.weight
    assert not torch.allclose(logits(model), before, atol=1e-2)


def test_names_are_matched_as_targets_are(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, "1.input_layernorm", "norm")
    assert list(model.saved_modules()) == ["model.layers.1.input_layernorm", "model.norm"]
    assert all(f"{name}.weight" in model.adapter_tensors() for name in model.saved_modules())
    assert "model.norm: saved whole, 32 parameters" in model.trainable_report()


def test_a_module_with_modules_in_it_is_saved_with_all_of_them(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, "1.mlp")
    names = {name for name in model.adapter_tensors() if ".mlp." in name}
    assert names == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_the_outermost_of_modules_with_one_name_is_taken(tiny_config: LlamaConfig) -> None:
    backbone = classifier(tiny_config)
    backbone.score = nn.Sequential()
    backbone.score.add_module("score", nn.Linear(32, 3))
    assert list(attached(backbone, "score").saved_modules()) == ["score"]


def test_the_copy_has_the_dtype_of_the_module(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama.to(torch.bfloat16), "lm_head")
    assert model.adapter_tensors()["lm_head.weight"].dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


def test_dropout_within_is_on_in_training_only(tiny_config: LlamaConfig) -> None:
    backbone = classifier(tiny_config)
    backbone.score = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 3))
    model = attached(backbone, "score")
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_embeddings_tied_to_the_output_are_free_of_it(tiny_config: LlamaConfig) -> None:
    tiny_config.tie_word_embeddings = True
    backbone = LlamaForCausalLM(tiny_config).eval()
    before = logits(backbone)
    model = attached(backbone, "embed_tokens", fill=False)
    trained = model.saved_modules()["model.embed_tokens"].trained
    with torch.no_grad():
        trained.weight[IDS[0, 0]] += 1
    assert backbone.lm_head.weight is backbone.model.embed_tokens.base.weight
    assert backbone.lm_head.weight is not trained.weight
    # The other row does not have that word, and the output has not changed.
    assert torch.equal(logits(model)[1], before[1]) and not torch.equal(logits(model)[0], before[0])


def test_generation_uses_the_copy_and_without_experts_the_backbone(tiny_llama: LlamaForCausalLM) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    frozen = tiny_llama.generate(IDS, **options)
    model = attached(tiny_llama, "lm_head", "embed_tokens")
    words = IDS
    for _ in range(8):
        words = torch.cat([words, logits(model, words)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(IDS, **options, eos_token_id=None), words)
    assert not torch.equal(words, frozen)
    with model.disable_experts():
        assert torch.equal(model.generate(IDS, **options), frozen)


def test_copies_of_a_model_are_apart(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, "lm_head")
    twin = copy.deepcopy(model)
    expected = logits(model)
    with twin.disable_experts():
        assert torch.equal(logits(model), expected)
        assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(twin), expected)
    module = pickle.loads(pickle.dumps(model.saved_modules()["lm_head"]))
    assert torch.equal(module(torch.ones(1, 32)), model.saved_modules()["lm_head"](torch.ones(1, 32)))
    with pytest.raises(AttributeError, match="no_such_thing"):
        module.no_such_thing  # noqa: B018


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_trains_the_copies_and_leaves_the_backbone(tiny_llama: LlamaForCausalLM, checkpointing: bool) -> None:
    frozen = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    model = attached(tiny_llama, "lm_head", "embed_tokens", "0.input_layernorm", fill=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    names = list(model.saved_modules())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = {name: value.detach().clone() for name, value in model.adapter_tensors().items()}
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.adapter_tensors().items() if not torch.equal(value, before[name])}
    assert {f"{name}.weight" for name in names} <= moved
    assert any(name.endswith("lora_B") for name in moved)
    backbone = model.unload()
    assert all(torch.equal(value, frozen[name]) for name, value in backbone.state_dict().items())


def test_gradients_are_the_same_with_checkpointing(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, "0.mlp", "1.input_layernorm", "lm_head").train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        found.append({name: value.grad for name, value in model.adapter_tensors().items() if value.requires_grad})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_head_of_a_classifier_learns(tiny_config: LlamaConfig) -> None:
    model = attached(classifier(tiny_config), "score", fill=False).train()
    labels = torch.tensor([2, 0])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(logits(model.eval()).argmax(-1), labels)
    assert model.saved_modules()["score"].base.weight.grad is None


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"], ["0.mlp", "norm"]])
def test_native_keeps_every_bit_and_loading_says_what_it_replaces(
    tiny_config: LlamaConfig, names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    model = attached(LlamaForCausalLM(tiny_config), *names)
    model.save_pretrained(tmp_path / "native")
    torch.manual_seed(1)
    again = moelora.from_pretrained(tmp_path / "native", LlamaForCausalLM(tiny_config))
    assert torch.equal(logits(again), logits(model))
    ours, theirs = again.adapter_tensors(), model.adapter_tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert f"replaces whole modules of the backbone: {', '.join(model.saved_modules())}" in caplog.text
    again.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / name / "moelora.safetensors") for name in ("native", "again")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_a_mixture_without_such_modules_says_nothing(
    tiny_config: LlamaConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attached(LlamaForCausalLM(tiny_config)).save_pretrained(tmp_path)
    moelora.from_pretrained(tmp_path, LlamaForCausalLM(tiny_config))
    assert "whole modules" not in caplog.text


def test_a_head_for_other_labels_is_refused_and_leaves_the_backbone(tiny_config: LlamaConfig, tmp_path: Path) -> None:
    attached(classifier(tiny_config), "score").save_pretrained(tmp_path)
    tiny_config.num_labels = 5
    backbone = LlamaForSequenceClassification(tiny_config).eval()
    before = logits(backbone)
    with pytest.raises(CheckpointError, match=r"misshapen: score.weight: expected \(5, 32\), found \(3, 32\)"):
        moelora.from_pretrained(tmp_path, backbone)
    assert type(backbone.score) is nn.Linear and torch.equal(logits(backbone), before)


def test_unloading_puts_the_very_modules_back(tiny_llama: LlamaForCausalLM) -> None:
    before, modules = logits(tiny_llama), dict(tiny_llama.named_modules())
    backbone = attached(tiny_llama, "lm_head", "embed_tokens", "1.mlp").unload()
    assert backbone is tiny_llama and dict(backbone.named_modules()) == modules
    assert torch.equal(logits(backbone), before)
    # And another mixture may have the same modules.
    assert not torch.equal(logits(attached(backbone, "lm_head")), before)


# -- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"]])
def test_merging_keeps_the_trained_modules(
    tiny_config: LlamaConfig, tied: bool, names: list[str], tmp_path: Path
) -> None:
    tiny_config.tie_word_embeddings = tied
    backbone = LlamaForCausalLM(tiny_config).eval()
    site = {"target": ["q_proj"], "experts": {"kind": "lora", "num_experts": 1, "r": 2}}
    model = moelora.attach(backbone, {"sites": [site], "modules_to_save": names}).eval()
    changed(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, SavedModule) for module in merged.modules())
    assert (logits(merged) - expected).abs().max() <= 1e-5
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(merged))
    # Where neither end was trained, what was tied still is.
    assert again.config.tie_word_embeddings == (tied and names == ["norm"])


def test_a_classifier_keeps_its_head_when_merged(tiny_config: LlamaConfig, tmp_path: Path) -> None:
    site = {"target": ["q_proj"], "experts": {"kind": "lora", "num_experts": 1, "r": 2}}
    model = moelora.attach(classifier(tiny_config), {"sites": [site], "modules_to_save": ["score"]}).eval()
    changed(model)
    expected, head = logits(model), model.adapter_tensors()["score.weight"].detach().clone()
    merged = model.merge_and_unload()
    assert torch.equal(merged.score.weight, head)
    assert (logits(merged) - expected).abs().max() <= 1e-5
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForSequenceClassification.from_pretrained(tmp_path).eval()), logits(merged))


# -- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "a name that fits nothing": (["head"], "modules_to_save names 'head', which matches no module.*it has: .*lm_head"),
    "a module without parameters": (["rotary_emb"], "'model.rotary_emb', which has no parameters"),
    "a site": (["1.self_attn.q_proj"], "'model.layers.1.self_attn.q_proj' is claimed by sites.0 and modules_to_save"),
    "a module around a site": (["0.self_attn"], r"q_proj' \(sites.0\) lies inside 'model.layers.0.self_attn'"),
    "a module in another": (["mlp", "up_proj"], r"up_proj' \(modules_to_save\) lies inside 'model.layers.0.mlp'"),
    "an expression": (["re:.*"], "modules_to_save.0: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_whole_is_refused_and_leaves_the_backbone(tiny_llama: LlamaForCausalLM, name: str) -> None:
    names, message = REFUSED[name]
    before = dict(tiny_llama.named_modules())
    with pytest.raises(ConfigError, match=message):
        attached(tiny_llama, *names)
    assert dict(tiny_llama.named_modules()) == before
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


def test_a_module_that_sits_at_two_places_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.model.layers[1].input_layernorm = tiny_llama.model.layers[0].input_layernorm
    with pytest.raises(ConfigError, match="are one module, of which only the first"):
        attached(tiny_llama, "0.input_layernorm")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_module_is_refused_and_others_are_not(
    tiny_config: LlamaConfig, quantization: str, tmp_path: Path
) -> None:
    tiny_config.hidden_size, tiny_config.intermediate_size, tiny_config.head_dim = 64, 128, 16
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    backbone, _ = moelora.load_backbone(tmp_path / "base", quantization=quantization, tokenizer=False)
    with pytest.raises(ConfigError, match=r"'model.layers.0.mlp', whose weight is quantised and cannot be trained"):
        attached(backbone, "0.mlp")
    model = attached(backbone, "lm_head")
    expected = logits(model)
    model.save_pretrained(tmp_path / "native")
    again, _ = moelora.load_backbone(tmp_path / "base", quantization=quantization, tokenizer=False)
    assert torch.equal(logits(moelora.from_pretrained(tmp_path / "native", again)), expected)


def test_a_backbone_without_a_head_has_other_modules_to_save(tiny_config: LlamaConfig) -> None:
    backbone = LlamaModel(tiny_config).eval()
    model = attached(backbone, "norm")
    with torch.no_grad():
        output = model(IDS).last_hidden_state
        with model.disable_experts():
            assert not torch.equal(model(IDS).last_hidden_state, output)
