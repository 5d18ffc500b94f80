"""Preference data: read from files and hub data sets, split by prompt, and written."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config import PreferenceData
from ..errors import DataError
from .preference_layouts import LeftOut, RankingReader
from .ranking import Comparison as Comparison
from .ranking import Ranking as Ranking
from .ranking import comparisons as comparisons
from .ranking import prompt_key as prompt_key
from .ranking import ranks_of
from .tables import open_table

logger = logging.getLogger(__name__)


def read_rankings(config: PreferenceData) -> tuple[list[Ranking], list[Ranking]]:
    """The rankings to train on and those to test on, both in the order of the files; no prompt is in both.

    Rows that compare nothing (a chosen response that is also the rejected one, conversations that part before their
    last turn) are left out and logged.

    Raises:
        DataError: a file or column is missing, a cell does not hold what it should, or nothing is left to train on.
    """
    if config.test_path is None and config.test_split is None:
        train, test = split(_read(config, config.path, config.split), config.test_fraction, config.seed)
    else:
        test = _read(config, config.test_path or config.path, config.test_split or "train")
        known = {ranking.key for ranking in test}
        everything = _read(config, config.path, config.split)
        train = [ranking for ranking in everything if ranking.key not in known]
        if len(train) < len(everything):
            logger.info("%d rankings left out: their prompts are tested", len(everything) - len(train))
    if not train:
        raise DataError(f"{config.path}: no ranking is left to train on, {len(test)} are held out")
    if config.limit is not None and config.limit < len(train):
        chosen = random.Random(config.seed).sample(range(len(train)), config.limit)  # noqa: S311 - no cryptography
        train = [train[place] for place in sorted(chosen)]
    return train, test


def _read(config: PreferenceData, path: str, part: str) -> list[Ranking]:
    table = open_table(config, path, part)
    if not len(table):
        raise DataError(f"{path}: there are no rows")
    read = RankingReader(config, table.column_names, path)
    found: list[Ranking] = []
    passed: dict[str, list[str]] = {}
    for place, row in read.rows(table):
        try:
            found.append(read(row, place))
        except LeftOut as reason:
            passed.setdefault(str(reason), []).append(place)
    for why, places in passed.items():
        logger.warning("%s: %d rows left out, the first of them %s: %s", path, len(places), places[0], why)
    if not found:
        raise DataError(f"{path}: every row was left out: {'; '.join(passed)}")
    return found


def split(rankings: Sequence[Ranking], fraction: float, seed: int) -> tuple[list[Ranking], list[Ranking]]:
    """Two parts with no prompt in common, each in the order given.

    Which prompt goes where depends on the seed and on the other prompts, not on their order. Of each category the same
    share of prompts is held out, to the nearest whole one, but at least one, and never the only one. A prompt that
    occurs under several categories counts as of the first of them in alphabetical order.

    Args:
        fraction: of the prompts of each category, how many are held out: go to the second part.
    """
    categories: dict[str, str] = {}
    for ranking in rankings:
        name = ranking.category or ""
        categories[ranking.key] = min(name, categories.get(ranking.key, name))
    keys: dict[str, list[str]] = {}
    for key in sorted(categories, key=lambda key: _draw(key, seed)):
        keys.setdefault(categories[key], []).append(key)
    held_out: set[str] = set()
    for drawn in keys.values():
        count = min(max(round(len(drawn) * fraction), 1), len(drawn) - 1) if fraction else 0
        held_out.update(drawn[:count])
    first = [ranking for ranking in rankings if ranking.key not in held_out]
    return first, [ranking for ranking in rankings if ranking.key in held_out]


def _draw(key: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def to_rows(rankings: Iterable[Ranking]) -> list[dict[str, Any]]:
    """Rankings as rows of the layout ``responses``, which :func:`read_rankings` reads back as equal rankings.

    A row has ``prompt`` (messages) and ``responses``, ``ranks`` (from 1, null where a response is not compared) and,
    where there are such, ``scores``, ``category`` and ``capabilities`` (a mapping to ranks). Comparisons that no ranks
    give, as with a cycle or a margin, are ``{pairs: [[winner, loser], ...], ties: [[one, other], ...], margins: [of
    each pair]}`` instead, and then so are all: a column of a table holds one kind of thing.
    """
    rankings = list(rankings)
    plain = all(ranks_of(found, len(r.responses)) is not None for r in rankings for found in _orders(r))
    as_cell = ranks_of if plain else _listed
    rows = []
    for ranking in rankings:
        count = len(ranking.responses)
        row: dict[str, Any] = {
            "prompt": [dict(message) for message in ranking.prompt],
            "responses": list(ranking.responses),
            "ranks": as_cell(ranking.comparisons, count),
        }
        if ranking.scores is not None:
            row["scores"] = list(ranking.scores)
        if ranking.category is not None:
            row["category"] = ranking.category
        if ranking.capabilities:
            row["capabilities"] = {name: as_cell(found, count) for name, found in ranking.capabilities.items()}
        rows.append(row)
    return rows


def _orders(ranking: Ranking) -> Iterable[tuple[Comparison, ...]]:
    return ranking.comparisons, *ranking.capabilities.values()


def _listed(found: Sequence[Comparison], count: int) -> dict[str, Any]:
    strict = [comparison for comparison in found if not comparison.tie]
    return {
        "pairs": [[comparison.winner, comparison.loser] for comparison in strict],
        "ties": [[comparison.winner, comparison.loser] for comparison in found if comparison.tie],
        "margins": [comparison.margin for comparison in strict],
    }


def write_rankings(path: str | Path, rankings: Iterable[Ranking]) -> None:
    """Write rankings as a JSONL file of :func:`to_rows`."""
    lines = (json.dumps(row, ensure_ascii=False) for row in to_rows(rankings))
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
