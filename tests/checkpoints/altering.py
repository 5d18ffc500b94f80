"""Copies of a checkpoint in which something is different."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def altered(source: Path, folder: Path, change: Change | None = None, **config: Any) -> Path:
    """Copy ``adapter_config.json`` and ``adapter_model.bin`` with other values and other tensors.

    Args:
        folder: a new one. change: makes other tensors of those there are. config: values; ``...`` leaves a key out.
    """
    folder.mkdir()
    values = {**json.loads((source / "adapter_config.json").read_text()), **config}
    values = {key: value for key, value in values.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    tensors = torch.load(source / "adapter_model.bin", weights_only=True)
    torch.save(tensors if change is None else change(dict(tensors)), folder / "adapter_model.bin")
    return folder


def without(*names: str) -> Change:
    """Leave out the tensors whose names contain one of these."""
    return lambda tensors: {key: value for key, value in tensors.items() if not any(name in key for name in names)}


def with_tensor(key: str, value: Tensor) -> Change:
    """Put a tensor in, or in place of one."""
    return lambda tensors: {**tensors, key: value}
