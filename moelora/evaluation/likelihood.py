"""Likelihoods of given answers: prompts are read once, and logits made where an answer is predicted.

Shapes: B rows of a batch, S sequence, P positions whose logits are kept, V words, N positions that predict an answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import ConfigError
from .scoring import Progress, counting, evaluating

if TYPE_CHECKING:
    from ..analysis import RoutingRecorder

# Answers by their task and the tokens that they have in common.
Members = dict[tuple[str, tuple[int, ...]], list[int]]


@dataclass(frozen=True)
class Answer:
    """A text that may follow a prompt.

    Attributes:
        prompt, tokens: token ids of the prompt, and of what follows it. task: whose routing it is.
    """

    prompt: list[int]
    tokens: list[int]
    task: str


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of an :class:`Answer`.

    Attributes:
        logprob: natural logarithm of the probability of all its tokens, each given those before it; float32 arithmetic.
        best: the most probable token at each of its places, given the answer's own tokens before.
    """

    logprob: float
    best: list[int]


def likelihoods(
    model: Any,
    answers: Sequence[Answer],
    *,
    pad: int = 0,
    batch_size: int = 16,
    progress: Progress | None = None,
    recorder: RoutingRecorder | None = None,
) -> list[Likelihood]:
    """The likelihood of every answer, in their order; left-padded batches of similar length.

    Answers with the same tokens before their last one share a row, so single tokens after one prompt cost one. Where
    prompts have several longer answers, a prompt is read once and its answers go on from its keys and values, unless a
    router decides for a token by others of its row (it then refuses packing, see ``RouterConfig.refuses_packing``), or
    the model has no plain cache.

    Args:
        model: a causal language model of transformers, or a mixture on one; in ``eval`` mode meanwhile.
        pad: token that fills rows; the attention mask hides it.
        batch_size: prompts, or rows, of a batch. progress: called with (those done, all of them) after each batch.
        recorder: counts the routing of each task, every token that is read once.

    Raises:
        ConfigError: the model is an encoder-decoder, whose answers do not follow their prompts.
    """
    if model.config.is_encoder_decoder:
        raise ConfigError("answers are scored by a causal language model, and this is an encoder-decoder: generate")
    prompts, rows = _by(answers, lambda answer: answer.prompt), _by(answers, lambda a: [*a.prompt, *a.tokens[:-1]])
    shared = len(rows) > len(prompts) and _goes_on(model)
    members, read = (prompts, _read_prompts) if shared else (rows, _read_rows)
    order = sorted(members, key=lambda key: -len(key[1]))
    found: dict[int, Likelihood] = {}
    with evaluating(model), recorder or nullcontext():
        for start in range(0, len(order), batch_size):
            chosen = {key: members[key] for key in order[start : start + batch_size]}
            logits_NV, places = read(model, answers, chosen, pad, recorder)
            best, normaliser_N = logits_NV.argmax(-1).tolist(), logits_NV.logsumexp(-1)
            for index, own in places.items():
                logprobs = logits_NV[own, answers[index].tokens] - normaliser_N[own]
                found[index] = Likelihood(float(logprobs.sum()), [best[place] for place in own])
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return [found[index] for index in range(len(answers))]


def _by(answers: Sequence[Answer], tokens: Callable[[Answer], list[int]]) -> Members:
    """Which answers have the same task and the same ``tokens``."""
    members: Members = {}
    for index, answer in enumerate(answers):
        members.setdefault((answer.task, tuple(tokens(answer))), []).append(index)
    return members


def _goes_on(model: Any) -> bool:
    """Whether a forward from the keys and values of a prompt is what a forward of the whole would be."""
    known = _arguments(model)
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    routers = [c.router for c in getattr(model, "containers", dict)().values() if c.router is not None]
    alone = all(router.config.refuses_packing() is None for router in routers)
    return plain and alone and {"past_key_values", "position_ids"} <= known


