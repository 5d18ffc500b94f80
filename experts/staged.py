"""Experts that come in stages, each a LoRA upon all before it, with scales that are trained: ScaleZero's DPS.

Source: ScaleZero's online Dynamic Parameter Scaling (arXiv 2509.07945; opendilab/LightZero, ``CurriculumLoRALinear``).
Stage 0 is the linear alone. With W0 and b its weight and bias, the output in stage s is

    y = a_0 W0 x + b + sum_{j=1..s} a_j alpha / r B_j A_j dropout(x),    a = scale_init + scale_range tanh(l),

one trained number l for each a, zero at first. From stage 1 on W0 and b are frozen, and so are A and B of older stages.
``policy`` says the rest:

* ``paper``, the branch of the paper (f63b544e): no a_0; all scales train, also the newest. What an older stage adds is
  detached, so that the gradient of x does not go through it.
* ``head``, the later main branch (9f717c80): a_0 and the scales of older stages train, that of the newest does not.
* ``strict``, ours: no a_0; the newest stage and its scale train, and nothing older.

Under the first two old functions change with every later stage, since stages are not chosen by task. Therefore the
scales of each stage are kept as they were at its end: :func:`showing` computes what the linear was then, bit for bit.

Differences from LightZero, whose layer has all stages from the start: here each is made when it begins. Its controller
sets the flags of the paper's scales, at the first switch and for good, and those of the later branch so that a_0 begins
to train in stage 2; here flags follow the stage alone. In place of ``(a_0 W0) x`` stands ``a_0 (W0 x)``, which a 4-bit
weight allows as well.

Shapes: D in, O out, E stages, r rank of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, ClassVar, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..dispatch.linear import Gate
from ..errors import ConfigError, UserError
from ..registry import EXPERTS
from .bank import ExpertBank, ExpertsConfig, PositiveFloat, PositiveInt
from .dense import dense_weight
from .lora import LoRAConfig
from .rank1 import one_more


class Policy(NamedTuple):
    """What trains beside the factors of the newest stage.

    Attributes:
        base_scale: whether there is an a_0, which trains. detached: older stages pass no gradient on to their input.
        scales: the stages, from 1, whose scales train in a stage.
    """

    base_scale: bool
    detached: bool
    scales: Callable[[int], range]


POLICIES = {
    "paper": Policy(False, True, lambda stage: range(1, stage + 1)),
    "head": Policy(True, False, lambda stage: range(1, stage)),
    "strict": Policy(False, False, lambda stage: range(stage, stage + 1)),
}


class StagedConfig(LoRAConfig):
    """Options of ``staged``. Stages act together, so there is no router.

    Attributes:
        num_experts: stages so far, without stage 0, which is the frozen linear; grows with each ``begin_task()``.
        num_stages: the most stages, with stage 0.
        r, alpha: of every stage, or one number for each.
        dropout: of the input of every stage. expert_dropout: ``separate``, as in LightZero, draws for each by itself.
        init: ``small``, as in LightZero, draws ``lora_A`` from N(0, 0.01^2).
        policy: what trains; see the text of the module.
        scale_init, scale_range: of the scales, which stay within ``scale_init ± scale_range``; a_0 starts at 1.
    """

    kind: str = "staged"
    together: ClassVar[bool] = True
    num_experts: PositiveInt = 1
    num_stages: Annotated[int, Field(ge=2)] = 5
    expert_dropout: Literal["shared", "separate"] = "separate"
    init: Literal["small", "kaiming", "gaussian"] = "small"  # type: ignore[assignment]
    policy: Literal["paper", "head", "strict"] = "paper"
    scale_init: PositiveFloat = 1.0
    scale_range: PositiveFloat = 0.2

    @model_validator(mode="after")
    def _no_more_than_the_most(self) -> Self:
        if self.num_experts >= self.num_stages:
            raise ValueError(
                f"{self.num_experts} stages and stage 0 are more than num_stages {self.num_stages}: raise num_stages"
            )
        return self

    @property
    def linear_only(self) -> str:
        return "stages of experts 'staged' add to the output of one linear, and scale it"

    @property
    def trains(self) -> Policy:
        """The policy."""
        return POLICIES[self.policy]

    def next_task(self) -> Self:
        """The configuration with one stage more, with the rank and the alpha of the last one.

        Raises:
            ConfigError: there are as many as there may be.
        """
        if self.num_experts + 1 >= self.num_stages:
            raise ConfigError(f"stage {self.num_experts} is the last of num_stages {self.num_stages}: raise num_stages")
        return self.parse({**self.to_dict(), **one_more(self)})


@EXPERTS.register("staged")
class StagedExperts(ExpertBank):
    """All stages of one linear. In a fresh bank older stages are zero until they are loaded.

    Parameters:
        lora_A: (r, D), lora_B: (O, r) of the newest stage. old_lora_A.j: (r, D), old_lora_B.j: (O, r) of older ones,
            not trained. scale_logits.j: (1,) of the scale of stage j + 1. base_logit: (1,) of a_0, of ``head``.
            Tensors of their own for each stage, so that a product does not depend on how many there are.
        ends: (E, E + 1), a buffer. Row k - 1 is the logits of a_0 to a_k at the end of stage k; zero beyond them, and
            for the stage that has not ended. NaN where they are not known.

    Attributes:
        shown: the stage that :func:`showing` shows; ``None`` is the newest, as it is now.
    """

    Config = StagedConfig
    grows = True

    config: StagedConfig
    ends: Tensor
    base_logit: nn.Parameter | None

    def __init__(self, config: StagedConfig, in_features: int, out_features: int, name: str = "") -> None:
        super().__init__(config, in_features, out_features, name)
        self.shown: int | None = None
        self.lora_B = nn.Parameter(self.lora_B.new_zeros(out_features, self.ranks[-1]))
        older = self.ranks[:-1]
        self.old_lora_A = nn.ParameterList(self.lora_A.new_zeros(rank, in_features) for rank in older)
        self.old_lora_B = nn.ParameterList(self.lora_B.new_zeros(out_features, rank) for rank in older)
        self.scale_logits = nn.ParameterList(self.lora_A.new_zeros(1) for _ in self.ranks)
        self.register_parameter("base_logit", nn.Parameter(torch.zeros(1)) if config.trains.base_scale else None)
        self.register_buffer("ends", torch.zeros(len(self.ranks), len(self.ranks) + 1))
        self._set_trained()

    @property
    def rescales(self) -> bool:
        return self.base_logit is not None

    @property
    def down_ranks(self) -> tuple[int, ...]:
        return self.ranks[-1:]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        if self.config.init == "small":
            with torch.no_grad():
                self.lora_A.mul_(0.01 * self.ranks[-1])  # drawn from N(0, 1/r^2)

    def _set_trained(self) -> None:
        """The flags of the scales and of the older factors, as the policy wants them in this stage."""
        trained = self.config.trains.scales(len(self.ranks))
        for stage, logit in enumerate(self.scale_logits, start=1):
            logit.requires_grad_(stage in trained)
        self.old_lora_A.requires_grad_(False)
        self.old_lora_B.requires_grad_(False)

    @torch.no_grad()
    def begin_task(self, config: ExpertsConfig) -> None:
        """Keep the scales as they are at the end of this stage, freeze it, and begin the next: A drawn, B zero.

        Scales that go on are the same parameters as before, so that an optimizer keeps what it knows of them.
        """
        count = len(self.ranks)
        ends = self.ends.new_zeros(count + 1, count + 2)
        ends[:count, : count + 1] = self.ends
        ends[count - 1, : count + 1] = self._logits()
        self.ends = ends
        self.old_lora_A.append(self.lora_A)
        self.old_lora_B.append(self.lora_B)
        self.config, self.ranks = cast(StagedConfig, config), config.ranks
        rank = self.ranks[-1]
        self.lora_A = nn.Parameter(self.lora_A.new_empty(rank, self.lora_A.shape[1]))
        self.lora_B = nn.Parameter(self.lora_B.new_empty(self.lora_B.shape[0], rank))
        self.scale_logits.append(nn.Parameter(self.scale_logits[0].new_zeros(1)))
        self.reset_parameters()
        self._set_trained()

    def _logits(self) -> Tensor:
        """(E + 1,) of a_0, or zero, to a_E, as they are now."""
        base = self.scale_logits[0].new_zeros(1) if self.base_logit is None else self.base_logit
        return torch.cat([base, *self.scale_logits])

    def factors(self, stage: int) -> list[Tensor]:
        """a_0 to a_s, scalars each: as they are now in the newest stage, else as they were at the end of ``stage``."""
        logits = self._logits() if stage == len(self.ranks) else self.ends[stage - 1]
        starts = [1.0, *[self.config.scale_init] * stage]
        return [
            start + self.config.scale_range * torch.tanh(logit) for start, logit in zip(starts, logits, strict=False)
        ]

    def down(self) -> Tensor:
        return torch.cat([*self.old_lora_A, self.lora_A])

    def up(self) -> Tensor:
        """(O, R) the factors B, each times the scale of its stage."""
        scales = self.factors(len(self.ranks))[1:]
        return torch.cat([a * B for a, B in zip(scales, (*self.old_lora_B, self.lora_B), strict=True)], dim=1)

    def add_to(self, out: Tensor, hidden_states: Tensor, low: Tensor | None, gate: Gate, base: nn.Module) -> Tensor:
        stage = len(self.ranks) if self.shown is None else self.shown
        if stage == 0:
            return out
        first, *scales = self.factors(stage)
        if self.base_logit is not None:
            bias = cast("Tensor | None", base.bias)
            out = out + (first - 1) * (out if bias is None else out - bias)
        shared = None if self.separate_masks else self.dropped(hidden_states)
        detached = [*[self.config.trains.detached] * (stage - 1), False]
        parts = zip(
            (*self.old_lora_A, self.lora_A), (*self.old_lora_B, self.lora_B), scales, self.config.scales, strict=False
        )
        for (A, B, learnt, scale), cut in zip(parts, detached, strict=True):
            x = self.dropped(hidden_states) if shared is None else shared
            low = F.linear(x.detach() if cut else x, A.to(x.dtype)) * (scale * learnt)
            out = out + F.linear(low, B.to(low.dtype)).to(out.dtype)
        return out

    @torch.no_grad()
    def delta(self, weights: Tensor, base: nn.Module) -> Tensor:
        """(O, D) float32: what the stages add to the frozen weight, a_0 included."""
        update = super().delta(weights, base)
        if self.base_logit is None:
            return update
        return update + (self.factors(len(self.ranks))[0] - 1).float() * dense_weight(base, self.name).float()


@contextmanager
def showing(banks: Iterable[StagedExperts], stage: int) -> Iterator[None]:
    """Within the block these linears are what they were at the end of ``stage``, bit for bit; the newest is as it is.

    In evaluation mode, on the same kind of device, with inputs of the same shapes and dtype. A backward pass, which
    gradient checkpointing computes forwards in, belongs into the block.

    Args:
        stage: 0 for the linears alone.

    Raises:
        UserError: no such stage, or what the scales were at its end is not known.
    """
    banks = list(banks)
    for bank in banks:
        if not 0 <= stage <= len(bank.ranks):
            raise UserError(f"stage {stage} of {bank.name!r}: there are stages 0 to {len(bank.ranks)}")
        if 0 < stage < len(bank.ranks) and bool(bank.ends[stage - 1].isnan().any()):
            raise UserError(
                f"stage {stage} of {bank.name!r}: the file that it was read from does not have the scales as they were "
                "at the end of that stage, as those of LightZero have not: only stage 0 and the newest can be shown"
            )
    before = [bank.shown for bank in banks]
    try:
        for bank in banks:
            bank.shown = stage
        yield
    finally:
        for bank, shown in zip(banks, before, strict=True):
            bank.shown = shown
