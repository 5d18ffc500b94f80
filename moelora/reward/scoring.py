"""From conversations to rewards: texts into tokens, tokens into batches, and what comes out in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from ..data.conversations import render
from ..data.ranking_set import ResponseFormat
from ..errors import ConfigError, DataError, UserError
from ..modes import evaluation_mode
from ..registry import closest
from ..saving import Saving
from .config import GENERAL, RewardConfig

Progress = Callable[[int, int], None]
Messages = Sequence[Mapping[str, str]]


@dataclass
class RewardOutput(ModelOutput):
    """What a reward model says of B texts.

    Attributes:
        logits: (B, 1) rewards, as of a sequence classifier; (B, V) where views were asked for, (B, T) for categories.
        category_ids: (B,) the category whose experts answered, -1 for the general one.
        routed_ids: (B,) the category that the classifier chose, or that was given. confidence: (B,) in it.
        capability_logits: (B, C) scores of the capabilities of each text's category, NaN beyond those that it has.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    category_ids: Tensor | None = None
    routed_ids: Tensor | None = None
    confidence: Tensor | None = None
    capability_logits: Tensor | None = None


@dataclass(frozen=True)
class Reward:
    """What a reward model says of one response.

    Attributes:
        reward: the number. category: whose experts answered; ``general`` where the classifier was not sure enough.
        routed: the category that the classifier chose, or that was given. confidence: its probability, calibrated.
        capabilities: the score of each capability of the category that answered.
    """

    reward: float
    category: str
    routed: str
    confidence: float
    capabilities: Mapping[str, float]


