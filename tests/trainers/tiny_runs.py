"""A tiny mixture, tiny data of unequal lengths, and trainers for them; importable by child processes too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import moelora
from moelora import checkpoints
from moelora.data import Collator
from moelora.trainers import SFTTrainer

SITES = [
    {
        "target": "mlp",
        "experts": {"kind": "lora", "num_experts": 4, "r": 2, "alpha": 4, "dropout": 0.0},
        "router": {"kind": "topk", "top_k": 2, "aux_loss_coef": 0.1},
    },
    {"target": ["q_proj", "v_proj"], "experts": {"kind": "lora", "num_experts": 1, "r": 2, "dropout": 0.0}},
]

Rows = list[dict[str, list[int]]]


def build_model(dropout: float = 0.0, router: dict[str, Any] | None = None) -> moelora.MoELoRAModel:
    """Always the same weights; lora_B is not zero, so that every gradient is non-trivial."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    sites = [{**site, "experts": {**site["experts"], "dropout": dropout}} for site in SITES]
    sites[0]["router"] = {**sites[0]["router"], "init_std": 0.5, **(router or {})}
    model = moelora.attach(LlamaForCausalLM(config), {"sites": sites})
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.2)
    return model


def build_rows(count: int = 32, seed: int = 1) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        prompt = int(torch.randint(1, 3, (1,), generator=generator))
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def build_trainer(
    folder: Path | str, model: moelora.MoELoRAModel, rows: Rows | None = None, **options: Any
) -> SFTTrainer:
    """An SFTTrainer; options that are no arguments of the trainer itself go to TrainingArguments."""
    own = {"step_balance", "router_learning_rate", "callbacks", "eval_dataset", "compute_metrics", "optimizers"}
    trainer = {name: options.pop(name) for name in own & set(options)}
    args = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**args, **options})
    return SFTTrainer(
        model, arguments, data_collator=Collator(0), train_dataset=build_rows() if rows is None else rows, **trainer
    )


class Gradients(TrainerCallback):
    """Keeps the gradients that each optimizer step was about to use."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.adapter_tensors().items()})


ROWS = build_rows(14)
RUN = {
    "max_steps": 8,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 3,
    "lr_scheduler_type": "cosine",
    "include_num_input_tokens_seen": "non_padding",
    "eval_strategy": "steps",
    "eval_steps": 3,
}


def start(folder: Path, **options: Any) -> Any:
    model = build_model(dropout=0.2, router={"jitter": 0.1})
    return build_trainer(folder, model, ROWS, eval_dataset=ROWS[:4], **{**RUN, **options})


class _Wait(TrainerCallback):
    def __init__(self, ready: Any, go: Any) -> None:
        self.ready, self.go = ready, go

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ready.set()
        assert self.go.wait(60)


def train_and_wait(folder: Path, ready: Any, go: Any) -> None:
    torch.set_num_threads(1)
    build_trainer(folder, build_model(), ROWS, max_steps=1, callbacks=[_Wait(ready, go)]).train()


def train_for_long(folder: Path, announce: Any) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    class Announce(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            announce.value = state.global_step

    trainer = start(folder, max_steps=10_000, eval_strategy="no", save_total_limit=3, callbacks=[Announce()])
    trainer.train(resume_from_checkpoint=checkpoints.latest(folder) is not None)
