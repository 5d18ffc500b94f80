"""A small mixture with random numbers, and what a linear site adds, written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.experts import LinearContainer

IDS = torch.arange(3, 15).reshape(2, 6)
EVEN = {"kind": "static", "weights": "uniform"}


def mixture(
    backbone: LlamaForCausalLM, experts: dict[str, Any], router: Any = EVEN, **site: Any
) -> moelora.MoELoRAModel:
    """Two experts at the queries and values of every layer, with random numbers."""
    given = {"num_experts": 2, "r": 4, "alpha": 8, **experts}
    model = moelora.attach(
        backbone, {"sites": [{"target": ["q_proj", "v_proj"], "experts": given, "router": router, **site}]}
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.adapter_tensors().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(IDS).logits
    return result


def by_hand(container: LinearContainer, x: Tensor, ranks: list[int], scales: list[float], weights: Tensor) -> Tensor:
    """(..., O) the frozen linear plus each expert's update, one after the other; weights (..., E)."""
    out = container.base(x)
    A, B = container.lora_A.split(ranks), container.lora_B.split(ranks, dim=1)
    for index, scale in enumerate(scales):
        out = out + weights[..., index : index + 1] * scale * (x @ A[index].T @ B[index].T)
    return out
