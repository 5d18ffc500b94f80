"""The phases of a reward model: what each learns from, what it moves, and what its loss is.

Published: DMoERM (arXiv 2403.01197). Base: the whole model of a category on the first part of its rankings; here an
expert. Capability: one expert and one head for each capability, from comparisons under that capability; the head starts
as a copy of the base's. Aggregate: the aggregator of each category on the rest of the rankings, all experts frozen.
Category: the classifier of prompts.

All categories and capabilities learn in one run: a batch has rows of several, each row moves the experts of its own
view, and their gradients do not meet. What they share is a step's size: Adam's count of steps, and clipping by the norm
of all.

Shapes: N responses of a batch, S tokens, C capabilities, H width of the hidden states, T categories.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.preferences import Ranking, split
from ..data.ranking_set import (
    NothingToLearnError,
    RankingCollator,
    RankingRow,
    RankingSet,
    ResponseFormat,
    comparison_tensors,
)
from ..modes import evaluation_mode
from ..reward.calibration import fit_temperature
from ..reward.config import GENERAL, OUTER
from ..reward.losses import Comparisons, ranking_loss
from ..reward.model import RewardModel
from ..reward.scoring import by_length

Loss = tuple[Tensor, dict[str, Any]]
Examples = Sequence[Any] | RankingSet


@dataclass(frozen=True)
class LossOptions:
    """Of the loss of rankings: see ``reward/losses.py``."""

    label_smoothing: float = 0.0
    center_coef: float = 0.0


class Phase(ABC):
    """One phase of training a reward model.

    Attributes:
        name: of the recipe. labels: what a batch has when it can be learnt from.
    """

    name: ClassVar[str]
    labels: ClassVar[list[str]]

    def __init__(self, model: RewardModel, options: LossOptions) -> None:
        self.model = model
        self.options = options

    @property
    @abstractmethod
    def moves(self) -> tuple[list[str], list[str]]:
        """The views whose own experts are trained, and the small modules; see ``reward/moving.py``."""

    @abstractmethod
    def examples(self, rankings: Sequence[Ranking], max_length: int) -> Examples:
        """What the phase learns from, of these rankings.

        Raises:
            NothingToLearnError: there is nothing to learn.
        """

    def untaught(self, examples: Examples) -> list[str]:
        """What learns nothing from these examples although it is the phase's to teach, in words."""
        return []

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """A batch."""

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Loss:
        """The loss of a batch, and ``metrics``. ``model`` is what a trainer has put around the reward model."""

    def begin(self) -> None:
        """Set what follows from the phases before."""
        return

    def finish(self, rankings: Sequence[Ranking], max_length: int) -> dict[str, float]:
        """Set what follows from the trained model; metrics of that."""
        return {}

    # -- shared --------------------------------------------------------------------------------------------------

    def _pad(self) -> int:
        tokenizer = self.model.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def _ranked(self, rewards_N: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of rewards, and the share of comparisons that they have the right way round."""
        comparisons = Comparisons.of(inputs)
        loss = ranking_loss(rewards_N, comparisons, **vars(self.options))
        strict = ~comparisons.ties
        right = (rewards_N[comparisons.winners] > rewards_N[comparisons.losers]) & strict
        return loss, right.sum() / strict.sum().clamp(min=1)


class Base(Phase):
    """The general expert, and with ``base: category`` that of each category beside it, from rankings."""

    name = "base"
    labels: ClassVar[list[str]] = ["winners"]

    @property
    def views(self) -> list[str]:
        """The general one first."""
        reward = self.model.reward
        return list(dict.fromkeys([GENERAL, *map(reward.base_view, reward.names)]))

    @property
    def moves(self) -> tuple[list[str], list[str]]:
        return self.views, [f"heads.{view}" for view in self.views]

    def examples(self, rankings: Sequence[Ranking], max_length: int) -> Examples:
        reward = self.model.reward
        numbers = reward.numbers

        def view(ranking: Ranking, capability: str | None) -> int:
            return numbers[reward.base_view(ranking.category if ranking.category in reward.categories else None)]

        return RankingSet(rankings, self.model.tokenizer, max_length, view=view)

    def collate(self, rows: Sequence[RankingRow]) -> dict[str, Tensor]:
        return RankingCollator(self._pad())(rows)

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Loss:
        views = inputs["view_ids"].unsqueeze(1)
        if GENERAL in self.views and len(self.views) > 1:  # each text under the general one as well
            views = torch.cat([torch.full_like(views, self.model.reward.numbers[GENERAL]), views], dim=1)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], view_ids=views).logits
        found = [self._ranked(rewards_N, inputs) for rewards_N in logits.unbind(dim=1)]
        loss = torch.stack([loss for loss, _ in found]).mean()
        metrics = {"accuracy": found[-1][1]}
        if len(found) > 1:
            metrics["general_accuracy"] = found[0][1]
        return loss, {"metrics": metrics}


class Capability(Base):
    """One expert and head for each capability, from comparisons under it."""

    name = "capability"

    @property
    def views(self) -> list[str]:
        reward = self.model.reward
        return [view for category in reward.names for view in reward.capability_views(category)]

    @torch.no_grad()
    def begin(self) -> None:
        reward, heads = self.model.reward, self.model.parts.heads
        for category in reward.names:
            base: Any = heads[reward.base_view(category)]
            for view in reward.capability_views(category):
                heads[view].load_state_dict(base.state_dict())

    def examples(self, rankings: Sequence[Ranking], max_length: int) -> Examples:
        numbers = self.model.reward.numbers

        def view(ranking: Ranking, capability: str | None) -> int | None:
            return numbers.get(f"{ranking.category}/{capability}")

        return RankingSet(rankings, self.model.tokenizer, max_length, by_capability=True, view=view)

    def untaught(self, examples: Examples) -> list[str]:
        known, numbers = {row.view_id for row in examples}, self.model.reward.numbers
        return [
            f"no comparison is by the capability {name}, whose expert"
            for name in self.views
            if numbers[name] not in known
        ]


@dataclass(frozen=True)
class StatesRow:
    """A ranking with the states of its responses, (K, C, H) float32, which stay as they are while aggregators learn."""

    row: RankingRow
    states: Tensor


class Aggregate(Phase):
    """The aggregator of each category, on stored states."""

    name = "aggregate"
    labels: ClassVar[list[str]] = ["winners"]
    texts_per_pass: ClassVar[int] = 16

    @property
    def moves(self) -> tuple[list[str], list[str]]:
        return [], [f"aggregators.{category}" for category in self.model.reward.names]

    @torch.no_grad()
    def examples(self, rankings: Sequence[Ranking], max_length: int) -> Examples:
        names = self.model.reward.names
        known = [ranking for ranking in rankings if ranking.category in names]
        if not known:
            raise NothingToLearnError(
                f"no ranking has a category of {', '.join(names)}: name their column with columns.category"
            )
        rows = RankingSet(known, self.model.tokenizer, max_length, categories=names).rows
        with evaluation_mode(self.model):
            return self._with_states(rows)

    def untaught(self, examples: Examples) -> list[str]:
        known = {each.row.category_id for each in examples if isinstance(each, StatesRow)}
        return _missing(self.model.reward.names, known, "ranking", "aggregator")

    def _with_states(self, rows: Sequence[RankingRow]) -> list[StatesRow]:
        texts = [(number, row.category_id, ids) for number, row in enumerate(rows) for ids in row.input_ids]
        found: dict[int, Tensor] = {}
        for category, name in enumerate(self.model.reward.names):
            own = [place for place, text in enumerate(texts) if text[1] == category]
            for batch in by_length([len(texts[place][2]) for place in own], self.texts_per_pass):
                places = [own[row] for row in batch]
                ids, mask = self.model.padded([texts[place][2] for place in places])
                states = self.model.capability_states(ids, mask, name).cpu()
                found.update(zip(places, states, strict=True))
        each: list[list[Tensor]] = [[] for _ in rows]
        for place, (number, _, _) in enumerate(texts):
            each[number].append(found[place])
        return [StatesRow(row, torch.stack(states)) for row, states in zip(rows, each, strict=True)]

    def collate(self, rows: Sequence[StatesRow]) -> dict[str, Tensor]:
        most = max(each.states.shape[1] for each in rows)
        padded = [F.pad(each.states, (0, 0, 0, most - each.states.shape[1])) for each in rows]
        categories = [each.row.category_id for each in rows for _ in each.row.input_ids]
        compared = comparison_tensors([each.row for each in rows])
        return {"states": torch.cat(padded), "category_ids": torch.tensor(categories), **compared}

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Loss:
        logits = model(states=inputs["states"], category_ids=inputs["category_ids"]).logits
        loss, accuracy = self._ranked(logits[:, 0], inputs)
        return loss, {"metrics": {"accuracy": accuracy}}


@dataclass(frozen=True)
class PromptRow:
    """The tokens of a prompt, and its category."""

    input_ids: list[int]
    category_id: int


class Category(Phase):
    """The classifier of prompts: its expert, if it has one, and its linear; the temperature afterwards."""

    name = "category"
    labels: ClassVar[list[str]] = ["labels"]
    held_out: ClassVar[float] = 0.2

    @property
    def moves(self) -> tuple[list[str], list[str]]:
        return [OUTER], ["outer"]

    def examples(self, rankings: Sequence[Ranking], max_length: int) -> list[PromptRow]:
        names, write = self.model.reward.names, ResponseFormat(self.model.tokenizer)
        distinct = {ranking.key: ranking for ranking in rankings if ranking.category in names}
        rows = []
        for ranking in distinct.values():
            ids, _ = write(ranking.prompt, [])
            if len(ids) <= max_length:
                rows.append(PromptRow(ids, names.index(str(ranking.category))))
        if not rows:
            raise NothingToLearnError(f"no prompt of at most {max_length} tokens has a category of {', '.join(names)}")
        return rows

    def untaught(self, examples: Examples) -> list[str]:
        return _missing(self.model.reward.names, {row.category_id for row in examples}, "prompt", "class")

    def collate(self, rows: Sequence[PromptRow]) -> dict[str, Tensor]:
        ids, mask = self.model.padded([row.input_ids for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row.category_id for row in rows])}

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Loss:
        logits, labels = _categories(model, inputs), inputs["labels"]
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"metrics": {"accuracy": accuracy}}

    def finish(self, rankings: Sequence[Ranking], max_length: int) -> dict[str, float]:
        """Fit the temperature to prompts that the classifier did not learn from."""
        examples = self.examples(rankings, max_length)
        logits, labels = [], []
        with torch.no_grad(), evaluation_mode(self.model):
            for batch in by_length([len(row.input_ids) for row in examples], 16):
                inputs = self.collate([examples[place] for place in batch])
                logits.append(_categories(self.model, inputs).float().cpu())
                labels.append(inputs["labels"])
        temperature = fit_temperature(torch.cat(logits), torch.cat(labels))
        self.model.parts.temperature.fill_(temperature)
        return {"category_temperature": temperature}


def _categories(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(N, T) the classifier's logits of whole prompts."""
    mask = inputs["attention_mask"]
    output = model(input_ids=inputs["input_ids"], attention_mask=mask, prompt_lengths=mask.sum(dim=-1), categorize=True)
    logits: Tensor = output.logits
    return logits


def _missing(names: Sequence[str], known: Collection[int], what: str, whose: str) -> list[str]:
    absent = [name for number, name in enumerate(names) if number not in known]
    return [f"no {what} is of the category {name}, whose {whose}" for name in absent]


PHASES: dict[str, type[Phase]] = {phase.name: phase for phase in (Base, Capability, Aggregate, Category)}


def part_of(
    name: str, rankings: Sequence[Ranking], first_share: float, seed: int
) -> tuple[list[Ranking], list[Ranking]]:
    """What a phase learns from, of all rankings to train on, and what it is finished on.

    The base and the capabilities have the first part, the aggregator the second; the classifier learns from four fifths
    of all and has its temperature from the rest.
    """
    if name == Category.name:
        return split(rankings, Category.held_out, seed)
    first, second = split(rankings, 1 - first_share, seed)
    return (second, []) if name == Aggregate.name else (first, [])
