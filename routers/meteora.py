"""MeteoRA: a linear gate over finished adapters, taught which adapter a task belongs to.

Published: Xu et al. 2024 (arXiv 2405.13053); NJUDeepEngine/meteora 2d192ad, read for its formulas alone (it has no
licence). Every gate is trained with a cross entropy against the task of the token, beside the language model's loss.
The released training script has the adapters learn as well, while the paper freezes them: ``experts.kind`` says which.

Our reading: the released gate starts at N(0, 1), ours at N(0, 0.02), where the cross entropy is about log E. The
released loss pairs the gate of one token with the task of the next, which in a packed row may be another; ours has one
task for each sequence, so ``shift`` only leaves out the last token of each. The temperature divides the logits in
evaluation alone, as in the released scripts, whose path for training has none.

Shapes: B batch, S sequence, D in, E experts, K picks.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import UserError
from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo
from .base import Router, RouterConfig
from .ids import checked
from .losses import pooled_mean, required
from .topk import check_top_k, top_indices


class MeteoRAConfig(RouterConfig):
    """Options of ``meteora``.

    Attributes:
        top_k: adapters per token.
        temperature: divides the chosen logits in evaluation: 1 for one task, 15 to 30 where a prompt has several.
        train_temperature: divide them in training, too.
        gate_loss_coef: factor of ``gate``, beta of the paper; 0 for a gate that learns from the task's loss alone.
        shift: leave the last real token of each sequence out of ``gate``, as the released code does.
        init_std: the gate starts as N(0, init_std).
    """

    kind: str = "meteora"
    top_k: Annotated[int, Field(ge=1)] = 2
    temperature: Annotated[float, Field(gt=0)] = 1.0
    train_temperature: bool = False
    gate_loss_coef: Annotated[float, Field(ge=0)] = 50.0
    shift: bool = False
    init_std: Annotated[float, Field(ge=0)] = 0.02

    def check(self, num_experts: int, total_rank: int) -> None:
        check_top_k(self.top_k, num_experts)

    def refuses_packing(self) -> str | None:
        return "the loss 'gate' goes by the task of a row: set gate_loss_coef to 0" if self.gate_loss_coef > 0 else None

    def coefficients(self) -> dict[str, float]:
        return {"gate": self.gate_loss_coef}


@ROUTERS.register("meteora")
class MeteoRARouter(Router[MeteoRAConfig]):
    """Weights (..., K) = softmax of the k largest logits ``x @ weight.T``; loss ``gate``.

    With one adapter per token the weight is 1 whatever the logit, so that the gate learns from ``gate`` alone; a
    warning says so.

    Parameters:
        weight: (E, D).
    """

    Config = MeteoRAConfig
    task_ids = "experts"

    def __init__(self, config: MeteoRAConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        if config.top_k == 1:
            rest = "it learns from the loss 'gate' alone" if config.gate_loss_coef > 0 else "it learns nothing at all"
            warnings.warn(
                f"router 'meteora' with top_k 1 always weighs by 1: the task's loss gives the gate no gradient, {rest}",
                stacklevel=2,
            )
        self.weight = nn.Parameter(torch.empty(site.num_experts, site.in_features))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            drawn = torch.empty(self.weight.shape, dtype=torch.float32)
            self.weight.copy_(nn.init.normal_(drawn, std=self.config.init_std, generator=generator))

    def route(self, inputs: RouteInput) -> RoutingRecord:
        logits = F.linear(inputs.hidden_states.float(), self.weight.float())
        indices = None if inputs.replay is None else inputs.replay.indices
        if indices is None:
            indices = top_indices(logits, self.config.top_k)
        hot = self.config.train_temperature or not self.training
        temperature = self.config.temperature if hot else 1.0
        return RoutingRecord(
            indices=indices,
            weights=(logits.gather(-1, indices) / temperature).softmax(dim=-1),
            num_experts=self.site.num_experts,
            normalized=True,
            logits=logits,
        )

    def losses(self, records: list[RoutingRecord], context: RoutingContext) -> dict[str, Tensor]:
        """``gate``: mean over gates and real tokens of the cross entropy of the logits against ``task_ids`` (B,).

        A sequence with the id -1 has no task and does not count. Without ids there is no such loss.

        Raises:
            UserError: in training, with a coefficient above 0, there are no ids, or they do not fit.
        """
        ids = context.task_ids
        if ids is None:
            if self.training and self.config.gate_loss_coef > 0:
                raise UserError(
                    "router 'meteora' learns which adapter a task belongs to, and needs task_ids for it: pass "
                    "model(..., task_ids=...) with one for each sequence, or set router.gate_loss_coef to 0"
                )
            return {}
        checked(ids, self.site.num_experts, "task_ids", least=-1)
        terms = [self._cross_entropy(record, ids.to(record.weights.device)) for record in records]
        masks, values = [mask for mask, _ in terms], [value for _, value in terms]
        masked = [replace(record, mask=mask) for record, mask in zip(records, masks, strict=True)]
        return {"gate": pooled_mean(masked, values).squeeze(0)}

    def _cross_entropy(self, record: RoutingRecord, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) bool, the tokens that count, and their cross entropies (B, S, 1)."""
        logits = required(record.logits)
        batch = ids.numel()
        if ids.dim() != 1 or logits[..., 0].numel() % max(batch, 1):
            raise UserError(
                f"task_ids has the shape {tuple(ids.shape)}, which does not fit {logits[..., 0].numel()} tokens: give "
                "one for each sequence"
            )
        length = logits[..., 0].numel() // max(batch, 1)
        logits = logits.reshape(batch, length, logits.shape[-1])
        known = (ids >= 0).unsqueeze(-1).expand(logits.shape[:-1])
        if record.mask is not None:
            known = known & record.mask.reshape(known.shape)
        if self.config.shift:
            known = known & F.pad(known[:, 1:], (0, 1))
        task = ids.clamp(min=0).view(batch, 1, 1).expand(*logits.shape[:-1], 1)
        return known, logits.logsumexp(dim=-1, keepdim=True) - logits.gather(-1, task)
