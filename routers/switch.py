"""Switch routing of MixLoRA: one expert per token, each with room for a fixed number of tokens of a sequence.

Source: TUDB-Labs/MoE-PEFT 40f8cb7, ``mixlora-switch``; Fedus et al. 2021 (arXiv 2101.03961). A token over capacity
passes through: its output is its own block input times its probability. In inference the released code returns the
block input for every token; ours computes the same function in training and inference. Padding takes no room and
enters no loss here, while it does both there.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..registry import ROUTERS
from ..routing import RoutingContext, RoutingRecord
from .base import LinearRouter, LinearRouterConfig
from .topk import top_indices


class SwitchConfig(LinearRouterConfig):
    """Options of ``switch``.

    Attributes:
        expert_capacity: tokens of one sequence that an expert takes; ``None`` means no limit. With a KV cache each
            forward counts anew, so generation with a finite capacity is not the function of the whole sequence. A
            backbone that makes one row of all tokens, as OPT does, needs an attention mask to tell sequences apart.
    """

    kind: str = "switch"
    init_std: Annotated[float, Field(ge=0)] = 1.0
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.01
    z_loss_coef: Annotated[float, Field(ge=0)] = 0.001
    expert_capacity: Annotated[int, Field(ge=1)] | None = 32

    def refuses_packing(self) -> str | None:
        if self.expert_capacity is None:
            return None
        return "expert_capacity counts the tokens of a sequence, and a packed row holds several: set it to null"


@ROUTERS.register("switch", "mixlora-switch")
class SwitchRouter(LinearRouter[SwitchConfig]):
    """Weights (..., 1) = the largest probability; over capacity the index is -1 and the probability is ``residual``."""

    Config = SwitchConfig
    weighs = "outputs"

    def choose(self, scores: Tensor, context: RoutingContext) -> Tensor:
        return self._admit(top_indices(scores, 1), context.token_mask)

    def residual(self, probs: Tensor, indices: Tensor) -> Tensor:
        return probs.max(dim=-1).values * (indices < 0).squeeze(-1)

    def _admit(self, chosen: Tensor, token_mask: Tensor | None) -> Tensor:
        """(..., S, 1) chosen experts with -1 where the expert's queue of the sequence is already full."""
        if self.config.expert_capacity is None:
            return chosen
        one_hot = F.one_hot(chosen.squeeze(-1), self.site.num_experts)
        if token_mask is not None and token_mask.numel() == chosen.numel():
            # Backbones such as OPT make one row of all tokens before their FFN; the mask tells the sequences apart.
            one_hot = one_hot.view(*token_mask.shape, -1) * token_mask.unsqueeze(-1)
        place = (one_hot.cumsum(dim=-2) * one_hot).sum(dim=-1).view(chosen.shape)
        return chosen.masked_fill(place > self.config.expert_capacity, -1)

    def losses(self, records: list[RoutingRecord], context: RoutingContext) -> dict[str, Tensor]:
        """``load_balance`` counts every token's choice, admitted or not: ``E * sum_e f_e q_e``; and ``router_z``."""
        return super().losses([_with_choices(record) for record in records], context)

    def balance_counts(self, record: RoutingRecord) -> Tensor:
        return _with_choices(record).counts()


def _with_choices(record: RoutingRecord) -> RoutingRecord:
    assert record.probs is not None
    return RoutingRecord(
        indices=top_indices(record.probs, 1),
        weights=record.weights,
        num_experts=record.num_experts,
        logits=record.logits,
        probs=record.probs,
        mask=record.mask,
    )
