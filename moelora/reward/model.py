"""The reward model: experts of capabilities below a router of categories, on one frozen backbone.

Published: DMoERM (Quan 2024, arXiv 2403.01197, ACL Findings); its released code, quanshr/DMoERM-v1 ecdbdc7, departs
from it in ten places, so this follows the mathematics. There a category has a whole trained model of its own; here one
frozen backbone carries all experts, and what phase 1 trains is an expert as well.

Shapes: B texts, S tokens, V views, C capabilities of a category, T categories, H width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters import Adapter, read_adapter
from ..checkpoints.layout import Stored
from ..config import MixtureConfig
from ..errors import CheckpointError, ConfigError, UserError
from ..modes import evaluation_mode
from ..parts import build_parts
from ..slot import RoutingSlot
from .config import GENERAL, OUTER, PARTS, RewardConfig
from .parts import RewardParts, in_float32, parts_on
from .refusing import Refusing
from .scoring import RewardOutput, Scoring, check_numbers
from .stacked import last_states, last_token
from .stored import read_config

NO_CATEGORY = -1


class RewardModel(Scoring, Refusing):
    """A mixture whose forward is a reward.

    It has the interface of a sequence classifier with one label, ``logits`` (B, 1), which trainers of TRL expect of a
    reward model. As one of their ``reward_funcs`` it reads whole conversations, and wants its ``tokenizer`` among
    their ``reward_processing_classes``; so does :meth:`reward_function`, which needs neither and also takes known
    categories. TRL's ``RewardTrainer`` trains a single reward model, one without categories, like any other. With
    categories each text goes to the experts of the category that the classifier tells; these, their heads and their
    aggregator learn, together, and the classifier does not, since a choice has no gradient: the trainer ``reward``
    is the one for such models.

    Attributes:
        reward: its configuration.
    """

    def __init__(self, backbone: PreTrainedModel, adapter: Adapter, slot: RoutingSlot, reward: RewardConfig) -> None:
        super().__init__(backbone, adapter, slot)
        self.reward = reward
        self._labels = cast(int, self.config.num_labels)
        self.config.num_labels = 1
        # The Trainer's predictions are the rewards, and not what is said beside them.
        beside = [each.name for each in fields(RewardOutput)[2:]]
        self.config.keys_to_ignore_at_inference.extend(beside)

    @classmethod
    def attach(
        cls,
        backbone: PreTrainedModel,
        reward: RewardConfig | Mapping[str, Any],
        template: MixtureConfig | Mapping[str, Any],
    ) -> Self:
        """A fresh reward model. Changes ``backbone`` in place, as :func:`moelora.attach` does.

        Args:
            template: sites with a single expert and no router; every expert of the reward model is like it.

        Raises:
            ConfigError: a configuration does not hold together or does not fit the backbone, which is then as it was.
        """
        from ..mixture import refuse_taken

        refuse_taken(backbone)
        reward = reward if isinstance(reward, RewardConfig) else RewardConfig.parse(reward)
        template = template if isinstance(template, MixtureConfig) else MixtureConfig.parse(template)
        try:
            mixture = reward.mixture(template)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        slot = RoutingSlot()
        with parts_on(backbone, reward):
            return cls(backbone, Adapter("default", mixture, build_parts(backbone, mixture, slot)), slot, reward)

    @classmethod
    def put_on(cls, backbone: PreTrainedModel, stored: Stored, adapter_name: str = "default") -> Self:
        """A reward model from a checkpoint that was read; in evaluation mode.

        Raises:
            CheckpointError, ConfigError: it is none, does not fit or is damaged; the backbone is then as it was.
        """
        stored.check_backbone(backbone.config)
        reward = read_config(stored, backbone.config.get_text_config().hidden_size)
        slot = RoutingSlot()
        with parts_on(backbone, reward):
            model = cls(backbone, read_adapter(stored, backbone, slot, adapter_name), slot, reward)
        model.train(False)
        return model

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """As :func:`moelora.from_pretrained`, for checkpoints of reward models.

        Raises:
            CheckpointError: it is missing or damaged, or a mixture that is no reward model.
        """
        from ..mixture import from_pretrained

        model = from_pretrained(path, *args, **kwargs)
        if not isinstance(model, cls):
            raise CheckpointError(f"{path}: a mixture, but no reward model: load it with moelora.from_pretrained")
        return model

    @property
    def parts(self) -> RewardParts:
        """Heads, aggregators and classifier."""
        return cast(RewardParts, self.saved_modules()[PARTS].trained)

    def used_outside(self) -> Iterator[nn.Parameter]:
        return self.parts.parameters()

    def sections(self) -> dict[str, Any]:
        return {"reward": self.reward.to_dict()}

    def unload(self) -> PreTrainedModel:
        backbone = super().unload()
        self.config.num_labels = self._labels
        delattr(backbone, PARTS)
        return backbone

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        category_ids: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        view_ids: Tensor | None = None,
        states: Tensor | None = None,
        categorize: bool = False,
        token_type_ids: Tensor | None = None,
        margin: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> RewardOutput:
        """The rewards of texts: whole conversations that end with the response.

        Without gradients the model is in evaluation mode, whatever :meth:`train` was called with: what asks for a
        reward gets the same one each time.

        Args:
            input_ids, attention_mask: (B, S); padding may be on either side.
            category_ids: (B,) where they are known, -1 for the general expert; else the classifier tells.
            prompt_lengths: (B,) tokens before the response, which the classifier reads; by default they are found by
                how the tokenizer's chat template begins an answer.
            view_ids: (B, V) ask for the scores of these views instead, of each by its own head.
            states: (B, C, H) ask for the rewards that the aggregators of ``category_ids`` make of these states; those
                beyond the capabilities of a category are not looked at.
            categorize: ask for the classifier's logits (B, T) instead.
            token_type_ids, margin, use_cache, return_dict: of no effect; tokenizers and trainers give them.

        Raises:
            UserError: neither categories nor what they are told by, or numbers that no category or view has.
        """
        self._check_checkpointing()
        with nullcontext() if torch.is_grad_enabled() else evaluation_mode(self):
            return self._answer(input_ids, attention_mask, category_ids, prompt_lengths, view_ids, states, categorize)

    def _answer(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        category_ids: Tensor | None,
        prompt_lengths: Tensor | None,
        view_ids: Tensor | None,
        states: Tensor | None,
        categorize: bool,
    ) -> RewardOutput:
        if states is not None:
            return RewardOutput(logits=self._joined(states, category_ids).unsqueeze(-1))
        if input_ids is None:
            raise UserError("a reward model takes input_ids: (B, S), or states: (B, C, H)")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if view_ids is not None:
            return RewardOutput(logits=self._views(input_ids, attention_mask, view_ids))
        if categorize:
            return RewardOutput(logits=self._categories(input_ids, attention_mask, prompt_lengths))
        confidence = None
        if category_ids is None:
            routed, confidence = self.route(input_ids, attention_mask, prompt_lengths)
            category_ids = torch.where(confidence >= self.reward.threshold, routed, NO_CATEGORY)
        else:
            routed = category_ids
        rewards, scores = self._rewards(input_ids, attention_mask, category_ids)
        return RewardOutput(
            logits=rewards.unsqueeze(-1),
            category_ids=category_ids,
            routed_ids=routed,
            confidence=torch.ones_like(rewards) if confidence is None else confidence,
            capability_logits=scores,
        )

    def route(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B,) the likeliest categories and (B,) their probabilities, with the fitted temperature; without gradients.

        Without categories all are -1 with probability 1; one category alone needs no telling.
        """
        count, texts = len(self.reward.names), len(input_ids)
        if count < 2:
            alone = torch.full((texts,), count - 1, dtype=torch.int64, device=input_ids.device)
            return alone, torch.ones(texts, device=input_ids.device)
        with torch.no_grad(), evaluation_mode(self):
            logits = self._categories(input_ids, attention_mask, prompt_lengths) / self.parts.temperature
        confidence, routed = logits.softmax(dim=-1).max(dim=-1)
        return routed, confidence

    def capability_states(self, input_ids: Tensor, attention_mask: Tensor, category: str) -> Tensor:
        """(B, C, H) last states of texts of one category under each of its capabilities, in one pass."""
        names = self.reward.capability_views(category)
        numbers = self.reward.numbers
        views = torch.tensor([numbers[name] for name in names], device=input_ids.device)
        texts = len(input_ids)
        rows = torch.arange(texts, device=input_ids.device).repeat_interleave(len(views))
        states = last_states(self, input_ids, attention_mask, rows, views.repeat(texts))
        return states.float().view(texts, len(views), -1)

    # -- parts of it ---------------------------------------------------------------------------------------------

    def _views(self, input_ids: Tensor, attention_mask: Tensor, view_ids: Tensor) -> Tensor:
        check_numbers("view_ids", view_ids, 0, len(self.parts.heads))  # that of the classifier is the last, without one
        texts, count = view_ids.shape
        rows = None if count == 1 else torch.arange(texts, device=input_ids.device).repeat_interleave(count)
        states = last_states(self, input_ids, attention_mask, rows, view_ids.flatten())
        return self._scores(states, view_ids.flatten()).view(texts, count)

    def _scores(self, states_MH: Tensor, views_M: Tensor) -> Tensor:
        """(M,) each state under the head of its view."""
        heads: Any = [self.parts.heads[view.name] for view in self.reward.views if view.name != OUTER]
        weights, biases = torch.cat([h.weight for h in heads]), torch.cat([h.bias for h in heads])
        return (states_MH.float() * weights[views_M]).sum(dim=-1) + biases[views_M]

    def _categories(self, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None) -> Tensor:
        """(B, T) logits of the categories, by the prompts alone."""
        if self.parts.outer is None:
            raise UserError("this reward model has fewer than two categories, so there is nothing to tell apart")
        lengths = self.prompt_lengths(input_ids, attention_mask) if prompt_lengths is None else prompt_lengths
        before = attention_mask.long().cumsum(dim=-1) <= lengths.to(attention_mask.device).unsqueeze(-1)
        mask = attention_mask * before
        width = int(last_token(mask).max()) + 1
        views = torch.full((len(input_ids),), self.reward.numbers[OUTER], device=input_ids.device)
        states = last_states(self, input_ids[:, :width], mask[:, :width], None, views)
        return in_float32(self.parts.outer, states)

    def _aggregate(self, states_BCH: Tensor, category: str) -> Tensor:
        names = self.reward.capability_views(category)
        scores = torch.stack([self.parts.head(name, states_BCH[:, i]) for i, name in enumerate(names)], dim=1)
        return in_float32(self.parts.aggregators[category], states_BCH, scores)

    def _joined(self, states_BCH: Tensor, category_ids: Tensor | None) -> Tensor:
        """(B,) the states of each text by the aggregator of its category."""
        if category_ids is None or not self.reward.names:
            raise UserError("states are joined by the aggregator of a category: give category_ids of a model with some")
        check_numbers("category_ids", category_ids, 0, len(self.reward.names))
        most = max(len(self.reward.capabilities(name)) for name in self.reward.names)
        states_BCH = F.pad(states_BCH, (0, 0, 0, most - states_BCH.shape[1]))
        rewards = torch.empty(len(states_BCH), device=states_BCH.device)
        # Also those of categories without a text here: other processes may have some, and all wait for the same ones.
        for number, name in enumerate(self.reward.names):
            own, count = (category_ids == number).nonzero().squeeze(-1), len(self.reward.capabilities(name))
            rewards = rewards.index_copy(0, own, self._aggregate(states_BCH[own, :count], name))
        return rewards

    def _rewards(self, input_ids: Tensor, attention_mask: Tensor, category_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) rewards and (B, C) scores of the capabilities, all experts of all texts in one pass."""
        check_numbers("category_ids", category_ids, NO_CATEGORY, len(self.reward.names))
        answered = category_ids.tolist()
        names = [None if number == NO_CATEGORY else self.reward.names[number] for number in answered]
        asked = {name: self._asked(name) for name in dict.fromkeys(names)}
        numbers = self.reward.numbers
        rows = [row for row, name in enumerate(names) for _ in asked[name]]
        views = torch.tensor([numbers[view] for name in names for view in asked[name]], device=input_ids.device)
        index = None if len(rows) == len(names) else torch.tensor(rows, device=input_ids.device)
        states = last_states(self, input_ids, attention_mask, index, views).float()
        scores = self._scores(states, views)
        parts_of = states.split([len(asked[name]) for name in names])
        scores_of = scores.split([len(asked[name]) for name in names])
        rewards = states.new_empty(len(names))
        for name in asked:
            own = [row for row, other in enumerate(names) if other == name]
            if name is not None:
                made = self._aggregate(torch.stack([parts_of[row] for row in own]), name)
            else:
                made = torch.cat([scores_of[row] for row in own])
            rewards = rewards.index_copy(0, torch.tensor(own, device=rewards.device), made)
        most = max((len(self.reward.capabilities(name)) for name in self.reward.names), default=0)
        each = [s[:0] if n is None else s for n, s in zip(names, scores_of, strict=True)]
        padded = torch.stack([F.pad(score, (0, most - len(score)), value=float("nan")) for score in each])
        return rewards, padded

    def _asked(self, category: str | None) -> list[str]:
        """The views that a text of a category is looked at under; ``None`` for the general expert."""
        return [GENERAL] if category is None else self.reward.capability_views(category)
