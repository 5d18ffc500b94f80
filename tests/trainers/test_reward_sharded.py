"""Phases of a reward model on two processes, each of which sees the experts of one category alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reward_runs import KINDS, PHASES, of_phase, reward_study
from test_sharded import spawn

Found = dict[tuple[str, str], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def results(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("reward-sharded")
    spawn(processes, reward_study, folder)
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_where_one_ends(results: list[Found], kind: str, phase: str, tmp_path: Path) -> None:
    alone = of_phase("one", phase, tmp_path, 1)
    for found in results:
        assert found[kind, phase].keys() == alone.keys()
        for name, value in alone.items():
            if name.endswith(".bias") and ("heads" in name or "second" in name):
                continue  # it cancels in comparisons: its gradient is rounding, and Adam's step the sign of that
            torch.testing.assert_close(found[kind, phase][name], value, atol=1e-5, rtol=1e-4)
