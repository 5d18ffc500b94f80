"""SMoRA: one LoRA of which each rank is an expert, chosen by a linear router.

Published (Zhao et al. 2025, arXiv 2501.15103; code read at StyxXuan/smora 7e7ada1, whose README says MIT): with
s = sigmoid(W x) for each rank, or for each group of ``partition`` neighbouring ranks, and a bias b,

    S   = the k ranks with the largest s + b
    g_i = k (s_i + b_i) / sum over S of (s + b)         for i in S, else 0; the k gates of a token sum to k
    y   = W0 x + (alpha / k) B ((A x) * g)
    b_i += u * sign(mean(c) - c_i)                       c_i: how often rank i was chosen in a step

The paper's first version has a softmax over the k chosen logits in place of the sigmoid.

Our reading: weights are ``g R / k``, so that with the scale alpha / r of a single expert of rank R the factor is the
published alpha / k; with several experts each rank is multiplied by the rank of its expert. The released code lets the
bias into the value of the gate as well, where a bias below -s makes it negative; ``bias_in_value: false`` keeps it to
the choice, as in DeepSeek's balancing without losses. The bias moves once per optimizer step, by the counts of real
tokens over micro-batches and data-parallel ranks; the released code moves it in every training forward, recomputations
included, and counts padding.

Shapes: D in, K picks, R stacked rank, P groups of ranks (R / partition).
"""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingRecord, SiteInfo
from .base import Router, RouterConfig
from .topk import check_top_k, top_indices


class SMoRAConfig(RouterConfig):
    """Options of ``smora``.

    Attributes:
        top_k: k, ranks per token.
        score: ``sigmoid`` as released, or ``softmax_topk``, the softmax over the chosen logits of the paper's first
            version.
        partition: neighbouring ranks that share a row of the router; divides the stacked rank.
        bias_in_value: the bias is added to the value of the gate too, as released; else it takes part in the choice
            only.
        bias_rate: u, by how much the bias of a rank moves in an optimizer step; 0 switches balancing off.
    """

    kind: str = "smora"
    top_k: Annotated[int, Field(ge=1)] = 8
    score: Literal["sigmoid", "softmax_topk"] = "sigmoid"
    partition: Annotated[int, Field(ge=1)] = 1
    bias_in_value: bool = True
    bias_rate: Annotated[float, Field(ge=0)] = 1e-5

    def check(self, num_experts: int, total_rank: int) -> None:
        check_top_k(self.top_k, total_rank, "ranks")
        if total_rank % self.partition:
            raise ValueError(
                f"router.partition is {self.partition} but there are {total_rank} ranks: choose a divisor of that"
            )


@ROUTERS.register("smora")
class SMoRARouter(Router[SMoRAConfig]):
    """Weights (..., K) ``r s_i / sum of the chosen s``, whose mean is what k equal gates would be.

    Parameters:
        weight: (P, D).

    Buffers:
        bias: (R,) float32, b; not trained, moved by :meth:`on_step_end`.
    """

    Config = SMoRAConfig
    level = "rank"

    bias: Tensor
    widths: Tensor

    def __init__(self, config: SMoRAConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        if config.top_k <= config.partition:
            warnings.warn(
                f"router 'smora' with top_k {config.top_k} and partition {config.partition}: the gates of a token sum "
                "to top_k and those of one group are equal, so they are constant and the task teaches the router "
                "nothing; set top_k above partition",
                stacklevel=2,
            )
        self.weight = nn.Parameter(torch.empty(site.total_rank // config.partition, site.in_features))
        self.register_buffer("bias", torch.zeros(site.total_rank))
        widths = [float(rank) for rank in site.ranks for _ in range(rank)]
        self.register_buffer("widths", torch.tensor(widths), persistent=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As ``nn.Linear`` starts."""
        with torch.no_grad():
            drawn = torch.empty(self.weight.shape, dtype=torch.float32)
            self.weight.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))

    def route(self, inputs: RouteInput) -> RoutingRecord:
        logits = F.linear(inputs.hidden_states.float(), self.weight.float())
        logits = logits.repeat_interleave(self.config.partition, dim=-1)
        sigmoid = self.config.score == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits
        shifted = scores + self.bias.float()
        indices = None if inputs.replay is None else inputs.replay.indices
        if indices is None:
            indices = top_indices(shifted, self.config.top_k)
        chosen = (shifted if self.config.bias_in_value else scores).gather(-1, indices)
        share = _shares(chosen) if sigmoid else chosen.softmax(dim=-1)
        return RoutingRecord(
            indices=indices,
            weights=share * self.widths.float()[indices],
            num_experts=self.num_units,
            level="rank",
            logits=logits,
            probs=F.normalize(scores, p=1.0, dim=-1) if sigmoid else logits.softmax(dim=-1),
        )

    @torch.no_grad()
    def on_step_end(self, load: Tensor) -> None:
        """Move each rank's bias by u towards an even load; see the base class."""
        error = (load.mean() - load).sign().to(self.bias)
        self.bias += self.config.bias_rate * error


def _shares(chosen: Tensor) -> Tensor:
    """(..., K) each value over the sum of all; 0 where every sigmoid was too small for float32."""
    total = chosen.sum(dim=-1, keepdim=True)
    return chosen / torch.where(total == 0, 1, total)
