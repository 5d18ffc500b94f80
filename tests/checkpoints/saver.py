"""Forks processes that save checkpoints, so that a test can kill them without importing torch each time.

Reads lines ``MODE FOLDER VALUE`` from its input and answers each with the process id of a fork that carries it out.
A fork's checkpoints hold one number everywhere, which it appends to ``FOLDER.announced`` once saving has returned.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from moelora import checkpoints, files
from moelora.checkpoints import Architecture, native
from moelora.config import BackboneConfig, MixtureConfig

SITES = [[f"model.layers.{layer}.mlp" for layer in range(4)]]
MIXTURE = MixtureConfig.parse(
    {
        "sites": [
            {
                "target": "mlp",
                "experts": {"kind": "lora", "num_experts": 4, "r": 8},
                "router": {"kind": "topk", "top_k": 2},
            }
        ]
    }
)


def save(folder: Path, value: int) -> None:
    tensors = {
        f"{site}.{name}": torch.full(shape, float(value))
        for site in SITES[0]
        for name, shape in {"up_proj.lora_A": (32, 64), "up_proj.lora_B": (256, 32), "router.weight": (4, 64)}.items()
    }
    native.save(folder, MIXTURE, BackboneConfig(), tensors, sites=SITES, architecture=Architecture())


def save_run(final: Path, value: int) -> None:
    """A training checkpoint: ours, and files of the trainer, committed together."""
    with files.staged(final) as staging:
        save(staging, value)
        (staging / "state").mkdir(exist_ok=True)
        torch.save(torch.full((50_000,), float(value)), staging / "state" / "optimizer.pt")
        checkpoints.commit(staging, final)


def announce(folder: Path, value: int) -> None:
    handle = os.open(f"{folder}.announced", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{value}\n".encode())
    os.close(handle)


def carry_out(mode: str, folder: Path, value: int) -> None:
    if mode == "same":  # the same checkpoint again and again
        while True:
            save(folder, value)
            announce(folder, value)
            value += 1
    elif mode == "steps":  # checkpoint-1, checkpoint-2, ...
        while True:
            save_run(folder / f"checkpoint-{value}", value)
            announce(folder, value)
            value += 1
    elif mode == "step":  # one step, once
        save_run(folder, value)
        announce(folder.parent, value)
    elif mode == "some":  # the same checkpoint a few times
        for _ in range(5):
            save(folder, value)
        announce(folder, value)
    elif mode == "limited":  # with room for files of 20 kB only
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save(folder, value)
        except checkpoints.native.CheckpointError as error:
            Path(f"{folder}.error").write_text(str(error))
        announce(folder, value)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    for line in sys.stdin:
        mode, folder, value = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                carry_out(mode, Path(folder), int(value))
            finally:
                os._exit(0)
        print(pid, flush=True)
    while os.getppid() == parent:
        time.sleep(0.1)


if __name__ == "__main__":
    main()
