"""Top-p ("dynamic") routing of MixLoRA: keep experts until their probabilities add up to p.

Source: TUDB-Labs/MoE-PEFT 40f8cb7, ``mixlora-dynamic``. The kept probabilities are not renormalised, so the weights of
a token sum to less than 1 and the block's output shrinks; ``normalize: true`` is our own option. The released loss
counts padding, ours does not.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..registry import ROUTERS
from ..routing import RoutingContext
from .base import LinearRouter, LinearRouterConfig


class TopPConfig(LinearRouterConfig):
    """Options of ``topp``.

    Attributes:
        top_p: experts are taken, most probable first, until their sum exceeds ``top_p``; the one that crosses is kept.
        temperature: divides the probabilities (not the logits, and without renormalising) when above 0.
        normalize: divide the kept weights by their sum.
    """

    kind: str = "topp"
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.8
    temperature: Annotated[float, Field(ge=0)] = 0.0
    normalize: bool = False


@ROUTERS.register("topp", "dynamic", "mixlora-dynamic")
class TopPRouter(LinearRouter[TopPConfig]):
    """Weights (..., E), most probable first; slots that are not kept have index -1 and weight 0."""

    Config = TopPConfig
    weighs = "outputs"

    @property
    def sums_to_one(self) -> bool:
        return self.config.normalize

    def scores(self, probs: Tensor) -> Tensor:
        return probs / self.config.temperature if self.config.temperature > 0 else probs

    def choose(self, scores: Tensor, context: RoutingContext) -> Tensor:
        ordered, indices = scores.sort(dim=-1, descending=True, stable=True)
        over = ordered.cumsum(dim=-1) > self.config.top_p
        # The expert that crosses p is kept: an expert goes only if the one before it was already over.
        drop = torch.zeros_like(over)
        drop[..., 1:] = over[..., :-1]
        return indices.masked_fill(drop, -1)
