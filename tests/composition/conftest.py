"""Puts the cases of this folder where its tests find them, and teaches two tiny adapters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from skills import ANSWERS, make_backbone, teach


@pytest.fixture(scope="session")
def skill_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose words differ enough for adapters to choose between them."""
    return make_backbone(tmp_path_factory.mktemp("skill_backbone"))


@pytest.fixture(scope="session")
def skilled(skill_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two adapters, each of which knows the answers of the task that it is named as."""
    parent = tmp_path_factory.mktemp("skills")
    return [teach(task, skill_backbone, parent / task) for task in ANSWERS]
