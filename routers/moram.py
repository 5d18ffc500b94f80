"""MoRAM: a growing bank of rank-1 experts that choose themselves. First published as MoRA, for continual learning.

Published (arXiv 2506.21035, "Little By Little"; code read at Artificer-AI-Lab/MoRAM aaa51d8, Apache-2.0; not the "MoRA:
High-Rank Updating" of arXiv 2405.12130): the rows of ``lora_A`` are keys and the columns of ``lora_B`` what they stand
for. With z = A x over the R atoms of all tasks so far,

    s = z / |z|                                          the norm over all atoms
    w = softmax over the k largest s of  s / tau         signed; at least 2 are taken
    w_i = 0 where s_i < delta                            in evaluation only, without renormalising
    y = W0 x + scale * sum_i w_i z_i b_i

Nothing is learned but the atoms of the newest task, through z, s and w alike; see expert kind ``rank1``.

Our reading: |z| has a floor, so that x = 0 is no NaN, and k is no more than the atoms there are; the released code has
no floor in one path and fails for few atoms. The scale is the bank's: 1 in the authors' vision code (set alpha to r),
alpha / r in their language code. Atoms that were chosen and then fell below the threshold count as chosen.

A new task's atoms add nothing, but they are no no-op from the second task on: they change the norm and take a share
of the softmax.

Shapes: K picks, R atoms of all tasks.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingRecord
from .base import Router, RouterConfig
from .topk import top_indices


class MoRAMConfig(RouterConfig):
    """Options of ``moram``; the defaults are those of the authors' language code.

    Attributes:
        top_k: k, atoms per token; at least 2 and at most all are taken.
        temperature: tau, divides the scores before the softmax.
        threshold: delta, the score below which a chosen atom is silent in evaluation; above 1 all are.
    """

    kind: str = "moram"
    top_k: Annotated[int, Field(ge=1)] = 8
    temperature: Annotated[float, Field(gt=0)] = 0.03
    threshold: float = 0.2


@ROUTERS.register("moram", "mora_continual")
class MoRAMRouter(Router[MoRAMConfig]):
    """Weights (..., K), which sum to 1 in training and to at most 1 in evaluation. Has no tensors of its own."""

    Config = MoRAMConfig
    level = "rank"
    needs_activations = True

    def route(self, inputs: RouteInput) -> RoutingRecord:
        assert inputs.activations is not None
        scores = F.normalize(inputs.activations.float(), dim=-1)
        indices = None if inputs.replay is None else inputs.replay.indices
        if indices is None:
            indices = top_indices(scores, max(self.config.top_k, 2))
        chosen = scores.gather(-1, indices)
        weights = (chosen / self.config.temperature).softmax(dim=-1)
        if not self.training:
            weights = weights * (chosen >= self.config.threshold)
        return RoutingRecord(indices, weights, self.num_units, "rank", logits=scores)
