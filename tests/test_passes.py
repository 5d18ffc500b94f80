"""What surrounds a forward of the backbone: masks, batches and modalities, in towers, stacks and generation."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, PreTrainedModel

import moelora
from moelora.errors import UserError

IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


TWO_KINDS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


def attached(backbone: PreTrainedModel, target: str | list[str], **router: Any) -> moelora.MoELoRAModel:
    experts = {"num_experts": 4, "r": 2}
    model = moelora.attach(backbone, {"sites": [{"target": target, "experts": experts, "router": router}]}).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("kind", ["Gemma2", "Qwen3"])
def test_a_static_cache_with_a_mask_for_each_kind_of_layer_generates_the_same(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    model = attached(getattr(transformers, f"{kind}ForCausalLM")(config), ["q_proj", "down_proj"], kind="topk")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(IDS, **options))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": 4}),
        (
            "Qwen3",
            {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 4},
        ),
        ("Gemma3Text", {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2}),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_known_from_the_mask_of_a_static_cache(kind: str, options: dict[str, Any], attention: str) -> None:
    """That mask has four dimensions; a choice for a sequence and the counts must not see the padding."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    backbone = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    backbone.set_attn_implementation(attention)
    router = {"kind": "remix", "route_level": "sequence", "top_k": 1}
    model = attached(backbone, ["q_proj", "down_proj"], **router)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    chosen = []
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with moelora.trace(model) as tape:
            model.generate(IDS, **options, **cache)
        for records in tape.records.values():
            real = [record.mask for record in records]
            assert real[0] is not None and torch.equal(real[0], mask.bool())
            assert all(later is not None and later.all() for later in real[1:])
        chosen.append([record.sequence_indices for records in tape.records.values() for record in records])
    assert all(torch.equal(one, two) for one, two in zip(*chosen, strict=True))


def test_a_choice_for_a_sequence_is_not_made_from_a_part_of_the_prompt(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, "q_proj", kind="remix", route_level="sequence")
    with pytest.raises(UserError, match="chooses from a whole prompt, of which prefill_chunk_size"):
        model.generate(IDS, max_new_tokens=2, prefill_chunk_size=3)
    assert model.generate(IDS, max_new_tokens=2, min_new_tokens=2).shape == (2, 10)


def test_an_interrupt_leaves_nothing_behind(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, "q_proj", kind="mask", by="task")
    hooks = [len(m._forward_hooks) for m in model.modules()]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for call in (model, partial(model.generate, max_new_tokens=2)):
        handle = tiny_llama.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(IDS, task_ids=torch.tensor([0, 1]))
        handle.remove()
        assert model._passes.contexts == [] and model._passes._inside == {}
        assert model.slot.context.task_ids is None and model.slot.listeners == []
        assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_a_second_thread_is_refused_and_the_first_is_not_disturbed(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, "q_proj", kind="mask", by="task")
    first, second = torch.tensor([0, 0]), torch.tensor([1, 1])
    with torch.no_grad():
        expected = model(IDS, task_ids=first).logits
    inside, done = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def wait(*_: Any) -> None:
        inside.set()
        assert done.wait(20)

    def run() -> None:
        with torch.no_grad():
            found.append(model(IDS, task_ids=first).logits)

    handle = tiny_llama.model.embed_tokens.register_forward_hook(wait)
    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(20)
    try:
        for call in (model, model.generate):
            with pytest.raises(UserError, match="running in another thread"):
                call(IDS, task_ids=second)
    finally:
        done.set()
        thread.join()
        handle.remove()
    assert torch.equal(found[0], expected)
    with torch.no_grad():
        assert not torch.equal(model(IDS, task_ids=second).logits, expected)


def test_a_sequence_may_have_several_images() -> None:
    """The vision tower takes pixels by position, and as many rows of them as there are images."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=60, vision_feature_layer=-1
    )
    model = attached(LlavaForConditionalGeneration(config), "re:model.language_model.*q_proj", kind="mask", by="task")
    ids = torch.full((2, 12), 5)
    ids[:, :4], ids[0, 4:8] = 60, 60  # four patches for each image
    known = {"task_ids": torch.tensor([1, 0]), "modality_mask": (ids == 60).long()}
    with torch.no_grad(), moelora.trace(model) as tape:
        model(ids, pixel_values=torch.randn(3, 3, 8, 8), attention_mask=torch.ones_like(ids), **known)
    chosen = next(iter(tape.records.values()))[0].indices
    assert chosen is not None and chosen[:, 0, 0].tolist() == [1, 0]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("cache", [True, False])
def test_generated_tokens_are_text_however_short_the_prompt(
    tiny_llama: LlamaForCausalLM, length: int, cache: bool
) -> None:
    model = attached(tiny_llama, "q_proj", kind="mask", by="modality")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": cache}
    with moelora.trace(model) as tape:
        model.generate(IDS[:1, :length], modality_mask=torch.ones(1, length, dtype=torch.long), **options)
    last: list[Tensor | None] = [record.indices for record in next(iter(tape.records.values()))]
    assert [int(indices[0, -1, 0]) for indices in last if indices is not None] == [1, 0, 0, 0]


def test_checkpointed_segments_within_a_checkpointed_segment(tiny_llama: LlamaForCausalLM) -> None:
    """The jitter comes from a generator that checkpointing does not rewind, so decisions have to be replayed."""
    model = attached(tiny_llama, ["q_proj", "down_proj"], kind="topk", jitter=0.5).train()
    backbone, contexts = model.backbone, model.slot.checkpoint_contexts

    def gradients(nested: bool) -> list[Tensor]:
        model.zero_grad()
        with model.routing_context(generator=torch.Generator().manual_seed(2)), moelora.trace(model) as tape:
            if nested:
                logits = checkpoint(lambda ids: backbone(ids).logits, IDS, use_reentrant=False, context_fn=contexts)
            else:
                logits = backbone(IDS).logits
            loss = logits.square().mean()
            loss.backward()
        assert all(len(records) == 1 for records in tape.records.values())
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(nested=False)
    model.gradient_checkpointing_enable()
    for one, two in zip(plain, gradients(nested=True), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"task_ids": [0, 1]}, "task_ids is a list: give a tensor"),
        ({"task_ids": torch.tensor(1)}, r"task_ids has the shape \(\) but the batch has 2"),
        ({"task_ids": torch.tensor([0, 1, 2])}, r"task_ids has the shape \(3,\) but the batch has 2"),
        ({"modality_mask": torch.tensor([0, 1])}, r"modality_mask has the shape \(2,\).*a modality for each token"),
    ],
)
def test_what_does_not_fit_the_batch_is_named(tiny_llama: LlamaForCausalLM, known: dict[str, Any], words: str) -> None:
    model = attached(tiny_llama, "q_proj", kind="topk")
    with pytest.raises(UserError, match=words):
        model(IDS, **known)
    assert model._passes.contexts == []


def test_logits_of_some_positions_are_one_product(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, "q_proj", kind="topk", top_k=1)
    ids = torch.arange(12).view(2, 6) + 1
    flat: list[bool] = []
    tiny_llama.lm_head.register_forward_hook(lambda module, args, output: flat.append(args[0].is_contiguous()))
    kept = model(ids, logits_to_keep=2).logits
    whole = model(ids).logits
    torch.testing.assert_close(kept, whole[:, -2:], atol=1e-6, rtol=0)
    assert flat == [True, True] and not tiny_llama.lm_head._forward_pre_hooks