class Scoring(Saving):
    """The part of a reward model that takes texts.

    Attributes:
        tokenizer: with a chat template. reward: the configuration.
    """

    reward: RewardConfig

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Messages | str],
        responses: Sequence[str],
        *,
        categories: Sequence[str] | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> list[Reward]:
        """Judge responses; deterministic, and of a text alone: neither its neighbours nor the batch size matter.

        Args:
            prompts: of each response the messages before it, ``{role, content}``, or the text of a single question.
            categories: of each response where they are known, ``general`` for the general expert; else the classifier
                tells from the prompt.
            batch_size: texts in one pass, each under all its views. progress: called with (those done, all of them).

        Raises:
            ConfigError: a category that the model does not have.
            DataError: prompts, responses and categories are not equally many, or the chat template fails.
            UserError: there is no tokenizer.
        """
        counts = {len(prompts), len(responses), len(responses if categories is None else categories)}
        if len(counts) > 1:
            raise DataError(f"score takes a prompt (and a category) for each response, got {sorted(counts)} of them")
        write = ResponseFormat(self._given_tokenizer())
        messages = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
        texts = []
        for prompt, response in zip(messages, responses, strict=True):
            before, [after] = write(prompt, [response])
            texts.append((before + after, len(before)))
        with evaluation_mode(self):
            routed, sure = self._routed(texts, batch_size) if categories is None else self._known(categories)
            threshold = self.reward.threshold
            answered = [number if p >= threshold else -1 for number, p in zip(routed, sure, strict=True)]
            found: dict[int, Reward] = {}
            for batch in by_length([len(ids) for ids, _ in texts], batch_size):
                ids, mask = self.padded([texts[row][0] for row in batch])
                known = torch.tensor([answered[row] for row in batch], device=ids.device)
                output = self(ids, mask, category_ids=known)
                for place, row in enumerate(batch):
                    found[row] = self._in_words(output, place, routed[row], sure[row])
                if progress is not None:
                    progress(len(found), len(texts))
        return [found[row] for row in range(len(texts))]

    def reward_function(self, batch_size: int = 16) -> Any:
        """A function for ``reward_funcs`` of TRL's trainers: ``(prompts, completions, **columns) -> list[float]``.

        It takes prompts and completions as texts or as messages; a column ``category`` is used where there is one.
        """

        def moelora_reward(
            prompts: Sequence[Any], completions: Sequence[Any], category: Sequence[str] | None = None, **columns: Any
        ) -> list[float]:
            replies = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
            found = self.score(prompts, replies, categories=category, batch_size=batch_size)
            return [each.reward for each in found]

        return moelora_reward

    def prompt_lengths(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B,) real tokens up to and with the last place where the chat template begins an answer; all without one.

        Raises:
            UserError: there is no tokenizer to ask.
        """
        start = _answer_start(self._given_tokenizer())
        lengths = []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            real: list[int] = ids[mask].tolist()
            # The last of them may be one with the beginning of the answer: SmolLM2 has a token for two newlines.
            header = start[:-1] or start
            places = range(len(real) - len(start), -1, -1)
            found = (at + len(start) for at in places if real[at : at + len(header)] == header)
            lengths.append(next(found, len(real)))
        return torch.tensor(lengths, device=input_ids.device)

    # -- how -----------------------------------------------------------------------------------------------------

    def _given_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise UserError("this reward model has no tokenizer: set model.tokenizer to that of its backbone")
        tokenizer: PreTrainedTokenizerBase = self.tokenizer
        return tokenizer

    def _known(self, categories: Sequence[str]) -> tuple[list[int], list[float]]:
        numbers = {GENERAL: -1, **{name: number for number, name in enumerate(self.reward.names)}}
        for name in categories:
            if name not in numbers:
                known = list(numbers)
                near = closest(str(name), known)
                raise ConfigError(f"category {name!r} is unknown: known are {', '.join(known)}{near}")
        return [numbers[name] for name in categories], [1.0] * len(categories)

    def _routed(self, texts: Sequence[tuple[list[int], int]], batch_size: int) -> tuple[list[int], list[float]]:
        """The category of each text by its prompt, each prompt once."""
        prompts = [tuple(ids[:length]) for ids, length in texts]
        distinct = list(dict.fromkeys(prompts))
        found: dict[tuple[int, ...], tuple[int, float]] = {}
        for batch in by_length([len(prompt) for prompt in distinct], batch_size):
            ids, mask = self.padded([distinct[row] for row in batch])
            routed, sure = self.route(ids, mask, mask.sum(dim=-1))  # type: ignore[operator]
            for row, number, p in zip(batch, routed.tolist(), sure.tolist(), strict=True):
                found[distinct[row]] = (number, p)
        return [found[prompt][0] for prompt in prompts], [found[prompt][1] for prompt in prompts]

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (B, S), padded on the right, on the model's device."""
        device = self.device
        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        return ids.to(device), mask.to(device)

    def _in_words(self, output: RewardOutput, place: int, routed: int, confidence: float) -> Reward:
        assert output.logits is not None and output.category_ids is not None and output.capability_logits is not None
        number = int(output.category_ids[place])
        names = [*self.reward.names, GENERAL]  # of which -1 is the last
        capabilities = [] if number < 0 else self.reward.capabilities(names[number])
        scores = output.capability_logits[place, : len(capabilities)].tolist()
        by_name = dict(zip(capabilities, scores, strict=True))
        return Reward(float(output.logits[place, 0]), names[number], names[routed], confidence, by_name)


def check_numbers(what: str, numbers: Tensor, lowest: int, count: int) -> None:
    """Raise unless all are from ``lowest`` to below ``count``.

    Raises:
        UserError: one is not; names it.
    """
    wrong = [number for number in numbers.flatten().tolist() if not lowest <= number < count]
    if wrong:
        raise UserError(f"{what} holds {wrong[0]}: this reward model has those from {lowest} to {count - 1}")


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, the longest first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _answer_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens by which a chat template begins an answer."""
    question = [{"role": "user", "content": "?"}]
    without, opening = render(tokenizer, question), render(tokenizer, question, add_generation_prompt=True)
    ids: list[int] = tokenizer(opening[len(without) :], add_special_tokens=False)["input_ids"]
    return ids
