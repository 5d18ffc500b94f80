"""The place that the containers of one mixture share, and how a recomputation finds what its forward found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Self

from torch import Tensor

from .errors import UserError
from .routing import Decision, RoutingContext, RoutingRecord, SiteInfo

Listener = Callable[[SiteInfo, RoutingRecord], None]
SlotState = tuple[RoutingContext, bool, Mapping[int, float]]


class _Frame:
    """What one checkpointed segment saw and decided, kept so that its recomputation repeats it."""

    def __init__(self, slot: RoutingSlot) -> None:
        self.slot = slot
        self.state = slot.state()
        self.adapters = slot.adapters
        self.decisions: list[Decision] = []
        self.outer: _Frame | None = None


class _Recording(AbstractContextManager[None]):
    """Around the forward of a segment: its decisions go into the frame."""

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame

    def __enter__(self) -> None:
        slot = self.frame.slot
        self.frame.outer = slot.frame
        self.frame.state = slot.state()
        slot.frame = self.frame

    def __exit__(self, *error: object) -> None:
        self.frame.slot.frame = self.frame.outer


class _Replaying(AbstractContextManager[None]):
    """Around a recomputation of a segment, of which there is one for each backward pass over it."""

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame
        self.before: list[tuple[Iterator[Decision] | None, SlotState]] = []

    def __enter__(self) -> None:
        slot = self.frame.slot
        if slot.adapters != self.frame.adapters:
            raise UserError(
                "other adapters are active than in the forward whose parts gradient checkpointing now computes again: "
                "call backward() first, then set_adapter()"
            )
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

    Attributes:
        adapters: which adapters are active; told apart by identity.
    """

    def __init__(self) -> None:
        self.context = RoutingContext()
        self.enabled = True
        self.expert_scale: Mapping[int, float] = {}
        self.listeners: list[Listener] = []
        self.adapters: tuple[object, ...] = ()
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
        """Hand a fresh record to the listeners; in a recomputation nothing is published.

        Segments may lie in each other: the recomputation of the outer one repeats what the inner one decided, and
        records it for the recomputation of the inner one.
        """
        frame = self.frame
        while frame is not None:
            frame.decisions.append(record.decision())
            frame = frame.outer
        if self.replay is not None:
            return
        for listener in self.listeners:
            listener(site, record)

    @contextmanager
    def using(self, context: RoutingContext | None = None, listener: Listener | None = None) -> Iterator[Self]:
        """Within the block ``context`` holds and ``listener`` hears every record."""
        before = self.context
        if context is not None:
            self.context = context
        if listener is not None:
            self.listeners = [*self.listeners, listener]
        try:
            yield self
        finally:
            self.context = before
            if listener is not None:
                # Not remove(), which torch.compile cannot trace.
                self.listeners = [other for other in self.listeners if other is not listener]

    @contextmanager
    def keeping(self, whole_prompt: bool = True) -> Iterator[None]:
        """Within the block what a router chose for a whole sequence holds for all later forwards.

        For generation: with a KV cache a later forward does not see the prompt that the choice was made from.

        Args:
            whole_prompt: the first forward sees all of the prompt.

        Raises:
            UserError: a router chose for a sequence of which it saw a part.
        """
        kept: dict[str, Tensor] = {}

        def keep(site: SiteInfo, record: RoutingRecord) -> None:
            if record.sequence_indices is not None:
                if not whole_prompt:
                    raise UserError(
                        f"the router of {site.name!r} chooses from a whole prompt, of which prefill_chunk_size would "
                        "show it a part: leave that out"
                    )
                kept.setdefault(site.name, record.sequence_indices)

        with self.using(replace(self.context, prompt_mask=None, selections=kept), keep):
            yield

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` of :func:`torch.utils.checkpoint.checkpoint`: record the segment, then replay it.

        The recomputation sees the context and the switches of the forward that it repeats, takes that forward's
        decisions, and publishes nothing, so that losses, counts and controllers hear every token once.
        """
        frame = _Frame(self)
        return _Recording(frame), _Replaying(frame)
