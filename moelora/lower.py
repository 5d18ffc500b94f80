"""What the layers below the first with experts make of a text, kept: nothing that is trained changes it.

With experts in the upper layers alone, a second pass over a text, in training or in an evaluation, begins where they
do: see :meth:`~moelora.MoELoRAModel.remember`.

Shapes: B texts, S tokens, H width of the hidden states.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import ConfigError
from .modes import evaluation_mode

if TYPE_CHECKING:
    from .model import MoELoRAModel

# What a forward may be given for what is kept to be of use: anything else could reach the layers below.
KNOWN = {"input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep", "use_cache", "num_items_in_batch"}
KNOWN |= {"output_router_logits"}


class LowerStates:
    """States that enter a layer, by the token ids of the text; the longest unused ones are forgotten.

    They are those of an evaluation without padding, whatever the mode of the model: a backbone with dropout of its own
    loses it below the layer.

    Args:
        backbone: whose states they are. Models that carry experts on it one after the other may share them.
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
        position_ids = positions(attention_mask)
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

    def above(self, model: MoELoRAModel, given: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Within the block a forward of ``model`` begins with what is kept, if all that it is given allows that.

        Args:
            given: arguments of the backbone's forward. ``use_cache`` has to be false: keys of the layers below are not
                kept. Positions have to be those of texts without padding.
        """
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or given.get("use_cache") is not False or not self._fits(model, given):
            return nullcontext()
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape or not _plain_positions(mask, given.get("position_ids")):
            return nullcontext()
        return self._begun(self(ids, mask))

    def _fits(self, model: MoELoRAModel, given: Mapping[str, Any]) -> bool:
        known = all(name in KNOWN for name, value in given.items() if value is not None)
        return known and not checkpoints(model) and first_layer(model) == self.layer

    @contextmanager
    def _begun(self, entering: Tensor) -> Iterator[None]:
        def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (entering.to(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": entering.to(kwargs["hidden_states"])}

        hook = self.backbone.get_submodule(self.layer).register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with self.skipping():
                yield
        finally:
            hook.remove()

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


def positions(attention_mask: Tensor) -> Tensor:
    """(B, S) int64, counted from the first real token of each text; 0 in padding before it."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def _plain_positions(mask: Tensor, position_ids: Tensor | None) -> bool:
    """Whether real tokens stand where they would without padding."""
    if position_ids is None:
        position_ids = torch.arange(mask.shape[1], device=mask.device)
    return bool(((position_ids == positions(mask)) | (mask == 0)).all())


def first_layer(model: MoELoRAModel) -> str | None:
    """The path of the first layer with experts, or ``None`` where there are none below it, or what is trained is."""
    paths = []
    for container in model.containers().values():
        names = container.site.path.split(".")
        depth = next((place for place, name in enumerate(names) if name.isdigit()), None)
        if depth is None:
            return None
        paths.append((int(names[depth]), ".".join(names[: depth + 1])))
    stacks = {path.rpartition(".")[0] for _, path in paths}
    if not paths or len(stacks) != 1:
        return None
    number, path = min(paths)
    return path if number > 0 and not _trained_below(model, stacks.pop(), number) else None


def _trained_below(model: MoELoRAModel, stack: str, number: int) -> bool:
    """Whether a module that is trained whole is the embedding, or a part of a layer below ``number``."""
    saved = [model.backbone.get_submodule(name) for name in model.saved_modules()]
    if not saved:
        return False
    below = [model.backbone.get_input_embeddings(), *list(model.backbone.get_submodule(stack).children())[:number]]
    parts = {id(part) for layer in below for part in layer.modules()}
    return any(id(part) in parts for module in saved for part in module.modules())


def checkpoints(model: MoELoRAModel) -> bool:
    """Whether layers are computed again in the backward pass, from inputs that hooks must not have changed."""
    return model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.backbone.modules())


def remember(model: MoELoRAModel, lower: LowerStates | int) -> LowerStates | None:
    """See :meth:`~moelora.MoELoRAModel.remember`."""
    first = first_layer(model)
    if isinstance(lower, int):
        return LowerStates(model.backbone, first, lower) if lower and first is not None else None
    if lower.backbone is not model.backbone or lower.layer != first:
        raise ConfigError(
            f"these states enter {lower.layer!r} of another backbone or mixture; here the first layer with experts is "
            f"{first!r}: keep new ones"
        )
    return lower
