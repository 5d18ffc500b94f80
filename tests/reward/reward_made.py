"""Tiny reward models whose experts, heads and aggregators all do something; importable by child processes too."""

from __future__ import annotations

from typing import Any

import torch
from byte_tokenizer import make_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from moelora.reward.model import RewardModel

CATEGORIES = {"sums": ["right", "short"], "letters": ["right", "clean", "short"]}
TEMPLATE = {"sites": [{"target": ["q_proj", "v_proj"], "experts": {"num_experts": 1, "r": 2, "alpha": 4}}]}


def build_backbone(layers: int = 3) -> LlamaForCausalLM:
    """Always the same weights; a vocabulary of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def build_reward(layers: str | None = None, **options: Any) -> RewardModel:
    """A reward model in evaluation mode; ``options`` are those of its configuration."""
    site = {**TEMPLATE["sites"][0], "layers": layers}
    model = RewardModel.attach(build_backbone(), {"categories": CATEGORIES, **options}, {"sites": [site]})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith(("lora_B", "outer.weight")):
                tensor.normal_(std=0.5)
    model.tokenizer = make_byte_tokenizer()
    return model.eval()


def build_batch(texts: int = 4, width: int = 12, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (B, S) of texts of unlike lengths."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 260, (texts, width), generator=generator)
    mask = torch.zeros_like(ids)
    for row in range(texts):
        mask[row, : width - 2 * row] = 1
    ids = ids * mask
    if left:
        for row in range(texts):
            ids[row], mask[row] = ids[row].roll(2 * row), mask[row].roll(2 * row)
    return ids, mask
