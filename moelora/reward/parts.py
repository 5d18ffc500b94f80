"""The small modules beside the experts: heads, aggregators, and the classifier of categories.

Shapes: B texts, C capabilities of a category, H width of the hidden states, T categories.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from .config import OUTER, PARTS, RewardConfig


class MLPAggregator(nn.Module):
    """``W2 PReLU(W1 [h_1; ...; h_C] + b1) + b2`` on the joined states, one slope for all units.

    Published: DMoERM (arXiv 2403.01197), quanshr/DMoERM-v1 ecdbdc7, where the slope starts at 0.25 and the inner width
    is that of the states. The scores of the capabilities play no part.
    """

    def __init__(self, capabilities: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(capabilities * width, width)
        self.prelu = nn.PReLU()
        self.second = nn.Linear(width, 1)

    def forward(self, states_BCH: Tensor, scores_BC: Tensor) -> Tensor:
        """(B,) rewards."""
        reward: Tensor = self.second(self.prelu(self.first(states_BCH.flatten(1)))).squeeze(-1)
        return reward


class LinearAggregator(nn.Module):
    """``w . scores + b``, from the mean of the scores on; a baseline of ours."""

    def __init__(self, capabilities: int, width: int) -> None:
        super().__init__()
        self.weights = nn.Linear(capabilities, 1)
        with torch.no_grad():
            self.weights.weight.fill_(1 / capabilities)
            self.weights.bias.zero_()

    def forward(self, states_BCH: Tensor, scores_BC: Tensor) -> Tensor:
        """(B,) rewards."""
        reward: Tensor = self.weights(scores_BC).squeeze(-1)
        return reward


class MeanAggregator(nn.Module):
    """The mean of the scores; nothing to learn. A baseline of ours."""

    def __init__(self, capabilities: int, width: int) -> None:
        super().__init__()

    def forward(self, states_BCH: Tensor, scores_BC: Tensor) -> Tensor:
        """(B,) rewards."""
        return scores_BC.mean(dim=1)


AGGREGATORS: dict[str, Any] = {"mlp": MLPAggregator, "linear": LinearAggregator, "mean": MeanAggregator}


class RewardParts(nn.Module):
    """All small modules of a reward model, in float32; they lie in the backbone as its module ``reward``.

    Parameters:
        heads.<view>: (1, H) and a bias, from a last state to a score. aggregators.<category>: see there. outer: (T, H)
        and a bias, with two categories or more.
    Buffers:
        temperature: () by which the classifier's logits are divided.
    """

    temperature: Tensor

    def __init__(self, config: RewardConfig, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({view.name: nn.Linear(width, 1) for view in config.views if view.name != OUTER})
        kind = AGGREGATORS[config.aggregator]
        sizes = {name: len(config.capabilities(name)) for name in config.names}
        self.aggregators = nn.ModuleDict({name: kind(size, width) for name, size in sizes.items()})
        self.outer = nn.Linear(width, len(sizes)) if len(sizes) > 1 else None
        self.register_buffer("temperature", torch.ones(()))

    def head(self, view: str, states: Tensor) -> Tensor:
        """(...) scores of states (..., H) under the head of a view."""
        return in_float32(self.heads[view], states).squeeze(-1)

    def forward(self) -> None:
        """Not a step of the backbone: a reward model calls the parts one by one."""
        raise NotImplementedError("the modules of a reward model are called one by one")


def in_float32(module: nn.Module, *inputs: Tensor) -> Tensor:
    """What a small module makes of states and scores, in float32 also under autocast.

    Where the whole model was cast to a half precision, as ``bf16_full_eval`` does, its weights have that already.
    """
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    with torch.autocast(inputs[0].device.type, enabled=False):
        made: Tensor = module(*(each.to(dtype) for each in inputs))
    return made.float()


@contextmanager
def parts_on(backbone: PreTrainedModel, reward: RewardConfig) -> Iterator[None]:
    """Give the backbone the small modules, which the mixture then trains whole; take them away after an error."""
    if hasattr(backbone, PARTS):
        raise ConfigError(f"this backbone has a module {PARTS!r} of its own: take another")
    device = next(backbone.parameters()).device
    width = backbone.config.get_text_config().hidden_size
    backbone.add_module(PARTS, RewardParts(reward, width).to(device))
    try:
        yield
    except BaseException:
        delattr(backbone, PARTS)
        raise
