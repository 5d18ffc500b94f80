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
from moelora.trainers import SFTTrainer, TimeBudget

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
    own = {
        "step_balance",
        "groups",
        "aux_warmup_steps",
        "callbacks",
        "eval_dataset",
        "compute_metrics",
        "optimizers",
        "data_collator",
    }
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
    trainer = {"data_collator": Collator(0), "train_dataset": build_rows() if rows is None else rows, **trainer}
    return SFTTrainer(model, arguments, **trainer)


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


VOLATILE = ("runtime", "per_second")


def start(folder: Path, **options: Any) -> Any:
    model = build_model(dropout=0.2, router={"jitter": 0.1})
    return build_trainer(folder, model, ROWS, eval_dataset=ROWS[:4], **{**RUN, **options})


def outcome(trainer: Any) -> dict[str, Any]:
    """Everything that a resumed run has to have in common with the uninterrupted one."""
    optimizer = trainer.optimizer.state_dict()
    return {
        "weights": {name: value.detach().clone() for name, value in trainer.model.adapter_tensors().items()},
        "optimizer": optimizer["state"],
        "groups": optimizer["param_groups"],
        "random": torch.get_rng_state(),
        "log": log_lines(trainer),
    }


def log_lines(trainer: Any) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [
        {key: value for key, value in line.items() if not key.endswith(VOLATILE)}
        for line in trainer.state.log_history
        if "train_loss" not in line
    ]


def assert_identical(got: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_identical(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for index, value in enumerate(expected):
            assert_identical(got[index], value, f"{where}.{index}")
    else:
        assert got == expected, where


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


def distributed(rank: int, world: int, port: int, folder: Path) -> None:
    """One of several processes that train together over gloo; each writes down what came of each case."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    results: dict[str, Any] = {}
    for average in (True, False):
        for step_balance in (True, False):
            gradients, model = Gradients(), build_model()
            loads: list[torch.Tensor] = []
            router = model.containers()["model.layers.0.mlp"].router
            assert router is not None
            router.on_step_end = loads.append  # type: ignore[method-assign]
            trainer = build_trainer(
                folder / "losses",
                model,
                max_steps=1,
                gradient_accumulation_steps=2,
                train_sampling_strategy="sequential",
                max_grad_norm=0.0,
                average_tokens_across_devices=average,
                step_balance=step_balance,
                callbacks=[gradients],
            )
            trainer.train()
            log = trainer.state.log_history[0]
            results[f"{average}, {step_balance}"] = {"grads": gradients.steps[0], "log": log, "load": loads}
    options = {"eval_strategy": "no", "max_steps": 5, "callbacks": [TimeBudget(5)]}
    whole = start(folder / "whole", **options)
    whole.train()
    resumed = start(folder / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    results["whole"], results["resumed"] = outcome(whole), outcome(resumed)
    torch.save(results, folder / f"results-{rank}.pt")
    torch.distributed.destroy_process_group()
