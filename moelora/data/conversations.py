"""Conversations as token ids: exactly those of the chat template, with loss on what the assistant says.

Who wrote which token is asked of the template itself where it marks the assistant's words (``{% generation %}``). Of
other templates it follows from prefixes: what the template writes before an answer, generation prompt included, and
what it writes up to the end of that answer, have to be how the whole conversation begins, token for token. Then the
tokens between the two are the answer, and training sees exactly what generation starts from. A template for which that
does not hold, because it rewrites a turn once others follow, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .example import Message

IGNORE = -100
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """What the chat template writes."""
    return str(
        tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], end_ids: Sequence[int], last_only: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels: the ids of the assistant's turns and their ends, else -100.

    Args:
        end_ids: what ends an answer. last_only: labels on the last of the assistant's turns alone.

    Raises:
        DataError: the template refuses the conversation, or it cannot be told which tokens are the assistant's.
    """
    try:
        if GENERATION.search(str(tokenizer.get_chat_template())):
            return _marked(tokenizer, turns, last_only)
        return _by_prefixes(tokenizer, turns, end_ids, last_only)
    except TemplateError as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from error


def _marked(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], last_only: bool
) -> tuple[list[int], list[int]]:
    made: Any = tokenizer.apply_chat_template(
        [dict(turn) for turn in turns], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(made["input_ids"]), list(made["assistant_masks"])
    starts = [at for at, own in enumerate(mask) if own and not (at and mask[at - 1])]
    wanted = sum(turn["role"] == "assistant" for turn in turns)
    if len(starts) < wanted:
        raise DataError(
            f"the chat template marks {len(starts)} parts as the assistant's ({{% generation %}}), but {wanted} turns "
            "are: it has to mark each by itself"
        )
    if last_only:
        mask[: starts[-1]] = [0] * starts[-1]
    return ids, [token if own else IGNORE for token, own in zip(ids, mask, strict=True)]


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], end_ids: Sequence[int], last_only: bool
) -> tuple[list[int], list[int]]:
    whole = _ids(tokenizer, render(tokenizer, turns))
    labels = [IGNORE] * len(whole)
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    for number in answers[-1:] if last_only else answers:
        if number == 0:
            raise DataError(
                "the conversation begins with the assistant, and nothing comes before that could be asked: begin with "
                "another turn, or set a chat_template that marks the assistant's words with {% generation %}"
            )
        before = _ids(tokenizer, render(tokenizer, turns[:number], add_generation_prompt=True))
        after = _ids(tokenizer, render(tokenizer, turns[: number + 1]))
        end = _end_of_answer(tokenizer, after, len(before), end_ids)
        if whole[: len(before)] != before or whole[:end] != after[:end]:
            others = (
                "; loss_turns: last needs it of the last turn only" if not last_only and number != answers[-1] else ""
            )
            raise DataError(
                f"the chat template does not write turn {number + 1} as it would be generated: it writes it otherwise "
                "within the whole conversation, so it cannot be told which tokens are the assistant's. Set a "
                f"chat_template that marks them with {{% generation %}}, or that writes each turn by itself{others}"
            )
        labels[len(before) : end] = whole[len(before) : end]
    return whole, labels


def _end_of_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, end_ids: Sequence[int]) -> int:
    """Where the answer that begins at ``start`` ends: after ``end_ids``, if no more than white space follows them."""
    width = len(end_ids)
    for at in range(len(ids) - width, start - 1, -1):
        if ids[at : at + width] == list(end_ids):
            rest = str(tokenizer.decode(ids[at + width :]))
            return at + width if not rest.strip() else len(ids)
    return len(ids)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
