"""Tiny sequences of tasks in local files, and runs on them; importable by child processes too."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

import moelora
from moelora import checkpoints
from moelora.config import load_recipe

TASKS = ("add", "copy", "swap")
CLASSES = ("aa", "bb")
TARGETS = ["q_proj", "v_proj"]
RANK1 = {"kind": "rank1", "r": 2, "alpha": 4, "dropout": 0.1}
LORA = {"kind": "lora", "num_experts": 1, "r": 2, "alpha": 4, "dropout": 0.1}
SITES: dict[str, dict[str, Any]] = {
    "moram": {"experts": RANK1, "router": {"kind": "moram", "top_k": 2}},
    "sequential": {"experts": LORA},
    "per_task": {"experts": RANK1, "router": {"kind": "mask", "by": "task"}},
    "replay": {"experts": LORA},
    "joint": {"experts": LORA},
    "o_lora": {"experts": RANK1, "router": {"kind": "static", "weights": "ones"}},
    "loramoe": {"experts": {**LORA, "num_experts": 2}, "router": {"kind": "softmax", "aux_loss_coef": 0}},
    "moe_adapter": {
        "experts": {**LORA, "kind": "freezing", "num_experts": 3},
        "router": {"kind": "moe_adapter", "top_k": 2},
    },
    "flylora": {
        "experts": {"kind": "sparse_projection", "r": 4, "alpha": 8},
        "router": {"kind": "flylora", "top_k": 2},
    },
}


def write_sequence(folder: Path, tasks: tuple[str, ...] = TASKS) -> Path:
    """Tasks with one of two answers, of which the first is scored by generation, and two orders."""
    about: dict[str, Any] = {"version": "1", "tasks": {}, "orders": {"a": list(tasks), "b": list(tasks[::-1])}}
    for number, task in enumerate(tasks):
        about["tasks"][task] = {"classes": list(CLASSES) if number else []}
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, first, count in (("train", 0, 12), ("val", 20, 2), ("test", 30, 4)):
            rows = [{"prompt": f"{task} {n}", "answer": CLASSES[(n + number) % 2]} for n in range(first, first + count)]
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "sequence.yaml").write_text(yaml.safe_dump(about))
    return folder


def recipe(folder: Path, backbone: Path, method: str | dict[str, Any] = "moram", **changes: Any) -> dict[str, Any]:
    """As a user has it, with the data in files."""
    kind = method if isinstance(method, str) else method["kind"]
    args = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    trainer = {"kind": "continual", "method": method, "args": args, "max_new_tokens": 4}
    return {
        "backbone": {"name": str(backbone), "quantization": None},
        "mixture": {"sites": [{"target": TARGETS, **SITES[kind]}]},
        "data": {"kind": "sequence", "name": "folder", "path": str(write_sequence(folder / "data"))},
        "max_length": 128,
        "output_dir": str(folder / "run"),
        "seed": 3,
        **changes,
        "trainer": {**trainer, **changes.get("trainer", {})},
    }


def run(values: dict[str, Any], **options: Any) -> Path:
    return Path(moelora.trainers.get("continual").run(load_recipe(values), **options))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of the mixture in a folder."""
    checkpoints.verify(folder)
    return load_file(folder / "moelora.safetensors")


def die(point: str, values: dict[str, Any]) -> None:
    """Run a recipe, and be killed at a point: ``<stage> step <n>``, ``<stage> answers <n>`` or ``<stage> over``."""
    from moelora.trainers import continual, continual_scores, stages

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    stage, what, *count = point.split()
    step, write, finish = (
        continual.ContinualTrainer.training_step,
        continual_scores.Scores.write,
        stages.Stages.finish,
    )

    def kill_if(at: Path | str, moment: list[str]) -> None:
        if Path(at).name == f"stage-{stage}" and moment == [what, *count]:
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping(self: Any, *args: Any) -> Any:
        kill_if(self.args.output_dir, ["step", str(self.state.global_step)])
        return step(self, *args)

    def writing(self: Any, items: dict[str, Any]) -> None:
        kill_if(self.path.parent, ["answers", str(len(items))])
        write(self, items)

    def finishing(self: Any, number: int) -> None:
        kill_if(self.folder(number), ["over"])
        finish(self, number)

    continual.ContinualTrainer.training_step = stepping  # type: ignore[method-assign]
    continual_scores.Scores.write = writing  # type: ignore[method-assign]
    stages.Stages.finish = finishing  # type: ignore[method-assign]
    run(values)
