"""FlyLoRA: each rank is an expert, and the fixed sparse ``lora_A`` is the router.

Published (Zou et al. 2025, arXiv 2510.08396; code read at gfyddha/FlyLoRA 91d9e36, which has no licence): with z = A x,

    y = W0 x + (alpha / r) * sum over the k chosen ranks i of  b_i z_i            (equation 11)
    d_i += u * sign(mean(c) - c_i)                                                (equation 9)

where c_i is how often rank i was chosen in a step and the bias d takes part in the choice only. The sources disagree on
the choice: the text and equations 7-8 take the largest |z|, equation 10 and the authors' fork of PEFT the largest
z + d, and the stand-alone ``flylora.py`` the largest |z + d|, where a rank with a very negative d is chosen all the
more, so that the bias cannot balance anything.

Our reading: the default chooses by |z| + d, which is the text's magnitude with a bias that works. The bias moves once
per optimizer step, by the counts of real tokens over micro-batches and data-parallel ranks. The released code moves it
in every forward, in evaluation and in recomputations as well, and ``flylora.py`` compares counts with a frequency.

Shapes: E experts, K picks, R stacked rank, r rank of one expert.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo
from .base import Router, RouterConfig
from .topk import check_top_k, top_indices


class FlyLoRAConfig(RouterConfig):
    """Options of ``flylora``.

    Attributes:
        top_k: k, ranks per token.
        select: what the choice goes by: ``abs`` is |z| + d, ``signed`` is z + d as in the fork of PEFT, ``abs_shifted``
            is |z + d| as in flylora.py, for its numbers only: its bias does not balance.
        bias_rate: u, by how much the bias of a rank moves in an optimizer step; 0 switches balancing off.
        within: among which ranks ``top_k`` are chosen: those of the whole ``site``, or those of each ``expert``, which
            routes stacked tasks by themselves (an expert of fewer ranks has all of them chosen).
    """

    kind: str = "flylora"
    top_k: Annotated[int, Field(ge=1)] = 8
    select: Literal["abs", "signed", "abs_shifted"] = "abs"
    bias_rate: Annotated[float, Field(ge=0)] = 1e-3
    within: Literal["site", "expert"] = "site"

    def check(self, num_experts: int, total_rank: int) -> None:
        check_top_k(self.top_k, total_rank, "ranks")


@ROUTERS.register("flylora")
class FlyLoRARouter(Router[FlyLoRAConfig]):
    """Weights (..., K) of 1 for the chosen ranks; the bank's alpha / r is the scale.

    Buffers:
        bias: (R,) float32, d; not trained, moved by :meth:`on_step_end`.
    """

    Config = FlyLoRAConfig
    level = "rank"
    needs_activations = True

    bias: Tensor

    def __init__(self, config: FlyLoRAConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        self.register_buffer("bias", torch.zeros(site.total_rank))

    @property
    def blocks(self) -> list[int]:
        """Sizes of the blocks of ranks within which ranks compete."""
        return [self.site.total_rank] if self.config.within == "site" else list(self.site.ranks)

    def route(self, inputs: RouteInput) -> RoutingRecord:
        assert inputs.activations is not None
        indices = None if inputs.replay is None else inputs.replay.indices
        if indices is None:
            indices = self.choose(inputs.activations.detach().float())
        return RoutingRecord(indices, indices.new_ones(indices.shape, dtype=torch.float32), self.num_units, "rank")

    def choose(self, z: Tensor) -> Tensor:
        """(..., K) int64 ranks for activations (..., R) in float32."""
        if self.config.select == "abs":
            scores = z.abs() + self.bias
        elif self.config.select == "signed":
            scores = z + self.bias
        else:
            scores = (z + self.bias).abs()
        chosen, start = [], 0
        for part in scores.split(self.blocks, dim=-1):
            chosen.append(top_indices(part, self.config.top_k) + start)
            start += part.shape[-1]
        return torch.cat(chosen, dim=-1)

    @torch.no_grad()
    def on_step_end(self, load: Tensor) -> None:
        """Move each rank's bias by u towards an even load; see the base class."""
        load = load.to(self.bias.device)
        error = torch.cat([part.mean() - part for part in load.split(self.blocks)])
        self.bias += self.config.bias_rate * error.sign().to(self.bias.dtype)

    def constant_weights(self, context: RoutingContext) -> Tensor | None:
        """(E,) ones where every rank is always chosen."""
        return self._ones(self.site.num_experts) if self.config.top_k >= max(self.blocks) else None

    def approximate_weights(self, context: RoutingContext) -> Tensor:
        """(R,) ones: the paper merges all ranks (equation 12) although it routes to k of them."""
        return self._ones(self.num_units)

    def _ones(self, count: int) -> Tensor:
        return self.bias.new_ones(count, dtype=torch.float32)
