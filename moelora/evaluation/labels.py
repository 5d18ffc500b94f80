"""Scores of known answers without generation: multiple choice by likelihood, and exact match by teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..data.chat import ChatFormat
from ..data.examples import Example
from ..errors import DataError
from .likelihood import Answer, likelihoods
from .scoring import Progress, Report, report_of, stop_ids

if TYPE_CHECKING:
    from ..analysis import RoutingRecorder


@dataclass(frozen=True)
class OptionScores:
    """Multiple choice by likelihood.

    Attributes:
        total: the option with the largest log-probability is the answer (``acc`` of lm-evaluation-harness).
        normalised: the same after dividing by the option's length in characters (``acc_norm``).
        logprobs: of each option, in the order of the examples.
    """

    total: Report
    normalised: Report
    logprobs: list[list[float]]


def score_options(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    recorder: RoutingRecorder | None = None,
) -> OptionScores:
    """Answer multiple-choice questions with the option whose text is most probable after the prompt.

    The prompt is written as in training, by :class:`~moelora.data.chat.ChatFormat`; the end of an answer is not scored.
    Without a chat template these are the numbers of lm-evaluation-harness for a task whose text is the prompt. With one
    they are those that it has with its chat template applied, but that it takes white space at the end of the prompt
    for a part of every option: ``acc`` is the same, its ``acc_norm`` divides by lengths that do not count it.

    Args:
        examples: with ``choices``. The other arguments are those of :func:`likelihoods`.

    Raises:
        DataError: no examples, or one without options.
        ConfigError: the model is an encoder-decoder.
    """
    asked = [(example, example.choices) for example in _with_options(examples)]
    logprobs = _ask(model, tokenizer, asked, batch_size=batch_size, progress=progress, recorder=recorder)
    lengths = [[len(option) for option in example.choices] for example in examples]
    normalised = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(logprobs, lengths, strict=True)]
    return OptionScores(_chosen(examples, logprobs), _chosen(examples, normalised), logprobs)


def score_labels(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    recorder: RoutingRecorder | None = None,
) -> Report:
    """Answer multiple-choice questions with the letter that is most probable after ``Answer:``, below the options.

    As MixLoRA and MoE-PEFT evaluate (argmax over the logits of the labels): one forward for each question. Questions
    whose options are single words already, such as true and false, are so answered by :func:`score_options`.

    Args:
        examples: with ``choices``. The other arguments are those of :func:`likelihoods`.

    Raises:
        DataError: no examples, or one without options, or with more than there are letters.
        ConfigError: the model is an encoder-decoder.
    """
    for example in _with_options(examples):
        if len(example.choices) > len(ascii_uppercase):
            raise DataError(f"task {example.task!r}: a question has {len(example.choices)} options, more than letters")
    asked = [
        (replace(example, prompt=lettered(example)), ascii_uppercase[: len(example.choices)]) for example in examples
    ]
    return _chosen(examples, _ask(model, tokenizer, asked, batch_size=batch_size, progress=progress, recorder=recorder))


def lettered(example: Example) -> str:
    """The question with its options below it, each after its letter, and ``Answer:``."""
    options = (f"{letter}. {option}" for letter, option in zip(ascii_uppercase, example.choices, strict=False))
    return "\n".join([example.prompt, *options, "Answer:"])


def teacher_forced_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 16,
    *,
    progress: Progress | None = None,
    recorder: RoutingRecorder | None = None,
) -> Report:
    """Whether the greedy answer is the reference, token for token: one forward for each question, no generation.

    Every token of the reference, and then one that ends an answer, must be the most probable given the question and the
    reference so far. By induction that is exactly when greedy generation, with room for the answer and its end, writes
    the reference and stops; batches of other shapes round differently, so two tokens that are equal up to rounding may
    fall apart. It is stricter than :func:`~moelora.evaluation.scoring.score`, to which case and closing punctuation do
    not matter, nor the tokens that spell a text, and which gives a task's own part marks.

    Args:
        batch_size: questions of a batch. The other arguments are those of :func:`likelihoods`.

    Returns:
        Items 1 or 0. ``answers`` are what greedy answers begin with, up to the first token that differs.

    Raises:
        DataError: no examples.
        ConfigError: the model is an encoder-decoder.
    """
    if not examples:
        raise DataError("there are no examples to answer: the data set is empty")
    chat = ChatFormat(tokenizer)
    stops = stop_ids(model, tokenizer, chat)
    answers = [Answer(chat.prompt_ids(example), chat.answer_ids(example), example.task) for example in examples]
    found = likelihoods(
        model, answers, pad=_pad(tokenizer), batch_size=batch_size, progress=progress, recorder=recorder
    )
    texts, items = [], []
    for answer, likelihood in zip(answers, found, strict=True):
        pairs = enumerate(zip(answer.tokens, likelihood.best, strict=True))
        differs = next((place for place, (token, best) in pairs if token != best), None)
        # Any token that stops a generation will do, where one token ends an answer.
        last = len(answer.tokens) - 1
        ended = differs == last and len(chat.end_ids) == 1 and likelihood.best[last] in stops
        items.append(float(differs is None or ended))
        begun = likelihood.best if differs is None else likelihood.best[: differs + 1]
        texts.append(str(tokenizer.decode(begun, skip_special_tokens=True)).strip())
    return report_of(examples, texts, items)


def _with_options(examples: Sequence[Example]) -> Sequence[Example]:
    if not examples:
        raise DataError("there are no examples to answer: the data set is empty")
    bare = next((example for example in examples if not example.choices), None)
    if bare is not None:
        raise DataError(
            f"task {bare.task!r} has questions without options, so there is nothing to choose from: name the column "
            "that holds them with data.columns.options, or score what the model generates"
        )
    return examples


def _ask(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[Example, Sequence[str]]], **options: Any
) -> list[list[float]]:
    """The log-probability of each text that may answer a question, without the end of an answer."""
    chat = ChatFormat(tokenizer)
    ended = len(chat.end_ids)
    answers = [
        Answer(chat.prompt_ids(example), chat.answer_ids(replace(example, answer=text))[:-ended], example.task)
        for example, texts in asked
        for text in texts
    ]
    found = iter(likelihoods(model, answers, pad=_pad(tokenizer), **options))
    return [[next(found).logprob for _ in texts] for _, texts in asked]


def _chosen(examples: Sequence[Example], scores: Sequence[Sequence[float]]) -> Report:
    """The option with the largest score, the first of several, is the answer."""
    texts = [example.choices[row.index(max(row))] for example, row in zip(examples, scores, strict=True)]
    items = [float(text == example.answer) for example, text in zip(examples, texts, strict=True)]
    return report_of(examples, texts, items)


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
