"""The gate that dense, top-k and threshold routers for linears have in common: softmax of a bias-free linear map.

Shapes: D in, E experts.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..routing import RouteInput, SiteInfo
from .base import Router, RouterConfig


class GateConfig(RouterConfig):
    """Options of routers with a plain gate.

    Attributes:
        init: how the gate starts: ``kaiming`` is uniform with a = sqrt(5), as LoRAMoE, HydraLoRA, MoLA and AdaMoLE all
            start theirs; ``normal`` is N(0, init_std).
        init_std: standard deviation of ``normal``.
    """

    init: Literal["kaiming", "normal"] = "kaiming"
    init_std: Annotated[float, Field(ge=0)] = 0.02


GateConfigT = TypeVar("GateConfigT", bound=GateConfig)


class GateRouter(Router[GateConfigT]):
    """A router that starts from ``softmax(x @ weight.T)`` in float32; a subclass writes ``route``.

    Parameters:
        weight: (E, D).
    """

    def __init__(self, config: GateConfigT, site: SiteInfo) -> None:
        super().__init__(config, site)
        self.weight = nn.Parameter(self.drawn(site.num_experts))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            self.weight.copy_(self.drawn(len(self.weight), generator))

    def drawn(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """(rows, D) float32 initial values of a weight matrix, drawn on the CPU."""
        values = torch.empty(rows, self.site.in_features, dtype=torch.float32)
        if self.config.init == "kaiming":
            return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        return nn.init.normal_(values, std=self.config.init_std, generator=generator)

    def gate(self, inputs: RouteInput) -> tuple[Tensor, Tensor]:
        """(..., E) float32 logits, and their softmax."""
        logits = F.linear(inputs.hidden_states.float(), self.weight.float())
        return logits, logits.softmax(dim=-1)
