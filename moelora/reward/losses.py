"""The loss of a reward model on rankings.

Shapes: N responses of a batch, P comparisons of two of them, G rankings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Comparisons:
    """Which of the responses of a batch are better than which.

    Attributes:
        winners, losers: (P,) int64, places of responses in the batch.
        ties: (P,) bool; the order of the two means nothing where it is true.
        margins: (P,) float32, by how much the winner's reward should be above the loser's; not looked at in ties.
        groups: (P,) int64, the ranking of each comparison, from 0.
    """

    winners: Tensor
    losers: Tensor
    ties: Tensor
    margins: Tensor
    groups: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Self:
        """Those of a batch of :class:`~moelora.data.ranking_set.RankingCollator`."""
        return cls(*(batch[name] for name in ("winners", "losers", "ties", "margins", "groups")))


def ranking_loss(
    rewards_N: Tensor,
    comparisons: Comparisons,
    *,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
    num_rankings: float | Tensor | None = None,
) -> Tensor:
    """The mean over rankings of the mean over the comparisons of each.

    With ``d = r_winner - r_loser``, margin ``m`` and label smoothing ``e``, one comparison costs::

        -(1 - e) log sigmoid(d - m) - e log sigmoid(-d - m)     (+ center_coef (r_winner + r_loser)^2)

    Without ``m`` and ``e`` that is the loss of Bradley and Terry (1952) in the form of Ouyang et al. (2022), with
    ``m`` that of Llama 2 (Touvron et al. 2023). Smoothing takes each label to be the wrong way round with probability
    ``e``. If it is, then what the annotator called the better one should be *below* by the margin, hence ``-d - m``
    and not the ``-(d - m)`` of a smoothed cross-entropy: exchanging the two responses is then the same as exchanging
    ``e`` and ``1 - e``, and a label that says nothing (``e`` one half) has its minimum at ``d = 0`` whatever the
    margin. A tie costs half of either direction, without a margin and whatever ``e``. Centring holds rewards, of
    which the rest sees only differences, around zero (Eisenstein et al. 2023).

    A ranking weighs the same however many responses it has.

    Args:
        rewards_N: (N,) or (N, 1), of any floating type; half precisions are computed in float32.
        num_rankings: how many rankings the mean is over, if a step has more than this batch holds; then the losses of
            its batches add up to that of one large batch.

    Returns:
        A scalar, float32 or float64 as the rewards are.

    Raises:
        ValueError: there is nothing to compare.
    """
    c = comparisons
    if not len(c.groups):
        raise ValueError("ranking_loss: the batch has no comparisons, so there is no loss: leave it out")
    rewards_N = rewards_N.reshape(-1)
    if rewards_N.dtype != torch.float64:
        rewards_N = rewards_N.float()
    winners_P, losers_P = rewards_N[c.winners], rewards_N[c.losers]
    above_P = winners_P - losers_P
    margins_P = c.margins.to(rewards_N.dtype).masked_fill(c.ties, 0.0)
    right_P = torch.full_like(margins_P, 1.0 - label_smoothing).masked_fill(c.ties, 0.5)
    loss_P = -right_P * logsigmoid(above_P - margins_P) - (1.0 - right_P) * logsigmoid(-above_P - margins_P)
    if center_coef:
        loss_P = loss_P + center_coef * (winners_P + losers_P).square()
    _, group_P, sizes_G = torch.unique(c.groups, return_inverse=True, return_counts=True)
    loss: Tensor = (loss_P / sizes_G[group_P]).sum() / (len(sizes_G) if num_rankings is None else num_rankings)
    return loss
