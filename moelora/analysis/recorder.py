"""Counts what the routers of a model decide, while it runs.

Memory does not grow with the number of tokens: a site keeps a table of N tasks by E experts and three more vectors.
Shapes: B batch, S sequence, T = B·S tokens, E experts, K picks, R stacked rank, N tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Self

import torch
from torch import Tensor

from ..errors import DataError
from ..mixture import MoELoRAModel
from ..routing import RoutingContext, RoutingRecord, SiteInfo
from .stats import RoutingStats, SiteStats

NO_TASK = "(no task)"


class RoutingRecorder:
    """Within ``with RoutingRecorder(model) as recorder:`` counts every routing decision of ``model``.

    Padding is left out. A token's task is that of its sequence: pass ``task_ids`` to the model's call, or, where no
    router should see them, name the tasks with :meth:`counting`. Counting goes on where it stopped when the recorder is
    entered again. Recomputed forwards (gradient checkpointing) count once.

    Args:
        model: the mixture to listen to.
        task_names: name of each task id; without names all tokens count as one task.

    Raises:
        DataError: a name is given twice; or, while recording, a task id has no name, or other adapters are active than
            at the beginning.
    """

    def __init__(self, model: MoELoRAModel, task_names: Sequence[str] = ()) -> None:
        if len(set(task_names)) != len(task_names):
            raise DataError(f"task_names lists a name twice: {', '.join(task_names)}; give every task id its own")
        self.model = model
        self.task_names = tuple(task_names)
        self._sites: dict[str, _SiteCounts] = {}
        self._listening: AbstractContextManager[object] | None = None
        self._context: RoutingContext | None = None
        self._task_B: Tensor | None = None
        self._named_B: Tensor | None = None
        self._adapters: list[str] = []
        self._names: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> Self:
        self._listening = self.model.slot.using(listener=self._hear)
        self._listening.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        assert self._listening is not None
        self._listening.__exit__(None, None, None)
        self._listening = None

    @contextmanager
    def counting(self, tasks: Sequence[str]) -> Iterator[None]:
        """Within the block sequences belong to these tasks, whatever ``task_ids`` say, and routers hear nothing of it.

        Args:
            tasks: (B,) the task of each sequence of the batches to come; a single name stands for all sequences.

        Raises:
            DataError: a name that is not in ``task_names``.
        """
        unknown = sorted(set(tasks) - set(self.task_names))
        if unknown:
            raise DataError(f"the recorder knows no task {unknown[0]!r}, but {', '.join(self.task_names)}")
        before, self._context = self._named_B, None
        self._named_B = torch.tensor([self.task_names.index(task) for task in tasks])
        try:
            yield
        finally:
            self._named_B, self._context = before, None

    @torch.no_grad()
    def _hear(self, site: SiteInfo, record: RoutingRecord) -> None:
        context = self.model.slot.context
        if context is not self._context:
            self._check_adapters()
            self._context, self._task_B = context, self._tasks(context)
        counts = self._sites.get(site.name)
        if counts is None:
            counts = _SiteCounts(site, record.num_experts, len(self.task_names) + 1, record.weights.device)
            self._sites[site.name] = counts
        counts.add(record, self._task_B)

    def _check_adapters(self) -> None:
        active = self.model.active_adapters
        if self._adapters == active:
            return
        if self._adapters:
            raise DataError(
                f"this recorder has counted adapter {', '.join(self._adapters)}, and now {', '.join(active)} decides, "
                "whose sites may have the same names: make a recorder for each"
            )
        # What frozen experts are called: no other kind has names.
        self._names = {
            name: tuple(getattr(container.config.experts, "names", None) or ())
            for name, container in self.model.containers().items()
        }
        self._adapters = active

    def _tasks(self, context: RoutingContext) -> Tensor | None:
        """(B,) row of each sequence's task; ``None`` where the tasks have no names."""
        if self._named_B is not None:
            return self._named_B
        ids = context.task_ids
        if ids is None or not self.task_names:
            return None
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.task_names):
            raise DataError(
                f"task_ids hold {int(ids.min())}..{int(ids.max())} but the recorder knows "
                f"0..{len(self.task_names) - 1} ({', '.join(self.task_names)}): give a name for every task id"
            )
        return ids.long()

    def result(self, model: str = "", data: str = "") -> RoutingStats:
        """The totals so far.

        Args:
            model, data: what was measured, in words, for the report.

        Raises:
            DataError: no real token was routed since the recorder was made.
        """
        if not any(float(counts.tokens_N.sum()) for counts in self._sites.values()):
            raise DataError(
                "no routed token was recorded: run the model inside `with RoutingRecorder(model) as recorder:`, on a "
                "batch with real tokens, and make sure that its mixture has a router"
            )
        known = any(float(counts.tokens_N[:-1].sum()) for counts in self._sites.values())
        unknown = any(float(counts.tokens_N[-1]) for counts in self._sites.values())
        rows = [*(range(len(self.task_names)) if known else ()), *([len(self.task_names)] if unknown else ())]
        names = [*self.task_names, NO_TASK if known else "all tokens"]
        order = [name for name in self._names if name in self._sites]
        return RoutingStats(
            model=model or self.model.name_or_path or type(self.model.backbone).__name__,
            data=data,
            tasks=tuple(names[row] for row in rows),
            sites=tuple(self._sites[name].result(rows, self._names[name]) for name in order),
        )


