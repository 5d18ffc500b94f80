"""Auxiliary losses that several routers share. All see real tokens only and pool over all routed layers.

Shapes: N rows (tokens of all layers), E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import RoutingContext, RoutingRecord


def pooled(records: list[RoutingRecord], values: list[Tensor]) -> Tensor:
    """Rows of real tokens of every record, one below the other.

    Args:
        values: for each record a tensor (..., C) whose leading axes are those of the record's tokens.

    Returns:
        (N, C) with N real tokens over all records; may be empty.
    """
    return torch.cat(
        [
            value.reshape(-1, value.shape[-1]) if record.mask is None else value[record.mask]
            for record, value in zip(records, values, strict=True)
        ]
    )


def load_balance(records: list[RoutingRecord], context: RoutingContext) -> Tensor:
    """Switch and Mixtral's load-balance loss in the pooled form of MixLoRA: ``E * sum_e f_e q_e``.

    f_e is the number of times that expert e fills any of the K slots, per real token; q_e is the mean over real tokens
    of the softmax over all experts. Both are taken once over the rows of all layers, so the value of a perfectly
    balanced router is K. Gradient flows through q only.

    Source: TUDB-Labs/MoE-PEFT 40f8cb7; Fedus et al. 2021 (arXiv 2101.03961), equations 4-6.
    """
    num_experts = records[0].num_experts
    probs_NE = pooled(records, [_required(record.probs) for record in records])
    share_E = context.load_share
    if share_E is None:
        chosen_NK = pooled(records, [_required(record.indices) for record in records])
        share_E = selections_per_token(chosen_NK, num_experts)
    return num_experts * torch.dot(share_E.to(probs_NE), probs_NE.sum(0) / max(probs_NE.shape[0], 1))


def selections_per_token(chosen_NK: Tensor, num_experts: int) -> Tensor:
    """(E,) float64: how many of the N rows chose each expert, divided by N. Slots marked -1 are empty."""
    flat = chosen_NK.reshape(-1)
    counts = torch.bincount(flat[flat >= 0], minlength=num_experts).double()
    return counts / max(chosen_NK.shape[0], 1)


def router_z(records: list[RoutingRecord]) -> Tensor:
    """Mean over real tokens of ``logsumexp(logits) ** 2``.

    Source: Zoph et al. 2022 (arXiv 2202.08906), equation 5.
    """
    logits_NE = pooled(records, [_required(record.logits) for record in records])
    return torch.logsumexp(logits_NE, dim=-1).square().sum() / max(logits_NE.shape[0], 1)


def _required(value: Tensor | None) -> Tensor:
    assert value is not None, "this loss needs records with logits, probs and indices"
    return value
