"""Two processes that train on one stream see what one process sees."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import stream_runs
import torch


def test_two_processes_train_as_one_and_go_on_where_they_stood(
    processes: Any, backbone_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": str(n)}) + "\n" for n in range(50)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = str(path), str(backbone_folder)
    children = [
        processes.Process(target=stream_runs.distributed, args=(rank, port, given, tmp_path)) for rank in (0, 1)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    alone = stream_runs.build(given, tmp_path / "alone", 4)
    fresh = stream_runs.weights(alone)
    alone.train()
    expected = stream_runs.weights(alone)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            assert torch.allclose(results["whole"][name], value, atol=1e-5), name
            assert torch.allclose(results["resumed"][name], results["whole"][name], atol=1e-6), name
    assert any(bool((value - fresh[name]).abs().max() > 1e-3) for name, value in expected.items())