class _SiteCounts:
    """The running totals of one site, whose experts may be single ranks; the last row is for tokens without a task."""

    def __init__(self, site: SiteInfo, experts: int, rows: int, device: torch.device) -> None:
        self.site = site
        self.experts = experts
        self.load_NE = torch.zeros(rows, experts, dtype=torch.float64, device=device)
        self.tokens_N = torch.zeros(rows, dtype=torch.float64, device=device)
        self.entropy = torch.zeros((), dtype=torch.float64, device=device)
        self.margin = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, record: RoutingRecord, task_B: Tensor | None) -> None:
        """Count one record: without a host sync, so that recording does not stall a GPU."""
        experts = self.experts
        tokens = record.weights.shape[:-1].numel()
        real_T = self._real(record, tokens)
        row_T = self._rows(record, task_B, tokens)
        self.tokens_N.index_add_(0, row_T, real_T)
        if record.indices is None:
            weights_TE = record.weights.reshape(tokens, experts).double().abs()
            self.load_NE.index_add_(0, row_T, weights_TE * real_T.unsqueeze(1))
        else:
            chosen_TK = record.indices.reshape(tokens, -1)
            cell = row_T.unsqueeze(1) * experts + chosen_TK.clamp(min=0)
            counted = (chosen_TK >= 0) * real_T.unsqueeze(1)
            self.load_NE.view(-1).scatter_add_(0, cell.reshape(-1), counted.reshape(-1))
        probs = record.dense_weights().abs() if record.probs is None else record.probs
        probs_TE = probs.reshape(tokens, experts).double()
        self._add_confidence(probs_TE / probs_TE.sum(-1, keepdim=True).clamp_min(1e-30), real_T)

    def _real(self, record: RoutingRecord, tokens: int) -> Tensor:
        if record.mask is None:
            return torch.ones(tokens, dtype=torch.float64, device=record.weights.device)
        return record.mask.reshape(-1).to(record.weights.device, torch.float64)

    def _rows(self, record: RoutingRecord, task_B: Tensor | None, tokens: int) -> Tensor:
        device = record.weights.device
        if task_B is None or not task_B.numel() or tokens % task_B.numel():
            return torch.full((tokens,), self.tokens_N.numel() - 1, device=device)
        return task_B.to(device).repeat_interleave(tokens // task_B.numel(), output_size=tokens)

    def _add_confidence(self, probs_TE: Tensor, real_T: Tensor) -> None:
        self.entropy += (torch.special.entr(probs_TE).sum(-1) * real_T).sum()
        best = probs_TE.topk(min(2, probs_TE.shape[-1]), dim=-1).values
        self.margin += ((best[:, 0] - best[:, 1:].sum(-1)) * real_T).sum()

    def result(self, rows: list[int], names: tuple[str, ...]) -> SiteStats:
        tokens = max(float(self.tokens_N.sum()), 1.0)
        most = math.log(self.experts) or 1.0
        load = self.load_NE[rows].tolist()
        return SiteStats(
            name=self.site.name,
            layer=self.site.layer,
            selections=tuple(tuple(row) for row in load),
            tokens=tuple(int(count) for count in self.tokens_N[rows].tolist()),
            entropy=float(self.entropy) / tokens / most,
            margin=float(self.margin) / tokens,
            experts=names if len(names) == self.experts else (),
        )
