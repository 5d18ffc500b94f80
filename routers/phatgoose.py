"""PHATGOOSE: one vector for each finished adapter, learnt beside that adapter alone, then compared with the input.

Published: Muqeeth et al. 2024 (arXiv 2402.05859); r-three/phatgoose 4fd5790 and mttl 3724abf. After an adapter is
trained, everything is frozen and a gate v is trained on the adapter's own data, with the update weighed by
sigmoid(v . x). To compose adapters, v and x are normalised and multiplied, and the two best adapters share the softmax.

Our reading: ``phase="gate"`` of the routing context is the first stage, for all adapters in one run: a sequence trains
the vector of its own task. Any other phase composes.

Shapes: D in, E experts, K picks.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingRecord, SiteInfo
from .base import Router, RouterConfig
from .ids import checked
from .topk import check_top_k, top_indices


class PhatgooseConfig(RouterConfig):
    """Options of ``phatgoose``. Attributes: top_k: adapters per token when composing."""

    kind: str = "phatgoose"
    top_k: Annotated[int, Field(ge=1)] = 2

    def check(self, num_experts: int, total_rank: int) -> None:
        check_top_k(self.top_k, num_experts)


@ROUTERS.register("phatgoose")
class PhatgooseRouter(Router[PhatgooseConfig]):
    """Composes by the softmax of the k largest ``layernorm(v) . layernorm(x) / sqrt(D)``.

    In the phase ``gate`` a token has one expert, that of its sequence's task (-1 for none), with the weight
    sigmoid(v . x). A fresh v is zero, so that every adapter counts half there.

    Parameters:
        weight: (E, D), v of each expert.
    """

    Config = PhatgooseConfig
    task_ids = "experts"
    train_phase = "gate"

    def __init__(self, config: PhatgooseConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        self.weight = nn.Parameter(torch.zeros(site.num_experts, site.in_features))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.zeros_(self.weight)

    def route(self, inputs: RouteInput) -> RoutingRecord:
        """See the class.

        Raises:
            UserError: in the phase ``gate`` there are no ``task_ids``, or they do not fit.
        """
        if inputs.context.phase == self.train_phase:
            return self._train_gates(inputs)
        hidden, width = inputs.hidden_states.float(), self.weight.shape[1]
        logits = F.linear(F.layer_norm(hidden, (width,)), F.layer_norm(self.weight.float(), (width,)))
        logits = logits / math.sqrt(width)
        indices = None if inputs.replay is None else inputs.replay.indices
        if indices is None:
            indices = top_indices(logits, self.config.top_k)
        return RoutingRecord(
            indices=indices,
            weights=logits.gather(-1, indices).softmax(dim=-1),
            num_experts=self.site.num_experts,
            normalized=True,
            logits=logits,
            probs=logits.softmax(dim=-1),
        )

    def _train_gates(self, inputs: RouteInput) -> RoutingRecord:
        ids = checked(inputs.given("task_ids"), self.site.num_experts, "task_ids", least=-1)
        indices = inputs.per_token(ids).unsqueeze(-1)
        logits = F.linear(inputs.hidden_states.float(), self.weight.float())
        weights: Tensor = logits.gather(-1, indices.clamp(min=0)).sigmoid() * (indices >= 0)
        return RoutingRecord(indices=indices, weights=weights, num_experts=self.site.num_experts, logits=logits)
