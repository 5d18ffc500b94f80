"""Several whole examples in one row, each as if it were alone.

An example is never cut. Positions start at 0 in each, and a backbone of ``transformers`` that is given such positions
and no mask lets tokens attend within their own example only (``masking_utils.find_packed_sequence_indices``; the
padding at the end of a row is one more piece by itself). ``segment_ids`` say the same to the mixture, so that padding
takes no part in routing statistics and auxiliary losses, and what goes by sequences goes by examples. Nothing predicts
the first token of an example. :func:`check_packing` asks a model whether all this holds for it.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

from ..errors import ConfigError
from ..model import MoELoRAModel
from .chat import Row, TokenizedSet
from .conversations import IGNORE

logger = logging.getLogger(__name__)

# How far logits may be from those of the example alone, relative to their norm: rounding is below, a leak above.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
LOW_PRECISION = 0.1


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Indices of examples by row: best fit, the longest first, as TRL's strategy ``bfd``.

    Each example goes into the row with the least room that it fits into. Rows, and examples within them, are in the
    order of their first index, so the result depends on ``lengths`` alone. O(n log n) but for the moves of a list.

    Raises:
        ValueError: an example is longer than ``max_length``.
    """
    if lengths and max(lengths) > max_length:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit into {max_length}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        at = bisect.bisect_left(room, (lengths[index], -1))
        if at == len(room):
            left, row = max_length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(index)
        bisect.insort(room, (left - lengths[index], row))
    return sorted(sorted(row) for row in rows)


def join(rows: Sequence[Row]) -> Row:
    """One packed row of several rows: ``segment_ids`` count the examples from 0, ids of tasks are a list of theirs."""
    joined: Row = {"input_ids": [], "labels": [], "segment_ids": []}
    for number, row in enumerate(rows):
        joined["input_ids"] += row["input_ids"]
        joined["labels"] += [IGNORE, *row["labels"][1:]]
        joined["segment_ids"] += [number] * len(row["input_ids"])
    for name in ("task_ids", "task_types"):
        if name in rows[0]:
            joined[name] = [row[name] for row in rows]
    return joined


@dataclass(frozen=True)
class PackedSet(Dataset[Row]):
    """A :class:`TokenizedSet` of which several examples make one row.

    Attributes:
        tokens: the examples. rows: the indices of those that are in each row.
    """

    tokens: TokenizedSet
    rows: list[list[int]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return join([self.tokens[member] for member in self.rows[index]])

    @property
    def tasks(self) -> list[str]:
        """Name of each task id."""
        return self.tokens.tasks

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples together, without padding."""
        return self.tokens.num_tokens


def packed(tokens: TokenizedSet, max_length: int) -> PackedSet:
    """The examples of ``tokens`` in rows of at most ``max_length`` tokens."""
    return PackedSet(tokens, pack([len(row["input_ids"]) for row in tokens.rows], max_length))


def packed_fields(rows: Sequence[Row], places: Sequence[slice], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What a batch of packed rows has beside ids, mask and labels, each (B, S) int64.

    ``segment_ids`` are numbered over the batch, -1 in padding; ``position_ids`` start at 0 in each example and in the
    padding; ``task_ids`` and ``task_types`` are those of each token's example, in padding of the row's first.
    """
    fields = {"segment_ids": torch.full(shape, -1), "position_ids": torch.zeros(shape, dtype=torch.long)}
    names = [name for name in ("task_ids", "task_types") if name in rows[0]]
    fields |= {name: torch.zeros(shape, dtype=torch.long) for name in names}
    first = 0
    for number, (row, where) in enumerate(zip(rows, places, strict=True)):
        segments = torch.tensor(row["segment_ids"])
        starts = torch.searchsorted(segments, segments)  # segments ascend, so this is where each one begins
        padding = torch.ones(shape[1], dtype=torch.bool)
        padding[where] = False
        fields["position_ids"][number, padding] = torch.arange(int(padding.sum()))
        fields["position_ids"][number, where] = torch.arange(len(segments)) - starts
        fields["segment_ids"][number, where] = segments + first
        for name in names:
            values = torch.tensor(row[name])
            fields[name][number] = values[0]
            fields[name][number, where] = values[segments]
        first += int(segments[-1]) + 1
    return fields


@torch.no_grad()
def check_packing(model: MoELoRAModel) -> None:
    """Run short examples alone and packed through the backbone, and compare; takes no longer than a small batch.

    Weights that are spread over processes before training (ZeRO-3, FSDP) cannot be run here: then a warning says so.

    Raises:
        ConfigError: it does not keep them apart: it has no such mask (state-space models, encoder-decoders), or its
            kind of attention keeps them apart in a batch of one row only.
    """
    from .collate import Collator

    if model.config.is_encoder_decoder:
        raise ConfigError(
            "packing: the backbone is an encoder-decoder, and packing is for decoders alone: set it to false"
        )
    if is_deepspeed_zero3_enabled() or is_fsdp_enabled():
        logger.warning(
            "packing: weights are sharded, so it is not checked that %s keeps the examples of a row apart; "
            "moelora.data.check_packing tells without ZeRO-3 and FSDP",
            type(model.backbone).__name__,
        )
        return
    device = next(model.backbone.parameters()).device
    words = model.config.get_text_config().vocab_size
    rows = [{"input_ids": [(7 * at + 3 * start) % words for at in range(9)]} for start in (1, 2, 3, 4)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    collate, training = Collator(0), model.training
    model.train(False)
    try:
        with model.disable_experts():
            alone = _logits(model, collate(rows[1:2]), device)[0]
            together = _logits(model, collate([join(rows[:2]), join(rows[2:])]), device)[0, 9:]
    finally:
        model.train(training)
    error = float((together - alone).norm() / alone.norm())
    if not error <= TOLERANCE.get(model.backbone.dtype, LOW_PRECISION):
        attention = getattr(model.config, "_attn_implementation", "its own")
        raise ConfigError(
            f"packing: {type(model.backbone).__name__} with {attention} attention does not keep the examples of a row "
            f"apart (logits differ by {error:.1%} from those of an example alone): set packing to false, or load the "
            "backbone with sdpa or eager attention"
        )


def _logits(model: MoELoRAModel, batch: dict[str, Any], device: torch.device) -> torch.Tensor:
    del batch["labels"]
    logits: torch.Tensor = model(**{name: value.to(device) for name, value in batch.items()}).logits
    return logits.double().cpu()
