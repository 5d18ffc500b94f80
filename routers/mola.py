"""Top-k routing of MoLA at linears: softmax, the k largest kept and renormalised, balanced layer by layer.

Source: Gao et al. 2024 (arXiv 2402.08562), GCYZSL/MoLA 01785c8; TUDB-Labs/MoE-PEFT 40f8cb7 for ``balance: pooled``.
The number of experts grows from the lower to the upper layers: one site configuration for each part of the backbone,
with ``layers``; see the card.

The authors pool the rows of all adapted projections of a layer, divide the counts by their sum, so that a balanced
layer has the loss 1 whatever k is, and sum over layers; their factor is 0.001 and the loss is off by default. MoE-PEFT
takes MixLoRA's loss instead, pooled over all layers, with the balanced value k. Padding counts in the authors' code;
here it does not.

Shapes: E experts, K picks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord
from .gate import GateConfig, GateRouter
from .losses import load_balance
from .topk import check_top_k, top_indices


class MoLAConfig(GateConfig):
    """Options of ``mola``.

    Attributes:
        top_k: experts per token.
        aux_loss_coef: factor of ``load_balance``; the authors' is 0.001 where they switch it on.
        balance: ``per_layer`` as the authors do, over the rows of each layer, summed; ``pooled`` as MoE-PEFT does,
            over the rows of all layers. A layer's sites count together where they are of one site configuration.
    """

    kind: str = "mola"
    top_k: Annotated[int, Field(ge=1)] = 2
    aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    balance: Literal["per_layer", "pooled"] = "per_layer"

    def check(self, num_experts: int, total_rank: int) -> None:
        check_top_k(self.top_k, num_experts)

    def coefficients(self) -> dict[str, float]:
        return {"load_balance": self.aux_loss_coef}


@ROUTERS.register("mola")
class MoLARouter(GateRouter[MoLAConfig]):
    """Weights (..., K) = top-k of softmax(x W^T), divided by their sum; loss ``load_balance``."""

    Config = MoLAConfig

    def route(self, inputs: RouteInput) -> RoutingRecord:
        logits, probs = self.gate(inputs)
        indices = None if inputs.replay is None else inputs.replay.indices
        if indices is None:
            indices = top_indices(probs, self.config.top_k)
        weights = probs.gather(-1, indices)
        return RoutingRecord(
            indices=indices,
            weights=weights / weights.sum(dim=-1, keepdim=True),
            num_experts=self.site.num_experts,
            normalized=True,
            logits=logits,
            probs=probs,
            layer=inputs.site.layer,
        )

    def losses(self, records: list[RoutingRecord], context: RoutingContext) -> dict[str, Tensor]:
        """``load_balance``: ``E * sum_e f_e q_e``, as ``balance`` says.

        A step's ``load_share`` is that of all layers together, so that only ``pooled`` can balance a whole step.
        """
        if self.config.balance == "pooled":
            return {"load_balance": load_balance(records, context)}
        layers: dict[int | None, list[RoutingRecord]] = {}
        for record in records:
            layers.setdefault(record.layer, []).append(record)
        alone = replace(context, load_share=None)
        each = [load_balance(members, alone) / self.config.top_k for members in layers.values()]
        return {"load_balance": torch.stack(each).sum()}
