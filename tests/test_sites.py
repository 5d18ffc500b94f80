"""Sites on every kind of backbone: which linears carry experts, and what is said of those that cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import moelora
from moelora.backbone import load_backbone
from moelora.errors import ConfigError
from moelora.experts import LinearContainer
from moelora.routing import SiteInfo

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WORDS: dict[str, Any] = {**SIZES, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = {**WORDS, "num_key_value_heads": 2}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
SSM: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "state_size": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPARSE: dict[str, Any] = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
QWEN3_MOE: dict[str, Any] = {**SPARSE, "moe_intermediate_size": 16, "head_dim": 8}
IMAGES: dict[str, Any] = {**SIZES, "image_size": 8, "patch_size": 4}
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    **{
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    },
}


def made(kind: str, options: dict[str, Any], cls: str = "ForCausalLM", config: str = "Config") -> PreTrainedModel:
    model: type[PreTrainedModel] = getattr(hf, kind + cls)
    return model(getattr(hf, kind + config)(**options)).eval()


def site(target: str | list[str], router: str = "topk") -> dict[str, Any]:
    experts = {"kind": "lora", "num_experts": 3, "r": 2, "alpha": 4}
    return {"target": target, "experts": experts, "router": {"kind": router, "init_std": 0.5}}


def attached(backbone: PreTrainedModel, *targets: str | list[str]) -> moelora.MoELoRAModel:
    return moelora.attach(backbone, {"sites": [site(target) for target in targets]}).eval()


def filled(model: moelora.MoELoRAModel) -> moelora.MoELoRAModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.3, generator=generator)
    return model


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 64, (2, 7), generator=generator)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    if model.config.model_type == "clip":
        return {"input_ids": ids, "pixel_values": images, "attention_mask": torch.ones_like(ids)}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": images}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else inputs


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    names = ("logits", "logits_per_image", "last_hidden_state")
    value: Tensor = next(out[name] for name in names if out.get(name) is not None)
    return value


CLIP: dict[str, Any] = {"text_config": WORDS, "vision_config": IMAGES, "projection_dim": 16}

# Backbone: how to make it, what to target, and how many sites that is.
BACKBONES: dict[str, tuple[Callable[[], PreTrainedModel], list[str], int]] = {
    "gpt2 linears (Conv1D)": (lambda: made("GPT2", GPT2, cls="LMHeadModel"), ["c_attn", "c_fc", "mlp.c_proj"], 6),
    "phi3 fused linears": (lambda: made("Phi3", GROUPED), ["qkv_proj", "gate_up_proj", "down_proj"], 6),
    "phi3 fused block": (lambda: made("Phi3", GROUPED), ["qkv_proj", "mlp"], 4),
    "mamba": (lambda: made("Mamba", SSM), ["in_proj"], 2),
    "mamba, unfused": (lambda: made("Mamba", SSM), ["in_proj", "x_proj", "out_proj"], 6),
    "falcon mamba": (lambda: made("FalconMamba", SSM), ["in_proj"], 2),
    "mixtral attention": (lambda: made("Mixtral", SPARSE), ["q_proj", "v_proj"], 4),
    "olmoe attention": (lambda: made("Olmoe", SPARSE), ["q_proj", "o_proj"], 4),
    "qwen3-moe attention": (lambda: made("Qwen3Moe", QWEN3_MOE), ["q_proj", "o_proj"], 4),
    "qwen2-moe shared expert": (
        lambda: made("Qwen2Moe", {**SPARSE, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}),
        ["shared_expert", "q_proj"],
        4,
    ),
    "vit linears": (lambda: made("ViT", IMAGES, cls="Model"), ["q_proj", "fc1", "fc2"], 6),
    "vit blocks": (lambda: made("ViT", IMAGES, cls="Model"), ["mlp"], 2),
    "vit classifier": (lambda: made("ViT", IMAGES, cls="ForImageClassification"), ["mlp"], 2),
    "clip, both towers": (lambda: made("CLIP", CLIP, cls="Model"), ["q_proj", "v_proj", "mlp"], 12),
    "t5": (lambda: made("T5", T5, cls="ForConditionalGeneration"), ["q", "v", "DenseReluDense"], 16),
    "bart": (lambda: made("Bart", BART, cls="ForConditionalGeneration"), ["q_proj", "v_proj", "fc1"], 16),
    "bert": (lambda: made("Bert", WORDS, cls="Model"), ["query", "value", "intermediate.dense"], 6),
    "opt": (lambda: made("OPT", {**WORDS, "ffn_dim": 48, "word_embed_proj_dim": 32}), ["q_proj", "fc1", "fc2"], 6),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_experts_start_as_the_backbone_then_change_and_train(name: str) -> None:
    make, targets, count = BACKBONES[name]
    backbone = make().requires_grad_(False)  # some backbones compute otherwise, by a rounding, where weights need none
    inputs = inputs_of(backbone)
    before = answer(backbone, inputs).detach()
    model = attached(backbone, targets)
    assert len(model.containers()) == count
    assert torch.equal(answer(model, inputs), before)
    filled(model)
    after = answer(model, inputs)
    assert (after - before).abs().max() > 1e-3
    after.square().mean().backward()
    for path, tensor in model.adapter_tensors().items():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), path
        assert "lora" not in path or tensor.grad.any(), path
    assert all(p.grad is None for n, p in model.backbone.named_parameters() if not p.requires_grad), "frozen"


@pytest.mark.parametrize("name", BACKBONES)
def test_the_named_forward_of_training_runs(name: str) -> None:
    make, targets, _ = BACKBONES[name]
    model = filled(attached(make(), targets)).train()
    answer(model, inputs_of(model.backbone)).square().mean().backward()


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
def test_a_state_space_mixer_generates_with_its_cache_as_without(kind: str) -> None:
    model = filled(attached(made(kind, SSM), "in_proj"))
    calls: list[str] = []
    for name, container in model.containers().items():
        container.register_forward_hook(lambda *_, name=name: calls.append(name))
    ids = torch.randint(3, 64, (2, 5))
    model(ids)
    assert sorted(calls) == sorted(model.containers())
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    with model.disable_experts():
        assert not torch.equal(with_cache, model.generate(ids, **options))


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
@pytest.mark.parametrize("training", [False, True])
def test_a_projection_that_is_never_called_is_refused(kind: str, training: bool) -> None:
    model = attached(made(kind, SSM), ["in_proj", "dt_proj"]).train(training)
    ids = torch.randint(3, 64, (2, 5))
    words = rf"2 sites, 'backbone.layers.0.mixer.dt_proj' first, would do nothing.*{kind}Mixer .*target in_proj"
    for _ in range(2):
        with pytest.raises(ConfigError, match=words):
            model(ids)
    assert not model._passes.contexts and not any(m._forward_hooks for m in model.containers().values())
    backbone = model.unload()
    attached(backbone, "in_proj")(ids)


def test_a_fused_kernel_that_trains_past_a_projection_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference x_proj is called, so only the first forward of training can tell."""
    from transformers.models.mamba import modeling_mamba

    model = attached(made("Mamba", SSM), ["in_proj", "x_proj"])
    ids = torch.randint(3, 64, (2, 5))
    model(ids)
    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", lambda xz, *_, **__: xz.sum(1)[..., None].expand(-1, -1, 32))
    with pytest.raises(ConfigError, match=r"2 sites, 'backbone.layers.0.mixer.x_proj' first.*in training"):
        model.train()(ids)


