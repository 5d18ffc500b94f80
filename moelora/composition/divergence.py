"""How far another adapter is from a mixture, measured by what the two say about the same text.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..model import MoELoRAModel

Batch = Mapping[str, Any]
Progress = Callable[[int, int], None]
# Rows of logits that are compared at once: the vocabulary is wide, and the sums are in float64.
ROWS = 512
_OTHER = "exported"


@dataclass(frozen=True)
class Divergence:
    """What was measured, token by token, on the probabilities of the next token.

    Attributes:
        tokens: how many. kl: mean of KL(mixture || other) in nats. agreement: share of tokens for which both think the
            same next token the likeliest. backbone_kl, backbone_agreement: the same of the frozen backbone, which is
            what an adapter that does nothing has.
        held_out: the text was not used to make the other.
    """

    tokens: int
    kl: float
    agreement: float
    backbone_kl: float
    backbone_agreement: float
    held_out: bool

    def __str__(self) -> str:
        where = "held-out tokens" if self.held_out else "tokens, of the same text that the weights were taken from"
        return (
            f"KL(mixture || export) {self.kl:.3g} nats per token, the same likeliest token {self.agreement:.1%} of the "
            f"time (the bare backbone: {self.backbone_kl:.3g} nats, {self.backbone_agreement:.1%}), on {self.tokens:,} "
            f"{where}"
        )


def measure(
    model: MoELoRAModel,
    folder: Path,
    batches: Sequence[Batch],
    fields: Mapping[str, Any],
    held_out: bool,
    progress: Progress | None = None,
) -> Divergence:
    """Compare the active adapter of ``model`` with the one in ``folder``, which is taken in meanwhile.

    Args:
        batches: keywords of forwards. fields: of the routing context. held_out: to be told of in the result.

    Raises:
        CheckpointError: the adapter in ``folder`` does not fit the backbone.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    with _beside(model, folder):
        for index, batch in enumerate(batches):
            sums += _compare(model, batch, fields)
            if progress is not None:
                progress(index + 1, len(batches))
    tokens = int(sums[0])
    if not tokens:
        raise DataError("there is no token to compare the export on: give a longer text")
    kl, agreement, backbone_kl, backbone_agreement = (sums[1:] / tokens).tolist()
    return Divergence(tokens, kl, agreement, backbone_kl, backbone_agreement, held_out)


@contextmanager
def _beside(model: MoELoRAModel, folder: Path) -> Iterator[None]:
    """Within the block the adapter in ``folder`` is known to the model, which is in evaluation mode."""
    own, training = model.active_adapter, model.training
    model.load_adapter(folder, _OTHER)
    model.train(False)
    try:
        yield
    finally:
        model.set_adapter(own)
        model.delete_adapter(_OTHER)
        model.train(training)


@torch.no_grad()
def _compare(model: MoELoRAModel, batch: Batch, fields: Mapping[str, Any]) -> Tensor:
    """(5,) float64 sums over the real tokens: their count, KL and agreement of the other, and those of the backbone."""
    own = model.active_adapter
    with model.routing_context(**fields):
        mixture = model(**batch).logits
        with model.disable_experts():
            backbone = model(**batch).logits
        model.set_adapter(_OTHER)
        try:
            other = model(**batch).logits
        finally:
            model.set_adapter(own)
    mask = batch.get("attention_mask")
    real = torch.ones(mixture.shape[:2]).bool() if mask is None or mask.shape != mixture.shape[:2] else mask.bool()
    rows = real.to(mixture.device).nonzero(as_tuple=True)
    sums = torch.zeros(5, dtype=torch.float64)
    for places in zip(*(index.split(ROWS) for index in rows), strict=True):
        wanted = mixture[places].double().log_softmax(-1)
        parts = [torch.tensor(float(len(wanted)), dtype=torch.float64)]
        for logits in (other, backbone):
            found = logits[places].double().log_softmax(-1)
            parts.append((wanted.exp() * (wanted - found)).sum().cpu())
            parts.append((wanted.argmax(-1) == found.argmax(-1)).double().sum().cpu())
        sums += torch.stack(parts)
    return sums


def split_text(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int = 512, most: int = 20_000
) -> tuple[list[Batch], list[Batch]]:
    """A text as pieces to take mean weights from, and others, in between, to measure on.

    Args:
        length: of a piece, in tokens; shorter where the text is. most: so many tokens of the text are used.

    Returns:
        The pieces of both kinds, each a batch of one; the second list is empty where the text has too few tokens to be
        divided.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    # More text than this has more tokens than are wanted, and need not be tokenised.
    ids: list[int] = tokenizer(text[: most * 16], verbose=False)["input_ids"][:most]
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens: give one with at least 2")
    size = min(length, max(len(ids) // 2, 2))
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    batches: list[Batch] = [{"input_ids": torch.tensor([piece])} for piece in pieces if len(piece) > 1]
    return batches[::2], batches[1::2]
