"""The expert bank: all experts of one projection, stacked on the rank axis.

Shapes: D in, O out, E experts, R stacked rank (sum of the experts' ranks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config import Pluggable, fits
from ..dispatch import linear as dispatch
from ..dispatch.linear import Gate, over_ranks

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class ExpertsConfig(Pluggable):
    """Options that every low-rank expert kind shares.

    Attributes:
        num_experts: E.
        r: rank of every expert, or one rank per expert.
        alpha: numerator of the scale, for all or per expert; the kind says what divides it.
        dropout: probability of dropping an input feature of ``lora_A`` in training.
        expert_dropout: ``shared`` draws one mask per token and projection for all experts of the token; ``separate``
            draws one for each expert, as the released MixLoRA, LoRAMoE and X-LoRA do, and is slower: linear sites only.
        init: how ``lora_A`` starts: ``kaiming`` is uniform with a = sqrt(5) as in PEFT, ``gaussian`` is N(0, 1/r).
            ``lora_B`` starts at zero.
        together: all experts act on every token, so that there is no router, however many they are; of the kind.
        rank_pattern, alpha_pattern: ``r`` and ``alpha`` of single sites, by a name that the site's path equals or ends
            with after a dot; of several that fit, the first holds.
    """

    together: ClassVar[bool] = False

    num_experts: PositiveInt = 8
    r: PositiveInt | list[PositiveInt] = 16
    alpha: PositiveFloat | list[PositiveFloat] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    expert_dropout: Literal["shared", "separate"] = "shared"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    rank_pattern: dict[str, PositiveInt | list[PositiveInt]] = Field(default_factory=dict)
    alpha_pattern: dict[str, PositiveFloat | list[PositiveFloat]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_per_expert(self) -> ExpertsConfig:
        values = {"r": self.r, "alpha": self.alpha}
        values |= {f"rank_pattern.{name}": value for name, value in self.rank_pattern.items()}
        values |= {f"alpha_pattern.{name}": value for name, value in self.alpha_pattern.items()}
        for name, value in values.items():
            if isinstance(value, list) and len(value) != self.num_experts:
                raise ValueError(f"{name} lists {len(value)} values for {self.num_experts} experts: give one each")
        return self

    def at(self, site: str) -> Self:
        """The options of one site: those of the patterns that its path fits, in place of ``r`` and ``alpha``."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        changes: dict[str, Any] = {}
        for name, pattern in (("r", self.rank_pattern), ("alpha", self.alpha_pattern)):
            fitting = next((value for key, value in pattern.items() if fits(site, key)), None)
            if fitting is not None:
                changes[name] = fitting
        # A file may name hundreds of sites, each of which would carry all patterns.
        rest = self.model_dump(mode="json", exclude={"rank_pattern", "alpha_pattern"})
        return self.parse({**rest, **changes})

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.r) if isinstance(self.r, list) else (self.r,) * self.num_experts

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(self.alpha) if isinstance(self.alpha, list) else (self.alpha,) * self.num_experts

    @property
    def total_rank(self) -> int:
        """R, without a list of all ranks: a file may ask for a billion experts."""
        return sum(self.r) if isinstance(self.r, list) else self.r * self.num_experts

    @property
    def scales(self) -> tuple[float, ...]:
        """Factor of each expert's update."""
        raise NotImplementedError

    @property
    def linear_only(self) -> str:
        """Why these options have no meaning in an FFN block, and what to do; empty where they have."""
        if self.dropout > 0 and self.expert_dropout == "separate":
            return (
                "expert_dropout 'separate' needs a mask as wide as the block for each expert of a token: set 'shared'"
            )
        return ""

    def next_task(self) -> Self:
        """The configuration with one task more; of kinds that grow."""
        raise NotImplementedError


