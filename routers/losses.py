"""Auxiliary losses that several routers share. All see real tokens only and pool over all routed layers.

Shapes: N rows (tokens of all layers), E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import RoutingContext, RoutingRecord


def total(record: RoutingRecord, values: Tensor) -> Tensor:
    """(C,) sum over the record's real tokens of values (..., C), without a host sync."""
    if record.mask is not None:
        values = torch.where(record.mask.unsqueeze(-1), values, 0)
    return values.reshape(-1, values.shape[-1]).sum(0)


def rows(records: list[RoutingRecord]) -> Tensor:
    """Scalar float64: real tokens of all records, at least 1."""
    counts = [
        torch.tensor(float(record.weights[..., 0].numel()), dtype=torch.float64, device=record.weights.device)
        if record.mask is None
        else record.mask.sum().double()
        for record in records
    ]
    return torch.stack(counts).sum().clamp(min=1)


def pooled_mean(records: list[RoutingRecord], values: list[Tensor]) -> Tensor:
    """(C,) mean over the real tokens of all records of values (..., C), one tensor for each record."""
    sums = [total(record, value) for record, value in zip(records, values, strict=True)]
    return torch.stack(sums).sum(0) / rows(records).to(sums[0].dtype)


def load_balance(records: list[RoutingRecord], context: RoutingContext) -> Tensor:
    """Switch and Mixtral's load-balance loss in the pooled form of MixLoRA: ``E * sum_e f_e q_e``.

    f_e is the number of times that expert e fills any of the K slots, per real token; q_e is the mean over real tokens
    of the softmax over all experts. Both are taken once over the rows of all layers, so the value of a perfectly
    balanced router is K. Gradient flows through q only.

    Source: TUDB-Labs/MoE-PEFT 40f8cb7; Fedus et al. 2021 (arXiv 2101.03961), equations 4-6.
    """
    num_experts = records[0].num_experts
    mean_E = pooled_mean(records, [required(record.probs) for record in records])
    share_E = context.load_share
    if share_E is None:
        share_E = torch.stack([record.counts() for record in records]).sum(0) / rows(records)
    return num_experts * torch.dot(share_E.to(mean_E), mean_E)


def router_z(records: list[RoutingRecord]) -> Tensor:
    """Mean over real tokens of ``logsumexp(logits) ** 2``.

    Source: Zoph et al. 2022 (arXiv 2202.08906), equation 5.
    """
    squares = [torch.logsumexp(required(record.logits), dim=-1, keepdim=True).square() for record in records]
    return pooled_mean(records, squares).squeeze(0)


def required(value: Tensor | None) -> Tensor:
    """The field of a record that a loss cannot do without."""
    assert value is not None, "this loss needs records with logits, probs and indices"
    return value
