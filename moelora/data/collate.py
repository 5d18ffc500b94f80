"""Rows as a batch of tensors.

Shapes: B batch, S sequence (the longest of the batch).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from ..errors import ConfigError
from .chat import Row
from .conversations import IGNORE
from .packing import packed_fields

PER_EXAMPLE = ("task_ids", "task_types")


@dataclass(frozen=True)
class Collator:
    """Pads rows of a :class:`TokenizedSet`, a :class:`PackedSet` or a :class:`StreamedSet` to the longest one.

    Attributes:
        pad_token_id: what fills ``input_ids``; the attention mask hides it and no label covers it.
        padding_side: where the padding goes.
        with_task_ids: whether the batch has ``task_ids``, for models that route by task.
        answers_only: pad on the left and ask the model for the logits of the last positions alone, as many as the
            longest answer needs (``logits_to_keep``, which most causal language models take), with the labels cut to
            match. The loss stays what it is; the output layer of a small model with a large vocabulary costs less.
    """

    pad_token_id: int
    padding_side: Literal["left", "right"] = "right"
    with_task_ids: bool = False
    answers_only: bool = False

    @classmethod
    def fitting(cls, backbone: Any, pad_token_id: int, packing: bool = False) -> Self:
        """For training on ``backbone``, with ``task_ids``: with ``answers_only`` where it can be told so."""
        known = set(inspect.signature(backbone.forward).parameters)
        answers_only = not packing and {"logits_to_keep", "position_ids"} <= known
        return cls(pad_token_id, with_task_ids=True, answers_only=answers_only)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels``: (B, S) int64; ``task_ids``: (B,) int64 if wanted.

        ``task_types`` (B,) int64 where the rows have them. Of packed rows also ``segment_ids`` and ``position_ids``
        (B, S), and what goes by sequences is (B, S): see :func:`~moelora.data.packing.packed_fields`. With
        ``answers_only`` also ``logits_to_keep`` (int) and ``position_ids`` (B, S), and labels of that length.
        """
        left = self.padding_side == "left" or self.answers_only
        longest = max(len(row["input_ids"]) for row in rows)
        shape = len(rows), longest
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE),
        }
        lengths = [len(row["input_ids"]) for row in rows]
        places = [slice(longest - length, longest) if left else slice(0, length) for length in lengths]
        for number, (row, where) in enumerate(zip(rows, places, strict=True)):
            batch["input_ids"][number, where] = torch.tensor(row["input_ids"])
            batch["attention_mask"][number, where] = 1
            batch["labels"][number, where] = torch.tensor(row["labels"])
        if "segment_ids" in rows[0]:
            if self.answers_only:
                raise ConfigError(
                    "answers_only keeps the logits of the end of each row, and a packed row has answers "
                    "all over: drop one of the two"
                )
            batch |= packed_fields(rows, places, shape)
        else:
            batch |= {name: torch.tensor([row[name] for row in rows]) for name in PER_EXAMPLE if name in rows[0]}
        if not self.with_task_ids:
            batch.pop("task_ids", None)
        return self._keep_answers(batch) if self.answers_only else batch

    def _keep_answers(self, batch: dict[str, Any]) -> dict[str, Any]:
        # The position before the first answer token predicts it.
        first = int((batch["labels"] != IGNORE).int().argmax(dim=1).min())
        keep = batch["labels"].shape[1] - max(first - 1, 0)
        positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return {**batch, "labels": batch["labels"][:, -keep:], "logits_to_keep": keep, "position_ids": positions}
