"""What a router sees, what it decides, and how decisions travel: context, record, tape, slot.

Shapes: B batch, S sequence, T = B·S tokens, D in, E experts, K picks, R stacked rank (sum of the experts' ranks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from .errors import UserError

Level = Literal["expert", "rank"]


@dataclass(frozen=True)
class SiteInfo:
    """Where a router sits.

    Attributes:
        name: dotted path of the site in the backbone ("" for a container used by itself).
        layer: index of the backbone layer, or ``None`` outside the layers.
        in_features, out_features: width of the hidden states that enter and leave the site.
        ranks: rank of each expert; scales: factor of each expert's update (alpha / r or alpha / sqrt(r)).
    """

    name: str
    layer: int | None
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def num_experts(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class RoutingContext:
    """What the caller knows about a batch; every field is optional.

    Attributes:
        token_mask: (B, S) bool, ``True`` on real tokens; ``None`` means that all tokens are real.
        task_ids: (B,) int64, the task of each sequence. task_types: (B,) int64, the type of each task.
        request_ids: (B,) int64, the request that each sequence belongs to.
        modality_mask: (B, S) int64, the modality of each token.
        phase: free text that staged methods switch on.
        generator: source of randomness for stochastic routers; ``None`` means the global one.
        load_share: (E,) selections of each expert per real token, measured over a whole optimizer step; the
            load-balance loss takes it in place of this batch's own (see ``step_balance`` of ``trainers/sft.py``).
    """

    token_mask: Tensor | None = None
    task_ids: Tensor | None = None
    task_types: Tensor | None = None
    request_ids: Tensor | None = None
    modality_mask: Tensor | None = None
    phase: str | None = None
    generator: torch.Generator | None = None
    load_share: Tensor | None = None

    PER_SEQUENCE = ("task_ids", "task_types", "request_ids", "modality_mask")

    def expand_to(self, batch_size: int) -> RoutingContext:
        """Repeat per-sequence fields for beams and multiple returned sequences, which enlarge the batch in place.

        Raises:
            UserError: ``batch_size`` is no multiple of a field's batch.
        """
        changes: dict[str, Tensor] = {}
        for name in self.PER_SEQUENCE:
            value: Tensor | None = getattr(self, name)
            if value is None or (value.dim() > 0 and value.shape[0] == batch_size):
                continue
            if value.dim() == 0 or batch_size % value.shape[0]:
                raise UserError(
                    f"{name} has the shape {tuple(value.shape)} but the batch has {batch_size} sequences: give one row "
                    "for each"
                )
            changes[name] = value.repeat_interleave(batch_size // value.shape[0], dim=0)
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]


@dataclass(frozen=True)
class RouteInput:
    """Everything that a router may look at, for one site in one forward.

    Attributes:
        hidden_states: (..., D), what enters the site.
        activations: (..., R), ``x @ lora_A.T``; only for routers with ``needs_activations``.
        context: what the caller knows about the batch.
        site: where the router sits.
        replay: the decision of an earlier forward that is being recomputed (gradient checkpointing). A router takes
            its ``indices`` instead of selecting again, draws through :meth:`draw`, and recomputes everything else.
    """

    hidden_states: Tensor
    activations: Tensor | None
    context: RoutingContext
    site: SiteInfo
    replay: Decision | None = None

    def draw(self, sample: Callable[[torch.Generator | None], Tensor]) -> Tensor:
        """Random numbers that a recomputation gets again.

        Checkpointing rewinds the global generator by itself, so there ``sample`` simply runs again, which also keeps
        later draws in step; a generator of the context is not rewound, so its numbers are taken from the record.
        """
        if self.replay is not None and self.replay.noise is not None:
            return self.replay.noise
        return sample(self.context.generator)

    def to_replay(self, noise: Tensor) -> Tensor | None:
        """What a record keeps of drawn numbers: nothing if the global generator drew them."""
        return None if self.context.generator is None else noise


@dataclass(frozen=True)
class Decision:
    """The part of a record that must not be made twice: discrete choices and random draws, without any graph."""

    indices: Tensor | None
    noise: Tensor | None


@dataclass
class RoutingRecord:
    """What one router decided in one forward. Pure result: nothing here is a buffer of a module.

    Attributes:
        indices: (..., K) int64, the chosen experts; -1 marks an empty slot; ``None`` means dense.
        weights: (..., K) for chosen experts, (..., E) when dense, (..., R) at rank level; float32.
        num_experts: E.
        level: whether ``weights`` weigh experts or single ranks.
        logits: (..., E) before, probs: (..., E) after the softmax; log_prob: (...,) of a sampled choice.
        normalized: the weights of every token sum to 1 by construction; a block site then equals its frozen block bit
            for bit while all updates are zero.
        residual: (...,) weight of the site's own input in the output of a block site (Switch's tokens over capacity).
        noise: what was drawn from the context's own generator, for replay.
        mask: (...) bool, real tokens, or ``None`` if all are real.
    """

    indices: Tensor | None
    weights: Tensor
    num_experts: int
    level: Level = "expert"
    normalized: bool = False
    logits: Tensor | None = None
    probs: Tensor | None = None
    log_prob: Tensor | None = None
    residual: Tensor | None = None
    noise: Tensor | None = None
    mask: Tensor | None = None

    def decision(self) -> Decision:
        """What a recomputation replays; holds no graph."""
        detached = None if self.noise is None else self.noise.detach()
        return Decision(indices=self.indices, noise=detached)

    def dense_weights(self) -> Tensor:
        """(..., E) float32: the weight of every expert, zero where not chosen.

        Raises:
            ValueError: the record is at rank level.
        """
        if self.level == "rank":
            raise ValueError("a rank-level record has no expert weights")
        if self.indices is None:
            return self.weights
        chosen = self.indices >= 0
        dense = self.weights.new_zeros(*self.weights.shape[:-1], self.num_experts)
        return dense.scatter_add(-1, self.indices.clamp(min=0), self.weights * chosen)

    def gate(self, ranks: Sequence[int]) -> Tensor:
        """(..., R) float32: the rank gate, each expert's weight repeated over its ranks."""
        if self.level == "rank":
            return self.weights
        dense = self.dense_weights()
        if len(set(ranks)) == 1:
            return dense.repeat_interleave(ranks[0], dim=-1)
        return dense.repeat_interleave(torch.tensor(ranks, device=dense.device), dim=-1)

    def counts(self, mask: Tensor | None = None) -> Tensor:
        """(E,) float64: how often each expert was chosen by real tokens (dense routing: the sum of its weights)."""
        mask = self.mask if mask is None else mask
        with torch.no_grad():
            if self.indices is None:
                flat = self.dense_weights().reshape(-1, self.num_experts).double()
                return (flat if mask is None else flat[mask.reshape(-1)]).sum(0)
            chosen = self.indices if mask is None else self.indices[mask]
            chosen = chosen.reshape(-1)
            return torch.bincount(chosen[chosen >= 0], minlength=self.num_experts).double()

    def entropy(self, mask: Tensor | None = None) -> Tensor:
        """Scalar: mean over real tokens of the entropy (nats) of ``probs``, or of the normalised dense weights."""
        mask = self.mask if mask is None else mask
        with torch.no_grad():
            if self.probs is not None:
                probs = self.probs
            else:
                dense = self.dense_weights()
                probs = dense / dense.sum(-1, keepdim=True).clamp_min(torch.finfo(dense.dtype).tiny)
            each = torch.special.entr(probs).sum(-1)
            kept: Tensor = each if mask is None else each[mask]
            return kept.mean()


