"""Finding the module that made a number that is not finite.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Origin:
    """Where a non-finite number came from.

    Attributes:
        module: name of the first module whose inputs were finite and whose output was not.
        parameters: names of its parameters that hold a non-finite number themselves.
        rows: indices of the sequences of the batch that are affected, where the output has them.
    """

    module: str
    parameters: list[str]
    rows: list[int]

    def describe(self, inputs: Mapping[str, Any], tokenizer: Any) -> str:
        """One clause for an error message; the text of a sequence where there is a tokenizer."""
        text = f"the first module with a non-finite output is {self.module!r}"
        if self.parameters:
            text += f", whose parameters {', '.join(self.parameters[:3])} are not finite themselves"
        if self.rows:
            text += f", in sequences {self.rows[:8]} of the batch"
            if "input_ids" in inputs and hasattr(tokenizer, "decode"):
                shown = tokenizer.decode(inputs["input_ids"][self.rows[0]], skip_special_tokens=True)[:120]
                text += f" (the first: {shown!r})"
        return text


class _Found(Exception):
    def __init__(self, origin: Origin) -> None:
        self.origin = origin


def first_non_finite(model: nn.Module, run: Callable[[], Any]) -> Origin | None:
    """Call ``run``, a forward of ``model``, and watch every module; ``None`` when all outputs are finite.

    Modules are judged as they finish, so a layer is named rather than the model around it; a module that only passed
    on a non-finite input is not named.
    """

    def hook(name: str) -> Callable[..., None]:
        def check(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            bad = [tensor for tensor in _tensors(output) if not bool(tensor.isfinite().all())]
            if bad and all(bool(t.isfinite().all()) for t in _tensors((args, kwargs))):
                parameters = [f"{name}.{n}" for n, p in module.named_parameters() if not bool(_finite(p))]
                raise _Found(Origin(name, parameters, _rows(bad[0])))

        return check

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in model.named_modules() if n]
    try:
        run()
    except _Found as found:
        return found.origin
    finally:
        for handle in handles:
            handle.remove()
    return None


def bad_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite, those closest to the loss first."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return [name for name, grad in reversed(named) if not bool(grad.isfinite().all())]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "loss":  # it is no layer's, and follows from the rest
                yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _finite(parameter: nn.Parameter) -> Tensor:
    return parameter.isfinite().all() if parameter.is_floating_point() else torch.tensor(True)


def _rows(output: Tensor) -> list[int]:
    if output.dim() < 3:
        return []
    return [int(i) for i in (~output.isfinite()).flatten(1).any(1).nonzero().flatten()]
