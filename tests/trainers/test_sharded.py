"""Data parallelism, ZeRO and FSDP2 train what one process with the same rows trains, and save no frozen weight."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_runs import COMBINATIONS, STAGES, by_label, labelled, study
from tiny_runs import assert_identical, build_model, build_rows, build_trainer

from moelora import checkpoints
from moelora.data import Collator
from moelora.errors import CheckpointError
from moelora.trainers.sharded import refuse_foreign_state

LIMIT = 600  # seconds after which a process counts as hanging, on a machine that has other work


def spawn(processes: Any, target: Any, *args: Any) -> None:
    """Run ``target(rank, 2, port, *args)`` in two processes, to a good end of both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [processes.Process(target=target, args=(rank, 2, port, *args)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(LIMIT)
    hanging = [child.is_alive() for child in children]
    for child in children:
        child.kill()
    assert hanging == [False, False]
    assert [child.exitcode for child in children] == [0, 0]


@pytest.fixture(scope="module")
def results(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sharded")
    spawn(processes, study, folder, STAGES)
    return folder, [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]


def by_hand(accumulation: int, average: bool) -> dict[str, torch.Tensor]:
    """Gradients of one step of two processes, from plain forwards of its micro-batches of two rows."""
    rows, model = build_rows(), build_model().train()
    batches = [rows[start : start + 2] for start in range(0, 4 * accumulation, 2)]  # of rank 0, 1, 0, 1, ...
    counts = [sum(label != -100 for row in batch for label in row["labels"][1:]) for batch in batches]
    of_rank = [sum(counts[rank::2]) for rank in range(2)]
    shares = [n / sum(counts) if average else n / of_rank[i % 2] / 2 for i, n in enumerate(counts)]
    outputs = [model(**Collator(0)(batch)) for batch in batches]
    sum(share * output.loss for share, output in zip(shares, outputs, strict=True)).backward()
    return {name: parameter.grad for name, parameter in model.adapter_tensors().items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of a tensor, as a share of its norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - value).norm() / value.norm().clamp(min=1e-12)) for name, value in other.items())


CASES = [(kind, *case) for kind, cases in COMBINATIONS.items() for case in cases]


@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize(("kind", "accumulation", "average"), CASES)
def test_gradients_are_those_of_the_step_by_hand(results: Any, kind: str, accumulation: int, average: bool) -> None:
    expected = by_hand(accumulation, average)
    for rank in range(2):
        assert distance(results[1][rank][kind]["gradients"][accumulation, average], expected) <= 1e-5


@pytest.mark.parametrize("kind", STAGES)
def test_twenty_steps_end_where_one_process_ends(results: Any, kind: str, tmp_path: Path) -> None:
    options = {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "step_balance": True}
    alone = build_trainer(
        tmp_path, build_model(), train_sampling_strategy="sequential", lr_scheduler_type="constant", **options
    )
    alone.train()
    start = build_model().adapter_tensors()
    for name, value in alone.model.adapter_tensors().items():
        got = results[1][0][kind]["twenty"][name]
        assert got.dtype == torch.float32
        assert (got - value).abs().max() <= 1e-4 and not torch.equal(got, start[name]), name


@pytest.mark.parametrize("kind", STAGES)
def test_an_expert_that_is_idle_on_one_process_stops_nobody(results: Any, kind: str) -> None:
    model, rows = by_label().train(), labelled(0)[:4]
    model(**Collator(0, with_task_ids=True)(rows)).loss.backward()
    for rank in range(2):
        got = results[1][rank][kind]["idle"]
        for name, parameter in model.adapter_tensors().items():
            if ".router." in name:
                assert not got[name].any()
            else:
                assert (got[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("kind", STAGES)
def test_a_resumed_run_ends_where_the_whole_one_ends(results: Any, kind: str) -> None:
    for rank in range(2):
        (whole, whole_log), (resumed, resumed_log) = (results[1][rank][kind][name] for name in ("whole", "resumed"))
        assert_identical(resumed, whole)
        assert_identical(resumed_log, whole_log)


@pytest.mark.parametrize("kind", STAGES)
def test_checkpoints_are_whole_and_native(results: Any, kind: str) -> None:
    folder = results[0] / kind / "whole" / "checkpoint-4"
    checkpoints.verify(folder)
    stored = checkpoints.read(folder)
    model = build_model()
    shapes = {name: tuple(value.shape) for name, value in model.adapter_tensors().items()}
    assert_identical(dict(stored.tensors(shapes)), results[1][0][kind]["whole"][0])


@pytest.mark.parametrize("kind", STAGES)
def test_a_checkpoint_holds_the_adapter_and_its_optimizer_and_nothing_else(results: Any, kind: str) -> None:
    total, adapter = results[1][0][kind]["bytes"]
    moments = 2 if kind in ("ddp", "fsdp2", "zero0") else 3  # ZeRO keeps a copy that it updates beside AdamW's two
    assert total <= 1.05 * (1 + moments) * adapter


@pytest.mark.parametrize("kind", [kind for kind in STAGES if kind != "ddp"])
def test_rows_that_do_not_come_out_even_are_shared_out_alike(results: Any, kind: str) -> None:
    for name, value in results[1][0]["ddp"]["uneven"].items():
        assert (results[1][0][kind]["uneven"][name] - value).abs().max() <= 1e-5, name


def test_state_of_other_processes_or_other_runs_is_refused(results: Any, tmp_path: Path) -> None:
    run = results[0] / "zero2" / "whole"
    refuse_foreign_state(run / "checkpoint-2", run, 2)
    with pytest.raises(CheckpointError, match=r"saved by 2 processes, resumed with 4: .* resume with 2"):
        refuse_foreign_state(run / "checkpoint-2", run, 4)
    with pytest.raises(CheckpointError, match=rf"pickled, .* move it to {re.escape(str(tmp_path))}"):
        refuse_foreign_state(run / "checkpoint-2", tmp_path, 2)