@dataclass
class Tape:
    """The records of one or several forwards, by site, in the order in which they were made."""

    records: dict[str, list[RoutingRecord]] = field(default_factory=dict)

    def add(self, site: str, record: RoutingRecord) -> None:
        self.records.setdefault(site, []).append(record)

    def __getitem__(self, site: str) -> list[RoutingRecord]:
        return self.records[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


Listener = Callable[[SiteInfo, RoutingRecord], None]
SlotState = tuple[RoutingContext, bool, Mapping[int, float]]


class _Frame:
    """What one checkpointed segment saw and decided, kept so that its recomputation repeats it."""

    def __init__(self, slot: RoutingSlot) -> None:
        self.slot = slot
        self.state = slot.state()
        self.decisions: list[Decision] = []


class _Recording(AbstractContextManager[None]):
    """Around the forward of a segment: its decisions go into the frame."""

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame
        self.before: list[_Frame | None] = []

    def __enter__(self) -> None:
        slot = self.frame.slot
        self.before.append(slot.frame)
        self.frame.state = slot.state()
        slot.frame = self.frame

    def __exit__(self, *error: object) -> None:
        self.frame.slot.frame = self.before.pop()


class _Replaying(AbstractContextManager[None]):
    """Around a recomputation of a segment, of which there is one for each backward pass over it."""

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame
        self.before: list[tuple[Iterator[Decision] | None, SlotState]] = []

    def __enter__(self) -> None:
        slot = self.frame.slot
        self.before.append((slot.replay, slot.state()))
        slot.replay = iter(self.frame.decisions)
        slot.restore(self.frame.state)

    def __exit__(self, *error: object) -> None:
        self.frame.slot.replay, state = self.before.pop()
        self.frame.slot.restore(state)


class RoutingSlot:
    """The place that the containers of one mixture share: current context and switches, listeners, replay.

    A plain object rather than a module global or a context variable: two mixtures never mix, and a recomputation that
    autograd runs in another thread still finds the forward that it belongs to.
    """

    def __init__(self) -> None:
        self.context = RoutingContext()
        self.enabled = True
        self.expert_scale: Mapping[int, float] = {}
        self.listeners: list[Listener] = []
        self.frame: _Frame | None = None
        self.replay: Iterator[Decision] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> RoutingSlot:
        copy = memo[id(self)] = RoutingSlot()
        return copy

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]

    def next_replay(self) -> Decision | None:
        """The decision to repeat, or ``None`` in an ordinary forward."""
        return None if self.replay is None else next(self.replay)

    def state(self) -> SlotState:
        """What a recomputation must find as the forward did."""
        return self.context, self.enabled, self.expert_scale

    def restore(self, state: SlotState) -> None:
        """Make :meth:`state` what it was."""
        self.context, self.enabled, self.expert_scale = state

    def publish(self, site: SiteInfo, record: RoutingRecord) -> None:
        """Hand a fresh record to the listeners; in a recomputation nothing is published."""
        if self.replay is not None:
            return
        if self.frame is not None:
            self.frame.decisions.append(record.decision())
        for listener in self.listeners:
            listener(site, record)

    @contextmanager
    def using(self, context: RoutingContext | None = None, listener: Listener | None = None) -> Iterator[Self]:
        """Within the block ``context`` holds and ``listener`` hears every record."""
        before = self.context
        if context is not None:
            self.context = context
        if listener is not None:
            self.listeners.append(listener)
        try:
            yield self
        finally:
            self.context = before
            if listener is not None:
                self.listeners.remove(listener)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` of :func:`torch.utils.checkpoint.checkpoint`: record the segment, then replay it.

        The recomputation sees the context and the switches of the forward that it repeats, takes that forward's
        decisions, and publishes nothing, so that losses, counts and controllers hear every token once.
        """
        frame = _Frame(self)
        return _Recording(frame), _Replaying(frame)
