"""Low-rank experts: fully fine-tuned experts of an FFN, kept as the low-rank part of what they changed.

Source: FlexMoRE (arXiv 2602.08818; schneiderkamplab/FlexMoRE 2debb726), whose factors are those of PHLoRA: with dW the
difference between the weights of an expert and of the frozen FFN and ``U S V^T`` its singular value decomposition,

    A = sqrt(S_r) V_r^T,  B = U_r sqrt(S_r),

so that B A is the best approximation of rank r, ``|dW - B A|_F = sqrt(sum_{i > r} S_i^2)``, and both factors have one
norm. The scale is 1 (alpha = r in PEFT's words). Rank 0 is the frozen FFN itself, FlexMoRE's expert 0.

Our reading: the method is a block site over expert 0, with router ``topk`` and ``normalize: false``, as FlexOlmo routes
(softmax over all experts, the k largest kept as they are). The factors may also be trained from zero, like LoRA's.
FlexMoRE runs the frozen down projection once for every chosen expert; it is linear, so a block site runs it once.

Shapes: D in, O out, r rank of one expert.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..errors import ConfigError
from ..registry import EXPERTS
from .bank import ExpertBank, ExpertsConfig, PositiveFloat

Rank = Annotated[int, Field(ge=0)]


class LowRankConfig(ExpertsConfig):
    """Options of ``low_rank``.

    Attributes:
        r: rank of every expert, or one rank per expert; 0 is the frozen layer itself.
        alpha: the scale itself, for all or per expert; 1 is the difference that was factored.
    """

    kind: str = "low_rank"
    r: Rank | list[Rank] = 16
    rank_pattern: dict[str, Rank | list[Rank]] = Field(default_factory=dict)
    alpha: PositiveFloat | list[PositiveFloat] = 1.0

    @property
    def scales(self) -> tuple[float, ...]:
        return self.alphas


@EXPERTS.register("low_rank")
class LowRankExperts(ExpertBank):
    """``alpha * B_e A_e x`` with factors from :meth:`load_difference`, or trained."""

    Config = LowRankConfig

    @torch.no_grad()
    def load_difference(self, index: int, difference: Tensor) -> None:
        """Factor the difference between an expert's weight and the frozen one into the place of that expert.

        Args:
            index: the expert. difference: (O, D); divided by alpha where that is not 1.

        Raises:
            ConfigError: no such expert, or the shape is not the linear's.
        """
        wanted = (self.lora_B.shape[0], self.lora_A.shape[1])
        if not 0 <= index < len(self.ranks) or tuple(difference.shape) != wanted:
            raise ConfigError(
                f"bank {self.name!r} has experts 0..{len(self.ranks) - 1} with differences of the shape {wanted}, got "
                f"expert {index} with {tuple(difference.shape)}"
            )
        rank, start = self.ranks[index], sum(self.ranks[:index])
        A, B = factor(difference / self.config.scales[index], rank)
        self.lora_A[start : start + rank] = A.to(self.lora_A)
        self.lora_B[:, start : start + rank] = B.to(self.lora_B)


def factor(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, D) and B (O, r), float32, with B A the best approximation of ``difference`` (O, D) of that rank.

    A rank above min(O, D) leaves its last rows and columns zero. Both factors carry the square roots of the singular
    values, so their norms are equal.
    """
    U, S, Vh = torch.linalg.svd(difference.float(), full_matrices=False)
    kept = min(rank, S.shape[0])
    root = S[:kept].sqrt()
    A = difference.new_zeros(rank, difference.shape[1], dtype=torch.float32)
    B = difference.new_zeros(difference.shape[0], rank, dtype=torch.float32)
    A[:kept] = root.unsqueeze(1) * Vh[:kept]
    B[:, :kept] = U[:, :kept] * root
    return A, B
