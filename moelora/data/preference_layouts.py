"""Rows of common preference sets as rankings; :class:`~moelora.config.PreferenceColumns` has the columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..config import PreferenceData
from ..errors import DataError
from ..registry import closest
from .ranking import Comparison, Message, Ranking, check_order, comparisons, prompt_key
from .tables import read_turns

LAYOUTS = {"responses": ("responses",), "pairs": ("chosen", "rejected"), "response": ("response",)}
OPTIONAL = {
    "responses": ("prompt", "ranks", "scores", "category", "capabilities"),
    "pairs": ("prompt", "category", "capabilities"),
    "response": ("prompt", "ranks", "scores", "category"),
}
NAMED = {"responses": ("answers",), "pairs": ("answers", "margin"), "response": ("answers",)}
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
# Fields whose cell may be a plain text, also one that happens to be JSON.
TEXTS = ("prompt", "chosen", "rejected", "category")
Row = Mapping[str, Any]
Told = tuple[tuple[Message, ...] | None, str]


class LeftOut(Exception):
    """A row that compares nothing; the text says why."""


class RankingReader:
    """Rows of one table as rankings.

    Args:
        present: the columns of the table. where: the file or hub id, for errors.

    Attributes:
        layout: ``responses``, ``pairs`` or ``response``.

    Raises:
        DataError: a column is missing.
    """

    def __init__(self, config: PreferenceData, present: Sequence[str], where: str) -> None:
        self.config, self.where = config, where
        self.columns, self.by_capability, self.layout = self._find(present)

    def rows(self, table: Iterable[Row]) -> Iterator[tuple[str, Row]]:
        """Each row and its place; with one response in a row, those of a prompt and category together."""
        numbered = ((f"row {number}", row) for number, row in enumerate(table, start=1))
        return self._together(numbered) if self.layout == "response" else numbered

    def __call__(self, row: Row, place: str) -> Ranking:
        """The ranking of a row.

        Raises:
            DataError: a cell does not hold what it should.
            LeftOut: the row compares nothing.
        """
        try:
            parts = self._pairs(row) if self.layout == "pairs" else self._responses(row)
            parts["category"] = self._category(row)
            parts["capabilities"] = self._capabilities(row, len(parts["responses"]))
        except DataError as error:
            raise DataError(f"{self.where}: {place}: {error}") from error
        return Ranking(where=f"{self.where}: {place}", **parts)

    # -- columns -------------------------------------------------------------------------------------------------

    def _find(self, present: Sequence[str]) -> tuple[dict[str, str], dict[str, str], str]:
        wanted = {field: column for field, column in self.config.columns.to_dict().items() if column is not None}
        capabilities = wanted.pop("capabilities", {})
        by_capability = {} if isinstance(capabilities, str) else capabilities
        if isinstance(capabilities, str):
            wanted["capabilities"] = capabilities
        for field, column in {
            **wanted,
            **{f"capabilities.{name}": column for name, column in by_capability.items()},
        }.items():
            if column not in present:
                raise self._missing(f"data.columns.{field} is {column!r}", present, closest(column, list(present)))
        named = [name for name, fields in LAYOUTS.items() if set(fields) & set(wanted)]
        for layout in named or LAYOUTS:
            fields = {field: wanted.get(field, field) for field in LAYOUTS[layout]}
            if set(fields.values()) <= set(present):
                found = fields | {field: field for field in OPTIONAL[layout] if field in present} | wanted
                if by_capability:
                    found.pop("capabilities", None)
                self._check(layout, found, present)
                return found, by_capability, layout
        raise self._missing(
            "data.columns has to name responses, or chosen and rejected, or response (one in a row)", present
        )

    def _check(self, layout: str, found: Mapping[str, str], present: Sequence[str]) -> None:
        if layout != "pairs" and "prompt" not in found:
            raise self._missing("data.columns.prompt has to name the column of prompts", present)
        known = {*LAYOUTS[layout], *OPTIONAL[layout], *NAMED[layout]}
        for field in found:
            if field not in known:
                raise DataError(
                    f"{self.where}: data.columns.{field} means nothing in rows with {' and '.join(LAYOUTS[layout])}; "
                    f"what they may have is {', '.join(sorted(known))}"
                )

    def _missing(self, what: str, present: Sequence[str], hint: str = "") -> DataError:
        return DataError(f"{self.where}: {what}, but the columns are {', '.join(present)}{hint}")

    def _together(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """Rows of one prompt as a row of the layout ``responses``."""
        found: dict[tuple[str, str | None], list[tuple[str, Row]]] = {}
        for place, row in rows:
            try:
                found.setdefault((prompt_key(self._prompt(row)), self._category(row)), []).append((place, row))
            except DataError as error:
                raise DataError(f"{self.where}: {place}: {error}") from error
        lists = [self.columns[field] for field in ("response", "ranks", "scores") if field in self.columns]
        for group in found.values():
            first = dict(group[0][1])
            for column in {*lists, *self.by_capability.values()}:
                first[column] = [row[column] for _, row in group]
            yield " and ".join(place for place, _ in group), first

    # -- cells ---------------------------------------------------------------------------------------------------

    def _cell(self, row: Row, field: str) -> Any:
        """What a row has under a field, ``None`` without such a column.

        JSON text is decoded: of conversations where a text may stand, and else of lists and mappings.
        """
        column = self.columns.get(field)
        if column is None:
            return None
        value = _decoded(row[column])
        plain = field in TEXTS and not ("answers" in self.columns and field == "prompt")
        return row[column] if plain and not _is_conversation(value) else value

    def _shown(self, field: str) -> str:
        return f"column {self.columns[field]!r}"

    def _category(self, row: Row) -> str | None:
        cell = self._cell(row, "category")
        return None if cell is None or not str(cell).strip() else str(cell).strip()

    def _prompt(self, row: Row) -> tuple[Message, ...]:
        cell, shown = self._cell(row, "prompt"), self._shown("prompt")
        if "answers" in self.columns:
            asked, answered = _texts(cell, shown), _texts(self._cell(row, "answers") or [], self._shown("answers"))
            if len(asked) != len(answered) + 1:
                raise DataError(
                    f"{shown} holds {len(asked)} questions and {self._shown('answers')} {len(answered)} answers; each "
                    "question but the last has been answered"
                )
            turns = [("user", text) for text in asked]
            for number, text in enumerate(answered):
                turns.insert(2 * number + 1, ("assistant", text))
            return tuple({"role": role, "content": text} for role, text in turns)
        if isinstance(cell, str):
            return _spoken(cell) if SPEAKER.match(cell) else ({"role": "user", "content": cell},)
        return read_turns(cell, shown)

    def _responses(self, row: Row) -> dict[str, Any]:
        prompt, field = self._prompt(row), self.layout
        responses = _texts(self._cell(row, field), self._shown(field))
        ranks, scores = self._cell(row, "ranks"), self._cell(row, "scores")
        for name, order in (("ranks", ranks), ("scores", scores)):
            if order is not None and not (name == "ranks" and isinstance(order, Mapping)):
                _one_each(order, len(responses), self._shown(name))
        if isinstance(ranks, Mapping):
            found = _listed(ranks, self._shown("ranks"))
        else:
            found = comparisons(ranks, scores=scores, margin=self.config.score_margin)
        gold = None if scores is None or None in scores else tuple(float(score) for score in scores)
        return {"prompt": prompt, "responses": tuple(responses), "comparisons": found, "scores": gold}

    def _pairs(self, row: Row) -> dict[str, Any]:
        sides = [self._side(row, field) for field in LAYOUTS["pairs"]]
        told = [prompt for side in sides for prompt, _ in side]
        if any(prompt != told[0] for prompt in told):
            raise LeftOut("the two conversations part before their last turn")
        prompt = told[0]
        if prompt is None:
            if "prompt" not in self.columns:
                raise DataError(
                    f"{self._shown('chosen')} is no conversation: name the column of prompts with data.columns.prompt"
                )
            prompt = self._prompt(row)
        good, bad = ([text for _, text in side] for side in sides)
        if set(good) & set(bad):
            raise LeftOut("a chosen and a rejected response are the same")
        margin = self._margin(row)
        found = [
            Comparison(winner, loser, margin=margin)
            for winner in range(len(good))
            for loser in range(len(good), len(good) + len(bad))
        ]
        return {"prompt": prompt, "responses": (*good, *bad), "comparisons": tuple(found)}

    def _side(self, row: Row, field: str) -> list[Told]:
        """The responses of one side, and the prompt where the cell holds a conversation."""
        cell, shown = self._cell(row, field), self._shown(field)
        if isinstance(cell, str):
            if "prompt" in self.columns or not SPEAKER.match(cell):
                return [(None, cell)]
            turns = _spoken(cell)
        elif _is_conversation(cell):
            turns = read_turns(cell, shown)
        else:
            return [(None, text) for text in _texts(cell, shown)]
        if turns[-1]["role"] != "assistant":
            raise LeftOut("a conversation does not end with what the assistant says")
        answer = turns[-1].get("content")
        if not isinstance(answer, str):
            raise DataError(f"{shown}: the last turn is {turns[-1]!r}; its content has to be a text")
        return [(tuple(turns[:-1]) or None, answer)]

    def _margin(self, row: Row) -> float:
        cell = self._cell(row, "margin")
        if cell is None:
            return 0.0
        if isinstance(cell, bool) or not isinstance(cell, int | float) or not cell >= 0:
            raise DataError(f"{self._shown('margin')} is {cell!r}; a margin is a number, 0 or more")
        return float(cell)

    def _capabilities(self, row: Row, count: int) -> dict[str, tuple[Comparison, ...]]:
        found = {}
        for name, column in self.by_capability.items():
            scores = _one_each(_decoded(row[column]), count, f"column {column!r}")
            found[name] = comparisons(scores=scores)
        cell = self._cell(row, "capabilities")
        if cell is not None and not isinstance(cell, Mapping):
            raise DataError(f"{self._shown('capabilities')} is {_short(cell)}; a mapping from names to ranks is wanted")
        for name, ranks in (cell or {}).items():
            shown = f"{self._shown('capabilities')}: {name!r}"
            if isinstance(ranks, Mapping):
                found[name] = _listed(ranks, shown)
            elif ranks is not None:  # tables fill in what only other rows have
                found[name] = comparisons(_one_each(ranks, count, shown))
        return {name: compared for name, compared in found.items() if compared}


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _decoded(cell: Any) -> Any:
    """A cell, or the list or mapping whose JSON text it is; other texts stay what they are."""
    if isinstance(cell, str) and cell.strip()[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def _spoken(text: str) -> tuple[Message, ...]:
    """The turns of a text with ``\\n\\nHuman:`` and ``\\n\\nAssistant:``; one who goes on speaking has one turn."""
    parts = SPEAKER.split(text)[1:]
    turns: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if turns and turns[-1]["role"] == ROLES[speaker]:
            turns[-1]["content"] += f"\n\n{said.strip()}"
        else:
            turns.append({"role": ROLES[speaker], "content": said.strip()})
    # A prompt by itself may end with the beginning of the answer.
    return tuple(turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns)


def _texts(cell: Any, shown: str) -> list[str]:
    if isinstance(cell, Sequence) and not isinstance(cell, str) and all(isinstance(part, str) for part in cell):
        return list(cell)
    raise DataError(f"{shown} is {_short(cell)}; a list of texts is wanted")


def _one_each(cell: Any, count: int, shown: str) -> Sequence[float | None]:
    if not isinstance(cell, Sequence) or isinstance(cell, str):
        raise DataError(f"{shown} is {_short(cell)}; a list with a number (or null) for each response is wanted")
    if len(cell) != count:
        raise DataError(f"{shown} has {len(cell)} entries for {count} responses")
    try:
        check_order(cell)
    except DataError as error:
        raise DataError(f"{shown}: {error}") from error
    return cell


def _listed(cell: Mapping[str, Any], shown: str) -> tuple[Comparison, ...]:
    """``{pairs: [[winner, loser], ...], ties: [[one, other], ...], margins: [of each pair]}`` as comparisons."""
    unknown = set(cell) - {"pairs", "ties", "margins"}
    pairs, ties = cell.get("pairs") or [], cell.get("ties") or []
    margins = cell.get("margins") or [0.0] * len(pairs)
    whole = all(
        isinstance(pair, Sequence) and len(pair) == 2 and all(type(place) is int for place in pair)
        for pair in (*pairs, *ties)
    )
    if unknown or not whole or len(margins) != len(pairs) or not all(isinstance(m, int | float) for m in margins):
        raise DataError(
            f"{shown} is {_short(cell)}; wanted are pairs, a list of [winner, loser] counted from 0, and where there "
            "are such, ties, another, and margins, a number for each pair"
        )
    strict = [Comparison(w, loser, margin=float(m)) for (w, loser), m in zip(pairs, margins, strict=True)]
    return (*strict, *(Comparison(one, other, tie=True) for one, other in ties))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else f"{shown[:77]}..."
