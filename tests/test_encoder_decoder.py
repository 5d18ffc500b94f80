"""Encoder-decoders: cross-attention reads the encoder's tokens, which have a mask and modalities of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import moelora

IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, 5:] = 0
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
BART = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()} | {"d_model": 32}
WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# Backbone: its options, the names of its keys' and queries' linears, and how the paths of cross-attention read.
BACKBONES = {"T5": (T5, ["k", "q"], "EncDecAttention"), "Bart": (BART, ["k_proj", "q_proj"], "encoder_attn")}
WHISPER = {**BART, "max_source_positions": 20, "num_mel_bins": 8, "begin_suppress_tokens": None}


def backbone_of(kind: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**WORDS, **options)
    model: PreTrainedModel = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    return model.eval()


def attached(name: str, targets: list[str], **router: Any) -> moelora.MoELoRAModel:
    options = BACKBONES[name][0] if name in BACKBONES else WHISPER
    site = {"target": targets, "experts": {"num_experts": 4, "r": 2}, "router": router}
    model = moelora.attach(backbone_of(name, options), {"sites": [site]}).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.3, generator=generator)
    return model


def masks_of(tape: moelora.Tape, part: str) -> list[Tensor | None]:
    return [record.mask for name in tape if part in name for record in tape[name]]


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("length", [8, 6])
def test_cross_attention_leaves_out_the_padding_of_the_encoder(kind: str, length: int) -> None:
    """With as many words in the decoder its own mask fits the shape, and must not be taken."""
    _, targets, cross = BACKBONES[kind]
    model = attached(kind, targets, kind="topk")
    written = torch.ones(2, length, dtype=torch.long)
    written[1, 2:] = 0
    inputs = {"decoder_input_ids": IDS[:, :length], "decoder_attention_mask": written}
    with torch.no_grad(), moelora.trace(model) as tape:
        model(IDS, attention_mask=MASK, **inputs)
    for name in tape:
        expected = MASK if "encoder." in name or (cross in name and ".k" in name) else written
        mask = tape[name][0].mask
        assert mask is not None and torch.equal(mask, expected.bool()), name
    with torch.no_grad(), moelora.trace(model) as tape:
        model(IDS, decoder_input_ids=IDS[:, :length], decoder_attention_mask=written)
    assert all(mask is None for name in tape if ".k" in name for mask in masks_of(tape, name) if cross in name)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_counts_no_padding_in_cross_attention(beams: int) -> None:
    model = attached("T5", ["k"], kind="topk")
    with moelora.trace(model) as tape:
        model.generate(IDS, attention_mask=MASK, num_beams=beams, max_new_tokens=3, min_new_tokens=3)
    masks = masks_of(tape, "EncDecAttention")
    assert len(masks) == 2, "one forward for each of two layers: later ones find keys in the cache"
    for mask in masks:
        assert mask is not None and torch.equal(mask, MASK.bool().repeat_interleave(beams, 0))


def test_sounds_have_no_mask_and_take_none_from_the_words() -> None:
    model = attached("Whisper", ["k_proj", "q_proj"], kind="topk")
    length = 20  # as many words as the encoder gives positions
    words = torch.randint(3, 64, (2, length))
    mask = torch.ones_like(words)
    mask[1, 4:] = 0
    with torch.no_grad(), moelora.trace(model) as tape:
        model(input_features=torch.randn(2, 8, 40), decoder_input_ids=words, decoder_attention_mask=mask)
    for name in tape:
        found = tape[name][0].mask
        if "encoder_attn.k_proj" in name or "model.encoder" in name:
            assert found is None, name
        else:
            assert found is not None and torch.equal(found, mask.bool()), name


def test_a_recomputation_pools_the_encoders_tokens_alike() -> None:
    """A choice for a sequence is a mean over its real tokens, in the recomputation too."""
    model = attached("T5", ["k"], kind="remix", route_level="sequence", top_k=1).train()
    written = torch.ones_like(IDS)
    written[1, 2:] = 0
    known = {"attention_mask": MASK, "decoder_input_ids": IDS, "decoder_attention_mask": written}

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        with model.routing_context(selection_seeds=(1,)), moelora.trace(model) as tape:
            logits = model(IDS, **known).logits
        chances = [record.log_prob.sum() for name in tape for record in tape[name] if record.log_prob is not None]
        (logits.square().mean() + torch.stack(chances).sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    assert len(plain) == len(recomputed) > 0
    for one, two in zip(plain, recomputed, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("cache", [True, False])
def test_what_the_decoder_writes_is_text_and_what_it_reads_has_the_encoders_modalities(kind: str, cache: bool) -> None:
    _, targets, cross = BACKBONES[kind]
    model = attached(kind, targets, kind="mask", by="modality")
    modality = (torch.arange(8) < 4).long().expand(2, -1)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 2, "use_cache": cache}
    with moelora.trace(model) as tape:
        model.generate(IDS, attention_mask=MASK, modality_mask=modality, **options)
    for name in tape:
        for record in tape[name]:
            assert record.indices is not None
            chosen = record.indices[..., 0]
            read = "encoder." in name or (cross in name and ".k" in name)
            assert torch.equal(chosen, modality[:1].expand_as(chosen) if read else torch.zeros_like(chosen)), name


def test_a_full_cache_of_cross_attention_is_no_reason_to_refuse() -> None:
    model = attached("Bart", ["q_proj", "k_proj", "v_proj"], kind="topk")
    with torch.no_grad():
        first = backbone_of("Bart", BART)(IDS, decoder_input_ids=IDS[:, :1], use_cache=True)
        states = (first.encoder_last_hidden_state,)
        model(encoder_outputs=states, decoder_input_ids=IDS[:, 1:2], past_key_values=first.past_key_values)
        assert len(model._passes.watch._unseen[False]) == 18, "nothing was concluded"
        model(IDS, decoder_input_ids=IDS)
    assert model._passes.watch._unseen[False] == set()
