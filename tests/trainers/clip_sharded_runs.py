"""Runs on image tasks of two processes over gloo; importable by child processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from clip_runs import attached, build_tasks, read_tiny, recipe, run
from sharded_runs import WholeGradients, arguments, fresh, join
from torch import Tensor

from moelora.clip import clip_loss
from moelora.data import image_sequences
from moelora.trainers.clip import ClipTrainer, Pictures
from moelora.trainers.sft import SFTConfig

KINDS = ("ddp", "zero2")
BATCH = 2
TASK = 1  # three classes, after two of an earlier task


def pictures() -> Pictures:
    return Pictures(TASK, build_tasks()[TASK].train)


def gradients(kind: str, folder: Path, accumulation: int) -> dict[str, Tensor]:
    """Of the first step."""
    fresh()
    model, clip = attached(scale=0.5)
    args = {
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "no",
    }
    config = SFTConfig.parse({"kind": "sft", "args": arguments(kind, **args)})
    noted = WholeGradients()
    trainer = ClipTrainer(
        model,
        config.training_arguments(folder, 0),
        clip=clip,
        tasks=build_tasks(),
        pictures=pictures(),
        callbacks=[noted],
    )
    noted.trainer = trainer
    trainer.train()
    return noted.steps[0]


def by_hand(count: int, size: int) -> dict[str, Tensor]:
    """The mean of the gradients of ``count`` micro-batches, each with a loss of its own."""
    model, clip = attached(scale=0.5)
    model.train()
    task, seen = build_tasks()[TASK], len(build_tasks()[0].classes)
    texts = clip.texts(task.prompts)
    for start in range(0, count * size, size):
        made = model(**texts, pixel_values=clip.pixels(task.train.take(range(start, start + size))))
        labels = torch.from_numpy(task.train.labels[start : start + size])
        scale = clip.model.logit_scale.exp()
        (clip_loss(made.image_embeds, made.text_embeds, scale, labels, seen) / count).backward()
    return {name: tensor.grad for name, tensor in model.adapter_tensors().items()}


def values_of(kind: str, folder: Path, backbone: Path, accumulation: int = 1) -> dict[str, Any]:
    """A recipe of three tasks, whose training images are a whole number of steps of two micro-batches."""
    values = recipe(folder, backbone)
    args = {**values["trainer"]["args"], "per_device_train_batch_size": BATCH, "save_strategy": "no"}
    # A first step of Adam is the sign of the gradient, also of one that is nothing but rounding.
    args |= {"gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 0.3}
    values["trainer"]["args"] = arguments(kind, **args)
    return values


def study(rank: int, world: int, port: int, folder: Path, backbone: Path) -> None:
    """Gradients into ``gradients-<rank>.pt``, and a whole run of each kind."""
    join(rank, world, port)
    image_sequences.IMAGE_SEQUENCES["tiny"] = read_tiny
    found = {
        (kind, accumulation): gradients(kind, folder / "gradients", accumulation)
        for kind in KINDS
        for accumulation in (1, 2)
    }
    torch.save(found, folder / f"gradients-{rank}.pt")
    for kind in KINDS:
        fresh()
        run(values_of(kind, folder / kind, backbone))
    torch.distributed.destroy_process_group()
