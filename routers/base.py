"""What every router offers, and the linear router that most methods start from.

Shapes: D in, E experts, K picks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Generic, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import Pluggable
from ..errors import ConfigError
from ..routing import Level, RouteInput, RoutingContext, RoutingRecord, SiteInfo
from .losses import load_balance, router_z


class RouterConfig(Pluggable):
    """Options that a router brings; subclasses add fields and set the default of ``kind``.

    Attributes:
        share: which sites of one site configuration have a router in common: each ``module`` has its own, those of one
            ``parent`` module (an attention), those of one ``layer``, or ``all`` of them. They must agree in width.
    """

    share: Literal["module", "parent", "layer", "all"] = "module"

    def check(self, num_experts: int, total_rank: int) -> None:
        """Raise ``ValueError`` where the options do not fit so many experts with so many ranks together."""

    def needs(self) -> dict[str, str]:
        """Fields of the routing context that training cannot do without, and how to do without them all the same."""
        return {}

    def refuses_packing(self) -> str | None:
        """Why the router cannot train on rows that hold several examples; ``None`` where it can."""
        return None

    def coefficients(self) -> dict[str, float]:
        """Factor of each loss that :meth:`Router.losses` returns, by name."""
        return {}


ConfigT = TypeVar("ConfigT", bound=RouterConfig)


class Router(nn.Module, Generic[ConfigT]):
    """Hidden states in, a :class:`~moelora.routing.RoutingRecord` out.

    A subclass writes :meth:`route`, and :meth:`losses` if it has any. ``route`` is pure: given its input and the
    generator it always decides the same, it writes no buffer, it leaves its input alone, and it computes in float32.
    Persistent buffers are saved with the parameters.

    Attributes:
        level: whether the router weighs experts or single ranks.
        weighs: what the weights of a block site multiply. ``updates``: ``f_0 + sum_e w_e (f_e - f_0)`` with f_0 the
            frozen block, as every method for linears means it; ``outputs``: ``sum_e w_e f_e``, as MixLoRA means it. At
            a linear site, and wherever the weights of a token sum to 1, the two are one.
        needs_activations: the router looks at ``x @ lora_A.T``, which is then computed before it; linear sites only.
        needs_scoring: the router looks at the last hidden states of a forward that comes first (``scoring_states``).
        needs_fit: the router decides by what :meth:`fit` made of the experts of one projection.
        samples: in training the router draws its choice, and learns by comparing the losses of several draws
            (``moelora.policy``) instead of through its weights.
        any_width: the router looks at no hidden states, so sites of any width may share it.
        task_ids: what the ``task_ids`` of a batch are when it is trained: ``tasks`` of the router's own, the index of
            ``experts`` (-1 for none), or of no matter.
        train_phase: the ``phase`` of the routing context that it is trained in, if it has one.
    """

    kind: ClassVar[str]
    Config: ClassVar[type[RouterConfig]]
    level: ClassVar[Level] = "expert"
    weighs: ClassVar[Literal["updates", "outputs"]] = "updates"
    needs_activations: ClassVar[bool] = False
    needs_scoring: ClassVar[bool] = False
    needs_fit: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    any_width: ClassVar[bool] = False
    task_ids: ClassVar[Literal["tasks", "experts"] | None] = None
    train_phase: ClassVar[str | None] = None

    def __init__(self, config: ConfigT, site: SiteInfo) -> None:
        super().__init__()
        config.check(site.num_experts, site.total_rank)
        self.config: ConfigT = config
        self.site = site
        if self.mix == "factors" and len(set(site.ranks)) > 1:
            raise ConfigError(
                f"site {site.name!r}: router {config.kind!r} with mix 'factors' adds up the factors of experts, which "
                f"needs experts of one rank, but theirs are {list(site.ranks)}: set mix to 'outputs'"
            )

    @property
    def mix(self) -> Literal["outputs", "factors"]:
        """What the weights mix; see :class:`~moelora.routing.RoutingRecord`. Factors: linear sites only."""
        return "outputs"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of any module, but buffers stay in float32: half precision would swallow a controller's small moves."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and old.dtype == torch.float32 != new.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def route(self, inputs: RouteInput) -> RoutingRecord:
        """Decide for hidden states (..., D); see :class:`~moelora.routing.RoutingRecord` for the shapes."""
        raise NotImplementedError

    def losses(self, records: list[RoutingRecord], context: RoutingContext) -> dict[str, Tensor]:
        """Named scalar losses, unscaled, over the records of every site that shares this router's configuration."""
        return {}

    def balance_counts(self, record: RoutingRecord) -> Tensor:
        """(E,) float64: how often real tokens picked each expert, as the load-balance loss counts it."""
        return record.counts()

    @property
    def num_units(self) -> int:
        """How many weights a token has: E, or R for a router of single ranks."""
        return self.site.num_experts if self.level == "expert" else self.site.total_rank

    def on_step_end(self, load: Tensor) -> None:
        """Called once per optimizer step with the step's selection counts of real tokens.

        Args:
            load: (num_units,) float64, summed over micro-batches, data-parallel ranks, and the sites that share this
                router.
        """

    def grow(self, ranks: tuple[int, ...], scales: tuple[float, ...]) -> None:
        """Route to more experts from now on: those of a bank that grew. For routers without tensors that are saved.

        Args:
            ranks, scales: of all experts, as :class:`~moelora.routing.SiteInfo` has them.
        """
        self.site = replace(self.site, ranks=ranks, scales=scales)

    @property
    def scoring_pass_value(self) -> float:
        """By what a router with ``needs_scoring`` weighs every expert in the scoring pass; 0 turns them off."""
        return 0.0

    def score(self, states: Tensor, context: RoutingContext) -> Tensor:
        """What :meth:`route` needs of the scoring states (B, S, H); ``needs_scoring`` only.

        Called once per forward, before it and outside every checkpointed segment, so that nothing here is computed
        for each site or recomputed; ``route`` finds the result in ``scores`` of its context.
        """
        raise NotImplementedError

    def fit(self, lora_A: Tensor, lora_B: Tensor, ranks: Sequence[int]) -> None:
        """Set what follows from the experts of the site, without training.

        Args:
            lora_A: (R, D), lora_B: (O, R) the stacked experts; ranks: rank of each.
        """

    def constant_weights(self, context: RoutingContext) -> Tensor | None:
        """(num_units,) float32 weights that are the same for every token, for merging; else ``None``.

        They weigh outputs or factors, as ``mix`` says.
        """
        return None

    def approximate_weights(self, context: RoutingContext) -> Tensor | None:
        """(num_units,) float32 weights that the method's source merges with although routing depends on the token.

        ``None`` where the source has none; merging then takes mean weights over given batches.
        """
        return None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial parameters; a ``generator`` on the CPU makes them reproducible on any device."""

    def extra_repr(self) -> str:
        return f"kind={self.config.kind}, num_experts={self.site.num_experts}"


class LinearRouterConfig(RouterConfig):
    """Options that all linear routers share.

    Attributes:
        init_std: standard deviation of the initial router weights, N(0, init_std).
        jitter: in training, router input is multiplied by U(1 - jitter, 1 + jitter), elementwise.
        aux_loss_coef: factor of the load-balance loss. z_loss_coef: factor of the router z-loss.
    """

    init_std: Annotated[float, Field(ge=0)] = 0.02
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    aux_loss_coef: Annotated[float, Field(ge=0)] = 0.01
    z_loss_coef: Annotated[float, Field(ge=0)] = 0.0

    def coefficients(self) -> dict[str, float]:
        return {"load_balance": self.aux_loss_coef, "router_z": self.z_loss_coef}


LinearConfigT = TypeVar("LinearConfigT", bound=LinearRouterConfig)


class LinearRouter(Router[LinearConfigT]):
    """Router that chooses experts by the softmax of ``x @ weight.T`` in float32, without bias.

    A subclass writes :meth:`choose`, and the other parts where it differs.

    Parameters:
        weight: (E, D).
    """

    def __init__(self, config: LinearConfigT, site: SiteInfo) -> None:
        super().__init__(config, site)
        self.weight = nn.Parameter(torch.empty(site.num_experts, site.in_features))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            drawn = torch.empty(self.weight.shape, dtype=torch.float32)
            self.weight.copy_(nn.init.normal_(drawn, std=self.config.init_std, generator=generator))

    def route(self, inputs: RouteInput) -> RoutingRecord:
        logits, noise = self.logits(inputs)
        probs = logits.softmax(dim=-1)
        scores = self.scores(probs)
        indices = None if inputs.replay is None else inputs.replay.indices
        if indices is None:
            indices = self.choose(scores.detach(), inputs.context)
        weights = scores.gather(-1, indices.clamp(min=0)) * (indices >= 0)
        if self.sums_to_one:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return RoutingRecord(
            indices=indices,
            weights=weights,
            num_experts=self.site.num_experts,
            normalized=self.sums_to_one,
            logits=logits,
            probs=probs,
            residual=self.residual(probs, indices),
            noise=noise,
        )

    def choose(self, scores: Tensor, context: RoutingContext) -> Tensor:
        """(..., K) int64 experts for scores (..., E) without graph; -1 leaves a slot empty."""
        raise NotImplementedError

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of a token are divided by their sum."""
        return False

    def scores(self, probs: Tensor) -> Tensor:
        """(..., E) what experts are chosen and weighed by; ``probs`` itself unless a method says otherwise."""
        return probs

    def residual(self, probs: Tensor, indices: Tensor) -> Tensor | None:
        """(...,) weight of the block's own input; ``None`` for none."""
        return None

    def losses(self, records: list[RoutingRecord], context: RoutingContext) -> dict[str, Tensor]:
        """``load_balance`` and ``router_z``, pooled over the rows of all records."""
        return {"load_balance": load_balance(records, context), "router_z": router_z(records)}

    def logits(self, inputs: RouteInput) -> tuple[Tensor, Tensor | None]:
        """(..., E) float32 logits, and the jitter (..., D) that a recomputation must repeat, if any."""
        hidden = inputs.hidden_states.float()
        if not self.training or self.config.jitter == 0:
            return F.linear(hidden, self.weight.float()), None
        noise = self._jitter(hidden, inputs)
        return F.linear(hidden * noise, self.weight.float()), inputs.to_replay(noise)

    def _jitter(self, hidden: Tensor, inputs: RouteInput) -> Tensor:
        low, high = 1 - self.config.jitter, 1 + self.config.jitter
        return inputs.draw(lambda generator: torch.empty_like(hidden).uniform_(low, high, generator=generator))
