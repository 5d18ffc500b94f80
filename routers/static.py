"""Weights that are the same for every token: CAT of LoRA Soups, a uniform mix, a plain sum, or the user's own.

Published: Prabhakar et al. 2024 (arXiv 2410.13025), code read at 7ce7a2e (it has no licence): for each linear one
number per adapter, c = softmax of them, and ``W0 x + sum_e c_e s_e B_e A_e x``, trained on a few mixed samples. Since
nothing depends on the token, the mix is one LoRA with the ranks of all, and can be merged into the frozen weight.
LoRAHub (arXiv 2307.13269) and arithmetic merging are the same with given weights; LoRAHub mixes factors.

Shapes: E experts.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo
from .base import Router, RouterConfig


class StaticConfig(RouterConfig):
    """Options of ``static``.

    Attributes:
        weights: ``learned`` is the softmax of one learned number for each expert; ``uniform`` is 1 / E; ``ones``
            adds up all experts; a list gives the weights themselves, which need not sum to 1.
        init: how the learned numbers start: ``normal`` is N(0, 1) as released, ``zeros`` an even mix.
        mix: ``outputs`` weighs what experts add; ``factors`` mixes their factors, as LoRAHub does.
    """

    kind: str = "static"
    weights: Literal["learned", "uniform", "ones"] | Annotated[list[float], Field(min_length=1)] = "learned"
    init: Literal["normal", "zeros"] = "normal"
    mix: Literal["outputs", "factors"] = "outputs"

    def check(self, num_experts: int, total_rank: int) -> None:
        if isinstance(self.weights, list) and len(self.weights) != num_experts:
            raise ValueError(
                f"router.weights lists {len(self.weights)} weights for {num_experts} experts: give one for each"
            )


@ROUTERS.register("static", "cat")
class StaticRouter(Router[StaticConfig]):
    """Weights (..., E), the same for every token.

    Parameters:
        logits: (E,), with learned weights only.
    """

    Config = StaticConfig
    any_width = True

    given: Tensor

    def __init__(self, config: StaticConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        if config.weights == "learned":
            self.logits = nn.Parameter(torch.empty(site.num_experts))
            self.reset_parameters()
        else:
            self._give(None)

    def grow(self, ranks: tuple[int, ...], scales: tuple[float, ...]) -> None:
        super().grow(ranks, scales)
        self._give(self.given.device)

    def _give(self, device: torch.device | None) -> None:
        """Set the buffer from the configuration and the number of experts."""
        count, weights = self.site.num_experts, self.config.weights
        shared = {"uniform": 1 / count, "ones": 1.0}
        values = [shared[weights]] * count if isinstance(weights, str) else list(weights)
        self.register_buffer("given", torch.tensor(values, device=device), persistent=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.config.weights == "learned":
            with torch.no_grad():
                drawn = torch.zeros(self.logits.shape)
                if self.config.init == "normal":
                    drawn.normal_(generator=generator)
                self.logits.copy_(drawn)

    @property
    def mix(self) -> Literal["outputs", "factors"]:
        return self.config.mix

    def _weights(self) -> Tensor:
        """(E,) float32."""
        return self.logits.float().softmax(dim=-1) if self.config.weights == "learned" else self.given.float()

    def route(self, inputs: RouteInput) -> RoutingRecord:
        weights = self._weights()
        return RoutingRecord(
            indices=None,
            weights=weights.expand(*inputs.hidden_states.shape[:-1], -1),
            num_experts=self.site.num_experts,
            mix=self.config.mix,
            normalized=self.config.weights in ("learned", "uniform"),
        )

    @torch.no_grad()
    def constant_weights(self, context: RoutingContext) -> Tensor | None:
        return self._weights()
