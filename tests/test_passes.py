"""What surrounds a forward of the backbone: masks, batches and modalities, in towers, stacks and generation."""

from __future__ import annotations

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
