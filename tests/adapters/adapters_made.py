"""What the tests of adapters share: a tiny backbone, two mixtures for it, and how they are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from moelora.mixture import MoELoRAModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
PEFT = FIXTURES / "peft_lora_tiny_llama"
FIRST, SECOND = PEFT / "plain_r4_a8", PEFT / "plain_r4_a8_second"
IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
MIXLORA: dict[str, Any] = {
    "sites": [
        {"target": "mlp", "experts": {"num_experts": 3, "r": 2}, "router": {"kind": "topk", "top_k": 2}},
        {"target": "o_proj", "experts": {"num_experts": 1, "r": 2}},
    ]
}
TOPK: dict[str, Any] = {
    "sites": [{"target": "q_proj", "experts": {"num_experts": 3, "r": 2}, "router": {"kind": "topk", "top_k": 2}}]
}


def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FIXTURES / "tiny_llama_base", dtype=torch.float32).eval()


def randomize(model: MoELoRAModel, name: str | None = None, seed: int = 5) -> MoELoRAModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.adapter_tensors(name).values():
            tensor.normal_(std=0.2, generator=generator)
    return model


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids, use_cache=False).logits
    return result


def values(model: MoELoRAModel, name: str) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.adapter_tensors(name).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def hooks(model: MoELoRAModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
