"""Image tasks on two processes: the step of one process with the same micro-batches, and the same scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clip_runs
import pytest
import torch
from clip_sharded_runs import BATCH, KINDS, by_hand, study, values_of
from test_sharded import LIMIT, distance, spawn

from moelora.data import image_sequences


@pytest.fixture(scope="module")
def folder(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of two processes of each kind, and of one of a single process."""
    folder = tmp_path_factory.mktemp("clip-sharded")
    backbone = clip_runs.save(folder / "clip")
    spawn(processes, study, folder, backbone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(image_sequences.IMAGE_SEQUENCES, "tiny", clip_runs.read_tiny)
        clip_runs.run(values_of("one", folder / "one", backbone, accumulation=2))
    return folder


@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_mean_of_the_micro_batches_of_all_processes(folder, kind, accumulation):
    wanted = by_hand(2 * accumulation, BATCH)
    assert all(value.any() for value in wanted.values())
    assert distance(by_hand(accumulation, 2 * BATCH), wanted) > 0.1  # a batch is not the mean of its halves
    for rank in range(2):
        found = torch.load(folder / f"gradients-{rank}.pt")[kind, accumulation]
        assert distance(found, wanted) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_where_one_process_ends_that_accumulates(folder, kind):
    for stage in range(4):
        one, two = (json.loads((folder / k / f"run/stage-{stage}/scores.json").read_text()) for k in ("one", kind))
        assert one == two
    assert len({(folder / "one" / f"run/stage-{stage}/scores.json").read_text() for stage in range(4)}) > 1
    for stage in range(1, 4):
        one, two = (clip_runs.tensors(folder / k / f"run/stage-{stage}") for k in ("one", kind))
        # The last task has one class, so its gradients nearly cancel, and what is left of some is rounding: 1e-9.
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-8)
