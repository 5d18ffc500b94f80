"""Tiny runs of ReMix; importable by child processes too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tiny_runs import Gradients, Rows, build_rows
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import moelora
from moelora.data import Collator
from moelora.trainers import RemixTrainer

AUX = 0.5
SITES = [
    {
        "target": ["gate_proj", "up_proj", "down_proj"],
        "experts": {"num_experts": 4, "r": 2, "alpha": 3, "dropout": 0.0},
        "router": {"kind": "remix", "top_k": 2},
    },
    {
        "target": ["q_proj"],
        "experts": {"num_experts": 4, "r": 2, "alpha": 3, "dropout": 0.0},
        "router": {"kind": "topk", "top_k": 2, "aux_loss_coef": AUX},
    },
]


def remix_model(dropout: float = 0.0, sites: Any = None, **router: Any) -> moelora.MoELoRAModel:
    """Always the same weights, none of them zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    sites = [{**site, "experts": {**site["experts"], "dropout": dropout}} for site in (sites or SITES)]
    sites[0]["router"] = {**sites[0]["router"], **router}
    model = moelora.attach(LlamaForCausalLM(config), {"sites": sites})
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.4)
    return model


def remix_trainer(
    folder: Path | str, model: moelora.MoELoRAModel, rows: Rows | None = None, **options: Any
) -> RemixTrainer:
    own = {"selections", "mode", "per_example", "callbacks", "eval_dataset", "step_balance", "aux_warmup_steps"}
    trainer = {name: options.pop(name) for name in own & set(options)}
    args = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    return RemixTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**args, **options}),
        data_collator=Collator(0),
        train_dataset=build_rows(8) if rows is None else rows,
        **{"selections": 3, **trainer},
    )


def one_step(folder: Path | str, **options: Any) -> dict[str, Any]:
    """Gradients and log of one optimizer step."""
    gradients = Gradients()
    trainer = remix_trainer(folder, remix_model(options.pop("dropout", 0.0)), callbacks=[gradients], **options)
    trainer.train()
    return {"grads": gradients.steps[0], "log": trainer.state.log_history[0]}


def ranks_of_remix(rank: int, world: int, port: int, folder: Path) -> None:
    """One of several processes that take a step together over gloo."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    results = {}
    for mode in ("looped", "batched", "lean"):
        for checkpointed in (False, True):
            results[mode, checkpointed] = one_step(
                folder / "step", mode=mode, gradient_accumulation_steps=2, activation_checkpointing=checkpointed
            )
    options = {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False}
    results["of ranks"] = one_step(folder / "step", **options)
    torch.save(results, folder / f"results-{rank}.pt")
    torch.distributed.destroy_process_group()
