"""Examples as token ids: the backbone's chat template, loss on the answer alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..registry import closest
from .conversations import IGNORE, conversation_tokens, render
from .example import Example, last_answer, task_names

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class ChatFormat:
    """How one tokenizer writes a question and ends an answer.

    With a chat template: the template's own turns, and whatever it puts after an answer ends it. Without: the system
    message, the question and the answer in plain text, ended by the tokenizer's end token. Question and answer are
    tokenised apart, so that training sees exactly the tokens that generation starts from.

    Raises:
        DataError: there is neither a chat template nor an end token, or the template does not show the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._templated = bool(tokenizer.chat_template)
        if not self._templated:
            if tokenizer.eos_token_id is None:
                raise DataError("the tokenizer has neither a chat template nor an end token: set its eos_token")
            self._end_ids = [int(tokenizer.eos_token_id)]
            return
        self._system_turn = self._has_system_turn()
        self._end_ids = self._ids(self._end_of_answer())

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return list(self._end_ids)

    def tokens(self, example: Example) -> tuple[list[int], list[int]]:
        """Tokens of the whole example, and its labels: -100 where there is no loss.

        Raises:
            DataError: a conversation that the chat template does not write so that one can tell who wrote what.
        """
        if example.messages:
            self._refuse_untemplated()
            return conversation_tokens(self.tokenizer, example.turns, self._end_ids, example.last_turn_only)
        prompt, answer = self.prompt_ids(example), self.answer_ids(example)
        return prompt + answer, [IGNORE] * len(prompt) + answer

    def prompt_ids(self, example: Example) -> list[int]:
        """Tokens of the question, up to where the answer begins; of a conversation, its last answer."""
        if example.messages:
            self._refuse_untemplated()
            turns = example.turns
            return self._ids(render(self.tokenizer, turns[: last_answer(turns)], add_generation_prompt=True))
        if self._templated:
            return self._ids(self._render(example.prompt, example.system))
        text = example.prompt if example.system is None else f"{example.system}\n\n{example.prompt}"
        ids: list[int] = self.tokenizer(text)["input_ids"]
        # Some tokenizers end every text by themselves.
        return ids[:-1] if len(ids) > 1 and ids[-1] == self._end_ids[-1] else ids

    def answer_ids(self, example: Example) -> list[int]:
        """Tokens of the answer and its end."""
        answer = example.answer if self._templated else f" {example.answer}"
        return self._ids(answer) + self._end_ids

    def _refuse_untemplated(self) -> None:
        if not self._templated:
            raise DataError("conversations are written by a chat template, and this tokenizer has none: set one")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, prompt: str, system: str | None, answer: str | None = None) -> str:
        turns = []
        if system is not None and self._system_turn:
            turns.append({"role": "system", "content": system})
        elif system is not None:
            prompt = f"{system}\n\n{prompt}"
        turns.append({"role": "user", "content": prompt})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return render(self.tokenizer, turns, add_generation_prompt=answer is None)

    def _has_system_turn(self) -> bool:
        """Some templates refuse a system turn; then it goes in front of the question."""
        self._system_turn = True
        try:
            return "by these rules" in self._render("question", "by these rules")
        except TemplateError:
            return False

    def _end_of_answer(self) -> str:
        answer = "the-answer"
        text = self._render("question", None, answer)
        _, found, end = text.rpartition(answer)
        if not found:
            raise DataError(
                "the tokenizer's chat template leaves out the assistant's answer: set another chat_template"
            )
        end = end.rstrip() or str(self.tokenizer.eos_token or "")
        if not end:
            raise DataError("nothing ends an answer in the tokenizer's chat template: set its eos_token")
        return end


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> list[int]:
    """Tokens at which an answer is over: the chat template's, the tokenizer's, the model's."""
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    # A template may end answers with several tokens, such as plain text; the first one alone is then no sign of an end.
    if len(chat.end_ids) == 1:
        stops.add(chat.end_ids[0])
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    stops.update(own if isinstance(own, list) else [own] if own is not None else [])
    return sorted(stops)


@dataclass(frozen=True)
class TokenizedSet(Dataset[Row]):
    """Tokenised examples, for :class:`transformers.Trainer`.

    Attributes:
        rows: ``input_ids`` and ``labels`` (lists of the same length), ``task_ids`` (int), and, where the examples
            have a type, ``task_types`` (int).
        tasks: name of each task id.
        dropped: how many examples were longer than ``max_length``.
    """

    rows: list[Row]
    tasks: list[str]
    dropped: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples together, without padding."""
        return sum(len(row["input_ids"]) for row in self.rows)


class RowMaker:
    """Examples, one by one, as rows of a :class:`TokenizedSet`.

    Attributes:
        tasks: name of each task id. made, dropped: how many rows were made, and how many examples were too long.
        shortest: tokens of the shortest of those that were too long; 0 if none was.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, tasks: Sequence[str]) -> None:
        self.chat = ChatFormat(tokenizer)
        self.max_length = max_length
        self.tasks = list(tasks)
        self._index = {name: number for number, name in enumerate(self.tasks)}
        self._typed: bool | None = None
        self.made, self.dropped, self.shortest = 0, 0, 0

    def __call__(self, example: Example) -> Row | None:
        """The row of an example, or ``None`` if it is too long.

        Raises:
            DataError: an unknown task, a type of the task where others have none or the other way about, or a
                conversation that cannot be written; the message shows the beginning of the example.
        """
        if example.task not in self._index:
            known = ", ".join(self.tasks)
            raise DataError(f"task {example.task!r} is not among {known}{closest(example.task, self.tasks)}")
        typed = example.task_type is not None
        if self._typed not in (None, typed):
            raise DataError(f"some examples have a task type and some have none; one of task {example.task!r} differs")
        self._typed = typed
        try:
            ids, labels = self.chat.tokens(example)
        except DataError as error:
            raise DataError(f"the example that asks {example.prompt[:60]!r}: {error}") from error
        if len(ids) > self.max_length:
            self.dropped += 1
            self.shortest = min(self.shortest or len(ids), len(ids))
            return None
        self.made += 1
        row = {"input_ids": ids, "labels": labels, "task_ids": self._index[example.task]}
        return {**row, "task_types": example.task_type} if typed else row

    def refuse_all_dropped(self) -> None:
        """Raise :class:`DataError` if examples came and every one was too long."""
        if self.dropped and not self.made:
            raise DataError(
                f"max_length is {self.max_length} tokens, but the shortest of {self.dropped} examples has "
                f"{self.shortest}: raise it"
            )


def tokenize(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    tasks: Sequence[str] | None = None,
) -> TokenizedSet:
    """Examples as token ids with labels on the answer and its end only, or on what the assistant says.

    Args:
        max_length: in tokens; a longer example is left out whole, because a cut question has another answer.
        tasks: name of each task id, from the training set; by default the tasks of ``examples`` in alphabetical order.

    Raises:
        DataError: no examples, every example is too long, or one that :class:`RowMaker` refuses.
    """
    examples = list(examples)
    if not examples:
        raise DataError("there are no examples to tokenise: the data set is empty")
    make = RowMaker(tokenizer, max_length, task_names(examples) if tasks is None else tasks)
    rows = [row for row in map(make, examples) if row is not None]
    make.refuse_all_dropped()
    if make.dropped:
        logger.warning("%d of %d examples are longer than %d tokens: left out", make.dropped, len(examples), max_length)
    return TokenizedSet(rows, make.tasks, make.dropped)
