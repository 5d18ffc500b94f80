"""The singular value decomposition of an update from its factors, without ever forming the update.

The same update ``s B A`` has many pairs of factors, (A, B) and (Q A, B Q^-1), but one singular value decomposition, up
to the signs of its vectors. With ``A^T = Q_A R_A`` and ``B = Q_B R_B`` it is that of the small matrix ``R_B R_A^T``
between the two Q, at the price of O((D + O) r^2 + r^3) (LoRA-Squeeze, arXiv 2602.10993). All in float64.

Shapes: D in, O out, r rank, n = min(r, D, O).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import Factors


class Term(NamedTuple):
    """One adapter's part in a mix at one linear: a weight, and what it weighs."""

    weight: float
    factors: Factors


@dataclass(frozen=True)
class Spectrum:
    """``U diag(S) Vh``, float64: U (O, n), S (n,) from large to small, Vh (n, D)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def largest(self, rank: int) -> Factors:
        """The best approximation of that rank, float32 with scale 1; both factors carry the square roots of S."""
        root = self.S[:rank].sqrt()
        return Factors((root.unsqueeze(1) * self.Vh[:rank]).float(), (self.U[:, :rank] * root).float(), 1.0)


def spectrum(factors: Factors) -> Spectrum:
    """The decomposition of ``scale * B A``."""
    Q_A, R_A = torch.linalg.qr(factors.A.double().T)
    Q_B, R_B = torch.linalg.qr(factors.B.double())
    U, S, Vh = torch.linalg.svd(factors.scale * R_B @ R_A.T, full_matrices=False)
    return Spectrum(Q_B @ U, S, Vh @ Q_A.T)


def stacked(terms: Sequence[Term]) -> Factors:
    """``sum of weight * scale * B A`` as one pair of the rank of all together, float64; the coefficients are in B."""
    A = torch.cat([term.factors.A.double() for term in terms])
    B = torch.cat([term.weight * term.factors.scale * term.factors.B.double() for term in terms], dim=1)
    return Factors(A, B, 1.0)


def norm(terms: Sequence[Term]) -> float:
    """The Frobenius norm of ``sum of weight * scale * B A``; of differences too, without losing half of the digits."""
    return spectrum(stacked(terms)).S.norm().item() if terms else 0.0
