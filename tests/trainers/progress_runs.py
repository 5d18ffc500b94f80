"""Runs of ``sft`` that go by the progress of three tasks; importable by child processes too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import make_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from moelora import checkpoints
from moelora.config import load_recipe
from moelora.trainers import SFTTrainer
from moelora.trainers.sft import SFT

TARGETS = {"easy": 0.9, "hard": 1.0, "other": 0.9}


def write_backbone(folder: Path) -> Path:
    """A random Llama whose output layer is large enough for adapters below it to make a token certain."""
    tokenizer = make_byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(folder: Path) -> Path:
    """Two tasks whose answer is always the same, and one whose answers cannot be known, so that it is never solved."""
    answers = {"easy": lambda n: "x", "other": lambda n: "zzz", "hard": lambda n: str(n * 7919 % 1000)}
    for name, numbers in {"train": range(24), "test": range(24, 30)}.items():
        lines = [
            {"prompt": f"{task} {n}", "answer": answer(n), "task": task}
            for n in numbers
            for task, answer in answers.items()
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def recipe(data: Path, backbone: Path, output: Path, progress: dict[str, Any], **args: Any) -> dict[str, Any]:
    adapters = {"kind": "staged", "r": 4, "alpha": 8, "dropout": 0.1, "num_stages": 4, "policy": "head"}
    return {
        "backbone": {"name": str(backbone), "quantization": None},
        "mixture": {"sites": [{"target": ["q_proj", "v_proj", "up_proj", "down_proj"], "experts": adapters}]},
        "data": {
            "kind": "dataset",
            "path": str(data / "train.jsonl"),
            "test_path": str(data / "test.jsonl"),
            "columns": {"task": "task"},
        },
        "trainer": {
            "progress": {
                "targets": TARGETS,
                "num_stages": 3,
                "t_min": 4,
                "t_max": 24,
                "eval_every": 4,
                "passes": 1,
                **progress,
            },
            "args": {
                "max_steps": 60,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "logging_steps": 3,
                "save_strategy": "no",
                "save_total_limit": 100,
                "disable_tqdm": True,
                "use_cpu": True,
                "dataloader_pin_memory": False,
                **args,
            },
        },
        "max_length": 64,
        "output_dir": str(output),
    }


def prepare(*given: Any, **args: Any) -> SFTTrainer:
    return SFT.prepare(load_recipe(recipe(*given, **args)))


class SaveAfter(TrainerCallback):
    """Makes checkpoints after these steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or state.global_step in self.steps


def train_and_announce(announce: Any, *given: Any) -> None:
    """Train from the newest checkpoint on, slowly, and say which one was written last."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    class Announce(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            announce.value = state.global_step

    trainer = prepare(*given)
    for callback in (SaveAfter(*range(60)), Announce()):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=checkpoints.latest(Path(trainer.args.output_dir or "")) is not None)


def two_processes(rank: int, port: int, results: Any, *given: Any) -> None:
    """One of two processes that prune together; in the middle the run is resumed."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update(
        {name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    *content, folder = given
    found = []
    progress = {"num_stages": 1, "targets": {**TARGETS, "other": 0.1}}
    for name, source in (("whole", None), ("again", folder / "whole" / "checkpoint-18")):
        trainer = prepare(*content, folder / name, progress, max_steps=32)
        trainer.add_callback(SaveAfter(18))
        trainer.train(resume_from_checkpoint=source and str(source))
        host = trainer.progress
        assert host is not None
        weights = {key: value.detach().tolist() for key, value in trainer.model.adapter_tensors().items()}
        found.append([host.rows.history, host.ledger.to_dict(), host.scheduler.state_dict(), weights])
    results.put((rank, found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
