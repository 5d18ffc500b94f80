"""Two processes over gloo train what one process with the same rows trains."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from tiny_runs import assert_identical, build_model, build_rows, distributed

from moelora import checkpoints
from moelora.data import Collator

COEF = 0.1
BATCHES = [slice(start, start + 2) for start in (0, 2, 4, 6)]  # rank 0, 1, 0, 1


@pytest.fixture(scope="module")
def results(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [processes.Process(target=distributed, args=(rank, 2, port, folder)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    return folder, [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]


def expected(average: bool, step_balance: bool) -> tuple[dict[str, torch.Tensor], float, float]:
    """Gradients, task loss and auxiliary loss from plain forwards of the rows of one step."""
    rows = build_rows()[:8]
    model = build_model().train()
    micro = [model(**Collator(0)(rows[batch])) for batch in BATCHES]
    labels = [sum(label != -100 for row in rows[batch] for label in row["labels"][1:]) for batch in BATCHES]
    across = [sum(labels[rank::2]) for rank in range(2)]
    shares = [count / sum(labels) if average else count / across[i % 2] / 2 for i, count in enumerate(labels)]
    task = sum(share * out.task_loss for share, out in zip(shares, micro, strict=True))
    if step_balance:
        aux = model(**Collator(0)(rows)).aux_losses["load_balance"]
    else:
        aux = sum(share * out.aux_losses["load_balance"] for share, out in zip(shares, micro, strict=True))
    (task + COEF * aux).backward()
    gradients = {name: p.grad for name, p in model.adapter_tensors().items()}
    return gradients, task.item(), aux.item()


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("step_balance", [True, False])
def test_gradients_and_log_are_those_of_one_process(results, average, step_balance):
    gradients, task, aux = expected(average, step_balance)
    for rank in range(2):
        got = results[1][rank][f"{average}, {step_balance}"]
        for name, value in gradients.items():
            assert (got["grads"][name] - value).abs().max() <= 1e-6, name
        assert got["log"]["task_loss"] == pytest.approx(task, abs=1e-5)
        assert got["log"]["aux/load_balance"] == pytest.approx(aux, abs=1e-5)
        assert got["log"]["loss"] == pytest.approx(task + COEF * aux, abs=1e-5)


def test_controllers_hear_the_tokens_of_all_ranks(results):
    real = sum(len(row["input_ids"]) for row in build_rows()[:8])
    loads = [results[1][rank]["True, False"]["load"] for rank in range(2)]
    assert [len(load) for load in loads] == [1, 1]
    assert loads[0][0].sum() == 2 * real
    assert torch.equal(loads[0][0], loads[1][0])


def test_two_ranks_resume_bit_for_bit(results):
    folder, (first, second) = results
    for rank in (first, second):
        assert_identical(rank["resumed"], rank["whole"])
    assert_identical(first["whole"]["weights"], second["whole"]["weights"])
    for step in range(1, 6):
        checkpoints.verify(folder / "whole" / f"checkpoint-{step}")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in (folder / "whole" / "checkpoint-2").iterdir()}
