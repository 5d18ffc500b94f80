"""Quick evaluation and training of a sequence: answers in one pass, and layers below the experts passed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_runs import TASKS, recipe, run, tensors

import moelora
from moelora.config import load_recipe
from moelora.data.sequences import read_sequence
from moelora.evaluation.labels import teacher_forced_match
from moelora.lower import LowerStates

QUICK: dict[str, Any] = {"answers": "forced", "remember_mib": 16}


def upper(folder: Path, backbone: Path, **options: Any) -> dict[str, Any]:
    """A recipe with experts in the second of two layers."""
    values = recipe(folder, backbone, trainer=options)
    values["mixture"]["sites"][0]["layers"] = "1:"
    values["trainer"]["args"].update(max_steps=6, save_strategy="no")
    return values


def rows(folder: Path) -> list[dict[str, list[float]]]:
    found = []
    for stage in range(4):
        tasks = json.loads((folder / f"stage-{stage}" / "scores.json").read_text())["tasks"]
        found.append({name: task["items"] for name, task in tasks.items()})
    return found


@pytest.fixture(scope="module")
def plain(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(upper(tmp_path_factory.mktemp("plain"), backbone_folder, answers="forced"))


def test_what_is_kept_changes_no_answer(
    plain: Path, backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[LowerStates] = []
    begin = LowerStates.__init__

    def begun(self: LowerStates, *args: Any) -> None:
        begin(self, *args)
        made.append(self)

    monkeypatch.setattr(LowerStates, "__init__", begun)
    quick = run(upper(tmp_path, backbone_folder, **QUICK))
    assert rows(quick) == rows(plain)
    expected = tensors(plain)
    for name, tensor in tensors(quick).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)
    (lower,) = made  # of all stages and evaluations
    # Of each task 12 texts to train on, 2 to validate, and 4 to answer, whose answers lack their ends.
    assert lower.computed == len(TASKS) * (12 + 2 + 4) and lower.found > lower.computed


def test_forced_answers_are_those_of_teacher_forcing(plain: Path, backbone_folder: Path) -> None:
    stored = rows(plain)[3]
    backbone, tokenizer = moelora.load_backbone(str(backbone_folder), quantization=None)
    model = moelora.from_pretrained(plain, backbone=backbone)
    for place, task in enumerate(read_sequence(load_recipe(plain / "recipe.yaml").data).ordered()):
        with model.routing_context(task_ids=torch.tensor([place])):
            assert teacher_forced_match(model, tokenizer, task.test).items == stored[task.name]


def test_keeping_nothing_is_said(backbone_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = recipe(tmp_path, backbone_folder, trainer={**QUICK})
    values["trainer"]["args"].update(max_steps=1, save_strategy="no")
    values["mixture"]["sites"][0]["layers"] = None
    run(values)
    assert "remember_mib keeps nothing" in caplog.text and "mixture.sites.layers" in caplog.text
