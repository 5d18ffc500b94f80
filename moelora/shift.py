"""How far the outputs of a model move when something in it changes that was meant to change nothing, or little.

A fresh task of a growing bank is the case in point. Its atoms add nothing, as their ``lora_B`` is zero, but with router
``moram`` they change the norm of the scores and take a share of the softmax, so from the second task on the outputs
move before anything is trained. That is the method (arXiv 2506.21035), and :func:`task_shift` says how far.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .errors import DataError
from .evaluation.scoring import evaluating
from .model import MoELoRAModel

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Shift:
    """How far outputs moved.

    Attributes:
        max_abs: largest absolute difference of any number, in the unit of the outputs (logits, as a rule).
        relative: Euclidean norm of the difference divided by that of the outputs before; over all batches together.
    """

    max_abs: float
    relative: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def logits(outputs: Any) -> Tensor:
    """What a language model predicts; see :func:`outputs_of`."""
    found: Tensor = outputs.logits
    return found


def outputs_of(model: MoELoRAModel, batches: Batches, read: Callable[[Any], Tensor] = logits) -> list[Tensor]:
    """What a model makes of batches, in evaluation mode, float32 on the CPU: all of it is kept, so give it few.

    Args:
        batches: keyword arguments of the model's call. Where ``read`` gives something for every token, (B, S, ...),
            and a batch has an ``attention_mask`` (B, S), padding is left out.
        read: what to compare of that which the model returns.

    Raises:
        DataError: there are no batches.
    """
    if not batches:
        raise DataError("no batches were given, so there is no output to compare: give a few")
    found = []
    with evaluating(model):
        for batch in batches:
            moved = {
                key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()
            }
            made, mask = read(model(**moved)), moved.get("attention_mask")
            real = made if mask is None or made.shape[:2] != mask.shape else made[mask.bool()]
            found.append(real.float().cpu())
    return found


def shift_between(before: Sequence[Tensor], after: Sequence[Tensor]) -> Shift:
    """How far outputs moved, both from :func:`outputs_of` on the same batches. Relative to zero outputs it is NaN."""
    largest = max(float((b - a).abs().max()) for a, b in zip(before, after, strict=True))
    moved = sum(float((b - a).double().square().sum()) for a, b in zip(before, after, strict=True))
    size = sum(float(a.double().square().sum()) for a in before)
    return Shift(largest, (moved / size) ** 0.5 if size else float("nan"))


def task_shift(model: MoELoRAModel, batches: Batches, read: Callable[[Any], Tensor] = logits) -> Shift:
    """Begin a task with ``model.begin_task()``, and say how far that alone moved the outputs.

    Args:
        batches, read: see :func:`outputs_of`.

    Raises:
        ConfigError: no bank of the model can grow, see :func:`~moelora.growth.begin_task`.
        DataError: there are no batches.
    """
    before = outputs_of(model, batches, read)
    model.begin_task()
    return shift_between(before, outputs_of(model, batches, read))
