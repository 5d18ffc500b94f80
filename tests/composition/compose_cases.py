"""Adapters that PEFT wrote, read here by hand, and the tiny Llama that they were trained on."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from moelora.checkpoints import Architecture
from moelora.composition.adapter import Adapter, Factors
from moelora.config import BackboneConfig

# For the modules of cases beside the tests.
sys.path.insert(0, str(Path(__file__).parent))

FIXTURES = Path(__file__).parents[1] / "fixtures"
LORA = FIXTURES / "peft_lora_tiny_llama"
ARROW = FIXTURES / "peft_arrow_tiny_llama"
BASE = FIXTURES / "tiny_llama_base"
PREFIX, SUFFIX = "base_model.model.", ".lora_A.weight"


def by_hand(folder: Path, name: str | None = None, backbone: str = "tiny") -> Adapter:
    """A PEFT folder, without the library's own reader."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = {}
    for key, A in tensors.items():
        if key.endswith(SUFFIX):
            module = key.removeprefix(PREFIX).removesuffix(SUFFIX)
            alpha = next((v for k, v in config["alpha_pattern"].items() if module.endswith(k)), config["lora_alpha"])
            scale = alpha / (math.sqrt(len(A)) if config["use_rslora"] else len(A))
            factors[module] = Factors(A, tensors[key.replace("lora_A", "lora_B")], scale)
    return Adapter(name or folder.name, factors, BackboneConfig(name=backbone, quantization=None), Architecture())


def tiny_backbone() -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return model.eval()


def logits(model: Any, **fields: Any) -> Tensor:
    """(B, S, V) on the inputs of the fixtures."""
    inputs = load_file(LORA / "io.safetensors")
    with torch.no_grad():
        result: Tensor = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], **fields).logits
    return result


def digest(adapter: Adapter) -> str:
    """Of all that an adapter holds."""
    total = hashlib.sha256()
    for module, factors in adapter.factors.items():
        total.update(module.encode() + factors.A.numpy().tobytes() + factors.B.numpy().tobytes())
        total.update(repr(factors.scale).encode())
    return total.hexdigest()


def files_digest(folder: Path) -> str:
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
    ).hexdigest()


WIDTHS = {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (64, 32)}


def random_lora(name: str, seed: int, modules: dict[str, int], scale: float = 2.0) -> Adapter:
    """An adapter for both layers of the tiny Llama, of the given rank at each module, that changes what it says."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(2):
        for ending, rank in modules.items():
            owner = "mlp" if ending == "down_proj" else "self_attn"
            wide, tall = WIDTHS[ending]
            A, B = (torch.randn(shape, generator=generator) / 4 for shape in ((rank, wide), (tall, rank)))
            factors[f"model.layers.{layer}.{owner}.{ending}"] = Factors(A, B, scale)
    return Adapter(name, factors, BackboneConfig(name="tiny", quantization=None), Architecture())
