"""The options of a multiple-choice question, as the cells of a table hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from ..errors import DataError


def read_options(cell: Any, answer: Any, place: str) -> tuple[tuple[str, ...], str]:
    """The texts of all options, and that of the right one.

    Args:
        cell: a list of texts, such a list as JSON text (for CSV), or a mapping with lists ``text`` and ``label``.
        answer: the right option: its label where there are labels; else its index from 0 where it is an integer; else
            its text; else its letter, A the first.
        place: where the row is, for errors.

    Raises:
        DataError: fewer than two options, an empty one, one that is there twice, or an answer that is none of them.
    """
    labels: list[str] = []
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            cell = None
    if isinstance(cell, Mapping) and {"text", "label"} <= set(cell):
        labels = [str(label).strip() for label in cell["label"]]
        cell = cell["text"]
    if not isinstance(cell, list) or len(cell) < 2 or (labels and len(labels) != len(cell)):
        raise DataError(
            f"{place}: the options must be a list of at least two texts, that list as JSON text, or "
            '{"text": [...], "label": [...]}'
        )
    options = tuple("" if option is None else str(option).strip() for option in cell)
    if not all(options) or len(set(options)) < len(options):
        raise DataError(f"{place}: an option is empty or is there twice: {', '.join(map(repr, options))}")
    index = _index(options, labels, answer)
    if index is None:
        known = f"labels {', '.join(labels)}" if labels else f"an index 0..{len(options) - 1}, a letter, or a text of "
        raise DataError(
            f"{place}: the answer {answer!r} is none of {known}{'' if labels else ', '.join(map(repr, options))}"
        )
    return options, options[index]


def _index(options: tuple[str, ...], labels: list[str], answer: Any) -> int | None:
    text = str(answer).strip()
    if labels:
        return labels.index(text) if text in labels else None
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(options) else None
    if text in options:
        return options.index(text)
    letters = ascii_uppercase[: len(options)]
    return letters.index(text) if len(text) == 1 and text in letters else None
