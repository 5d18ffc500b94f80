"""Tiny runs of LoRA-Mixer's stages; importable by child processes too."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from tiny_runs import Gradients, build_rows
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import moelora
from moelora import checkpoints
from moelora.config import load_recipe
from moelora.data import Collator
from moelora.trainers import LoRAMixerTrainer
from moelora.trainers.stages import Stages

TASKS = ("add", "copy", "reverse")
SITES = [
    {
        "target": ["q_proj", "v_proj"],
        "experts": {"num_experts": 3, "r": 2, "alpha": 4, "dropout": 0.1},
        "router": {"kind": "lora_mixer", "top_k": 2, "init_std": 0.5},
    }
]
HARD = {"phase": "hard", "args": {"max_steps": 4}}
KEPT = {"phase": "soft", "experts": "trained", "preserve_coef": 0.5, "args": {"max_steps": 4, "learning_rate": 5e-3}}
FROZEN = {"phase": "soft", "samples": 16, "args": {"max_steps": 4}}


def recipe(folder: Path, backbone: Path, stages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """As a user has it, with the data in a file."""
    lines = [{"prompt": f"{t} {n}", "answer": f"{t[0] * 3}", "task": t} for n in range(12) for t in TASKS]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = {"task": "task"}
    args = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 2,
        "disable_tqdm": True,
    }
    return {
        "backbone": {"name": str(backbone), "quantization": None},
        "mixture": {"sites": SITES},
        "data": {"kind": "dataset", "path": str(folder / "data.jsonl"), "test_fraction": 0.2, "columns": columns},
        "trainer": {"kind": "lora_mixer", "args": args, "stages": stages},
        "max_length": 128,
        "output_dir": str(folder / "run"),
        "seed": 3,
        **changes,
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of the mixture in a folder."""
    stored = checkpoints.read(folder)
    from safetensors.torch import load_file

    checkpoints.verify(folder)
    assert stored.mixture is not None
    return load_file(folder / "moelora.safetensors")


def die(point: str, values: dict[str, Any]) -> None:
    """Run a recipe, and be killed at a point: ``<stage> <step>``, or ``<stage> over`` before that is written down."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    stage, _, when = point.partition(" ")
    step, finish = LoRAMixerTrainer.training_step, Stages.finish

    def stepping(self: Any, *args: Any) -> Any:
        if str(self.args.output_dir).endswith(f"stage-{stage}") and str(self.state.global_step) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    def finishing(self: Stages, number: int) -> None:
        if when == "over" and str(number) == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, number)

    LoRAMixerTrainer.training_step = stepping  # type: ignore[method-assign]
    Stages.finish = finishing  # type: ignore[method-assign]
    moelora.trainers.get("lora_mixer").run(load_recipe(values))


def mixer_model(dropout: float = 0.0) -> moelora.MoELoRAModel:
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
    sites = [{**SITES[0], "experts": {**SITES[0]["experts"], "dropout": dropout}}]  # type: ignore[dict-item]
    model = moelora.attach(LlamaForCausalLM(config), {"sites": sites})
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.4)
    return model


def mixer_trainer(folder: Path | str, model: moelora.MoELoRAModel, **options: Any) -> LoRAMixerTrainer:
    own = {"phase", "experts", "preserve_coef", "callbacks", "eval_dataset", "aux_warmup_steps"}
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
    rows = [{**row, "task_ids": index % 3} for index, row in enumerate(build_rows(8))]
    return LoRAMixerTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**args, **options}),
        data_collator=Collator(0, with_task_ids=True),
        train_dataset=rows,
        **trainer,
    )


class Kept(Gradients):
    """Gradients of what is trained."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.adapter_tensors().items() if p.grad is not None})


def moved_step(folder: Path | str, coef: float, phase: str = "soft", **options: Any) -> dict[str, Any]:
    """Gradients and log of a step of which the experts are 0.1 away from where the stage began."""
    gradients, model = Kept(), mixer_model()
    own = {"experts": "trained", "preserve_coef": coef} if phase == "soft" else {}
    trainer = mixer_trainer(folder, model, phase=phase, callbacks=[gradients], **own, **options)
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if "lora_" in name:
                tensor.add_(0.1)
    trainer.train()
    return {"grads": gradients.steps[0], "log": trainer.state.log_history[0]}


def ranks_of_mixer(rank: int, world: int, port: int, folder: Path) -> None:
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
    for average in (True, False):
        options = {"gradient_accumulation_steps": 2, "average_tokens_across_devices": average}
        results[average] = {coef: moved_step(folder / "step", coef, **options) for coef in (0.0, 0.5)}
    results["hard"] = moved_step(folder / "step", 0.0, "hard", gradient_accumulation_steps=2)
    torch.save(results, folder / f"results-{rank}.pt")
    torch.distributed.destroy_process_group()
