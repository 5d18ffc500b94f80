"""A tiny Phi-4-multimodal, inputs of every mode for it, and what transformers makes of them with an adapter of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

IMAGE, AUDIO = 60, 61
TARGETS = r"model.layers.\d+.((self_attn.(qkv|o)_proj)|(mlp.(gate_up|down)_proj))"
CHOSEN = [None, "vision", "speech", "vision"]  # by mode: text, images, speech, both
OPTIONS = {"vision": {"r": 4, "lora_alpha": 8}, "speech": {"r": 3, "lora_alpha": 9}}


def tiny_phi4() -> Phi4MultimodalForCausalLM:
    torch.manual_seed(3)
    audio = {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16}
    config = Phi4MultimodalConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 2,
            "crop_size": 8,
            "image_token_id": IMAGE,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "input_size": 8,
            "bias_max_distance": 8,
            "audio_token_id": AUDIO,
            **audio,
        },
    )
    model = Phi4MultimodalForCausalLM(config)
    with torch.no_grad():  # those that start at zero would hide their inputs
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.add_(0.1)
    return model.eval()


def image_batch() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "image_pixel_values": torch.randn(1, 2, 3, 8, 8),
        "image_sizes": torch.tensor([[8, 8]]),
        "image_attention_mask": torch.ones(1, 2, 4, 4),
    }


def audio_batch() -> dict[str, Any]:
    torch.manual_seed(2)
    return {"audio_input_features": torch.randn(1, 16, 8), "audio_embed_sizes": torch.tensor([2])}


def batch(mode: int) -> dict[str, Any]:
    """One prompt: text, with an image, with speech, or with both."""
    parts = [7, 8, *[IMAGE] * 13 * (mode & 1), 9, *[AUDIO] * (mode & 2), 10, 11]
    return {
        "input_ids": torch.tensor([parts]),
        **(image_batch() if mode & 1 else {}),
        **(audio_batch() if mode & 2 else {}),
    }


def theirs(folder: Path, mode: int) -> PeftModel:
    """transformers' model in PEFT, with the adapter that the published rule chooses."""
    model = PeftModel.from_pretrained(tiny_phi4(), folder / "vision-lora", adapter_name="vision")
    model.load_adapter(folder / "speech-lora", adapter_name="speech")
    if CHOSEN[mode] is None:
        model.base_model.disable_adapter_layers()
    else:
        model.set_adapter(CHOSEN[mode])
    return model.eval()


def logits(model: Any, inputs: dict[str, Any], **fields: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs, **fields).logits
    return result