class ExpertBank(nn.Module):
    """Stacked low-rank experts of one projection: ``lora_A`` (R, D), ``lora_B`` (O, R).

    A container uses :meth:`down`, :meth:`up`, :meth:`low` and :meth:`add_to`, never the parameters, so that a kind may
    hold its factors in another form.

    Attributes:
        ranks: rank of each expert. name: where the bank sits, ``<site>`` or ``<site>.<projection>``.
        token_local: the update of a token depends on that token alone, so tokens may be dispatched to experts.
        mergeable: the update of an expert is a matrix, which may be added to the frozen weight; see :meth:`delta`.
        needs_dense_weight: the forward looks at the frozen weight itself, which a 4-bit base has to unpack; linear
            sites only.
        zero_at_init: a fresh expert adds nothing.
        grows: experts may be added later; see :meth:`begin_task`.
    """

    kind: ClassVar[str]
    Config: ClassVar[type[ExpertsConfig]] = ExpertsConfig
    token_local: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    needs_dense_weight: ClassVar[bool] = False
    zero_at_init: ClassVar[bool] = True
    grows: ClassVar[bool] = False

    def __init__(self, config: ExpertsConfig, in_features: int, out_features: int, name: str = "") -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.ranks = config.ranks
        total = sum(self.ranks)
        self.lora_A = nn.Parameter(torch.empty(sum(self.down_ranks), in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, total))
        self.reset_parameters()

    @property
    def rescales(self) -> bool:
        """Whether this also scales what the frozen linear gives, which must not have other updates in it then."""
        return self.needs_dense_weight

    @property
    def down_ranks(self) -> tuple[int, ...]:
        """Rank of each matrix that ``lora_A`` stacks; one for each expert."""
        return self.ranks

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """``lora_A`` as ``init`` says, each expert by itself; ``lora_B`` zero."""
        start = 0
        with torch.no_grad():
            drawn = torch.empty(self.lora_A.shape, dtype=torch.float32)
            for rank in filter(None, self.down_ranks):  # an expert of rank 0 is the frozen layer
                rows = drawn[start : start + rank]
                if self.config.init == "kaiming":
                    nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)
                else:
                    nn.init.normal_(rows, std=1 / rank, generator=generator)
                start += rank
            self.lora_A.copy_(drawn)
            self.lora_B.zero_()

    def start_from(self, base: nn.Module) -> None:
        """Set what follows from the frozen linear; called once, when the container of a linear site is built."""

    def begin_task(self, config: ExpertsConfig) -> None:
        """Freeze the experts there are and add those that ``config`` has more; of kinds that grow."""
        raise NotImplementedError

    def scale(self, like: Tensor, factors: Mapping[int, float]) -> float | Tensor:
        """The factor of the update: one number where all experts agree, else (R,) in ``like``'s dtype and device.

        Args:
            factors: run-time factors of single experts, by index.
        """
        each: Sequence[float] = self.config.scales
        if factors:
            each = [scale * factors.get(expert, 1.0) for expert, scale in enumerate(each)]
        if len(set(each)) == 1:
            return each[0]
        return torch.tensor(
            [s for s, rank in zip(each, self.ranks, strict=True) for _ in range(rank)],
            dtype=like.dtype,
            device=like.device,
        )

    def dropped(self, hidden_states: Tensor) -> Tensor:
        """The input after dropout, in training."""
        if not self.training or self.config.dropout == 0:
            return hidden_states
        return F.dropout(hidden_states, self.config.dropout)

    def down(self) -> Tensor:
        """(R, D) what multiplies the input, all experts stacked."""
        return self.lora_A

    def up(self) -> Tensor:
        """(O, R) what multiplies the low-rank activations, all experts stacked."""
        return self.lora_B

    @property
    def separate_masks(self) -> bool:
        """Whether this forward drops features for each expert by itself."""
        return self.training and self.config.dropout > 0 and self.config.expert_dropout == "separate"

    def low(self, hidden_states: Tensor) -> Tensor:
        """(..., R) ``dropout(x) A^T``, not scaled yet."""
        A = self.down().to(hidden_states.dtype)
        if not self.separate_masks:
            return F.linear(self.dropped(hidden_states), A)
        parts = A.split(list(self.ranks), dim=0)
        return torch.cat([F.linear(self.dropped(hidden_states), part) for part in parts], dim=-1)

    def add_to(self, out: Tensor, hidden_states: Tensor, low: Tensor | None, gate: Gate, base: nn.Module) -> Tensor:
        """(..., O) the output of the frozen linear with the update of the gated experts.

        Args:
            out: (..., O) what ``base`` made of ``hidden_states`` (..., D); may be changed in place.
            low: (..., R) of :meth:`low` where it was needed before; else it is computed here.
            gate: weights of the experts, scales included.
        """
        if low is None and self.separate_masks:
            low = self.low(hidden_states)
        if low is not None:
            return dispatch.from_low(out, low, self.up(), gate)
        return dispatch.routed(out, self.dropped(hidden_states), self.down(), self.up(), gate)

    @torch.no_grad()
    def delta(self, weights: Tensor, base: nn.Module) -> Tensor:
        """(O, D) float32: the update under weights that are the same for every token, as a matrix.

        Args:
            weights: (E,) of the experts, or (R,) of single ranks. base: the frozen linear.
        """
        weights = weights.float()
        if weights.shape[0] == len(self.ranks):
            weights = over_ranks(weights, self.ranks)
        scales = over_ranks(weights.new_tensor(self.config.scales), self.ranks)
        return (self.up().float() * weights * scales) @ self.down().float()

    def extra_repr(self) -> str:
        ranks = self.ranks[0] if len(set(self.ranks)) == 1 else self.ranks
        return f"kind={self.config.kind}, num_experts={len(self.ranks)}, r={ranks}"
