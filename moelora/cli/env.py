"""``moelora env``: what this machine and this installation are, for bug reports."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from .common import AsJson, print_json

PACKAGES = (
    "moelora",
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "pydantic",
    "deepspeed",
    "lm-eval",
    "peft",
    "plotly",
    "reasoning-gym",
    "trl",
)


# Variables that change how fast a CPU works.
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MOELORA_CPP")


def env(as_json: AsJson = False) -> None:
    """Print versions, devices, threads and number formats, for a bug report.

    Example: `moelora env --json`
    """
    report = describe_environment()
    if as_json:
        print_json(report)
        return
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "none"
        typer.echo(f"{name}: {value}")


def describe_environment() -> dict[str, Any]:
    """Versions, devices, threads and supported number formats, as plain values. Names no user and no host."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda or "none",
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "dtypes": [name for name in ("float32", "bfloat16", "float16") if _multiplies(getattr(torch, name), device)],
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _multiplies(dtype: Any, device: Any) -> bool:
    import torch

    try:
        one = torch.ones(2, 2, dtype=dtype, device=device)
        return bool(torch.isfinite(one @ one).all())
    except RuntimeError:
        return False
