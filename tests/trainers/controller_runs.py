"""A tiny mixture whose routers have controllers, and a run of it by several processes; importable by children."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tiny_runs import Rows, build_trainer
from transformers import LlamaConfig, LlamaForCausalLM

import moelora

RATE = 0.05
SITES: list[dict[str, Any]] = [
    {
        "target": ["q_proj", "up_proj"],
        "experts": {"kind": "sparse_projection", "r": 8, "alpha": 16},
        "router": {"kind": "flylora", "top_k": 3, "bias_rate": RATE},
    },
    {
        "target": "v_proj",
        "experts": {"kind": "lora", "num_experts": 1, "r": 8, "alpha": 16},
        "router": {"kind": "smora", "top_k": 3, "bias_rate": RATE},
    },
]
RUN: dict[str, Any] = {
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "activation_checkpointing": True,
    "train_sampling_strategy": "sequential",
}


def build_model() -> moelora.MoELoRAModel:
    """Always the same weights; lora_B is not zero, so that what a router decides matters to the layers above."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = moelora.attach(LlamaForCausalLM(config), {"sites": SITES})
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.2)
    return model


def biases(model: moelora.MoELoRAModel) -> dict[str, torch.Tensor]:
    """(R,) of each router by the name of its site."""
    return {name: tensor.clone() for name, tensor in model.adapter_tensors().items() if name.endswith("router.bias")}


def two_ranks(rank: int, world: int, port: int, folder: Path, rows: Rows) -> None:
    """One of several processes that train together over gloo; writes down the biases at the end."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    model = build_model()
    options = {**RUN, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows[:4]}
    build_trainer(folder / "run", model, rows, learning_rate=0.0, **options).train()
    torch.save(biases(model), folder / f"biases-{rank}.pt")
    torch.distributed.destroy_process_group()