class Skipping(nn.Module):
    """A decoder layer that may be left out, as layerdrop does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.skip = True

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states if self.skip else self.layer(hidden_states, **kwargs)


def test_layers_that_are_skipped_on_purpose_are_not_refused(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.model.layers[1] = Skipping(tiny_llama.model.layers[1])
    model = filled(attached(tiny_llama, "q_proj"))
    ids = torch.randint(3, 64, (2, 5))
    first = model(ids).logits
    tiny_llama.model.layers[1].skip = False
    assert not torch.equal(model(ids).logits, first)
    assert not any(model._passes.watch._unseen.values())


def test_the_watch_leaves_no_hook_and_looks_once_in_each_mode(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, "q_proj", "mlp")
    ids = torch.randint(3, 64, (2, 5))
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(IndexError):
        model(ids + 1000)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    for training in (True, False):
        model.train(training)(ids)
        assert model._passes.watch._unseen[training] == set()
        assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_generation_of_an_encoder_decoder_is_no_reason_to_refuse() -> None:
    """generate runs the encoder alone, and cross-attention with a cache does not call its keys and values again."""
    model = filled(attached(made("T5", T5, cls="ForConditionalGeneration"), ["q", "k", "v", "o"]))
    ids = torch.randint(3, 64, (2, 5))
    options = {"max_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    assert model._passes.watch._unseen[False] == set()


def test_layers_of_encoder_and_decoder_share_no_router() -> None:
    backbone = made("T5", T5, cls="ForConditionalGeneration")
    model = moelora.attach(
        backbone,
        {"sites": [{"target": "q", "experts": {"num_experts": 2}, "router": {"kind": "topk", "share": "layer"}}]},
    )
    routers: dict[str, set[int]] = {}
    for name, container in model.containers().items():
        routers.setdefault(".".join(name.split(".")[:3]), set()).add(id(container.router))
    assert all(len(found) == 1 for found in routers.values())
    assert len(set().union(*routers.values())) == len(routers) == 2 * len(backbone.encoder.block)


def test_the_text_mask_is_not_taken_for_the_images() -> None:
    """A tower of images with as many patches as there are words would have its patches masked as padding."""
    model = attached(made("CLIP", CLIP, cls="Model"), "q_proj")
    inputs = inputs_of(model.backbone)
    length = 5  # as many as the vision tower has: four patches and one class token
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    masks: dict[str, Tensor | None] = {}

    def listener(info: SiteInfo, record: Any) -> None:
        assert record.weights.shape[:2] == (2, length)
        masks[info.name] = record.mask

    with model.slot.using(listener=listener), torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :length], attention_mask=mask, pixel_values=inputs["pixel_values"])
    assert len(masks) == 4
    for name, found in masks.items():
        assert found is None if name.startswith("vision") else torch.equal(found, mask.bool()), name


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_a_classification_head_stays_frozen_and_the_task_loss_trains_the_experts(kind: str) -> None:
    options = {**(GROUPED if kind == "Llama" else WORDS), "num_labels": 3}
    model = filled(
        attached(made(kind, options, cls="ForSequenceClassification"), ["q_proj"] if kind == "Llama" else ["query"])
    )
    head = model.backbone.score if kind == "Llama" else model.backbone.classifier
    ids = torch.randint(3, 64, (4, 6))
    labels = torch.tensor([0, 1, 2, 0])
    out = model(ids, attention_mask=torch.ones_like(ids), labels=labels)
    assert out.logits.shape == (4, 3)
    assert out.task_loss.item() == pytest.approx(nn.functional.cross_entropy(out.logits, labels).item(), rel=1e-5)
    expected = out.task_loss + 0.01 * out.aux_losses["load_balance"]
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    out.loss.backward()
    assert not any(p.requires_grad for p in head.parameters())
    assert all(t.grad is not None and t.grad.any() for t in model.adapter_tensors().values())


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("mlp", "holds the weights of experts of its own in one tensor, experts.gate_up_proj of the shape"),
        ("experts", "holds the weights of experts of its own in one tensor, gate_up_proj of the shape"),
        ("gate_up_proj", r"names model.layers.0.mlp.experts.gate_up_proj, a tensor of the shape \(4, .*q_proj"),
        ("gate", "neither a linear nor an FFN block"),
    ],
)
@pytest.mark.parametrize("kind", ["Mixtral", "Olmoe", "Qwen3Moe"])
def test_fused_experts_of_a_sparse_backbone_are_refused_with_the_reason(kind: str, target: str, words: str) -> None:
    backbone = made(kind, QWEN3_MOE if kind == "Qwen3Moe" else SPARSE)
    names = [name for name, _ in backbone.named_modules()]
    with pytest.raises(ConfigError, match=words):
        attached(backbone, target)
    assert [name for name, _ in backbone.named_modules()] == names


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_quantised_linears_carry_every_kind(tmp_path: Any, quantization: str, kind: str) -> None:
    made("Llama", {**GROUPED, "hidden_size": 64, "intermediate_size": 128}).save_pretrained(tmp_path)
    backbone, _ = load_backbone(tmp_path, quantization=quantization, tokenizer=False)
    ids = torch.randint(3, 64, (2, 5))
    before = backbone(ids).logits
    sites = [{**site(["q_proj", "down_proj"]), "experts": {"kind": kind, "num_experts": 3, "r": 2}}]
    model = moelora.attach(backbone, {"sites": sites}).eval()
    names = {type(c.base).__name__ for c in model.containers().values()}
    assert names == {"Linear4bit" if quantization == "nf4" else "Linear8bitLt"}
    assert all(isinstance(c, LinearContainer) for c in model.containers().values())
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        for path, tensor in model.adapter_tensors().items():
            if path.endswith("lora_B"):
                tensor.normal_(std=0.2)
    out = model(ids, labels=ids)
    assert not torch.equal(out.logits, before)
    out.loss.backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in model.adapter_tensors().values())


def test_several_backbones_of_one_process_do_not_mix(tiny_llama: LlamaForCausalLM) -> None:
    one, two = (filled(attached(copy.deepcopy(tiny_llama), target)) for target in ("q_proj", "mlp"))
    ids = torch.randint(3, 64, (2, 5))
    first = one(ids).logits
    two(ids)
    assert torch.equal(one(ids).logits, first)
