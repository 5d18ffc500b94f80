"""Adapters to merge: random ones, and those of PEFT's fixtures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from moelora.checkpoints import Architecture
from moelora.composition import Adapter
from moelora.composition.adapter import Factors
from moelora.config import BackboneConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = FIXTURES / "peft_lora_tiny_llama"
IO = load_file(ROOT / "io.safetensors")
WEIGHTED = load_file(ROOT / "weighted_adapter_io.safetensors")


def random_adapter(seed: int, ranks: Mapping[str, int], scale: float = 1.0, width: int = 12) -> Adapter:
    """(r, width) and (width - 2, r) normal factors at each module."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        path: Factors(
            torch.randn(rank, width, generator=generator), torch.randn(width - 2, rank, generator=generator), scale
        )
        for path, rank in ranks.items()
    }
    return adapter_of(factors, f"random{seed}")


def adapter_of(factors: Mapping[str, Factors], name: str = "made", **architecture: int) -> Adapter:
    return Adapter(name, factors, BackboneConfig(name="tiny"), Architecture.parse(architecture))


def update(adapter: Adapter, path: str) -> Tensor:
    """(O, D) float64."""
    factors = adapter.factors[path]
    return factors.scale * factors.B.double() @ factors.A.double()


def total(adapters: list[Adapter], weights: list[float], path: str) -> Tensor:
    """(O, D) float64: the weighted sum of what the adapters have at a module."""
    parts = [w * update(a, path) for a, w in zip(adapters, weights, strict=True) if path in a.factors]
    return torch.stack(parts).sum(0)


def fixture(name: str, scale: float) -> Adapter:
    """One of PEFT's adapters; read by hand, so that these tests stand apart from our reader."""
    tensors = load_file(ROOT / name / "adapter_model.safetensors")
    factors = {}
    for key, value in tensors.items():
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            factors[path] = Factors(value, tensors[key.replace("lora_A", "lora_B")], scale)
    return adapter_of(factors, name)


def pair() -> list[Adapter]:
    """The two adapters of ``weighted_adapter_io.safetensors``."""
    return [fixture("plain_r4_a8", 2.0), fixture("plain_r4_a8_second", 2.0)]


@torch.no_grad()
def logits_of(adapter: Adapter) -> Tensor:
    """What the fixture's backbone says with the adapter in its weights."""
    model = LlamaForCausalLM.from_pretrained(FIXTURES / "tiny_llama_base", dtype=torch.float32).eval()
    for path in adapter.factors:
        model.get_submodule(path).weight += update(adapter, path).float()
    result: Tensor = model(IO["input_ids"], attention_mask=IO["attention_mask"]).logits
    return result
