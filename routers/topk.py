"""Top-k routing of MixLoRA and Mixtral: softmax over all experts, keep the k largest, renormalise.

Source: Li et al. 2024 (arXiv 2404.15159), equations 3-4 and 6-8; TUDB-Labs/MixLoRA d59d09b.
Differences from the released code: padding never enters a loss, jitter is training-only and touches the router's input
alone, and ties go to the lower index on every device.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..registry import ROUTERS
from ..routing import RoutingContext
from .base import LinearRouter, LinearRouterConfig


class TopKConfig(LinearRouterConfig):
    """Options of ``topk``.

    Attributes:
        top_k: experts per token.
        normalize: divide the kept probabilities by their sum, so that the weights of a token sum to 1.
    """

    kind: str = "topk"
    top_k: Annotated[int, Field(ge=1)] = 2
    normalize: bool = True

    def check(self, num_experts: int, total_rank: int) -> None:
        check_top_k(self.top_k, num_experts)


@ROUTERS.register("topk", "mixlora")
class TopKRouter(LinearRouter[TopKConfig]):
    """Weights (..., K) = top-k of softmax(x W^T), divided by their sum; losses ``load_balance`` and ``router_z``."""

    Config = TopKConfig
    weighs = "outputs"

    @property
    def sums_to_one(self) -> bool:
        return self.config.normalize

    def choose(self, scores: Tensor, context: RoutingContext) -> Tensor:
        return top_indices(scores, self.config.top_k)


def check_top_k(top_k: int, count: int, what: str = "experts") -> None:
    """Raise ``ValueError`` where ``top_k`` exceeds ``count``; ``what`` is counted."""
    if top_k > count:
        raise ValueError(f"router.top_k is {top_k} but there are {count} {what}: choose 1..{count}")


def top_indices(scores: Tensor, k: int) -> Tensor:
    """(..., k) int64: the k largest of (..., E), largest first; ties go to the lower index, on every device.

    ``torch.topk`` promises nothing about ties.
    """
    scores = scores.detach()
    if 4 * k > scores.shape[-1] or scores.numel() < 1024:  # measured: a sort is quicker than so many passes
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # What is taken becomes -inf, below whatever is left.
    left = scores.clamp(min=torch.finfo(scores.dtype).min)
    chosen = []
    for _ in range(k):
        chosen.append(left.argmax(dim=-1, keepdim=True))  # the first of equals, as its documentation promises
        left.scatter_(-1, chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=-1)
