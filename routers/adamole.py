"""Threshold routing of AdaMoLE: experts whose probability reaches a threshold that the token itself sets.

Source: Liu and Luo 2024 (arXiv 2405.00361), zefang-liu/AdaMoLE 5e8599a. With p the softmax over all experts:

* ``tau = max_threshold * sigmoid(v x + b)``, one number for each token;
* expert e is kept where ``p_e - tau >= 0``, and its weight is ``p_e - tau`` over the sum of the kept;
* a token that keeps none gets no update.

With ``threshold`` the number is fixed, experts are kept where ``p_e >= threshold`` and weighed by p_e over the sum of
the kept: the same repository's MoLE with a threshold. The loss is Switch's with the scores that weigh in place of p,
over each site by itself, summed over sites. Padding counts in the released loss; here it does not.

Shapes: D in, E experts.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo
from .gate import GateConfig, GateRouter
from .losses import pooled_mean, required, rows

Fraction = Annotated[float, Field(gt=0, le=1)]


class AdaMoLEConfig(GateConfig):
    """Options of ``adamole``.

    Attributes:
        max_threshold: the largest threshold; ``None`` means 1/E, below which a token always keeps an expert.
        threshold: a fixed threshold in place of the learnt one (MoLE).
        aux_loss_coef: factor of ``load_balance``.
    """

    kind: str = "adamole"
    max_threshold: Fraction | None = None
    threshold: Fraction | None = None
    aux_loss_coef: Annotated[float, Field(ge=0)] = 0.01

    def check(self, num_experts: int, total_rank: int) -> None:
        if self.threshold is not None and self.max_threshold is not None:
            raise ValueError(
                f"router.threshold is {self.threshold} and router.max_threshold is {self.max_threshold}: a threshold "
                "is either fixed or learnt, drop one"
            )

    def coefficients(self) -> dict[str, float]:
        return {"load_balance": self.aux_loss_coef}


@ROUTERS.register("adamole")
class AdaMoLERouter(GateRouter[AdaMoLEConfig]):
    """Weights (..., E) in the order of the experts; those that are not kept have index -1 and weight 0.

    Parameters:
        weight: (E, D). threshold_weight: (1, D), threshold_bias: (1,), both absent with a fixed threshold.
    """

    Config = AdaMoLEConfig
    threshold_weight: nn.Parameter | None
    threshold_bias: nn.Parameter | None

    def __init__(self, config: AdaMoLEConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        learnt = config.threshold is None
        self.threshold_weight = nn.Parameter(self.drawn(1)) if learnt else None
        self.threshold_bias = nn.Parameter(self._drawn_bias()) if learnt else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        if self.threshold_weight is not None and self.threshold_bias is not None:
            with torch.no_grad():
                self.threshold_weight.copy_(self.drawn(1, generator))
                self.threshold_bias.copy_(self._drawn_bias(generator))

    def _drawn_bias(self, generator: torch.Generator | None = None) -> Tensor:
        """(1,) as ``nn.Linear`` starts its bias."""
        bound = 1 / math.sqrt(self.site.in_features)
        return torch.empty(1).uniform_(-bound, bound, generator=generator)

    def route(self, inputs: RouteInput) -> RoutingRecord:
        logits, probs = self.gate(inputs)
        scores, over = self._scores(inputs.hidden_states, probs)
        indices = None if inputs.replay is None else inputs.replay.indices
        if indices is None:
            every = torch.arange(self.site.num_experts, device=probs.device)
            indices = torch.where(over.detach() >= 0, every, -1)
        kept = torch.where(indices >= 0, scores, 0)
        total = kept.sum(dim=-1, keepdim=True)
        return RoutingRecord(
            indices=indices,
            weights=kept / torch.where(total == 0, 1, total),
            num_experts=self.site.num_experts,
            logits=logits,
            probs=probs,
            scores=scores,
        )

    def _scores(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """(..., E) what experts are weighed by, and by how much they are over the threshold."""
        if self.threshold_weight is None or self.threshold_bias is None:
            assert self.config.threshold is not None
            return probs, probs - self.config.threshold
        most = self.config.max_threshold or 1 / self.site.num_experts
        tau = F.linear(hidden_states.float(), self.threshold_weight.float(), self.threshold_bias.float()).sigmoid()
        over = probs - tau * most
        return over, over

    def losses(self, records: list[RoutingRecord], context: RoutingContext) -> dict[str, Tensor]:
        """``load_balance``: ``E * sum_e f_e s_e`` of each site, summed over sites.

        f_e is the share of real tokens that keep expert e, s_e the mean over real tokens of its score, kept or not:
        ``p_e - tau``, or p_e with a fixed threshold.
        """
        each = []
        for record in records:
            mean_E = pooled_mean([record], [required(record.scores)])
            share_E = record.counts() / rows([record])
            each.append(record.num_experts * torch.dot(share_E.to(mean_E), mean_E))
        return {"load_balance": torch.stack(each).sum()}
