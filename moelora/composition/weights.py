"""LoRAHub: one weight for each adapter, found without gradients on a handful of examples.

Published: Huang et al. 2023 (arXiv 2307.13269); sail-sg/lorahub df73afe. Weights in [-1.5, 1.5], at first 0, that
minimise the loss of at most five examples plus 0.05 times the mean size of the weights, in 40 evaluations of NGOpt, of
nevergrad. Factors are mixed, which needs adapters of one rank; outputs may be mixed instead, of any ranks.

Our reading: a search along one coordinate after another, in a random order, with a step for each that grows where it
helped and shrinks where it did not; nothing to install. On 200 random convex quadratics with that penalty, 40
evaluations brought it to 0.12, 0.11 and 0.21 of the value at 0 (median; 2, 5 and 20 weights), a (1+1) evolution
strategy to 0.13, 0.16 and 0.46, random points to 0.21, 0.48 and 1.00. The loss is the mean over the tokens of the
answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from ..config import Closed
from ..data import Collator, Example, tokenize
from ..errors import ConfigError
from ..model import MoELoRAModel
from ..modes import evaluation_mode
from ..routers.static import StaticRouter
from . import card
from .plan import Progress, expert_names


class SearchConfig(Closed):
    """Options of :func:`search_weights`.

    Attributes:
        evaluations: how often the examples are read. bound: largest size of a weight.
        penalty: factor of the mean size of the weights. shots: at most so many examples.
    """

    evaluations: Annotated[int, Field(gt=0)] = 40
    bound: Annotated[float, Field(gt=0)] = 1.5
    penalty: Annotated[float, Field(ge=0)] = 0.05
    shots: Annotated[int, Field(gt=0)] = 5


@dataclass(frozen=True)
class Found:
    """What :func:`search_weights` found.

    Attributes:
        weights: by the name of the adapter. value: the loss with the penalty. before: the same with all weights 0,
            which is the loss of the backbone.
        history: the value of every evaluation. examples: how many were read each time.
    """

    weights: dict[str, float]
    value: float
    before: float
    history: list[float]
    examples: int


def search_weights(
    model: MoELoRAModel,
    examples: Sequence[Example],
    config: SearchConfig | None = None,
    *,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Found:
    """Search the weights of a composition by ``static`` with given weights; the best become those of the model.

    Args:
        model: of ``compose(..., router="static", weights=..., mix="factors")``, in which the weights given are of no
            matter; its ``tokenizer`` is set.
        examples: the first ``shots`` of them count. seed: the same gives the same weights.

    Raises:
        ConfigError: the model is another one, or has no tokenizer.
        DataError: no examples, or all of them too long.
    """
    config = config or SearchConfig()
    routers = _routers(model)
    tokens = tokenize(examples[: config.shots], model.tokenizer, max_length)
    collate = Collator(model.tokenizer.pad_token_id)
    rows = [tokens[index] for index in range(len(tokens))]
    batches = [collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    done = 0

    def objective(weights: list[float]) -> float:
        nonlocal done
        _set(routers, weights)
        penalty = config.penalty * sum(abs(weight) for weight in weights) / len(weights)
        value = mean_loss(model, batches) + penalty
        done += 1
        if progress is not None:
            progress("Searching weights", done, config.evaluations)
        return value

    size = model.mixture.sites[0].experts.num_experts
    with evaluation_mode(model):
        weights, history = minimise(objective, size, bound=config.bound, evaluations=config.evaluations, seed=seed)
    _settle(model, weights)
    names = expert_names(model.mixture.sites[0])
    found = Found(dict(zip(names, weights, strict=True)), min(history), history[0], history, len(rows))
    if model.card is not None:
        said = (
            f"The weights were searched without gradients on {found.examples} examples: the loss with the penalty is "
            f"{found.value:.4g}, that of the backbone is {found.before:.4g}."
        )
        model.card = card.with_section(model.card, "Search", said, {**config.to_dict(), "seed": seed})
    return found


def minimise(
    objective: Callable[[list[float]], float], size: int, *, bound: float, evaluations: int, seed: int = 0
) -> tuple[list[float], list[float]]:
    """The best point of ``[-bound, bound]^size`` that so many evaluations find from 0 on, and all their values.

    A value that is no finite number counts as infinite.
    """
    order = random.Random(seed)  # noqa: S311 - not for cryptography
    best = [0.0] * size
    values = [_finite(objective(best))]
    least = values[0]
    steps, signs = [bound / 3] * size, [1.0] * size
    waiting: list[int] = []
    while len(values) < evaluations:
        if not waiting:
            waiting = order.sample(range(size), size)
        axis = waiting.pop()
        moved = False
        for sign in (signs[axis], -signs[axis]):
            trial = list(best)
            trial[axis] = min(max(best[axis] + sign * steps[axis], -bound), bound)
            if moved or len(values) == evaluations or trial == best:
                continue
            values.append(_finite(objective(trial)))
            if values[-1] < least:
                best, least, signs[axis], moved = trial, values[-1], sign, True
        steps[axis] *= 1.5 if moved else 0.5
    return best, values


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


@torch.no_grad()
def mean_loss(model: MoELoRAModel, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """The next-token loss of a model, averaged over all labels of the batches."""
    total, count = 0.0, 0
    for batch in batches:
        labels = int((batch["labels"][:, 1:] != -100).sum())
        output = model(**{key: value.to(model.device) for key, value in batch.items()})
        total += float(output.get("task_loss", output["loss"])) * labels  # without experts there is only the loss
        count += labels
    return total / count


def _routers(model: MoELoRAModel) -> list[StaticRouter]:
    routers = [container.router for container in model.containers().values()]
    given = [r for r in routers if isinstance(r, StaticRouter) and r.config.weights != "learned"]
    if len(given) != len(routers) or len(model.mixture.sites) != 1:
        raise ConfigError(
            "weights are searched for one mix of the whole model: compose with router 'static' and weights 'uniform'"
        )
    if model.tokenizer is None:
        raise ConfigError("the model has no tokenizer to read examples with: set model.tokenizer")
    return given


def _set(routers: Sequence[StaticRouter], weights: Sequence[float]) -> None:
    for router in routers:
        router.given.copy_(torch.tensor(weights))


def _settle(model: MoELoRAModel, weights: list[float]) -> None:
    """Make the weights those of the model's configuration, from which they are made when it is loaded."""
    routers = _routers(model)
    _set(routers, weights)
    [site] = model.mixture.sites
    assert site.router is not None
    before = site.router
    config = before.model_copy(update={"weights": weights})
    for router in routers:
        router.config = config
    site = site.model_copy(update={"router": config})
    if model.card is not None:
        model.card = card.with_router(model.card, before, config)
    model.mixture = model.mixture.model_copy(update={"sites": [site]})
    for name, container in model.containers().items():
        container.config = site.at(name)
