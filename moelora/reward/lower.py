"""What the layers below the first with experts make of a text, kept: nothing that is trained changes it.

Shapes: B texts, S tokens, H width of the hidden states.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..modes import evaluation_mode


class LowerStates:
    """States that enter a layer, by the token ids of the text; the longest unused ones are forgotten.

    They are those of an evaluation without padding, whatever the mode of the model: a backbone with dropout of its own
    loses it below the layer.

    Args:
        backbone: whose states they are. Reward models that carry experts on it one after the other may share them.
        layer: path of the layer. limit: bytes to keep at most, in the memory of the CPU.

    Attributes:
        bytes: what is kept now. computed, found: how many texts were run through the layers, and how many were not.
    """

    def __init__(self, backbone: PreTrainedModel, layer: str, limit: int) -> None:
        self.backbone = backbone
        self.layer = layer
        self.limit = limit
        self.bytes = self.computed = self.found = 0
        self.as_tuple = False
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S, H) states, zero in padding, without gradient."""
        real = attention_mask.bool()
        keys = [tuple(ids[mask].tolist()) for ids, mask in zip(input_ids, real, strict=True)]
        states = {key: self._kept[key] for key in keys if key in self._kept}
        self.found += sum(key in states for key in keys)
        missing = list(dict.fromkeys(key for key in keys if key not in states))
        if missing:
            states.update(self._computed(missing, input_ids.device))
        for key in states:
            self._keep(key, states[key])
        width = next(iter(states.values())).shape[-1]
        out = torch.zeros(*input_ids.shape, width, dtype=next(iter(states.values())).dtype, device=input_ids.device)
        out[real] = torch.cat([states[key] for key in keys]).to(out.device)
        return out

    def _keep(self, key: tuple[int, ...], value: Tensor) -> None:
        if key not in self._kept:
            self.bytes += value.nbytes
            self._kept[key] = value
        self._kept.move_to_end(key)
        while self.bytes > self.limit and self._kept:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes

    @torch.inference_mode(False)
    @torch.no_grad()
    def _computed(self, keys: Sequence[tuple[int, ...]], device: torch.device) -> dict[tuple[int, ...], Tensor]:
        self.computed += len(keys)
        width = max(map(len, keys))
        ids, mask = torch.zeros(len(keys), width, dtype=torch.int64), torch.zeros(len(keys), width, dtype=torch.int64)
        for row, key in enumerate(keys):
            ids[row, : len(key)], mask[row, : len(key)] = torch.tensor(key), 1
        states = self._run(ids.to(device), mask.to(device)).cpu()
        # Cloned: out of the batch, and out of inference mode.
        return {key: states[row, : len(key)].clone() for row, key in enumerate(keys)}

    def _run(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def catch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _EnoughError

        def look(layer: nn.Module, args: Any, output: Any) -> None:
            self.as_tuple = isinstance(output, tuple)

        below = self.below()
        upper = self.backbone.get_submodule(self.layer)
        hooks = [below[-1].register_forward_hook(look), upper.register_forward_pre_hook(catch, with_kwargs=True)]
        position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
        body: Any = self.backbone.base_model
        try:
            with evaluation_mode(body):
                body(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        except _EnoughError:
            return caught[0]
        finally:
            for hook in hooks:
                hook.remove()
        raise ConfigError(f"layer {self.layer!r} was not reached: its states cannot be kept; leave remember_mib at 0")

    def below(self) -> list[nn.Module]:
        """The layers that are not run."""
        stack, _, number = self.layer.rpartition(".")
        return list(self.backbone.get_submodule(stack).children())[: int(number)]

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Within the block the layers below give back what enters them."""

        def through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if self.as_tuple else hidden_states

        before = [(layer, vars(layer).get("forward")) for layer in self.below()]
        for layer, _ in before:
            vars(layer)["forward"] = through
        try:
            yield
        finally:
            for layer, own in before:
                if own is None:
                    del vars(layer)["forward"]
                else:
                    vars(layer)["forward"] = own


class _EnoughError(Exception):
    """Ends a forward whose rest is not wanted."""
