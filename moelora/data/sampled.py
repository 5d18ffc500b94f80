"""Rankings made without people: a model answers procedural tasks, their scorers and properties of the text judge.

The answers of a part (train or test) lie in one file, ``sampled-<part>-<hash>.jsonl``: a line for each question, in
batches. The hash is of all that the answers depend on in the configuration, so that a file is used again exactly where
it fits. After each batch the whole file takes the place of the old one: a run that is killed loses the batch that it
was at. Each batch has a random generator of its own, so an interrupted run ends with the same file as another.

The same configuration gives the same answers on the same machine with the same number of threads; elsewhere arithmetic
differs in the last digits, and now and then a token does.

Shapes: B questions of a batch, K answers to each, S tokens of the longest prompt, V words.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.utils import logging as bars

from ..config import BackboneConfig, ReasoningGymData, SampledPreferenceData
from ..errors import DataError
from ..files import locked, plain_errors, replace_text
from . import gym
from .chat import ChatFormat, stop_ids
from .example import Example
from .properties import PROPERTIES, Answer
from .ranking import Ranking, comparisons

logger = logging.getLogger(__name__)

Part = Literal["train", "test"]
Load = Callable[[], tuple[Any, PreTrainedTokenizerBase]]
Rows = list[dict[str, Any]]
SHOWN = 2_000_003  # added to the seed, for worked examples
# What the answers do not depend on: how they are judged, and how many questions the other part has.
JUDGING = {"property_weight", "categories", "train_size", "test_size", "kind"}


@dataclass(frozen=True)
class Sampler:
    """Samples the answers that a configuration asks for, and ranks them.

    Attributes:
        config: the data section. backbone: the model, as a part of the file's name.
        load: gives the model, a causal one of transformers, and its tokenizer; called where answers are missing.
        folder: where the files are kept.
    """

    config: SampledPreferenceData
    backbone: BackboneConfig
    load: Load
    folder: Path

    def read(self) -> tuple[list[Ranking], list[Ranking]]:
        """The rankings to train on and to test on; see :meth:`part`. No question is in both."""
        return self.part("train"), self.part("test")

    def part(self, part: Part) -> list[Ranking]:
        """The rankings of one part, as :meth:`judged` gives them, less those that say nothing.

        A question whose answers all have the same gold score is left out; how many is logged.

        Raises:
            DataError: a task or option is refused, or no question is left.
            CheckpointError: the file cannot be written.
        """
        rankings = self.judged(part)
        kept = [ranking for ranking in rankings if any(not each.tie for each in ranking.comparisons)]
        if len(kept) < len(rankings):
            logger.info(
                "%d of %d %s questions left out: all answers to them are as good",
                len(rankings) - len(kept),
                len(rankings),
                part,
            )
        if not kept:
            raise DataError(
                f"{self._path(part)}: to each of {len(rankings)} questions all answers are as good, so there is "
                "nothing to rank: take other tasks or options, or raise temperatures"
            )
        return kept

    def judged(self, part: Part) -> list[Ranking]:
        """All answers of one part, in the order of its questions, sampled where that is still to be done.

        Raises:
            DataError: a task or option is refused.
            CheckpointError: the file cannot be written.
        """
        questions, path = self.questions(part), self._path(part)
        rows = self._sample(questions, path)
        return [
            self._ranking(question, row, f"{path.name}, question {number}")
            for number, (question, row) in enumerate(zip(questions, rows, strict=True), start=1)
        ]

    def questions(self, part: Part) -> list[Example]:
        """The questions of one part.

        Raises:
            DataError: a task or option is refused.
        """
        config = self.config
        tasks = {task: options for group in config.categories.values() for task, options in group.tasks.items()}
        plan = ReasoningGymData(
            tasks=tasks,
            train_size=config.train_size,
            test_size=config.test_size,
            seed=config.seed,
            test_seed=config.test_seed,
            system=config.system,
        )
        splits = gym.generate(plan)
        return splits.train if part == "train" else splits.test

    def _path(self, part: Part) -> Path:
        return self.folder / f"sampled-{part}-{self._hash(part)}.jsonl"

    def _asked(self, question: Example) -> Example:
        """The question as it is put to the model, after worked examples of its task as earlier turns."""
        wanted = self.config.worked_examples
        if not wanted:
            return question
        candidates = _examples(question.task, json.dumps(question.options), wanted * gym.DRAWS, self.config.seed)
        others = [pair for pair in candidates if pair[0] != question.prompt][:wanted]
        turns = [
            {"role": role, "content": content}
            for pair in (*others, (question.prompt, ""))
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        return replace(question, messages=tuple(turns))

    def _hash(self, part: Part) -> str:
        config = self.config
        tasks = {task: options for group in config.categories.values() for task, options in group.tasks.items()}
        # Training questions avoid those of the test, so they depend on both sizes.
        sizes = {"test_size": config.test_size} | ({"train_size": config.train_size} if part == "train" else {})
        plain = {name: value for name, value in config.to_dict().items() if name not in JUDGING}
        parts = [part, plain, sizes, list(tasks.items()), self.backbone.to_dict()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    # -- sampling ------------------------------------------------------------------------------------------------

    def _sample(self, questions: list[Example], path: Path) -> Rows:
        """A row ``{question, answers: [{text, ended}]}`` for each question, in their order."""
        # Questions of similar length are answered together.
        order = sorted(range(len(questions)), key=lambda place: -len(questions[place].prompt))
        with plain_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):  # of several processes one samples
            done = _stored(path, [questions[place].prompt for place in order])
            if len(done) < len(order):
                self._go_on([questions[place] for place in order], done, path)
        return [row for _, row in sorted(zip(order, done, strict=True), key=lambda pair: pair[0])]

    def _go_on(self, questions: list[Example], done: Rows, path: Path) -> None:
        """Answer, batch by batch, what is not yet in ``done``, which grows, as the file does."""
        model, tokenizer = self.load()
        chat = ChatFormat(tokenizer)
        stops = stop_ids(model, tokenizer, chat)
        size = self.config.batch_size
        with bars.tqdm(total=len(questions), initial=len(done), desc=f"Sampling {path.stem}", unit="question") as bar:
            for start in range(len(done), len(questions), size):
                batch = questions[start : start + size]
                answers = self._answers(
                    model, tokenizer, [chat.prompt_ids(self._asked(each)) for each in batch], stops, start
                )
                done += [
                    {"question": question.prompt, "answers": each}
                    for question, each in zip(batch, answers, strict=True)
                ]
                _store(path, done)
                bar.update(len(batch))

    @torch.no_grad()
    def _answers(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], stops: list[int], start: int
    ) -> list[Rows]:
        """K answers to each of B prompts. The prompts are read once, whatever K is."""
        config, longest = self.config, max(map(len, prompts))
        pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0])
        device = model.device
        ids_BS = torch.tensor([[pad] * (longest - len(each)) + each for each in prompts], device=device)
        lengths_B = torch.tensor([len(each) for each in prompts], device=device)
        mask_BS = (torch.arange(longest, device=device) >= longest - lengths_B[:, None]).long()
        count = len(config.temperatures)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed * 1_000_003 + start)
            made = model.generate(
                input_ids=ids_BS.repeat_interleave(count, 0),
                attention_mask=mask_BS.repeat_interleave(count, 0),
                past_key_values=_read(model, ids_BS, mask_BS, count),
                logits_processor=LogitsProcessorList([Temperatures(config.temperatures, len(prompts))]),
                max_new_tokens=config.max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_p=config.top_p,
                top_k=0,
                pad_token_id=pad,
                eos_token_id=stops,
            )
        texts = [_text(tokenizer, row, stops) for row in made[:, longest:].tolist()]
        return [texts[place : place + count] for place in range(0, len(texts), count)]

    # -- judging -------------------------------------------------------------------------------------------------

    def _ranking(self, question: Example, row: dict[str, Any], where: str) -> Ranking:
        category, group = next(
            (name, group) for name, group in self.config.categories.items() if question.task in group.tasks
        )
        scorer = _scorer(question.task, json.dumps(question.options))
        entry = {"question": question.prompt, "answer": question.answer, "metadata": question.metadata}

        def score(text: str) -> float:
            return float(scorer(text, entry)) if text else 0.0

        answers = [Answer(each["text"], each["ended"], question, score) for each in row["answers"]]
        names = list(dict.fromkeys(["correctness", *group.capabilities]))
        values = {name: [round(PROPERTIES[name].measure(each), 6) for each in answers] for name in names}
        scores = [
            round(values["correctness"][place] + self.config.property_weight * _others(values, place), 6)
            for place in range(len(answers))
        ]
        system = [] if question.system is None else [{"role": "system", "content": question.system}]
        return Ranking(
            prompt=(*system, {"role": "user", "content": question.prompt}),
            responses=tuple(each.text for each in answers),
            comparisons=comparisons(scores=scores),
            category=category,
            capabilities={name: comparisons(scores=values[name]) for name in group.capabilities},
            scores=tuple(scores),
            where=where,
        )


class Temperatures(LogitsProcessor):
    """Divides the logits (B K, V) of each answer by its temperature, before nucleus sampling."""

    def __init__(self, temperatures: Sequence[float], questions: int) -> None:
        self.temperatures = torch.tensor(list(temperatures) * questions)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores at each row's temperature."""
        return scores / self.temperatures.to(scores)[:, None]


