"""PEFT's ``rank_pattern`` and ``alpha_pattern``, told apart without running a regular expression from a file.

PEFT takes a key K for a module where the regular expression ``(.*\\.)?(K)$`` matches its path from the start, and of
several keys the first (peft 0.21.2, utils/other.py, ``get_pattern_key``). Nearly all keys are plain paths, or paths
that PEFT itself escaped; those are matched here, letter by letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import TypeVar

from ..config import fits

T = TypeVar("T")

_ANY = "."
_META = "^$*+?{}[]|()"


@dataclass(frozen=True)
class Pattern:
    """A key of which every character is known.

    Attributes:
        letters: each a character, or ``None`` for any one. whole: it must match the whole path, not its end.
        inside: something must stand before it. boundary: what stands before it must end with a dot.
    """

    letters: Sequence[str | None]
    whole: bool = False
    inside: bool = False
    boundary: bool = True

    def fits(self, path: str) -> bool:
        """Whether PEFT would take the key for the module of this path."""
        start = len(path) - len(self.letters)
        if start < 0 or (self.whole and start) or (self.inside and not start):
            return False
        if self.boundary and start and path[start - 1] != ".":
            return False
        return all(letter in (None, found) for letter, found in zip(self.letters, path[start:], strict=True))


@lru_cache(maxsize=4096)
def parse_pattern(key: str) -> Pattern | None:
    """A key as :class:`Pattern`, or ``None`` for a regular expression beyond ``^``, ``$``, ``.``, a backslash before
    punctuation, and ``.*`` at the start.
    """
    inside, boundary = False, True
    whole = key.startswith("^")
    rest = key[1:] if whole else key
    rest = rest[:-1] if rest.endswith("$") and not rest.endswith("\\$") else rest
    if rest.startswith(".*"):
        rest, whole, boundary = rest[2:], False, False
        if rest.startswith("\\."):
            rest, inside, boundary = rest[2:], True, True
    letters: list[str | None] = []
    characters = iter(rest)
    for character in characters:
        if character == "\\":
            character = next(characters, "")
            if not character or character.isalnum():
                return None
            letters.append(character)
        elif character in _META:
            return None
        else:
            letters.append(None if character == _ANY else character)
    return Pattern(letters, whole, inside, boundary) if letters else None


def possible(path: str, rank: int, pattern: Mapping[str, T], default: T, told: Mapping[str, int]) -> list[T]:
    """The values that a module may have: one, unless a regular expression comes before what decides.

    Args:
        path, rank: of the module. pattern: of the values. default: where no key fits. told: of :func:`told_by_rank`.
    """
    maybe = []
    for key, value in pattern.items():
        parsed = parse_pattern(key)
        if parsed is None and key not in told:
            maybe.append(value)
        elif parsed.fits(path) if parsed is not None else rank == told[key]:
            return [*maybe, value]
    return [*maybe, default]


def told_by_rank(pattern: Mapping[str, object], ranks: Mapping[str, int], r: int) -> dict[str, int]:
    """The keys of ``pattern`` whose modules are known by their rank.

    Those are keys that stand at the same place in ``rank_pattern``, with a rank that nothing else gives.

    Args:
        ranks: the ``rank_pattern``. r: the rank of modules without one.
    """
    given = [r, *ranks.values()]
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(pattern, ranks, strict=False))
    return {key: ranks[key] for key, _ in shared if given.count(ranks[key]) == 1}


def most_common(values: Iterable[T]) -> T:
    """What most modules have, and the first of them where several tie: the default beside a pattern."""
    return Counter(values).most_common(1)[0][0]


def site_patterns(values: Mapping[str, T], default: T) -> dict[str, T]:
    """Our own pattern (:class:`~moelora.experts.ExpertsConfig`) for the sites whose value is not the default.

    A longer path stands before one that it ends with, which would fit it as well.

    Args:
        values: of every site, by path.
    """
    named = {path: value for path, value in values.items() if value != default}
    caught = {path: value for path, value in values.items() if any(fits(path, name) for name in named)}
    return dict(sorted(caught.items(), key=lambda item: -len(item[0])))
