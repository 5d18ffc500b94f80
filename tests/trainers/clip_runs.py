"""A tiny CLIP model, tiny image tasks and runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import moelora
from moelora.clip import Clip
from moelora.clip_small import untrained
from moelora.config import load_recipe
from moelora.data.image_sequences import ImageSequence, ImageSplit, ImageTask

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANK1 = {"kind": "rank1", "r": 2, "alpha": 2, "dropout": 0.0}
MORAM = {"kind": "moram", "top_k": 2, "temperature": 0.05, "threshold": 0.2}
LORA = {"kind": "lora", "num_experts": 1, "r": 2, "alpha": 4, "dropout": 0.0}
SITES: dict[str, dict[str, Any]] = {
    "moram": {"experts": RANK1, "router": MORAM},
    "per_task": {"experts": RANK1, "router": {"kind": "mask", "by": "task"}},
    "moe_adapter": {
        "experts": {**LORA, "kind": "freezing", "num_experts": 3},
        "router": {"kind": "moe_adapter", "top_k": 2},
    },
    "replay": {"experts": LORA},
    "joint": {"experts": LORA},
}
CLASSES = {"red": ("red zero", "red one"), "noisy": ("noisy two", "noisy three", "noisy four"), "photos": ("temple",)}


def build_tasks() -> tuple[ImageTask, ...]:
    """Images of one colour with noise; a colour for each class."""
    tasks, generator = [], np.random.default_rng(5)
    colours = iter(generator.integers(0, 256, (6, 3)))
    for name, classes in CLASSES.items():
        mine = [next(colours) for _ in classes]
        splits = {}
        for split, count in {"train": 4, "val": 1, "test": 3}.items():
            labels = np.repeat(np.arange(len(classes)), count)
            noise = generator.integers(-40, 40, (len(labels), 8, 8, 3))
            images = np.clip(np.stack([mine[label] for label in labels])[:, None, None] + noise, 0, 255)
            splits[split] = ImageSplit(images.astype(np.uint8), labels)
        tasks.append(ImageTask(name, **splits, classes=classes, template="a picture of a {}."))
    return tuple(tasks)


def read_tiny(shots: int, test_size: int | None, seed: int, path: str | None) -> ImageSequence:
    """A reader for ``IMAGE_SEQUENCES``."""
    return ImageSequence("tiny", "1", build_tasks(), {"a": tuple(CLASSES), "b": tuple(CLASSES)[::-1]})


def save(folder: Path) -> Path:
    """The small CLIP model with random weights."""
    clip = untrained(3)
    for part in (clip.model, clip.tokenizer, clip.images):
        part.save_pretrained(folder)
    return folder


def attached(method: str = "moram", scale: float = 0.0) -> tuple[moelora.MoELoRAModel, Clip]:
    """A mixture on the model with random weights; ``lora_B`` is as large as ``scale`` says."""
    clip = untrained(3)
    torch.manual_seed(4)
    model = moelora.attach(clip.model, {"sites": [{"target": TARGETS, **SITES[method]}]})
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if scale and name.endswith("lora_B"):
                tensor.normal_(std=scale)
    return model, clip


def recipe(folder: Path, backbone: Path, method: str | dict[str, Any] = "moram", **changes: Any) -> dict[str, Any]:
    kind = method if isinstance(method, str) else method["kind"]
    args = {
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "adam_beta2": 0.9999,
    }
    return {
        "backbone": {"name": str(backbone), "quantization": None},
        "mixture": {"sites": [{"target": TARGETS, **SITES[kind]}]},
        "data": {"kind": "images", "name": "tiny", "order": "a"},
        "trainer": {"kind": "clip", "method": method, "args": args},
        "output_dir": str(folder / "run"),
        "seed": 3,
        **changes,
    }


def run(values: dict[str, Any], **options: Any) -> Path:
    return Path(moelora.trainers.get("clip").run(load_recipe(values), **options))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "moelora.safetensors")
