"""A prompt with several responses, and which of these are better: what a reward model learns from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import DataError

Message = Mapping[str, str]
Order = Sequence[float | None]


@dataclass(frozen=True)
class Comparison:
    """Of two responses of one ranking.

    Attributes:
        winner, loser: which responses, from 0. tie: they are as good as each other; which is called the winner means
            nothing.
        margin: by how much the winner's reward should be above the loser's, at least 0.
    """

    winner: int
    loser: int
    tie: bool = False
    margin: float = 0.0


@dataclass(frozen=True)
class Ranking:
    """A prompt, responses to it, and what is known about which are better.

    Comparisons are put in order, so that rankings that say the same are equal, and capabilities without any dropped.

    Attributes:
        prompt: messages ``{role, content}``, the last one the user's.
        responses: at least one text.
        comparisons: of the overall preference.
        category: of the task; ``None`` where it is not known.
        capabilities: capability -> comparisons under that capability alone.
        scores: the gold score of each response; ``None`` where there is none, or not for all.
        key: the same for equal prompts, on every machine; made from the prompt if it is not given.
        where: the file and row, for messages.

    Raises:
        DataError: something of this does not hold; the message begins with ``where``.
    """

    prompt: tuple[Message, ...] = field(hash=False)
    responses: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()
    category: str | None = None
    capabilities: Mapping[str, tuple[Comparison, ...]] = field(default_factory=dict, hash=False)
    scores: tuple[float, ...] | None = None
    key: str = ""
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise DataError(f"{self.where}: {problem}" if self.where else f"ranking: {problem}")
        if not self.key:
            object.__setattr__(self, "key", prompt_key(self.prompt))
        object.__setattr__(self, "comparisons", _in_order(self.comparisons))
        capabilities = {name: _in_order(found) for name, found in self.capabilities.items() if found}
        object.__setattr__(self, "capabilities", capabilities)

    def _problem(self) -> str | None:
        for number, message in enumerate(self.prompt, start=1):
            if not all(isinstance(message.get(part), str) for part in ("role", "content")):
                return f"message {number} of the prompt is {dict(message)!r}; it needs a role and a content, both texts"
        if not self.prompt or self.prompt[-1]["role"] != "user" or not self.prompt[-1]["content"].strip():
            return "the prompt has to end with what the user says, and that may not be empty"
        if not self.responses:
            return "there are no responses"
        for number, response in enumerate(self.responses):
            if not isinstance(response, str):
                return f"response {number} is {response!r}; a text is wanted"
        for text in (*(message["content"] for message in self.prompt), *self.responses):
            if not is_unicode(text):
                return f"{text[:60]!r} has half of a surrogate pair, which is no text: mend or leave out the row"
        if self.scores is not None and len(self.scores) != len(self.responses):
            return f"there are {len(self.scores)} scores for {len(self.responses)} responses"
        for name, found in {"": self.comparisons, **self.capabilities}.items():
            problem = _problem_of(found, len(self.responses))
            if problem:
                return f"{f'capability {name!r}: ' if name else ''}{problem}"
        return None


def _in_order(found: Iterable[Comparison]) -> tuple[Comparison, ...]:
    """By the smaller and then the larger response; of a tie the smaller one first."""
    same = (Comparison(min(c.winner, c.loser), max(c.winner, c.loser), tie=True) if c.tie else c for c in found)
    return tuple(sorted(same, key=lambda c: (min(c.winner, c.loser), max(c.winner, c.loser))))


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _problem_of(found: Iterable[Comparison], count: int) -> str | None:
    seen: set[frozenset[int]] = set()
    for comparison in found:
        pair = frozenset((comparison.winner, comparison.loser))
        shown = f"responses {comparison.winner} and {comparison.loser} are compared"
        if not all(0 <= place < count for place in pair):
            return f"{shown}, but there are {count}, counted from 0"
        if len(pair) == 1:
            return f"response {comparison.winner} is compared with itself"
        if pair in seen:
            return f"{shown} twice: say once which is better"
        if not 0 <= comparison.margin < math.inf:
            return f"{shown} with a margin of {comparison.margin}; it has to be 0 or more"
        if comparison.tie and comparison.margin:
            return f"{shown} as a tie with a margin of {comparison.margin:g}: a tie has none"
        seen.add(pair)
    return None


def prompt_key(prompt: Iterable[Message]) -> str:
    """Sixteen hexadecimal digits that are the same for prompts that differ in white space alone."""
    turns = [[message["role"], " ".join(message["content"].split())] for message in prompt]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:16]


def comparisons(
    ranks: Order | None = None, *, scores: Order | None = None, margin: float = 0.0
) -> tuple[Comparison, ...]:
    """All pairs of responses of which one is known to be better, and all pairs that are known to be as good.

    Args:
        ranks: of each response, smaller is better; ``None`` where nothing is known.
        scores: of each response, larger is better; what decides where there are no ranks.
        margin: of a comparison, for each unit by which the winner's score is above the loser's.

    Raises:
        DataError: an entry is no number.
    """
    order = ranks if ranks is not None else scores
    check_order(ranks or ())
    check_order(scores or ())
    found = []
    for first, one in enumerate(order or ()):
        for second, other in enumerate((order or ())[first + 1 :], start=first + 1):
            if one is None or other is None:
                continue
            if one == other:
                found.append(Comparison(first, second, tie=True))
                continue
            winner, loser = (first, second) if (one < other) == (ranks is not None) else (second, first)
            found.append(Comparison(winner, loser, margin=_margin(scores, winner, loser, margin)))
    return tuple(found)


def check_order(values: Order) -> None:
    """Raise :class:`DataError` unless every entry is a number or ``None``."""
    for place, value in enumerate(values):
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)):
            continue
        raise DataError(f"entry {place} is {value!r}; a finite number or null is wanted")


def _margin(scores: Order | None, winner: int, loser: int, unit: float) -> float:
    above, below = (scores[winner], scores[loser]) if scores is not None else (None, None)
    return 0.0 if above is None or below is None else unit * max(above - below, 0.0)


def ranks_of(found: Sequence[Comparison], count: int) -> list[int | None] | None:
    """Ranks with exactly these comparisons, from 1; ``None`` if there are none, as with a cycle or a margin."""
    compared = {place for comparison in found for place in (comparison.winner, comparison.loser)}
    beaten = [0] * count
    for comparison in found:
        beaten[comparison.loser] += not comparison.tie
    ranks = [beaten[place] + 1 if place in compared else None for place in range(count)]
    return ranks if _in_order(comparisons(ranks)) == _in_order(found) else None
