"""Top-k routing of MixLoRA and Mixtral: softmax over all experts, keep the k largest, renormalise.

Source: Li et al. 2024 (arXiv 2404.15159), equations 3-4 and 6-8; TUDB-Labs/MixLoRA d59d09b.
Differences from the released code: padding never enters a loss, jitter is training-only and touches the router's input
alone, and ties go to the lower index on every device.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord
from .base import LinearRouter, LinearRouterConfig
from .losses import load_balance, router_z


class TopKConfig(LinearRouterConfig):
    """Options of ``topk``.

    Attributes:
        top_k: experts per token.
        normalize: divide the kept probabilities by their sum, so that the weights of a token sum to 1.
    """

    kind: str = "topk"
    top_k: Annotated[int, Field(ge=1)] = 2
    normalize: bool = True

    def check(self, num_experts: int) -> None:
        if self.top_k > num_experts:
            raise ValueError(
                f"router.top_k is {self.top_k} but there are {num_experts} experts: choose 1..{num_experts}"
            )


@ROUTERS.register("topk", "mixlora")
class TopKRouter(LinearRouter[TopKConfig]):
    """Weights (..., K) = top-k of softmax(x W^T), divided by their sum; losses ``load_balance`` and ``router_z``."""

    Config = TopKConfig

    def route(self, inputs: RouteInput) -> RoutingRecord:
        logits, noise = self.logits(inputs)
        probs = logits.softmax(dim=-1)
        indices = inputs.replay.indices if inputs.replay is not None else None
        if indices is None:
            indices = top_indices(probs, self.config.top_k)
        weights = probs.gather(-1, indices)
        if self.config.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return RoutingRecord(
            indices=indices,
            weights=weights,
            num_experts=self.site.num_experts,
            normalized=self.config.normalize,
            logits=logits,
            probs=probs,
            noise=noise,
        )

    def losses(self, records: list[RoutingRecord], context: RoutingContext) -> dict[str, Tensor]:
        return {"load_balance": load_balance(records, context), "router_z": router_z(records)}


def top_indices(scores: Tensor, k: int) -> Tensor:
    """(..., k) int64: the k largest of (..., E), largest first; ties go to the lower index, on every device."""
    return scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
