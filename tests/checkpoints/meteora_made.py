"""A Llama with adapters as the authors of MeteoRA publish it, and its logits by their formula, without moelora."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

PREFIX = "base_model.model."
EXPERTS, RANK, ALPHA = 5, 4, 8
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B",
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "alpha_pattern": {},
    "modules_to_save": None,
}


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")


def published(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The state dict of the wrapped model, with random adapters and gates."""
    state = {f"{PREFIX}{name}": value.clone() for name, value in model.state_dict().items()}
    for name, linear in linears(model):
        key = f"{PREFIX}{name}."
        state[f"{key}base_layer.weight"] = state.pop(f"{key}weight")
        state[f"{key}moe_gate.weight"] = torch.randn(EXPERTS, linear.in_features)
        state[f"{key}lora_A.weight"] = torch.randn(EXPERTS * RANK, linear.in_features) * 0.2
        state[f"{key}lora_B.weight"] = torch.randn(linear.out_features, EXPERTS * RANK) * 0.2
    return state


def write(folder: Path, state: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def reference(
    model: LlamaForCausalLM, state: dict[str, Tensor], top_k: int, T: float, scale: float, ids: Tensor
) -> Tensor:
    """Logits by the formula of the paper, expert after expert, without anything of moelora."""

    def adapted(name: str, base: Tensor) -> Any:
        gate, A, B = (state[f"{PREFIX}{name}.{part}.weight"] for part in ("moe_gate", "lora_A", "lora_B"))

        def forward(x: Tensor) -> Tensor:
            chosen, experts = (x @ gate.T).topk(top_k, dim=-1)
            weights = (chosen / T).softmax(dim=-1)
            out = x @ base.T
            for expert in range(EXPERTS):
                part = slice(expert * RANK, (expert + 1) * RANK)
                weight = (weights * (experts == expert)).sum(-1, keepdim=True)
                out = out + weight * scale * (x @ A[part].T @ B[:, part].T)
            return out

        return forward

    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    for name, linear in linears(plain):
        linear.forward = adapted(name, linear.weight)  # type: ignore[method-assign]
    with torch.no_grad():
        return plain.eval()(ids).logits
