"""Asking many questions: a few at once, each once, until they are answered or a limit or a dead server ends it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from .cache import Answer, AnswerCache
from .client import Client, Failure
from .config import Limits, Prices
from .questions import Question, Verdict, read_verdict

FEWEST_FAILURES = 3  # failures in a row, with no answer between them, after which the server is taken for dead


def settle(cache: AnswerCache, question: Question, ask_again: int) -> tuple[Verdict | None, Question]:
    """What the answers that are kept say: a verdict, unreadable after all attempts, or nothing yet.

    Returns:
        The verdict, and the question at its last attempt; where the verdict is ``None``, the one to ask next.
    """
    while True:
        answer = cache.get(question)
        if answer is None:
            return None, question
        verdict = read_verdict(answer.text)
        if verdict is not Verdict.UNREADABLE or question.attempt >= ask_again:
            return verdict, question
        question = question.again(answer.text)


@dataclass
class Spent:
    """What one run took from the server.

    Attributes:
        answers: that arrived. uncounted: those of them of which the server did not count the tokens.
        failures: in plain words, each with the number of questions that met it.
        stopped: why the run ended before all was asked, if it did. faulty: whether that is the server's doing.
        retried: how often a question was sent again and the server answered at last.
    """

    answers: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0
    cost: float = 0.0
    retried: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None
    faulty: bool = False


class Asker:
    """Asks what the cache has no answer to.

    Args:
        progress: called after each question, whether it was answered or not.
    """

    def __init__(
        self,
        client: Client,
        cache: AnswerCache,
        prices: Prices,
        limits: Limits,
        progress: Callable[[Spent], None] | None = None,
    ) -> None:
        self.client = client
        self.cache = cache
        self.prices = prices
        self.limits = limits
        self.progress = progress
        self.spent = Spent()
        self._lock = threading.Lock()
        self._under_way: list[Question] = []
        self._in_a_row = 0

    def ask(self, questions: Iterable[Question]) -> Spent:
        """Ask ``questions``, of which none is settled and none is there twice.

        An interrupt lets those under way arrive, and be kept.

        Raises:
            DataError: an answer cannot be kept.
        """
        waiting = iter(questions)
        with ThreadPoolExecutor(self.client.config.concurrency, thread_name_prefix="judge") as threads:
            workers = [threads.submit(self._work, waiting) for _ in range(self.client.config.concurrency)]
            try:
                for worker in workers:
                    worker.result()
            except BaseException:
                self._stop("interrupted", faulty=True)
                raise
        self.spent.retried = self.client.retried
        return self.spent

    def _work(self, waiting: Iterator[Question]) -> None:
        try:
            while (question := self._take(waiting)) is not None:
                self._pursue(question)
                if self.progress is not None:
                    with self._lock:
                        self.progress(self.spent)
        except BaseException:
            self._stop("interrupted", faulty=True)  # else the others would ask on while the error waits to be seen
            raise

    def _take(self, waiting: Iterator[Question]) -> Question | None:
        """The next question, if the limits leave room for it; in one step, so that they are asked in order."""
        with self._lock:
            question = None if self.spent.stopped else next(waiting, None)
            return question if question is not None and self._reserve(question) else None

    def _pursue(self, question: Question) -> None:
        """Ask one question until it is settled."""
        while True:
            try:
                answer = self.client.ask(question)
            except Failure as failure:
                self._failed(question, failure)
                return
            self.cache.put(question, answer)
            self._arrived(question, answer)
            verdict, question = settle(self.cache, question, self.client.config.ask_again)
            if verdict is not None:
                return
            with self._lock:
                if not self._reserve(question):
                    return

    def _reserve(self, question: Question) -> bool:
        """Whether a question may be asked; then it counts as under way. The caller holds the lock."""
        count, cost = self.limits.questions, self.limits.cost
        if self.spent.stopped:
            return False
        if count is not None and self.spent.answers + len(self._under_way) >= count:
            self.spent.stopped = f"the limit of {count} questions is reached"
            return False
        expected = self.spent.cost + sum(self._most(each) for each in (*self._under_way, question))
        if cost is not None and expected > cost:
            self.spent.stopped = f"the next question might take the cost above the limit of {cost:g}"
            return False
        self._under_way.append(question)
        return True

    def _most(self, question: Question) -> float:
        return self.prices.of(question.tokens(), self.client.config.output_limit or 0)

    def _arrived(self, question: Question, answer: Answer) -> None:
        with self._lock:
            self._under_way.remove(question)
            self._in_a_row = 0
            spent = self.spent
            spent.answers += 1
            spent.uncounted += answer.tokens_in is None or answer.tokens_out is None
            spent.tokens_in += answer.tokens_in or 0
            spent.tokens_out += answer.tokens_out or 0
            spent.cost = self.prices.of(spent.tokens_in, spent.tokens_out)

    def _failed(self, question: Question, failure: Failure) -> None:
        with self._lock:
            self._under_way.remove(question)
            self._in_a_row += 1
            self.spent.failures[str(failure)] = self.spent.failures.get(str(failure), 0) + 1
            if failure.hopeless:
                self.spent.stopped, self.spent.faulty = str(failure), True
            elif self._in_a_row >= max(FEWEST_FAILURES, self.client.config.concurrency):
                self.spent.stopped, self.spent.faulty = f"{self._in_a_row} questions in a row failed", True

    def _stop(self, why: str, faulty: bool) -> None:
        with self._lock:
            self.spent.stopped = self.spent.stopped or why
            self.spent.faulty = self.spent.faulty or faulty
