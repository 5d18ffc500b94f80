"""Dense softmax routing of LoRAMoE and HydraLoRA: every expert, weighed by its probability.

Sources: Dou et al. 2023 (arXiv 2312.09979), Ablustrund/LoRAMoE 1177288; Tian et al. 2024 (arXiv 2404.19245),
Clin0212/HydraLoRA afb693b, whose router is the same and has no loss.

LoRAMoE's localized balancing constraint, for one router and a micro-batch, with w the weights of expert n:

* ``Q[b, n] = sum over the sequence of w``, the importance of expert n in sequence b;
* ``I[b, n] = 1 + delta`` where expert n belongs to the type of sequence b, else ``1 - delta``;
* ``Z = I * Q``, and the loss is ``var(Z) / mean(Z)^2`` over its B·E values (unbiased variance), summed over routers.

The released code squares the mean; the paper's text was not at hand, and is commonly quoted with ``var(Z) / mean(Z)``,
which ``form`` offers. There padding counts as well as real tokens, here only with ``count_padding``. Its script ships
with the loss switched off; 0.1 for both the factor and delta are the paper's as quoted.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo
from .gate import GateConfig, GateRouter

EPSILON = 1e-10


class SoftmaxConfig(GateConfig):
    """Options of ``softmax``.

    Attributes:
        aux_loss_coef: factor of ``localized_balance``; at 0 the loss is 0 and no types are needed.
        delta: how far the balance tells the experts of a sequence's own type from the others, 0 for plain balance. As
            released it is even when a sequence uses its own ones less; see the card.
        form: ``released`` is var / mean^2, ``paper`` is var / mean.
        count_padding: take the importance over padding as well, as the released code does.
        expert_types: the type that each expert belongs to; ``None`` gives type 1 the first half of the experts and
            type 0 the second.
        types_of_tasks: the type of each task by its id (tasks are numbered in alphabetical order), for callers that
            give ``task_ids`` but no ``task_types``.
    """

    kind: str = "softmax"
    aux_loss_coef: Annotated[float, Field(ge=0)] = 0.1
    delta: Annotated[float, Field(ge=0, le=1)] = 0.1
    form: Literal["released", "paper"] = "released"
    count_padding: bool = False
    expert_types: list[int] | None = None
    types_of_tasks: Annotated[list[int], Field(min_length=1)] | None = None

    def check(self, num_experts: int, total_rank: int) -> None:
        if self.expert_types is not None and len(self.expert_types) != num_experts:
            raise ValueError(
                f"router.expert_types lists {len(self.expert_types)} types for {num_experts} experts: give one each"
            )
        if self.aux_loss_coef > 0 and self.expert_types is None and num_experts % 2:
            raise ValueError(
                f"the localized balance gives each of two types one half of the experts, but there are {num_experts}: "
                "choose an even num_experts, list router.expert_types, or set router.aux_loss_coef to 0"
            )

    def needs(self) -> dict[str, str]:
        if self.aux_loss_coef == 0 or self.types_of_tasks is not None:
            return {}
        return {"task_types": "set router.aux_loss_coef to 0"}

    def refuses_packing(self) -> str | None:
        padding = self.aux_loss_coef > 0 and self.count_padding
        return (
            "count_padding counts the padding of each sequence, and packed rows have none: drop it" if padding else None
        )

    def coefficients(self) -> dict[str, float]:
        return {"localized_balance": self.aux_loss_coef}

    def types_of(self, num_experts: int) -> list[int]:
        """The type of each expert."""
        if self.expert_types is not None:
            return self.expert_types
        return [int(expert < num_experts // 2) for expert in range(num_experts)]


@ROUTERS.register("softmax", "loramoe", "hydra")
class SoftmaxRouter(GateRouter[SoftmaxConfig]):
    """Weights (..., E) = softmax(x W^T) over all experts; loss ``localized_balance``."""

    Config = SoftmaxConfig
    expert_types: Tensor
    types_of_tasks: Tensor

    def __init__(self, config: SoftmaxConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        # Buffers, so that they are where the weights are: a copy from the host in every step would make a GPU wait.
        self.register_buffer("expert_types", torch.tensor(config.types_of(site.num_experts)), persistent=False)
        self.register_buffer("types_of_tasks", torch.tensor(config.types_of_tasks or [0]), persistent=False)

    def route(self, inputs: RouteInput) -> RoutingRecord:
        logits, probs = self.gate(inputs)
        return RoutingRecord(
            indices=None,
            weights=probs,
            num_experts=self.site.num_experts,
            normalized=True,
            logits=logits,
            probs=probs,
        )

    def losses(self, records: list[RoutingRecord], context: RoutingContext) -> dict[str, Tensor]:
        """``localized_balance``, summed over the records.

        Raises:
            UserError: the factor is not 0 and the types of the sequences are not given, or do not fit the batch.
        """
        if self.config.aux_loss_coef == 0:
            return {"localized_balance": records[0].weights.new_zeros(())}
        types = self._types(context)
        segments = context.segment_ids
        if segments is None:
            values = [self._imbalance(record, types) for record in records]
        else:
            values = [self._packed_imbalance(record, types, segments) for record in records]
        return {"localized_balance": torch.stack(values).sum()}

    def _types(self, context: RoutingContext) -> Tensor:
        """(B,) the type of each sequence, or (B, S) of a packed batch."""
        if context.task_types is not None:
            return context.task_types
        if context.task_ids is not None and self.config.types_of_tasks is not None:
            return self.types_of_tasks[context.task_ids.to(self.types_of_tasks.device)]
        raise UserError(
            f"router {self.config.kind!r} balances experts by the type of each sequence (aux_loss_coef is "
            f"{self.config.aux_loss_coef:g}): pass model(..., task_types=...) with one integer for each sequence, or "
            "task_ids with router.types_of_tasks set, or set router.aux_loss_coef to 0"
        )

    def _imbalance(self, record: RoutingRecord, types_B: Tensor) -> Tensor:
        """Scalar: dispersion of the importance of experts in sequences, for one router."""
        weights = record.weights
        if record.mask is not None and not self.config.count_padding:
            weights = torch.where(record.mask.unsqueeze(-1), weights, 0)
        if weights.dim() == 2 and len(types_B) and weights.shape[0] % len(types_B) == 0:
            # Backbones such as OPT make one row of all tokens before their FFN.
            weights = weights.unflatten(0, (types_B.shape[0], -1))
        if weights.shape[0] != types_B.shape[0]:
            raise UserError(
                f"task_types has {types_B.shape[0]} values but the batch has {weights.shape[0]} sequences: give one "
                "for each sequence"
            )
        importance_BE = weights.flatten(1, -2).sum(1)
        Z_BE = self._localized(types_B.to(weights.device, non_blocking=True)) * importance_BE
        if Z_BE.numel() <= 1:
            return Z_BE.new_zeros(())
        return self._dispersion(Z_BE.mean(), Z_BE.var())

    def _packed_imbalance(self, record: RoutingRecord, types_BS: Tensor, segments_BS: Tensor) -> Tensor:
        """The same of a packed batch, of whose N sequences each has its own number.

        N is known to the device alone, so there is room for a sequence per token, of which all but N stay empty.
        """
        weights_TE = record.weights.reshape(-1, record.weights.shape[-1])
        segments_T = segments_BS.reshape(-1).to(weights_TE.device)
        if len(segments_T) != len(weights_TE):
            raise UserError(f"segment_ids are of {len(segments_T)} tokens, but {len(weights_TE)} were routed")
        real_T = segments_T >= 0
        own_TE = self._localized(types_BS.reshape(-1).to(weights_TE.device))
        weighted_TE = torch.where(real_T.unsqueeze(-1), own_TE * weights_TE, 0)
        Z_NE = torch.zeros_like(weighted_TE).index_add(0, segments_T.clamp(min=0), weighted_TE)
        count = (segments_T.max() + 1) * Z_NE.shape[-1]
        there_N = torch.arange(len(Z_NE), device=Z_NE.device) <= segments_T.max()
        mean = Z_NE.sum() / count
        variance = torch.where(there_N.unsqueeze(-1), Z_NE - mean, 0).square().sum() / (count - 1).clamp(min=1)
        return self._dispersion(mean, variance)

    def _localized(self, types: Tensor) -> Tensor:
        """(..., E): ``1 + delta`` for the experts of each type, ``1 - delta`` for the others."""
        own = types.unsqueeze(-1) == self.expert_types.to(types.device)
        return torch.where(own, 1 + self.config.delta, 1 - self.config.delta)

    def _dispersion(self, mean: Tensor, variance: Tensor) -> Tensor:
        return variance / ((mean.square() if self.config.form == "released" else mean) + EPSILON)
