"""What several processes that train together found out, for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch


def gather_solved(solved: Iterable[str]) -> tuple[str, ...]:
    """All tasks that some process has solved, sorted; alone, those given. Every process has to call this.

    A union cannot open a task again, nor tell how often it passed: to have schedulers that are alike on all processes,
    gather what they observe, with :func:`gather_evaluations`.
    """
    return tuple(sorted({task for part in _everywhere(sorted(solved)) for task in part}))


def gather_evaluations(evaluations: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The evaluations of all processes by task, tasks sorted; every process has to call this.

    Schedulers that observe them in this order are alike everywhere, so that the state of one is that of all. The
    results of a task that several processes evaluated follow one another in the order of the processes.
    """
    merged: dict[str, list[float]] = {}
    for part in _everywhere({task: list(values) for task, values in evaluations.items()}):
        for task, values in part.items():
            merged.setdefault(task, []).extend(values)
    return dict(sorted(merged.items()))


def _everywhere(mine: Any) -> list[Any]:
    """What each process gives, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found
