"""Does a checkpoint, loaded in a new process, do what the trained model did?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data import Example
from ..data.chat import ChatFormat
from ..errors import CheckpointError
from ..evaluation.scoring import generate_answers
from ..mixture import MoELoRAModel, from_pretrained

CHECKPOINT = "mixlora"
PROBE = "probe.safetensors"
QUESTIONS = "probe.json"
# The same arithmetic in the same order on the same machine; the margin is for another number of threads.
TOLERANCE = 1e-4


def write_probe(
    folder: Path, model: MoELoRAModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> None:
    """Write the logits after one question of each task, to be compared by :func:`check`."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.task, example)
    chat = ChatFormat(tokenizer)
    tensors = {}
    for task, example in first.items():
        ids = torch.tensor([chat.prompt_ids(example)])
        tensors[f"{task}.input_ids"] = ids
        tensors[f"{task}.logits"] = _logits(model, ids)
    save_file(tensors, folder / PROBE)
    questions = [{"task": e.task, "prompt": e.prompt, "answer": e.answer, "system": e.system} for e in first.values()]
    (folder / QUESTIONS).write_text(json.dumps(questions, indent=2) + "\n", encoding="utf-8")


def check(folder: Path) -> dict[str, Any]:
    """Load the checkpoint of a quickstart's folder and compare it with the probe that the trained model left.

    Returns:
        ``agrees``, ``max_difference`` of the logits, ``tolerance``, and ``answers``: for each task the question, the
        right answer and the model's.

    Raises:
        CheckpointError: the folder is not one that a quickstart has finished.
    """
    missing = [name for name in (CHECKPOINT, PROBE, QUESTIONS) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder}: no {', '.join(missing)}; run `moelora quickstart --output {folder}` first")
    model = from_pretrained(folder / CHECKPOINT, backbone="auto")
    tensors = load_file(folder / PROBE)
    questions = json.loads((folder / QUESTIONS).read_text(encoding="utf-8"))
    difference = max(
        float((_logits(model, tensors[f"{q['task']}.input_ids"]) - tensors[f"{q['task']}.logits"]).abs().max())
        for q in questions
    )
    examples = [Example(**question) for question in questions]
    answers = generate_answers(model, model.tokenizer, examples)
    told = [{**question, "model": answer} for question, answer in zip(questions, answers, strict=True)]
    return {
        "agrees": difference <= TOLERANCE,
        "max_difference": difference,
        "tolerance": TOLERANCE,
        "answers": told,
    }


def _logits(model: MoELoRAModel, input_ids: Tensor) -> Tensor:
    """(S, V) float32 on the CPU."""
    training = model.training
    model.train(False)
    with torch.no_grad():
        logits: Tensor = model(input_ids.to(model.device)).logits[0].float().cpu()
    model.train(training)
    return logits
