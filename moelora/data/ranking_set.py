"""Rankings as token ids, and batches of them for a reward model.

Shapes: N responses of a batch, S sequence (the longest of them), P comparisons of two of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..registry import closest
from .conversations import IGNORE, render
from .ranking import Comparison, Message, Ranking

logger = logging.getLogger(__name__)

View = Callable[[Ranking, str | None], int | None]


class NothingToLearnError(DataError):
    """Whole rankings, of which none has what is asked for here."""


class ResponseFormat:
    """How one tokenizer writes a prompt and a response for a reward model.

    The text is what the chat template makes of the whole conversation, without a generation prompt at its end. So the
    last token, whose state a reward is read from, is whatever the template puts last: with ChatML (SmolLM2, Qwen) the
    newline after ``<|im_end|>``, and with most others the end of turn itself. The prompt, generation prompt included,
    is tokenised apart from what follows, as in generation: its tokens are the same whatever the response. (One
    tokenizer call on the whole text may join the two at the border, where a response begins with white space.)

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError("responses are written by a chat template, and this tokenizer has none: set one")
        self.tokenizer = tokenizer

    def __call__(self, prompt: Sequence[Message], responses: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt, and of each response: what follows the prompt up to the end.

        Raises:
            DataError: the template refuses the conversation, or writes the prompt otherwise once a response follows.
        """
        try:
            opening = self._opening(prompt)
            texts = [self._whole(prompt, response) for response in responses]
        except TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        if not all(text.startswith(opening) for text in texts):
            raise DataError(
                "the chat template writes the prompt otherwise once a response follows, so it cannot be told where the "
                "response begins: set a chat_template that writes each turn by itself"
            )
        return self._ids(opening), [self._ids(text[len(opening) :]) for text in texts]

    def _opening(self, prompt: Sequence[Message]) -> str:
        """The prompt with the generation prompt, or without where the template leaves that out before an answer."""
        # Asked with one fixed answer: the prompt's tokens must not depend on the response.
        whole = self._whole(prompt, "the-answer")
        opening = render(self.tokenizer, prompt, add_generation_prompt=True)
        return opening if whole.startswith(opening) else render(self.tokenizer, prompt)

    def _whole(self, prompt: Sequence[Message], response: str) -> str:
        return render(self.tokenizer, [*prompt, {"role": "assistant", "content": response}])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


@dataclass(frozen=True)
class RankingRow:
    """Responses that are compared, tokenised.

    Attributes:
        ranking: its index among those that the set was made of. capability: ``None`` for the overall preference.
        input_ids: of each response, prompt and all. prompt_length: tokens of the prompt, the first of each.
        comparisons: of these responses, by their place here.
        category_id: -100 where it is not known. view_id: the number that the caller gave; ``None`` without one.
    """

    ranking: int
    capability: str | None
    input_ids: tuple[list[int], ...]
    prompt_length: int
    comparisons: tuple[Comparison, ...]
    category_id: int
    view_id: int | None


class RankingSet(Dataset[RankingRow]):
    """The comparisons of rankings, tokenised once: a row for each ranking, or for each of its capabilities.

    A row has those responses that occur in its comparisons. A response longer than ``max_length`` tokens is left out
    with its comparisons, and a row without any is left out; so are rankings that compare nothing.

    Args:
        by_capability: a row for each capability of a ranking instead of one for its overall preference.
        categories: name of each category id; a ranking of another one is an error, one of none has the id -100.
        view: called with a ranking and a capability (``None`` for the overall preference), gives the number of the
            row's responses in ``view_ids``, or ``None`` to leave the row out.

    Attributes:
        rows: the rows. dropped: how many responses were too long.

    Raises:
        DataError: an unknown category, or a conversation that cannot be written.
        NothingToLearnError: nothing is left.
    """

    def __init__(
        self,
        rankings: Sequence[Ranking],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        by_capability: bool = False,
        categories: Sequence[str] = (),
        view: View | None = None,
    ) -> None:
        self.rows: list[RankingRow] = []
        self._categories, self._view = list(categories), view
        write, too_long = ResponseFormat(tokenizer), list[int]()
        for number, ranking in enumerate(rankings):
            wanted = ranking.capabilities.items() if by_capability else [(None, ranking.comparisons)]
            orders = {name: found for name, found in wanted if found}
            if not orders:
                continue
            compared = sorted({place for found in orders.values() for c in found for place in (c.winner, c.loser)})
            try:
                prompt, answers = write(ranking.prompt, [ranking.responses[place] for place in compared])
            except DataError as error:
                raise DataError(f"{ranking.where or f'ranking {number}'}: {error}") from error
            texts = {place: prompt + answer for place, answer in zip(compared, answers, strict=True)}
            kept = {place: text for place, text in texts.items() if len(text) <= max_length}
            too_long += [len(text) for text in texts.values() if len(text) > max_length]
            self.rows += self._rows(number, ranking, orders, kept, len(prompt))
        self.dropped = len(too_long)
        if too_long:
            logger.warning("%d responses are longer than %d tokens: left out", self.dropped, max_length)
        if not self.rows:
            raise NothingToLearnError(_nothing_left(too_long, max_length, by_capability))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> RankingRow:
        return self.rows[index]

    def __iter__(self) -> Iterator[RankingRow]:
        return iter(self.rows)

    def _rows(
        self,
        number: int,
        ranking: Ranking,
        orders: dict[str | None, tuple[Comparison, ...]],
        kept: dict[int, list[int]],
        prompt_length: int,
    ) -> list[RankingRow]:
        rows = []
        category_id = self._category_id(ranking)
        for capability, order in orders.items():
            view_id = None if self._view is None else self._view(ranking, capability)
            found = [c for c in order if c.winner in kept and c.loser in kept]
            if not found or (self._view is not None and view_id is None):
                continue
            used = sorted({place for c in found for place in (c.winner, c.loser)})
            at = {place: row for row, place in enumerate(used)}
            moved = tuple(Comparison(at[c.winner], at[c.loser], c.tie, c.margin) for c in found)
            ids = tuple(kept[place] for place in used)
            rows.append(RankingRow(number, capability, ids, prompt_length, moved, category_id, view_id))
        return rows

    def _category_id(self, ranking: Ranking) -> int:
        if ranking.category is None or not self._categories:
            return IGNORE
        if ranking.category not in self._categories:
            raise DataError(
                f"{ranking.where or 'a ranking'}: category {ranking.category!r} is not among "
                f"{', '.join(self._categories)}{closest(ranking.category, self._categories)}"
            )
        return self._categories.index(ranking.category)


def _nothing_left(too_long: list[int], max_length: int, by_capability: bool) -> str:
    if too_long:
        return (
            f"max_length is {max_length} tokens, which leaves no two responses to compare; the shortest of "
            f"{len(too_long)} longer ones has {min(too_long)}: raise it"
        )
    what = "by a capability that is wanted here" if by_capability else "overall"
    return f"there is nothing to learn: no ranking compares two responses {what}"


def comparison_tensors(rows: Sequence[RankingRow]) -> dict[str, Tensor]:
    """The comparisons of a batch whose responses are those of the rows, one row after the other.

    ``winners``, ``losers``, ``groups`` (P,) int64, ``ties`` (P,) bool and ``margins`` (P,) float32, as
    :class:`~moelora.reward.losses.Comparisons` has them; a group is the place of a row in the batch.
    """
    counts = torch.tensor([len(row.input_ids) for row in rows])
    starts = (counts.cumsum(0) - counts).tolist()
    found = [(group, starts[group], c) for group, row in enumerate(rows) for c in row.comparisons]
    return {
        "winners": torch.tensor([start + c.winner for _, start, c in found]),
        "losers": torch.tensor([start + c.loser for _, start, c in found]),
        "ties": torch.tensor([c.tie for _, _, c in found]),
        "margins": torch.tensor([c.margin for _, _, c in found], dtype=torch.float32),
        "groups": torch.tensor([group for group, _, _ in found]),
    }


@dataclass(frozen=True)
class RankingCollator:
    """Puts the responses of several rankings into one batch.

    Attributes:
        pad_token_id: what fills ``input_ids``; the attention mask hides it. padding_side: where the padding goes.
    """

    pad_token_id: int
    padding_side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[RankingRow]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (N, S), ``prompt_lengths``, ``category_ids`` (N,) int64, comparisons.

        ``view_ids`` (N,) int64 where the rows have them. The comparisons are those of :func:`comparison_tensors`.
        ``prompt_lengths`` counts real tokens, whichever side the padding.
        """
        texts = [torch.tensor(ids) for row in rows for ids in row.input_ids]
        counts = torch.tensor([len(row.input_ids) for row in rows])
        batch = {
            "input_ids": self._padded(texts, self.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(text) for text in texts], 0),
            **comparison_tensors(rows),
        }
        each: dict[str, list[Any]] = {
            "prompt_lengths": [row.prompt_length for row in rows],
            "category_ids": [row.category_id for row in rows],
        }
        if rows[0].view_id is not None:
            each["view_ids"] = [row.view_id for row in rows]
        return batch | {name: torch.tensor(values).repeat_interleave(counts) for name, values in each.items()}

    def _padded(self, texts: list[Tensor], value: int) -> Tensor:
        return pad_sequence(texts, batch_first=True, padding_value=value, padding_side=self.padding_side)
