"""Run a model over data and report its routing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..mixture import MoELoRAModel
from ..modes import evaluation_mode
from . import figures, report
from .recorder import RoutingRecorder
from .stats import RoutingStats

# What a batch may hold that the routing does not depend on; without labels no loss is computed.
_UNUSED = ("labels", "num_items_in_batch")


def analyze(
    model: MoELoRAModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    task_names: Sequence[str] = (),
    out: str | Path | None = None,
    model_name: str = "",
    data_name: str = "",
) -> RoutingStats:
    """Count what the routers of ``model`` decide on ``batches``, in evaluation mode and without gradients.

    Args:
        batches: keyword arguments of the model's call: ``input_ids`` (B, S), ``attention_mask`` (B, S), ``task_ids``
            (B,); such as a ``DataLoader``. A progress bar is shown on a terminal.
        task_names: name of each task id.
        out: folder for ``routing.html``, ``routing.json`` and ``routing.csv``; ``None`` writes nothing.
        model_name, data_name: what was measured, in words, for the report.

    Raises:
        DataError: no routed token in ``batches``, or a task id without a name.
        UserError: ``out`` is given and plotly is not installed; said before the model runs.
    """
    if out is not None:
        figures.require_plotly()
    with evaluation_mode(model), RoutingRecorder(model, task_names) as recorder, torch.no_grad():
        for batch in _shown(batches):
            model(**{key: _to(value, model) for key, value in batch.items() if key not in _UNUSED})
    stats = recorder.result(model_name, data_name)
    if out is not None:
        report.write(stats, out)
    return stats


def _shown(batches: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """``batches`` with a progress bar on standard error, if that is a terminal."""
    total = len(batches) if isinstance(batches, Sized) else None
    with Progress(console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()) as progress:
        yield from progress.track(batches, total=total, description="Recording the routing")


def _to(value: Any, model: MoELoRAModel) -> Any:
    return value.to(model.device) if isinstance(value, Tensor) else value