def _read_rows(
    model: Any, answers: Sequence[Answer], rows: Members, pad: int, recorder: RoutingRecorder | None
) -> tuple[Tensor, dict[int, list[int]]]:
    """(N, V) float32 logits that predict answers, from prompts and answers in one; and each answer's places there."""
    keeps = [max(len(answers[index].tokens) for index in members) for members in rows.values()]
    with counting(recorder, [task for task, _ in rows]):
        output, _ = _forward(model, [tokens for _, tokens in rows], pad, logits_to_keep=max(keeps), use_cache=False)
    wanted_BP = torch.arange(max(keeps)) >= max(keeps) - torch.tensor(keeps).unsqueeze(1)
    ends = dict(zip(rows, accumulate(keeps), strict=True))
    places = {
        index: list(range(ends[row] - len(answers[index].tokens), ends[row]))
        for row, members in rows.items()
        for index in members
    }
    return output.logits[:, -max(keeps) :][wanted_BP.to(output.logits.device)].float(), places


def _read_prompts(
    model: Any, answers: Sequence[Answer], prompts: Members, pad: int, recorder: RoutingRecorder | None
) -> tuple[Tensor, dict[int, list[int]]]:
    """The same, from each prompt once, and then from what follows it."""
    with counting(recorder, [task for task, _ in prompts]):
        output, mask_BS = _forward(model, [tokens for _, tokens in prompts], pad, logits_to_keep=1, use_cache=True)
    logits_NV = output.logits[:, -1].float()
    # What is read of an answer, which its last token is not: once for all answers of a prompt that begin so.
    rows = {(key, tuple(answers[index].tokens[:-1])): key for key, members in prompts.items() for index in members}
    rows = {row: key for row, key in rows.items() if row[1]}
    number = {key: place for place, key in enumerate(prompts)}
    starts: dict[Any, int] = {}
    if rows:
        of_B = torch.tensor([number[key] for key in rows.values()], device=mask_BS.device)
        cache = output.past_key_values
        cache.batch_select_indices(of_B)
        with counting(recorder, [task for task, _ in rows.values()]):
            more, own_BS = _forward(model, [tokens for _, tokens in rows], pad, mask_BS[of_B], past_key_values=cache)
        ends = accumulate((len(tokens) for _, tokens in rows), initial=len(prompts))
        starts = dict(zip(rows, ends, strict=False))
        logits_NV = torch.cat([logits_NV, more.logits[own_BS.bool()].float()])
    places = {}
    for key, members in prompts.items():
        for index in members:
            rest = len(answers[index].tokens) - 1
            start = starts.get((key, tuple(answers[index].tokens[:-1])), 0)
            places[index] = [number[key], *range(start, start + rest)]
    return logits_NV, places


def _forward(
    model: Any, rows: Sequence[Sequence[int]], pad: int, before_BS: Tensor | None = None, **options: Any
) -> tuple[Any, Tensor]:
    """The output for ``rows``, and which of the (B, S) tokens are real; padded on the left, or behind a cache right.

    Args:
        before_BS: which tokens in the cache are real.
        options: of the model's forward; dropped where it has none of that name. Without ``logits_to_keep`` the output
            layer runs on prompts too, where nothing is asked.
    """
    longest = max(map(len, rows))
    left = 1 if before_BS is None else 0
    fills = [longest - len(row) for row in rows]
    padded = [[pad] * fill * left + [*row] + [pad] * fill * (1 - left) for row, fill in zip(rows, fills, strict=True)]
    real = [[0] * fill * left + [1] * len(row) + [0] * fill * (1 - left) for row, fill in zip(rows, fills, strict=True)]
    ids_BS, own_BS = (torch.tensor(values, device=model.device) for values in (padded, real))
    mask_BS = own_BS if before_BS is None else torch.cat([before_BS, own_BS], dim=1)
    options["position_ids"] = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)[:, -longest:]
    known = _arguments(model)
    options = {name: value for name, value in options.items() if name in known}
    return model(input_ids=ids_BS, attention_mask=mask_BS, **options), own_BS


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(getattr(model, "backbone", model).forward).parameters)
