"""Fixtures around the tiny runs; puts them where child processes find them."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_runs import Gradients, Rows, build_model, build_rows, build_trainer

import moelora
from moelora.trainers import SFTTrainer

MakeModel = Callable[..., moelora.MoELoRAModel]
MakeTrainer = Callable[..., SFTTrainer]


@pytest.fixture
def make_model() -> MakeModel:
    return build_model


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    def make(model: moelora.MoELoRAModel, rows: Rows | None = None, **options: Any) -> SFTTrainer:
        return build_trainer(tmp_path / "run", model, rows, **options)

    return make


@pytest.fixture
def rows() -> Rows:
    return build_rows()


@pytest.fixture
def gradients() -> Gradients:
    return Gradients()


@pytest.fixture(scope="session")
def processes() -> Any:
    """Children of one server that has imported everything, so that starting one takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "moelora.trainers", "tiny_runs"])
    return context
