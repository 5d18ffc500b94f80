"""Two processes that train on one stream; importable by child processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import moelora
from moelora.config import DatasetData
from moelora.data import Collator, StreamedSet
from moelora.data.streaming import SourceReader, StreamOptions
from moelora.trainers import SFTTrainer

SITE = {
    "target": "mlp",
    "experts": {"kind": "lora", "num_experts": 4, "r": 2, "dropout": 0.0},
    "router": {"kind": "topk", "top_k": 2, "init_std": 0.5, "aux_loss_coef": 0.0},
}


def build(given: tuple[str, str], folder: Path, rows: int, **options: Any) -> SFTTrainer:
    """A trainer of a tiny mixture on a stream, six steps of four rows in all.

    Args:
        given: the file that is streamed, and the folder of the backbone. rows: of a batch of one process.
    """
    path, backbone_folder = given
    backbone, tokenizer = moelora.load_backbone(backbone_folder, quantization=None)
    assert tokenizer is not None
    torch.manual_seed(0)
    model = moelora.attach(backbone, {"sites": [SITE]})
    source = SourceReader(DatasetData(path=path, streaming=True), "")
    stream = StreamedSet({"": source}, tokenizer, StreamOptions(buffer=5, seed=0, max_length=120), 24)
    args = {
        "max_steps": 6,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**args, **options})
    return SFTTrainer(model, arguments, data_collator=Collator(0), train_dataset=stream)


def weights(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    """What was trained."""
    return {name: value.detach().clone() for name, value in trainer.model.adapter_tensors().items()}


def distributed(rank: int, port: int, given: tuple[str, str], folder: Path) -> None:
    """One of two processes: a whole run, and one that goes on from its middle."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    whole = build(given, folder / "whole", 2)
    whole.train()
    resumed = build(given, folder / "resumed", 2)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    torch.save({"whole": weights(whole), "resumed": weights(resumed)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
