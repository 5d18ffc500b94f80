"""Experts by identity: of the token's modality, or of the sequence's task, task type or request. Nothing is learned.

Published: MM-LoRA of Arcana (arXiv 2410.13733), which has an expert for image tokens and one for text; the same line
serves a task's own expert, and one adapter for each request of a batch. TARA (a concept's expert on its own tokens) and
LoRA-Composer (on its own region) are masks of the same kind in diffusion models.

Our reading: an identity without an expert, such as -1, leaves the frozen layer as it is. Generated tokens have the
modality 0, text.

Shapes: B batch, S sequence, E experts, I identities, K experts of one identity.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo
from .base import Router, RouterConfig
from .ids import the_only

FIELDS = {"modality": "modality_mask", "task": "task_ids", "task_type": "task_types", "request": "request_ids"}


class MaskConfig(RouterConfig):
    """Options of ``mask``.

    Attributes:
        by: what identity counts: that of each token's ``modality``, or of each sequence's ``task``, ``task_type`` or
            ``request``.
        table: the experts of identity 0, 1, ...; an empty list is the frozen layer. ``None`` gives each its own number.
        weights: the weights of the experts in ``table``, of the same shape; ``None`` means 1 for each.
    """

    kind: str = "mask"
    by: Literal["modality", "task", "task_type", "request"] = "modality"
    table: Annotated[list[list[Annotated[int, Field(ge=0)]]], Field(min_length=1)] | None = None
    weights: list[list[float]] | None = None

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if self.weights is not None:
            if self.table is None:
                raise ValueError("weights says how much the experts of table count, but there is no table")
            if [len(row) for row in self.weights] != [len(row) for row in self.table]:
                raise ValueError("weights has not the shape of table: give one number for each expert in it")
        for row in self.table or []:
            if len(set(row)) != len(row):
                raise ValueError(f"table names an expert twice in {row}")
        return self

    def needs(self) -> dict[str, str]:
        return {FIELDS[self.by]: "route by something else with router.by"}

    def check(self, num_experts: int, total_rank: int) -> None:
        most = max((expert for row in self.table or [] for expert in row), default=0)
        if most >= num_experts:
            raise ValueError(
                f"router.table names expert {most} but there are {num_experts}: they are 0..{num_experts - 1}"
            )


@ROUTERS.register("mask")
class MaskRouter(Router[MaskConfig]):
    """Indices and weights (..., K) from a table; -1 and 0 where there is no expert.

    Buffers, not saved, since the configuration says them:
        indices: (I + 1, K) int64, weights: (I + 1, K); the last row is for identities without an expert.
    """

    Config = MaskConfig
    any_width = True

    indices: Tensor
    weights: Tensor

    def __init__(self, config: MaskConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        self._tabulate(None)

    def grow(self, ranks: tuple[int, ...], scales: tuple[float, ...]) -> None:
        """As of any router; without a table the new experts have the next identities."""
        super().grow(ranks, scales)
        self._tabulate(self.indices.device)

    def _tabulate(self, device: torch.device | None) -> None:
        """Set the buffers from the configuration and the number of experts."""
        config = self.config
        table = [[expert] for expert in range(self.site.num_experts)] if config.table is None else config.table
        weights = [[1.0] * len(row) for row in table] if config.weights is None else config.weights
        slots = max(1, *(len(row) for row in table))
        indices = [[*row, *[-1] * (slots - len(row))] for row in (*table, [])]
        values = [[*row, *[0.0] * (slots - len(row))] for row in (*weights, [])]
        self.register_buffer("indices", torch.tensor(indices, device=device), persistent=False)
        self.register_buffer("weights", torch.tensor(values, device=device), persistent=False)

    def route(self, inputs: RouteInput) -> RoutingRecord:
        """See the class.

        Raises:
            UserError: the context lacks what ``by`` names, or it does not fit the batch.
        """
        ids = inputs.per_token(inputs.given(FIELDS[self.config.by]))
        none = self.indices.shape[0] - 1
        rows = torch.where((ids >= 0) & (ids < none), ids, none)
        return RoutingRecord(
            indices=self.indices[rows], weights=self.weights.float()[rows], num_experts=self.site.num_experts
        )

    def constant_weights(self, context: RoutingContext) -> Tensor | None:
        """The weights of the identity that the context names, if it names one for all its sequences.

        A modality is each token's own, and is never the same for those that are still to come.
        """
        one = None if self.config.by == "modality" else the_only(getattr(context, FIELDS[self.config.by]))
        if one is None:
            return None
        none = self.indices.shape[0] - 1
        row = one if 0 <= one < none else none
        chosen = self.indices[row]
        dense = self.weights.new_zeros(self.site.num_experts, dtype=torch.float32)
        return dense.index_add_(0, chosen.clamp(min=0), self.weights[row].float() * (chosen >= 0))
