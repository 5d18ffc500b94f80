"""Routers that are taught from a column of the data, under the plain trainer: LoRAMoE by type, MeteoRA by task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import build_rows
from transformers import LlamaForCausalLM, TrainingArguments

import moelora
from moelora.data import Collator
from moelora.errors import UserError
from moelora.trainers import SFTTrainer


def attached(backbone: LlamaForCausalLM, experts: dict[str, Any], router: dict[str, Any]) -> moelora.MoELoRAModel:
    experts = {"num_experts": 4, "r": 2, "alpha": 4, **experts}
    model = moelora.attach(backbone, {"sites": [{"target": ["up_proj"], "experts": experts, "router": router}]})
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.2)
    return model


def trained(folder: Path, model: moelora.MoELoRAModel, column: str, ids: list[int], **args: Any) -> SFTTrainer:
    """A run on rows whose tokens tell what is in the column: even ones for even ids, and so on by 4."""
    rows = []
    for index, row in enumerate(build_rows(16)):
        own = ids[index % len(ids)]
        tokens = [3 + 4 * (token % 15) + own for token in row["input_ids"]]
        labels = [-100 if label == -100 else token for label, token in zip(row["labels"], tokens, strict=True)]
        rows.append({"input_ids": tokens, "labels": labels, column: own})

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {**Collator(0)(batch), column: torch.tensor([row[column] for row in batch])}

    options = {
        "max_steps": 25,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **args,
    }
    arguments = TrainingArguments(output_dir=str(folder), **options)
    trainer = SFTTrainer(model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return trainer


def ends(trainer: SFTTrainer, name: str) -> tuple[float, float]:
    """Of what is logged under a name: the means of its first and of its last two values."""
    values = [line[name] for line in trainer.state.log_history if name in line]
    return sum(values[:2]) / 2, sum(values[-2:]) / 2


def test_loramoe_learns_to_balance_by_type(tiny_llama, tmp_path):
    """Where the loss is least, experts of a sequence's own type have the smaller share, (1 - delta) / (1 + delta).

    So the published formula has it, and the model card says so. Experts of type 1 are the first half.
    """
    router = {"kind": "softmax", "aux_loss_coef": 1.0, "delta": 0.6}
    model = attached(tiny_llama, {}, router)
    trainer = trained(tmp_path, model, "task_types", [0, 1], gradient_accumulation_steps=2)
    balance, last = ends(trainer, "aux/localized_balance")
    assert last < 0.5 * balance
    first, last = ends(trainer, "task_loss")
    assert last < first - 0.05
    with moelora.trace(model) as tape, torch.no_grad():
        rows = [row for row in trainer.train_dataset if row["task_types"] == 1]
        model.eval()(**{**Collator(0)(rows), "task_types": torch.ones(len(rows), dtype=torch.long)})
    for site in tape:
        [record] = tape[site]
        use = record.weights[record.mask].mean(0)
        assert use[:2].sum() < use[2:].sum() - 0.2, site
    assert trainer.evaluate()["eval_aux/localized_balance"] < 0.5 * balance


def test_loramoe_without_types_says_which_column_is_missing(tiny_llama, tmp_path):
    model = attached(tiny_llama, {}, {"kind": "softmax", "aux_loss_coef": 1.0})
    with pytest.raises(UserError, match=r"task_types=\.\.\.\) with one integer for each sequence"):
        trained(tmp_path, model, "request_ids", [0, 1])


def test_meteora_learns_which_adapter_a_task_belongs_to(tiny_llama, tmp_path):
    """Over finished adapters, which stay as they are: afterwards the first choice is the task's own."""
    model = attached(tiny_llama, {"kind": "frozen"}, {"kind": "meteora", "top_k": 2, "gate_loss_coef": 5.0})
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items() if "lora_" in name}
    trainer = trained(tmp_path, model, "task_ids", [0, 1, 2, 3])
    first, last = ends(trainer, "aux/gate")
    assert first > 1.2 and last < 0.5 * first  # log 4 is 1.39
    first, last = ends(trainer, "loss")
    assert last < first - 1
    assert all(torch.equal(model.adapter_tensors()[name], value) for name, value in before.items())
    with moelora.trace(model) as tape, torch.no_grad():
        rows = [row for row in trainer.train_dataset if row["task_ids"] == 2]
        model.eval()(**{**Collator(0)(rows), "task_ids": torch.full((len(rows),), 2)})
    for site in tape:
        [record] = tape[site]
        assert (record.logits[record.mask].argmax(-1) == 2).float().mean() > 0.7, site


def test_meteora_without_tasks_says_which_column_is_missing(tiny_llama, tmp_path):
    model = attached(tiny_llama, {"kind": "frozen"}, {"kind": "meteora", "top_k": 2})
    with pytest.raises(UserError, match=r"needs task_ids for it: pass model\(\.\.\., task_ids=\.\.\.\)"):
        trained(tmp_path, model, "request_ids", [0, 1])
