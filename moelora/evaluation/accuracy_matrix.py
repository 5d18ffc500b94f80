"""The accuracy matrix of continual learning, and what the field reads from it.

R[i, j] is the score (0 to 1) on task j after the first i tasks of a sequence were learnt, i = 0..T and j = 1..T; row 0
is the model before any. The literature names alike what it defines differently, so every number here says whose it is
and which sign is good. A number is NaN where a score that it needs was not measured, or where it has no meaning, as
backward transfer has none for a single task: nothing is left out silently, and nothing is made up.

Sources: Lopez-Paz & Ranzato 2017 (GEM, arXiv 1706.08840); Rebuffi et al. 2017 (iCaRL, arXiv 1611.07725); Chaudhry et
al. 2018 (arXiv 1801.10112); Riemer et al. 2019 (MER, arXiv 1810.11910); Wang et al. 2023 (TRACE, arXiv 2310.06762);
Zheng et al. 2023 (ZSCL with MTIL, arXiv 2303.06628), whose three numbers X-TAIL (Xu et al. 2024, arXiv 2406.18868) took
over, computed as in ``XTAIL/main.py`` of Artificer-AI-Lab/MoRAM aaa51d8; Zhao et al. 2024 (SAPT, arXiv 2401.08295, code
circle-hit/SAPT 52a52b9).

Shapes: T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError

Array = NDArray[np.float64]
NAN = float("nan")


@dataclass(frozen=True)
class Metric:
    """A number that is read from the matrix: a property of :class:`AccuracyMatrix` of this name.

    Attributes:
        title: what to call it on a page. higher: whether a larger one is better. meaning: in words.
    """

    title: str
    higher: bool
    meaning: str


METRICS: dict[str, Metric] = {
    "average_performance": Metric("Average performance (OP, ACC)", True, "mean over all tasks after the last one"),
    "average_incremental": Metric(
        "Average incremental accuracy", True, "mean over the tasks learnt so far, averaged over all moments"
    ),
    "learning_accuracy": Metric("Learning accuracy", True, "mean of each task right after it was learnt"),
    "backward_transfer": Metric(
        "Backward transfer (GEM)", True, "last score minus that right after learning; below 0 is forgetting"
    ),
    "trace_backward_transfer": Metric(
        "Backward transfer (TRACE)", False, "mean loss since learning, gains not counted; above 0 is forgetting"
    ),
    "forgetting": Metric("Forgetting", False, "best earlier score minus the last; above 0 is forgetting"),
    "forward_transfer": Metric("Forward transfer (GEM)", True, "score just before learning, minus zero shot"),
    "gain_over_alone": Metric(
        "Gain over learning alone", True, "score right after learning, minus that of a model with this task alone"
    ),
    "transfer": Metric("Transfer (MTIL, X-TAIL)", True, "mean of the scores of tasks before they are learnt"),
    "average": Metric("Average (MTIL, X-TAIL)", True, "mean over all tasks and all moments"),
    "last": Metric("Last (MTIL, X-TAIL)", True, "mean over all tasks after the last one"),
}


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """Scores of a sequence of tasks, learnt one after another.

    Attributes:
        tasks: (T,) names, in the order in which they are learnt.
        scores: (T + 1, T) float64 of 0 to 1: R. NaN where not measured.
        alone: (T,) of a model that was trained on the task of this column alone, or ``None``; NaN where not measured.

    Raises:
        DataError: no task, a name twice, another shape, or a score outside 0..1.
    """

    tasks: tuple[str, ...]
    scores: Array
    alone: Array | None = None

    def __post_init__(self) -> None:
        count = len(self.tasks)
        if not count or len(set(self.tasks)) < count:
            raise DataError(
                f"an accuracy matrix needs tasks of different names, got: {', '.join(self.tasks) or 'none'}"
            )
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "scores", _checked("scores", self.scores, (count + 1, count)))
        if self.alone is not None:
            object.__setattr__(self, "alone", _checked("alone", self.alone, (count,)))

    @property
    def learnt(self) -> Array:
        """(T, T): the matrix without the zero-shot row; [i, j] after task i, counted from 0."""
        return self.scores[1:]

    @property
    def average_performance(self) -> float:
        """Mean over all tasks of the last row: GEM's ACC, TRACE's OP, the AP of SAPT and O-LoRA. Higher is better."""
        return float(self.learnt[-1].mean())

    @property
    def average_incremental(self) -> float:
        """Mean over i = 1..T of the mean over the tasks learnt by then (iCaRL). Higher is better."""
        return float(self.average_so_far().mean())

    @property
    def learning_accuracy(self) -> float:
        """Mean of R[j, j]: how well each task is learnt, whatever becomes of it later (MER). Higher is better."""
        return float(np.diagonal(self.learnt).mean())

    @property
    def backward_transfer(self) -> float:
        """Mean over j < T of R[T, j] - R[j, j] (GEM). Below 0 is forgetting, above 0 later tasks helped.

        SAPT's code divides by T instead of T - 1: take (T - 1) / T of this.
        """
        changes = self._changes[:-1]
        return float(changes.mean()) if changes.size else NAN

    @property
    def trace_backward_transfer(self) -> float:
        """Mean over all T tasks of max(R[j, j] - R[T, j], 0): above 0 is forgetting, so lower is better.

        What MoRAM's tables for TRACE call backward transfer (``TRACE/inference/collect_results.py``, which prints it
        with a minus sign). Against GEM's the sign is the other, gains count as 0, and the last task counts too.
        """
        return float(np.maximum(-self._changes, 0).mean())

    @property
    def forgetting(self) -> float:
        """Mean over j < T of max over 1 <= i < T of R[i, j], minus R[T, j] (Chaudhry et al.). Lower is better.

        Rows before task j was learnt count where they were measured; those from then on have to be.
        """
        before_last, last = self.learnt[:-1], self.learnt[-1]
        lost = []
        for task in range(len(self.tasks) - 1):
            earlier = np.fmax.reduce(before_last[:task, task], initial=-np.inf)
            # max() keeps a NaN that comes first, as one of a row that has to be measured does.
            lost.append(max(before_last[task:, task].max(), earlier) - last[task])
        return float(np.mean(lost)) if lost else NAN

    @property
    def forward_transfer(self) -> float:
        """:meth:`forward_transfer_from` the zero-shot row, which is what a pretrained model knows without any task."""
        return self.forward_transfer_from(self.scores[0])

    def forward_transfer_from(self, baseline: ArrayLike) -> float:
        """Mean over j = 2..T of R[j - 1, j] - b[j] (GEM). Above 0: earlier tasks helped one that was not learnt yet.

        Args:
            baseline: (T,) b; GEM has that of a model with random weights.
        """
        ahead = np.diagonal(self.scores[1:], offset=1) - np.asarray(baseline, dtype=np.float64)[1:]
        return float(ahead.mean()) if ahead.size else NAN

    @property
    def gain_over_alone(self) -> float:
        """Mean of R[j, j] - alone[j], which SAPT calls forward transfer. Above 0: earlier tasks helped to learn."""
        return NAN if self.alone is None else float((np.diagonal(self.learnt) - self.alone).mean())

    @property
    def transfer(self) -> float:
        """Mean over j = 2..T of the mean over 1 <= i < j of R[i, j] (ZSCL, MTIL, X-TAIL). Higher is better.

        How well tasks are done before they are learnt, the zero-shot row left out; each task counts alike.
        """
        columns = [self.learnt[:task, task].mean() for task in range(1, len(self.tasks))]
        return float(np.mean(columns)) if columns else NAN

    @property
    def average(self) -> float:
        """Mean of all R[i, j] with i >= 1, learnt or not (ZSCL, MTIL, X-TAIL). Higher is better."""
        return float(self.learnt.mean())

    @property
    def last(self) -> float:
        """The last row's mean under the name that ZSCL, MTIL and X-TAIL have for it. Higher is better."""
        return self.average_performance

    @property
    def _changes(self) -> Array:
        """(T,) R[T, j] - R[j, j]."""
        changes: Array = self.learnt[-1] - np.diagonal(self.learnt)
        return changes

    def average_so_far(self) -> Array:
        """(T,) after each task, the mean over the tasks that were learnt by then."""
        return np.array([self.learnt[task, : task + 1].mean() for task in range(len(self.tasks))])

    def average_to_come(self) -> Array:
        """(T,) before each task is learnt, that is after 0..T - 1 of them, the mean over those that are to come."""
        return np.array([self.scores[task, task:].mean() for task in range(len(self.tasks))])

    def metrics(self) -> dict[str, float]:
        """Every number of :data:`METRICS` by name."""
        return {name: getattr(self, name) for name in METRICS}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, ``None`` where not measured; read back by :meth:`from_json`."""
        alone = None if self.alone is None else plain(self.alone)
        return {"tasks": list(self.tasks), "scores": plain(self.scores), "alone": alone}

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read ``R.json``.

        Raises:
            DataError: no such file, or no accuracy matrix.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            alone = values["alone"]
            return cls(values["tasks"], _array(values["scores"]), None if alone is None else _array(alone))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}: expected an accuracy matrix as R.json holds it ({what})") from None


def plain(values: Array) -> list[Any]:
    """Nested lists with ``None`` for NaN."""
    cells = values.astype(object)
    cells[np.isnan(values)] = None
    return list(cells.tolist())


def _array(values: Sequence[Any]) -> Array:
    return np.array(values, dtype=np.float64)


def _checked(name: str, values: ArrayLike, shape: tuple[int, ...]) -> Array:
    """A copy that nobody can write to."""
    array = np.array(values, dtype=np.float64)
    if array.shape != shape:
        raise DataError(f"{name} of an accuracy matrix of {shape[-1]} tasks have the shape {shape}, got {array.shape}")
    wrong = array[(array < 0) | (array > 1)]
    if wrong.size:
        raise DataError(f"{name} are parts of 1 and lie between 0 and 1, got {wrong[0]:g}: divide percentages by 100")
    array.flags.writeable = False
    return array
