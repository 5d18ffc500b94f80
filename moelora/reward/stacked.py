"""One pass of the backbone for several views of each text.

All experts of a site are stacked, so views differ in nothing but which of them are open: texts that are looked at
under n views are n rows of a batch. Layers below the first with experts give the same for all views; they see each
text once, and its states are repeated where the first experts are. With experts in the upper third of the layers that
is most of the work.

Shapes: B texts, S tokens, M rows, which is texts times views, H width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..lower import checkpoints, first_layer, positions
from ..model import MoELoRAModel


def last_states(
    model: MoELoRAModel, input_ids: Tensor, attention_mask: Tensor, rows: Tensor | None, views: Tensor
) -> Tensor:
    """(M, H) the hidden state of the last real token, after the last layer, of texts under views.

    Args:
        input_ids, attention_mask: (B, S); padding may be on either side.
        rows: (M,) which text each row is; ``None`` means every text once. views: (M,) int64, under which view.
    """
    position_ids = positions(attention_mask)
    lower = model.lower
    first = None if (rows is None and lower is None) or checkpoints(model) else first_layer(model)
    entering = None if lower is None or first is None else lower(input_ids, attention_mask)
    if rows is not None and first is None:
        input_ids, attention_mask, position_ids = (t[rows] for t in (input_ids, attention_mask, position_ids))
        rows = None
    body: Any = model.backbone.base_model
    whole = model.slot.context
    known = replace(whole, request_ids=views if rows is None else None)
    skipping = nullcontext() if lower is None or entering is None else lower.skipping()
    repeating = _repeating(model, first, rows, views, attention_mask, entering)
    with model._passes.whole(), model.slot.using(known), skipping, repeating:
        output = body(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    states: Tensor = output.last_hidden_state
    last = last_token(attention_mask)
    last = last if rows is None else last[rows]
    return states[torch.arange(len(states), device=states.device), last.to(states.device)]


def last_token(attention_mask: Tensor) -> Tensor:
    """(B,) index of the last real token of each row, 0 where there is none."""
    return attention_mask.long().cumsum(dim=-1).argmax(dim=-1)


@contextmanager
def _repeating(
    model: MoELoRAModel,
    first: str | None,
    rows: Tensor | None,
    views: Tensor,
    attention_mask: Tensor,
    entering: Tensor | None,
) -> Iterator[None]:
    """Within the block the layer ``first`` and those above it see a row for each text and view.

    Args:
        entering: (B, S, H) what ``first`` sees in place of what the layers below give.
    """
    if first is None:
        yield
        return
    stack, _, number = first.rpartition(".")
    layers = list(model.backbone.get_submodule(stack).children())[int(number) :]
    texts = len(attention_mask)
    repeated: dict[int, tuple[Any, Any]] = {}

    def repeat(value: Any) -> Any:
        """What has a row for each text has one for each row; once for all layers, which are given the same masks."""
        if isinstance(value, tuple):
            return tuple(repeat(each) for each in value)
        if rows is None or not isinstance(value, Tensor) or value.dim() < 2 or len(value) != texts:
            return value
        if id(value) not in repeated:
            repeated[id(value)] = (value, value[rows.to(value.device)])
        return repeated[id(value)][1]

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, *others = args
        if layer is layers[0] and entering is not None:
            hidden = entering.to(hidden)
        if layer is layers[0] and rows is not None:
            hidden = hidden[rows.to(hidden.device)]
            mask = attention_mask[rows].bool()
            model.slot.context = replace(model.slot.context, request_ids=views, token_mask=mask)
        return (hidden, *map(repeat, others)), {name: repeat(value) for name, value in kwargs.items()}

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
