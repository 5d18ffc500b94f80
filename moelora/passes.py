"""What surrounds every forward of the backbone, those of ``generate`` included."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .errors import UserError
from .experts import Container
from .routing import EncoderTokens, RoutingContext
from .scoring import ScoringPass
from .slot import RoutingSlot
from .watch import Watch


@dataclass(frozen=True, eq=False)
class _Claim:
    """That a thread is inside a mixture."""

    thread: int


class Passes:
    """Hooks on the backbone that fit the routing context to each forward.

    Args:
        containers: those of the mixture, by site name.
    """

    def __init__(self, backbone: PreTrainedModel, slot: RoutingSlot, containers: Mapping[str, Container]) -> None:
        self.backbone = backbone
        self.slot = slot
        self.contexts: list[RoutingContext] = []
        self._inside: dict[str, _Claim] = {}
        self.scoring = ScoringPass.of(backbone, slot, containers)
        self.watch = Watch()
        # The part without its head may be called by itself.
        self.headless: Any = None if backbone.base_model is backbone else backbone.base_model
        stacks: list[Any] = [backbone] if self.headless is None else [backbone, self.headless]
        self.decoder: Any = None
        if backbone.config.is_encoder_decoder:  # each stack has a padding mask of its own
            self.decoder = backbone.get_decoder()
            stacks += [backbone.get_encoder(), self.decoder]
        # So has a part with an input of another kind, such as a vision tower.
        towers = [m for m in backbone.modules() if isinstance(m, PreTrainedModel) and m not in stacks]
        towers = [tower for tower in towers if tower.main_input_name != backbone.main_input_name]
        stacks += towers
        self.towers = [tower for tower in towers if tower.main_input_name != "input_ids"]
        self.hooks = [
            hook
            for stack in stacks
            for hook in (
                stack.register_forward_pre_hook(self.enter, with_kwargs=True),
                stack.register_forward_hook(self.leave, always_call=True),
            )
        ]

    @property
    def running(self) -> bool:
        """Whether a forward or a generation is between its beginning and its end."""
        return bool(self._inside or self.contexts)

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self.hooks:
            hook.remove()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around a forward of the mixture, or a generation, from its beginning to its end.

        Raises:
            UserError: another thread is inside the same mixture: the two would see each other's context.
        """
        if torch.compiler.is_compiling():  # a graph knows of no threads
            yield
            return
        claim = _Claim(threading.get_ident())
        # One step, so that of two threads only one can have come first.
        first = self._inside.setdefault("claim", claim)
        if first.thread != claim.thread:
            raise UserError(
                "this mixture is running in another thread, and holds what is known of one batch: run one forward or "
                "generate() at a time (a lock, or a copy.deepcopy of the model for each thread; DataParallel is such "
                "a use, DistributedDataParallel is not)"
            )
        if first is not claim:
            yield
            return
        try:
            yield
        finally:
            # Nothing is left unless a KeyboardInterrupt, which no hook hears of, came in between.
            self.contexts.clear()
            self.watch.forget()
            self._inside.clear()

    @contextmanager
    def flat_head(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Around a forward that asks for the logits of some positions: compute those of all rows in one product.

        The positions are cut out of longer rows, and as such a slice torch multiplies them row by row, so that the
        weights of the vocabulary are read once for each.
        """
        head = self.backbone.get_output_embeddings()
        if not given.get("logits_to_keep") or head is None:
            yield
            return
        hook = head.register_forward_pre_hook(lambda module, args: tuple(each.contiguous() for each in args))
        try:
            yield
        finally:
            hook.remove()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every backbone forward, generation's too: take the padding mask and fit the context to the batch."""
        before = self.slot.context
        if module is self.headless and self.contexts:
            self.contexts.append(before)
            return
        if not self.contexts:
            self.watch.begin(self.backbone, kwargs.get("past_key_values"))
        self.contexts.append(before)
        # A tower's first argument is its images or sounds, of which a sequence may have several.
        first = () if module in self.towers else args
        tokens = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *first) if _is_batch(t)), None)
        if tokens is None:
            if len(self.contexts) > 1:  # a part of another input: what is known of the text is not true of it
                self.slot.context = self._of_tower(replace(before, token_mask=None, modality_mask=None), args, kwargs)
            return
        batch, length = tokens.shape[:2]
        context = before.expand_to(batch)
        mask = _token_mask(kwargs, batch, length)
        if mask is None and context.segment_ids is not None and context.segment_ids.shape == (batch, length):
            mask = context.segment_ids >= 0
        if module is self.decoder:
            context = _in_decoder(context, mask, tokens, kwargs)
        else:
            context = replace(context, token_mask=mask, modality_mask=_modality_mask(context, kwargs, length))
        if self.scoring is not None and self.slot.enabled:
            context = self.scoring.before(context, args, kwargs)
        self.slot.context = context

    def _of_tower(self, context: RoutingContext, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutingContext:
        """What the caller said once for the whole batch holds for all images too, however many there are."""
        rows = next((len(value) for value in (*args, *kwargs.values()) if _is_batch(value)), None)
        said = {name: getattr(self.contexts[0], name) for name in RoutingContext.PER_SEQUENCE}
        once: dict[str, Any] = {
            name: value.expand(rows)
            for name, value in said.items()
            if rows is not None and isinstance(value, Tensor) and value.shape == (1,)
        }
        return replace(context, **once)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.scoring is not None and not (module is self.headless and len(self.contexts) > 1):
            self.scoring.after(output)
        self.slot.context = self.contexts.pop()
        if not self.contexts:
            self.watch.end(self.backbone, completed=output is not None)


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2


def _in_decoder(
    context: RoutingContext, mask: Tensor | None, tokens: Tensor, kwargs: Mapping[str, Any]
) -> RoutingContext:
    """The context of a decoder, whose caller knows of the encoder's tokens."""
    length, modality = tokens.shape[1], context.modality_mask
    states, encoder = kwargs.get("encoder_hidden_states"), None
    if isinstance(states, Tensor):
        theirs = kwargs.get("encoder_attention_mask")
        real = theirs.bool() if _is_padding_mask(theirs) and theirs.shape == states.shape[:2] else None
        known = replace(context, token_mask=real, prompt_mask=None)
        encoder = EncoderTokens(states, known, by_shape=states.shape[1] != length)
    written = None if modality is None else modality.new_zeros(len(modality), length)
    return replace(context, token_mask=mask, modality_mask=written, encoder=encoder)


def _modality_mask(context: RoutingContext, kwargs: Mapping[str, Any], length: int) -> Tensor | None:
    """(B, S) of the tokens of this forward."""
    modality = context.modality_mask
    # In generate, which has selections, it is the prompt's, even where a later forward has as many tokens.
    if modality is None or (modality.shape[1] == length and context.selections is None):
        return modality
    # Generated tokens are text, the modality 0.
    total = _tokens_so_far(kwargs, length, modality.shape[1])
    return F.pad(modality, (0, max(total - modality.shape[1], 0)))[:, total - length : total]


def _token_mask(kwargs: Mapping[str, Any], batch: int, length: int) -> Tensor | None:
    """(B, S) bool, the real tokens of this forward; ``None`` where no mask tells."""
    mask = kwargs.get("attention_mask")
    if not _is_padding_mask(mask):
        return _diagonal(mask, kwargs.get("past_key_values"), batch, length)
    if mask.shape[0] != batch or mask.shape[1] < length:
        return None
    return mask[:, -length:].bool()  # with a KV cache the mask covers the past as well


def _diagonal(mask: Any, cache: Any, batch: int, length: int) -> Tensor | None:
    """(B, S) bool, the tokens that attend to themselves, as all but padding do.

    Args:
        mask: (B, heads, S, keys) as ``generate`` prepares it for a static cache, or one for each kind of layer.
    """
    full = True
    if isinstance(mask, Mapping):
        full = "full_attention" in mask
        mask = mask["full_attention"] if full else next(iter(mask.values()), None)
    else:
        full = not (isinstance(cache, Cache) and any(cache.is_sliding))
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != length or mask.shape[0] not in (1, batch):
        return None
    past: Any = mask.shape[3] - length
    if isinstance(cache, Cache):
        # The length in a static cache is a tensor, and stays one: nothing here waits for a GPU.
        past = cache.get_seq_length() - (0 if full else cache.get_mask_sizes(length, 0)[1])
    keys = (torch.arange(length, device=mask.device) + past).clamp(max=mask.shape[3] - 1).view(1, length, 1)
    own = mask[:, 0].expand(batch, -1, -1).gather(-1, keys.expand(batch, -1, -1)).squeeze(-1)
    return own > torch.finfo(own.dtype).min / 2 if own.is_floating_point() else own.bool()


def _is_padding_mask(mask: Any) -> TypeGuard[Tensor]:
    """Not so the masks of a static cache: of four dimensions, or one for each kind of layer in a dict."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def _tokens_so_far(kwargs: Mapping[str, Any], length: int, given: int) -> int:
    """Tokens up to and with this forward, whose own are ``length``; ``generate`` leaves out a mask without padding.

    Args:
        given: tokens that the caller described, which are those of the prompt.
    """
    cache = kwargs.get("past_key_values")
    if isinstance(cache, Cache):
        return int(cache.get_seq_length()) + length
    if _is_padding_mask(kwargs.get("attention_mask")):
        return int(kwargs["attention_mask"].shape[-1])
    return given + length if length < given else length