def _read(model: Any, ids_BS: Tensor, mask_BS: Tensor, count: int) -> DynamicCache:
    """Keys and values of all but the last token of each prompt, ``count`` times each."""
    cache = DynamicCache()
    positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    if ids_BS.shape[1] > 1:
        model(
            input_ids=ids_BS[:, :-1],
            attention_mask=mask_BS[:, :-1],
            position_ids=positions_BS[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(count)
    return cache


def _text(tokenizer: PreTrainedTokenizerBase, row: list[int], stops: list[int]) -> dict[str, Any]:
    end = next((place for place, token in enumerate(row) if token in stops), None)
    return {
        "text": str(tokenizer.decode(row[:end], skip_special_tokens=True)).strip(),
        "ended": end is not None,
    }


def _others(values: dict[str, list[float]], place: int) -> float:
    others = [each[place] for name, each in values.items() if name != "correctness"]
    return sum(others) / len(others) if others else 0.0


@cache
def _scorer(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    score: Callable[[str, dict[str, Any]], float] = gym.gym_dataset(task, json.loads(options)).score_answer
    return score


@cache
def _examples(task: str, options: str, count: int, seed: int) -> tuple[tuple[str, str], ...]:
    """Different questions of a task, with their answers."""
    source = gym.gym_dataset(task, json.loads(options), count, seed + SHOWN)
    return tuple(
        {str(source[place]["question"]).strip(): str(source[place]["answer"]) for place in range(count)}.items()
    )


def _stored(path: Path, questions: Sequence[str]) -> Rows:
    """The rows of a file, which are of the first of these questions; none if there is no file.

    Raises:
        DataError: they are not, or the file is not what was written.
    """
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        fits = [row["question"] for row in rows] == list(questions[: len(rows)])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{path}: cannot be read as sampled answers ({error}): delete it to sample anew") from error
    if not fits:
        raise DataError(
            f"{path}: the answers are to other questions than the tasks give now, perhaps because another version of "
            "reasoning-gym made them: delete the file to sample anew, or go back to that version"
        )
    return rows


def _store(path: Path, rows: Rows) -> None:
    replace_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
