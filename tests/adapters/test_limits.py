"""Where several adapters cannot be active, and those with a scoring pass, merges, and a quantised backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import FIXTURES, IDS, MIXLORA, PEFT, SECOND, TOPK, base, hooks, logits, randomize, same, values
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora.config import BackboneConfig
from moelora.errors import ConfigError
from moelora.experts import Container
from moelora.merging import merge
from moelora.mixture import MoELoRAModel

ONE = {"num_experts": 1, "r": 2}
TARGET = ["q_proj", "v_proj", "down_proj"]


def lora(target: Any = TARGET, kind: str = "lora", **more: Any) -> dict[str, Any]:
    return {"sites": [{"target": target, "experts": {"kind": kind, **ONE}}], **more}


def xlora(**router: Any) -> dict[str, Any]:
    experts = {"kind": "frozen", "num_experts": 3, "r": 2, "alpha": 4}
    return {"sites": [{"target": TARGET, "experts": experts, "router": {"kind": "xlora", "layerwise": True, **router}}]}


def pair(one: dict[str, Any], other: dict[str, Any], backbone: Any = None) -> MoELoRAModel:
    model = moelora.attach(base() if backbone is None else backbone, one, adapter_name="one").eval()
    model.add_adapter("other", other)
    return randomize(randomize(model, "one"), "other", seed=6)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "two blocks": (MIXLORA, MIXLORA, "'model.layers.0.mlp', and experts of a block are on both sides"),
    "a routed linear in a block": (
        MIXLORA,
        {"sites": [{**TOPK["sites"][0], "target": "up_proj"}]},
        "'model.layers.0.mlp.up_proj' of the latter lies in 'model.layers.0.mlp' of the former, and inside a block",
    ),
    "a block around routed linears": (
        {"sites": [{**TOPK["sites"][0], "target": "up_proj"}]},
        MIXLORA,
        "adapters 'other' and 'one' .* 'model.layers.0.mlp.up_proj' of the latter lies in 'model.layers.0.mlp'",
    ),
    "two doras": (lora(kind="dora"), lora(kind="dora"), "both rescale the output of the frozen linear"),
    "a whole module twice": (
        lora(modules_to_save=["up_proj"]),
        lora(modules_to_save=["up_proj"]),
        "trained whole is in the place of the frozen one",
    ),
    "a site at a whole module": (lora("up_proj"), lora("q_proj", modules_to_save=["up_proj"]), "nothing to add to"),
    "a site in a whole module": (lora("up_proj"), lora("q_proj", modules_to_save=["mlp"]), "in the place of all of it"),
    "a whole module in a block": (MIXLORA, lora("q_proj", modules_to_save=["up_proj"]), "inside a block of experts"),
    "two passes": (xlora(scaling_pass_value=0.5), xlora(), "scaling_pass_value is not 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_whose_sum_has_no_meaning_are_refused(case: str) -> None:
    one, other, words = REFUSED[case]
    model = pair(one, other)
    before, modules, count = logits(model), list(model.named_modules()), hooks(model)
    for names in (["one", "other"], ["other", "one"]):
        with pytest.raises(ConfigError, match="cannot be active together") as caught:
            model.set_adapter(names)
        assert "activate one of the two" in str(caught.value)
        if names == ["one", "other"]:
            caught.match(words)
    assert model.active_adapters == ["one"] and torch.equal(logits(model), before)
    assert list(model.named_modules()) == modules and hooks(model) == count
    model.set_adapter("other")
    assert logits(model).isfinite().all()


def weights(model: MoELoRAModel) -> dict[str, Tensor]:
    with torch.no_grad(), moelora.trace(model) as tape:
        model(IDS, use_cache=False)
    return {name: tape[name][0].weights for name in tape}


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_scoring_pass_sees_no_other_adapter(value: float) -> None:
    model = pair(xlora(scaling_pass_value=value), lora())
    alone = weights(model)
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter(["other", "one"])
    assert same({name.removeprefix("one:"): weight for name, weight in weights(model).items()}, alone)
    with torch.no_grad():
        for name, tensor in model.adapter_tensors("one").items():
            if "lora_B" in name:
                tensor.zero_()
    assert torch.allclose(logits(model), other, atol=1e-6)


def test_adapters_of_different_layouts_have_their_authors_numbers_side_by_side() -> None:
    root = FIXTURES / "xlora_standalone_tiny_llama"
    model = moelora.from_pretrained(root / "depth1_layerwise", base(), adapter_name="xlora")
    model.load_adapter(PEFT / "rslora_r4_a8", "peft")
    wanted = {"xlora": (root, "depth1_layerwise.logits"), "peft": (PEFT, "logits.rslora_r4_a8")}
    alone = {}
    for _ in range(2):
        for name, (folder, key) in wanted.items():
            stored = load_file(folder / "io.safetensors")
            model.set_adapter(name)
            with torch.no_grad():
                found = model(stored["input_ids"], attention_mask=stored["attention_mask"]).logits
            assert (found - stored[key]).abs().max() <= 1e-5
            alone[name] = weights(model)
        model.set_adapter(["peft", "xlora"])
        assert same({name.removeprefix("xlora:"): value for name, value in weights(model).items()}, alone["xlora"])


def test_two_scoring_passes_of_the_bare_backbone_are_one() -> None:
    model = pair(xlora(), xlora(top_k=2))
    alone = {}
    for name in ("one", "other"):
        model.set_adapter(name)
        alone[name] = weights(model)
    model.set_adapter(["one", "other"])
    calls: list[bool] = []
    model.backbone.model.register_forward_pre_hook(lambda *_: calls.append(model.slot.context.scoring_pass))
    found = weights(model)
    assert sorted(calls) == [False, True]
    for name, expected in alone.items():
        mine = {key.partition(":")[2]: value for key, value in found.items() if key.startswith(f"{name}:")}
        assert len({weight.sum().item() for weight in mine.values()}) > 1  # layerwise: each site its own
        assert mine.keys() == expected.keys() and all(torch.equal(mine[key], expected[key]) for key in mine)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))


STATIC = {"kind": "static", "weights": [0.3, 0.9]}
MERGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two loras": (lora(), lora(["q_proj", "k_proj"])),
    "a dora over a mix": (
        {"sites": [{"target": TARGET, "experts": {"num_experts": 2, "r": 2}, "router": STATIC}]},
        lora(kind="dora"),
    ),
    "a lora in a block": (lora(["gate_proj", "down_proj", "o_proj"]), lora("mlp")),
    "a block with one projection": (
        {"sites": [{"target": "mlp", "projections": "up_proj", "experts": ONE}]},
        lora(["gate_proj", "up_proj"]),
    ),
    "whole modules": (lora(modules_to_save=["lm_head"]), lora()),
}


@pytest.mark.parametrize("case", MERGED)
def test_the_active_adapters_are_merged_together(case: str) -> None:
    model = pair(*MERGED[case])
    model.add_adapter("idle", TOPK)
    randomize(model, "idle")
    names = [name for name, _ in base().named_modules()]
    one = logits(model)
    model.set_adapter(["one", "other"])
    expected = logits(model)
    result = merge(model, batches=[{"input_ids": IDS}])
    assert [name for name, _ in result.backbone.named_modules()] == names
    assert not any(isinstance(module, Container) for module in result.backbone.modules())
    assert (logits(result.backbone) - expected).abs().max() <= 1e-5
    assert (one - expected).abs().max() > 1e-2
    assert {name.partition(":")[0] for name in result.sites} == {"one", "other"}
    assert all(
        site.exact and site.output_error is not None and site.output_error < 1e-5 for site in result.sites.values()
    )


def test_a_merge_by_mean_weights_takes_them_with_all_active() -> None:
    model = pair(TOPK, lora())
    model.set_adapter(["one", "other"])
    with pytest.raises(ConfigError, match=r"'one:model\.layers\.0\.self_attn\.q_proj' first, cannot be merged exactly"):
        merge(model)
    expected = logits(model)
    result = merge(model, approximate=True, batches=[{"input_ids": IDS}])
    assert not result.sites["one:model.layers.0.self_attn.q_proj"].exact
    assert result.sites["other:model.layers.0.self_attn.v_proj"].exact
    far, near = (logits(m) - expected for m in (base(), result.backbone))
    assert near.norm() < 0.5 * far.norm()


def test_adapters_on_a_quantised_backbone(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base().save_pretrained(tmp_path / "backbone")

    def backbone() -> LlamaForCausalLM:
        config = BackboneConfig(name=str(tmp_path / "backbone"), quantization="nf4")
        return moelora.load_backbone(config, tokenizer=False)[0]

    bare = logits(backbone())
    model = moelora.from_pretrained(PEFT / "alllinear_r2_a4", backbone(), adapter_name="one")
    one = logits(model)
    model.add_adapter("block", MIXLORA)
    randomize(model, "block")
    model.load_adapter(SECOND, "two")
    model.set_adapter(["one", "two", "block"])
    together, kept = logits(model), values(model, "block")
    assert torch.isfinite(together).all() and (together - one).abs().max() > 1e-2
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(value.grad is not None for name in model.adapters for value in model.adapter_tensors(name).values())
    model.eval()
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    with model.disable_experts():
        assert torch.equal(logits(model), bare)
    model.save_pretrained(tmp_path / "saved", selected_adapters=model.adapters)
    again = moelora.from_pretrained(tmp_path / "saved", backbone(), adapter_name="one", subfolder="one")
    for name in ("two", "block"):
        again.load_adapter(tmp_path / "saved", name, subfolder=name)
    again.set_adapter(["one", "two", "block"])
    assert torch.equal(logits(again), together) and same(values(again, "block"), kept)
    assert torch.equal(logits(again.unload()), bare)


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("mixture", [TOPK | {"modules_to_save": ["embed_tokens"]}, lora("lm_head")])
def test_embeddings_that_an_adapter_has_a_part_at_keep_their_size(active: bool, mixture: dict[str, Any]) -> None:
    model = moelora.attach(base(), TOPK)
    model.add_adapter("words", mixture)
    model.set_adapter("words" if active else "default")
    before = logits(model)
    with pytest.raises(ConfigError, match=r"'words' has a part at .*, which would keep its size: resize .* before"):
        model.resize_token_embeddings(100)
    assert torch.equal(logits(model), before) and model.config.vocab_size == before.shape[-1]
    model.set_adapter("default")
    model.delete_adapter("words")
    model.resize_token_embeddings(100)
    assert logits(model).shape[-1] == 100
