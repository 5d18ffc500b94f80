"""One example, and what makes two of them the same question."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Message = Mapping[str, Any]
Question = tuple[str | None, str]


@dataclass(frozen=True)
class Example:
    """One question and its answer, or a conversation.

    Attributes:
        prompt, answer: what is asked, and the text to be learnt; of a conversation, what comes before the assistant's
            last turn (the user's last words), and that turn.
        task: the task's name; scores are given per task.
        system: system message; ``None`` leaves it to the backbone's chat template.
        metadata: what the task's own scorer needs (empty for a user's data, which is scored by exact match).
        options: generator options of the task, for its scorer.
        choices: what a multiple-choice question offers, ``answer`` among it; empty for other questions.
        messages: the turns of a conversation, ``{"role": ..., "content": ...}``; empty for a single question.
        last_turn_only: of a conversation, learn the assistant's last turn alone instead of all of them.
        task_type: 0 or 1, for routers that balance experts by it; ``None`` where nothing is known.
    """

    prompt: str
    answer: str
    task: str
    system: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    choices: tuple[str, ...] = ()
    messages: tuple[Message, ...] = field(default=(), hash=False)
    last_turn_only: bool = False
    task_type: int | None = None

    @property
    def turns(self) -> list[Message]:
        """The conversation, opened by the system message where it has none of its own."""
        turns = list(self.messages)
        if self.system is not None and turns and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return turns

    @property
    def question(self) -> Question:
        """Equal for examples that ask the same."""
        if self.messages:
            return self.system, json.dumps(self.messages[: last_answer(self.messages)], sort_keys=True)
        return self.system, " ".join(self.prompt.split())


class Splits(NamedTuple):
    """Examples to train on and to test on.

    Attributes:
        train: shuffled across tasks; empty where the training examples are streamed. test: in the order of the tasks.
        dropped: how many candidates were left out because the same question was there already.
    """

    train: list[Example]
    test: list[Example]
    dropped: int


def last_answer(messages: Iterable[Message]) -> int:
    """The index of the assistant's last turn.

    Raises:
        ValueError: there is none.
    """
    return max(number for number, message in enumerate(messages) if message["role"] == "assistant")


def task_names(examples: Iterable[Example]) -> list[str]:
    """The names of all tasks, each once, in alphabetical order; the index of a name is its ``task_id``."""
    return sorted({example.task for example in examples})


def mix(examples: Iterable[Example], seed: int) -> list[Example]:
    """All examples in one order that depends on the seed alone."""
    mixed = list(examples)
    random.Random(seed).shuffle(mixed)  # noqa: S311 - not for cryptography
    return mixed


def fresh(examples: Iterable[Example], seen: set[Question], wanted: int | None = None) -> tuple[list[Example], int]:
    """The first ``wanted`` examples with a question not in ``seen`` (which grows), and how many were passed over."""
    kept: list[Example] = []
    dropped = 0
    for example in examples:
        if example.question in seen:
            dropped += 1
            continue
        seen.add(example.question)
        kept.append(example)
        if len(kept) == wanted:
            break
    return kept, dropped
