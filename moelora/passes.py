"""What surrounds every forward of the backbone, those of ``generate`` included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .experts import Container
from .routing import RoutingContext
from .scoring import ScoringPass
from .slot import RoutingSlot
from .watch import Watch


class Passes:
    """Hooks on the backbone that fit the routing context to each forward.

    Args:
        containers: those of the mixture, by site name.
    """

    def __init__(self, backbone: PreTrainedModel, slot: RoutingSlot, containers: Mapping[str, Container]) -> None:
        self.backbone = backbone
        self.slot = slot
        self.contexts: list[RoutingContext] = []
        self.scoring = ScoringPass.of(backbone, slot, containers)
        self.watch = Watch()
        stacks: list[Any] = [backbone]
        if backbone.config.is_encoder_decoder:  # each stack has a padding mask of its own
            stacks += [backbone.get_encoder(), backbone.get_decoder()]
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

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self.hooks:
            hook.remove()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every backbone forward, generation's too: take the padding mask and fit the context to the batch."""
        before = self.slot.context
        if not self.contexts:
            self.watch.begin(self.backbone)
        self.contexts.append(before)
        # A tower's first argument is its images or sounds, of which a sequence may have several.
        first = () if module in self.towers else args
        tokens = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *first) if _is_batch(t)), None)
        if tokens is None:
            if len(self.contexts) > 1:  # a part of another input: what is known of the text is not true of it
                self.slot.context = replace(before, token_mask=None, modality_mask=None)
            return
        batch, length = tokens.shape[:2]
        mask = kwargs.get("attention_mask")
        if not _is_padding_mask(mask) or mask.shape[0] != batch or mask.shape[1] < length:
            mask = None
        else:
            mask = mask[:, -length:].bool()  # with a KV cache the mask covers the past as well
        context = before.expand_to(batch)
        modality = context.modality_mask
        # In generate, which has selections, it is the prompt's, even where a later forward has as many tokens.
        if modality is not None and (modality.shape[1] != length or context.selections is not None):
            # Generated tokens are text, the modality 0.
            total = _tokens_so_far(kwargs, length, modality.shape[1])
            modality = F.pad(modality, (0, max(total - modality.shape[1], 0)))[:, total - length : total]
        context = replace(context, token_mask=mask, modality_mask=modality)
        if self.scoring is not None and self.slot.enabled:
            context = self.scoring.before(context, args, kwargs)
        self.slot.context = context

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.scoring is not None:
            self.scoring.after(output)
        self.slot.context = self.contexts.pop()
        if not self.contexts:
            self.watch.end(self.backbone, completed=output is not None)


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2


def _is_padding_mask(mask: Any) -> TypeGuard[Tensor]:
    """Not so the masks of a static cache: of four dimensions, or one for each kind of layer in a dict."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def _tokens_so_far(kwargs: dict[str, Any], length: int, given: int) -> int:
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
