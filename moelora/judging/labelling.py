"""Capability labels for rankings: which pairs are compared, and which answers become labels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING

from ..errors import DataError
from ..registry import closest
from ..reward.categories import Categories
from .asking import Asker, Spent, settle
from .cache import AnswerCache
from .client import Client
from .config import JudgeConfig, Limits, Prices
from .questions import Question, Verdict, compare

if TYPE_CHECKING:
    from ..data.preferences import Comparison, Ranking


@dataclass(frozen=True)
class Pair:
    """Two responses of a ranking, by index, to be compared on one point."""

    row: int
    point: str
    one: int
    two: int


@dataclass
class Tally:
    """What became of the pairs of one point; the numbers add up to those planned.

    Attributes:
        kept: both answers name the same reply: these are the labels.
        inconsistent: the two answers name different replies, which is the same place twice.
        undecided: one of the answers, or both, finds neither reply better.
        unreadable: one of the answers, or both, could not be read, after all attempts.
        open: one of the answers, or both, is missing.
    """

    kept: int = 0
    inconsistent: int = 0
    undecided: int = 0
    unreadable: int = 0
    open: int = 0

    @property
    def asked(self) -> int:
        """Pairs that have both answers."""
        return self.kept + self.inconsistent + self.undecided + self.unreadable


def added(tallies: Iterable[Tally]) -> Tally:
    """The sum of some tallies."""
    each = list(tallies)
    return Tally(**{name: sum(getattr(tally, name) for tally in each) for name in vars(Tally())})


@dataclass
class Labels:
    """Rankings with the labels that were found, and how they were found.

    Attributes:
        tallies: by category and point. skipped: rankings without a category, of which nothing is asked.
        both_first: pairs of which both answers name the reply shown first; both_second likewise.
        cut_off: answers that could not be read and that ended because they were too long.
    """

    rankings: list[Ranking] = field(default_factory=list)
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    skipped: int = 0
    both_first: int = 0
    both_second: int = 0
    cut_off: int = 0
    spent: Spent = field(default_factory=Spent)

    @property
    def total(self) -> Tally:
        """All points together."""
        return added(self.tallies.values())

    @property
    def position_bias(self) -> float | None:
        """From -1 (always the second reply) over 0 (as often the one as the other) to 1 (always the first).

        The difference between the two kinds of inconsistent pairs, over the pairs with two decided answers; ``None``
        where there are none.
        """
        decided = self.total.kept + self.total.inconsistent
        return (self.both_first - self.both_second) / decided if decided else None


@dataclass(frozen=True)
class Survey:
    """What a run would ask.

    Attributes:
        questions: all of them. open: those without an answer yet; an unreadable answer brings further ones.
        tokens_in: an estimate for the open ones. tokens_out: the most that their answers can take, where it is known.
        cost: of both.
    """

    pairs: int
    questions: int
    open: int
    tokens_in: int
    tokens_out: int | None
    cost: float
    skipped: int


def survey(
    rankings: Sequence[Ranking],
    categories: Categories,
    config: JudgeConfig,
    cache: AnswerCache,
    *,
    pairs_per_row: int | None = None,
    prices: Prices | None = None,
) -> Survey:
    """Count what :func:`label` would ask; nothing is asked.

    Raises:
        DataError: see :func:`label`.
    """
    pairs = plan(rankings, categories, pairs_per_row)
    seen: set[str] = set()
    count = tokens = 0
    for question in _unasked(rankings, categories, config, cache, pairs, seen):
        count += 1
        tokens += question.tokens()
    limit = config.output_limit
    out = None if limit is None else count * limit
    cost = (prices or Prices()).of(tokens, out or 0)
    return Survey(len(pairs), len(seen), count, tokens, out, cost, _without_category(rankings))


def label(
    rankings: Sequence[Ranking],
    categories: Categories,
    config: JudgeConfig,
    cache: AnswerCache,
    *,
    pairs_per_row: int | None = None,
    prices: Prices | None = None,
    limits: Limits | None = None,
    progress: Callable[[Spent], None] | None = None,
) -> Labels:
    """Ask which of two replies is better, on each point of the category, twice with the order swapped.

    A pair is a label where both answers name the same reply, so a judge that always answers the same yields none.
    Labels that the data brings for a point stand, and nothing is asked about it. Faults of the server raise nothing:
    ``labels.spent`` says what went wrong, and the same call goes on from there.

    Args:
        pairs_per_row: at most this many pairs of a ranking, drawn once and for all from its key; all by default.
        progress: called with what was spent, after each question.

    Raises:
        DataError: no ranking has a category, or one has another than ``categories``; or the answers cannot be kept.
        ConfigError: no key where one is needed, or the package ``openai`` is missing.
    """
    pairs = plan(rankings, categories, pairs_per_row)
    client = Client(config)
    try:
        asker = Asker(client, cache, prices or Prices(), limits or Limits(), progress)
        spent = asker.ask(_unasked(rankings, categories, config, cache, pairs, set()))
    finally:
        client.close()
    labels = collect(rankings, categories, config, cache, pairs)
    labels.spent = spent
    return labels


def plan(rankings: Sequence[Ranking], categories: Categories, pairs_per_row: int | None = None) -> list[Pair]:
    """All pairs to compare, ranking by ranking; two replies with the same text are none.

    Raises:
        DataError: no ranking has a category, or one has another than ``categories``.
    """
    pairs = []
    for row, ranking in enumerate(rankings):
        if ranking.category is None:
            continue
        if ranking.category not in categories:
            raise DataError(
                f"{ranking.where}: the category {ranking.category!r} is not among {', '.join(categories)}"
                f"{closest(ranking.category, list(categories))}; choose categories that fit the data"
            )
        texts = [text.strip() for text in ranking.responses]
        two = [(one, two) for one, two in combinations(range(len(texts)), 2) if texts[one] != texts[two]]
        if pairs_per_row is not None and len(two) > pairs_per_row:
            two = sorted(random.Random(ranking.key).sample(two, pairs_per_row))  # noqa: S311
        points = [point for point in categories[ranking.category].capabilities if point not in ranking.capabilities]
        pairs += [Pair(row, point, *each) for point in points for each in two]
    if rankings and _without_category(rankings) == len(rankings):
        raise DataError(
            f"none of the {len(rankings)} rankings has a category, which says on which points to compare its replies: "
            "add the field 'category'"
        )
    return pairs


def collect(
    rankings: Sequence[Ranking],
    categories: Categories,
    config: JudgeConfig,
    cache: AnswerCache,
    pairs: Sequence[Pair],
) -> Labels:
    """Labels from the answers that are kept; nothing is asked."""
    from ..data.preferences import Comparison  # brings transformers along

    labels = Labels(skipped=_without_category(rankings))
    found: dict[int, dict[str, list[Comparison]]] = {}
    for pair in pairs:
        category = rankings[pair.row].category
        assert category is not None
        tally = labels.tallies.setdefault((category, pair.point), Tally())
        settled = [settle(cache, question, config.ask_again) for question in _questions(rankings, categories, pair)]
        verdicts = [verdict for verdict, _ in settled]
        for verdict, last in settled:
            answer = cache.get(last) if verdict is Verdict.UNREADABLE else None
            labels.cut_off += answer is not None and answer.finish == "length"
        if None in verdicts:
            tally.open += 1
        elif Verdict.UNREADABLE in verdicts:
            tally.unreadable += 1
        elif Verdict.SAME in verdicts:
            tally.undecided += 1
        elif verdicts[0] is verdicts[1]:
            tally.inconsistent += 1
            labels.both_first += verdicts[0] is Verdict.FIRST
            labels.both_second += verdicts[0] is Verdict.SECOND
        else:
            tally.kept += 1
            ends = (pair.one, pair.two) if verdicts[0] is Verdict.FIRST else (pair.two, pair.one)
            found.setdefault(pair.row, {}).setdefault(pair.point, []).append(Comparison(*ends))
    labels.rankings = [_with(ranking, found.get(row, {})) for row, ranking in enumerate(rankings)]
    return labels


def _with(ranking: Ranking, found: Mapping[str, Sequence[Comparison]]) -> Ranking:
    made = {point: tuple(comparisons) for point, comparisons in found.items()}
    return replace(ranking, capabilities={**ranking.capabilities, **made}) if made else ranking


def _questions(rankings: Sequence[Ranking], categories: Categories, pair: Pair) -> tuple[Question, Question]:
    """The two questions of a pair: response ``one`` shown first, and shown second."""
    ranking = rankings[pair.row]
    assert ranking.category is not None
    category = categories[ranking.category]
    one, two = ranking.responses[pair.one], ranking.responses[pair.two]
    about = (pair.point, category.capabilities[pair.point], category.description)
    return compare(ranking.prompt, one, two, *about), compare(ranking.prompt, two, one, *about)


def _unasked(
    rankings: Sequence[Ranking],
    categories: Categories,
    config: JudgeConfig,
    cache: AnswerCache,
    pairs: Sequence[Pair],
    seen: set[str],
) -> Iterator[Question]:
    """Questions that the kept answers do not settle, at their first or a later attempt; the same text only once."""
    for pair in pairs:
        for question in _questions(rankings, categories, pair):
            key = question.key(config.model, config.sampling)
            if key not in seen:
                seen.add(key)
                verdict, next_ = settle(cache, question, config.ask_again)
                if verdict is None:
                    yield next_


def _without_category(rankings: Sequence[Ranking]) -> int:
    return sum(ranking.category is None for ranking in rankings)
