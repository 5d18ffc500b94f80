"""Scores of greedy answers, task by task, with intervals, and the comparison of two models on the same questions."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.chat import ChatFormat
from ..data.chat import stop_ids as stop_ids
from ..data.examples import Example, gym_dataset
from ..errors import DataError
from ..modes import evaluation_mode

if TYPE_CHECKING:
    from ..analysis import RoutingRecorder

Progress = Callable[[int, int], None]
Z = 1.959964  # two-sided 95 % of a normal distribution


@dataclass(frozen=True)
class TaskScore:
    """The score of one task.

    Attributes:
        mean: mean score, 0 to 1. low, high: 95 % Wilson interval (wider than needed where a scorer gives part marks).
        count: number of questions.
    """

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Report:
    """What a model scored.

    Attributes:
        tasks: score of each task.
        mean: mean of the tasks' scores, each task counting the same.
        answers, items: the answer and its score (0 to 1), in the order of the examples.
    """

    tasks: dict[str, TaskScore]
    mean: float
    answers: list[str]
    items: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the single answers."""
        return {"mean": self.mean, "tasks": {name: vars(task) for name, task in self.tasks.items()}}


@dataclass(frozen=True)
class Comparison:
    """How much better one model is than another on the same questions, each task counting the same.

    Attributes:
        difference: difference of the mean scores. low, high: its 95 % bootstrap interval over questions.
    """

    difference: float
    low: float
    high: float


def score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    progress: Progress | None = None,
    recorder: RoutingRecorder | None = None,
) -> Report:
    """Let a model answer every question greedily, and score the answers; deterministic.

    Args:
        model: anything with ``generate`` and ``device``; a module is in ``eval`` mode meanwhile.
        progress: called with (questions answered, questions in all) after each batch.
        recorder: counts the routing of each task, of ``model``; it knows the tasks of ``examples``.

    Raises:
        DataError: no examples, or the package that scores them is missing.
    """
    answers = generate_answers(
        model,
        tokenizer,
        examples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        recorder=recorder,
    )
    return score_answers(examples, answers)


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    progress: Progress | None = None,
    recorder: RoutingRecorder | None = None,
) -> list[str]:
    """The greedy answers, in the order of ``examples``; generated in left-padded batches of similar length."""
    if not examples:
        raise DataError("there are no examples to answer: the data set is empty")
    chat = ChatFormat(tokenizer)
    prompts = [chat.prompt_ids(example) for example in examples]
    order = sorted(range(len(examples)), key=lambda index: -len(prompts[index]))
    stops = stop_ids(model, tokenizer, chat)
    answers = [""] * len(examples)
    with evaluating(model), recorder or nullcontext():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [prompts[index] for index in chosen]
            with counting(recorder, [examples[index].task for index in chosen]):
                texts = _greedy(model, tokenizer, batch, stops, max_new_tokens)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return answers


def _greedy(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], stops: list[int], max_new_tokens: int
) -> list[str]:
    longest = max(map(len, prompts))
    pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0])
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        # Sampling settings of a checkpoint would only be warned about.
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        eos_token_id=stops,
    )
    texts = []
    for row in made[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), len(row))
        texts.append(str(tokenizer.decode(row[:end], skip_special_tokens=True)).strip())
    return texts


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """``eval`` mode and no gradients within the block; each module's mode is as before afterwards."""
    with evaluation_mode(model) if isinstance(model, nn.Module) else nullcontext(), torch.no_grad():
        yield


def counting(recorder: RoutingRecorder | None, tasks: Sequence[str]) -> AbstractContextManager[None]:
    """What makes ``recorder``, if there is one, count the next batches for these tasks, one for each sequence."""
    return nullcontext() if recorder is None else recorder.counting(tasks)


def score_answers(examples: Sequence[Example], answers: Sequence[str]) -> Report:
    """Score given answers: by a procedural task's own scorer, else 1 for the right text and 0 for any other.

    Case, quotation marks, closing punctuation and the amount of white space do not matter for the right text.
    """
    gyms: dict[str, Any] = {}
    items = []
    for example, answer in zip(examples, answers, strict=True):
        if "source_dataset" in example.metadata:
            if example.task not in gyms:
                gyms[example.task] = gym_dataset(example.task, example.options)
            entry = {"question": example.prompt, "answer": example.answer, "metadata": example.metadata}
            items.append(float(gyms[example.task].score_answer(answer, entry)))
        else:
            items.append(float(normalized(answer) == normalized(example.answer)))
    return report_of(examples, answers, items)


def report_of(examples: Sequence[Example], answers: Sequence[str], items: Sequence[float]) -> Report:
    """The report of answers whose scores (0 to 1) are known."""
    by_task: dict[str, list[float]] = {}
    for example, item in zip(examples, items, strict=True):
        by_task.setdefault(example.task, []).append(item)
    tasks = {
        name: TaskScore(_mean(values), *wilson(_mean(values), len(values)), len(values))
        for name, values in by_task.items()
    }
    return Report(tasks, _mean([task.mean for task in tasks.values()]), list(answers), list(items))


def majority(train: Sequence[Example], test: Sequence[Example]) -> Report:
    """The score of always giving the most frequent training answer of a task: what can be had without reading.

    Raises:
        DataError: a task of ``test`` has no training examples.
    """
    frequent: dict[str, Counter[str]] = {}
    for example in train:
        frequent.setdefault(example.task, Counter())[example.answer] += 1
    for example in test:
        if example.task not in frequent:
            raise DataError(f"task {example.task!r} has no training examples, so it has no most frequent answer")
    return score_answers(test, [frequent[example.task].most_common(1)[0][0] for example in test])


def normalized(text: str) -> str:
    """Lower case, single spaces, without quotation marks around and closing punctuation; signs of numbers stay."""
    return re.sub(r"^[\s\"'`*]+|[\s\"'`*.,;:!?]+$", "", " ".join(text.lower().split()))


def wilson(mean: float, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a mean of ``count`` scores between 0 and 1."""
    spread = Z * math.sqrt(mean * (1 - mean) / count + Z * Z / (4 * count * count))
    centre = mean + Z * Z / (2 * count)
    scale = 1 + Z * Z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def compare(examples: Sequence[Example], one: Report, other: Report, *, draws: int = 2000, seed: int = 0) -> Comparison:
    """``one`` minus ``other``, with an interval from resampling the questions of each task, both models alike."""
    by_task: dict[str, list[float]] = {}
    for example, first, second in zip(examples, one.items, other.items, strict=True):
        by_task.setdefault(example.task, []).append(first - second)
    return bootstrap(list(by_task.values()), draws=draws, seed=seed)


def bootstrap(groups: Sequence[Sequence[float]], *, draws: int = 2000, seed: int = 0) -> Comparison:
    """The mean of the groups' means, with an interval from resampling the differences within each group."""
    rng = random.Random(seed)  # noqa: S311 - not for cryptography
    means = sorted(_mean([_mean(rng.choices(group, k=len(group))) for group in groups]) for _ in range(draws))
    return Comparison(_mean([_mean(group) for group in groups]), means[int(draws * 0.025)], means[int(draws * 0.975)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
