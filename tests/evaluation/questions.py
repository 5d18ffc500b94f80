"""A tiny mixture with a tokenizer, and multiple-choice questions as a file and as a task of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

import moelora
from moelora.config import DatasetData
from moelora.data import Example, load_examples

SITES = [
    {
        "target": "mlp",
        "experts": {"num_experts": 4, "r": 4, "alpha": 8},
        "router": {"kind": "topk", "top_k": 2, "init_std": 0.5},
    }
]

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Question: what is {n} and {word}?\nAnswer:", "choices": choices, "answer": n % len(choices), "kind": k}
    for n, (word, choices, k) in enumerate(
        [
            ("one", ["a cat", "two dogs", "bees"], "animals"),
            ("another one", ["yes", "no"], "facts"),
            ("a much longer one, so that batches are padded", ["red", "green", "blue", "no colour at all"], "facts"),
            ("a bird", ["it sings", "it barks"], "animals"),
            ("x", ["p", "q", "r"], "facts"),
        ]
    )
]


def build_model(folder: Path, chat: bool = False, router: dict[str, Any] | None = None) -> moelora.MoELoRAModel:
    """A mixture whose experts do something, with the byte tokenizer; always the same weights."""
    backbone, tokenizer = moelora.load_backbone(str(folder), quantization=None)
    model = moelora.attach(backbone, {"sites": [{**SITES[0], **({"router": router} if router else {})}]})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            tensor.normal_(std=0.5 if "router" in name or name.endswith("lora_B") else 0.1, generator=generator)
        # Far from ties, which other shapes of a batch could tip.
        for parameter in backbone.parameters():
            parameter.mul_(3)
    if not chat:
        tokenizer.chat_template = None
    tokenizer.pad_token = "<|unused|>"
    model.tokenizer = tokenizer
    return model.eval()


def write_questions(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples_of(path: Path, **columns: str) -> list[Example]:
    """The questions as moelora reads them, in the order of the file."""
    train = path.parent / "train.jsonl"
    train.write_text(json.dumps({**ROWS[0], "prompt": "something else"}) + "\n")
    data = DatasetData(path=str(train), test_path=str(path), columns={"options": "choices", "task": "kind", **columns})
    found = load_examples(data).test
    return sorted(found, key=lambda example: [row["prompt"] for row in ROWS].index(example.prompt))


def write_task(folder: Path, name: str, data: Path, **changes: Any) -> Path:
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**task, **changes}))
    return path
