"""MoE-Adapters: experts that all tasks have in common, and a router for each task.

Published: Yu et al. 2024 (arXiv 2403.11549); code read at JiazuoYu/MoE-Adapters4CL, ``mtil/clip/model.py`` of 4572d97
and ``mtil/src/models/finetune.py`` of 07d5c33. With W_t and V_t of the task t that a token belongs to,

    s = W_t x + n * (softplus(V_t x) + 0.01)      n ~ N(0, 1) in training, 0 in evaluation
    g = softmax over the k largest s
    y = W0 x + sum_i g_i * scale_i * B_i A_i x

W_t and V_t start at zero, so it is the noise that first spreads tokens over experts. Nothing balances them: the code
computes Shazeer's two balance losses and never adds them to the loss.

Differences from the code: it routes whole sequences by their first token (class token or start of text), and an expert
is a bottleneck of width 64 with ReLU and biases, times 0.1, beside the FFN; here tokens are routed one by one, as the
other routers do, and experts are those of the site. There a small autoencoder for each task (DDAS) tells the task of
a test image or sends it to the frozen model. Our reading: the caller tells it, by ``task_ids``, and a task that was
not learnt yet, or has a negative id, is answered by the frozen model. The text of the paper was not at hand; a
summary of it has the k largest scores of the class token, and no noise.

Which experts a task used most is counted here, for the method that freezes them; see
``trainers/continual_moe_adapter.py``.

Shapes: D in, E experts, K picks, N tasks.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingRecord, SiteInfo
from .base import Router, RouterConfig
from .topk import check_top_k, top_indices

LEAST_DEVIATION = 0.01


class MoEAdapterConfig(RouterConfig):
    """Options of ``moe_adapter``.

    Attributes:
        top_k: experts per token.
        num_tasks: tasks so far; ``task_ids`` from this number on have no experts.
        frozen_tasks: so many of the first tasks are over: their routers are not trained.
        noise: add the learned noise to the scores in training.
    """

    kind: str = "moe_adapter"
    top_k: Annotated[int, Field(ge=1)] = 2
    num_tasks: Annotated[int, Field(ge=1)] = 1
    frozen_tasks: Annotated[int, Field(ge=0)] = 0
    noise: bool = True

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> Self:
        if self.frozen_tasks > self.num_tasks:
            raise ValueError(f"frozen_tasks is {self.frozen_tasks}, but num_tasks is {self.num_tasks}")
        return self

    def check(self, num_experts: int, total_rank: int) -> None:
        check_top_k(self.top_k, num_experts)

    def next_task(self) -> Self:
        """The configuration with one task more, the only one that is trained."""
        changes = {"num_tasks": self.num_tasks + 1, "frozen_tasks": self.num_tasks}
        return self.parse({**self.to_dict(), **changes})


@ROUTERS.register("moe_adapter")
class MoEAdapterRouter(Router[MoEAdapterConfig]):
    """Weights (..., K), which sum to 1; indices -1 and weights 0 where the task is not known.

    Parameters:
        weight, noise_weight: N matrices (E, D), one for each task; no ``noise_weight`` without noise. Zero at first.

    Buffers:
        usage: (E,) how often real tokens chose each expert in the optimizer steps since the last task began.
    """

    Config = MoEAdapterConfig
    task_ids = "tasks"

    usage: Tensor

    def __init__(self, config: MoEAdapterConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        self.weight = nn.ParameterList()
        self.noise_weight = nn.ParameterList()
        like = torch.empty(site.num_experts, site.in_features)
        for task in range(config.num_tasks):
            self._append(like, trained=task >= config.frozen_tasks)
        self.register_buffer("usage", torch.zeros(site.num_experts))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def begin_task(self, config: MoEAdapterConfig) -> None:
        """Freeze the routers there are, add one for the next task, and count anew.

        Args:
            config: that of :meth:`MoEAdapterConfig.next_task`.
        """
        self.requires_grad_(False)
        self._append(self.weight[0], trained=True)
        self.usage.zero_()
        self.config = config

    def _append(self, like: Tensor, trained: bool) -> None:
        for weights in (self.weight, self.noise_weight) if self.config.noise else (self.weight,):
            weights.append(nn.Parameter(torch.zeros_like(like), requires_grad=trained))

    def most_used(self) -> list[int]:
        """The ``top_k`` experts with the highest ``usage``, rising; of equals the lower."""
        return sorted(top_indices(self.usage, self.config.top_k).tolist())

    def on_step_end(self, load: Tensor) -> None:
        self.usage += load.to(self.usage)

    def route(self, inputs: RouteInput) -> RoutingRecord:
        """See the class.

        Raises:
            UserError: there are no ``task_ids``, or they do not fit the batch.
        """
        ids = inputs.per_token(inputs.given("task_ids"))
        known = ((ids >= 0) & (ids < len(self.weight))).unsqueeze(-1)
        ids = ids.clamp(0, len(self.weight) - 1)
        hidden = inputs.hidden_states.float()
        logits, noise = self._of_task(self.weight, hidden, ids), None
        if self.training and self.config.noise:
            deviation = F.softplus(self._of_task(self.noise_weight, hidden, ids)) + LEAST_DEVIATION
            drawn = inputs.draw(lambda generator: torch.empty_like(deviation).normal_(generator=generator))
            logits, noise = logits + drawn * deviation, inputs.to_replay(drawn)
        probs = logits.softmax(dim=-1)
        indices = None if inputs.replay is None else inputs.replay.indices
        if indices is None:
            indices = torch.where(known, top_indices(logits, self.config.top_k), -1)
        chosen = probs.gather(-1, indices.clamp(min=0))
        weights = chosen / chosen.sum(dim=-1, keepdim=True) * known
        return RoutingRecord(indices, weights, self.num_units, logits=logits, probs=probs, noise=noise)

    def _of_task(self, weights: nn.ParameterList, hidden: Tensor, ids: Tensor) -> Tensor:
        """(..., E) float32 products of hidden states (..., D) with the matrix of each token's task (...)."""
        every = F.linear(hidden, torch.cat(list(weights)).float())
        every = every.view(*ids.shape, len(weights), self.num_units)
        return every.gather(-2, ids[..., None, None].expand(*ids.shape, 1, self.num_units)).squeeze(-2)
