"""MOELoRA: a gate that looks at the task, not at the token.

Published: Liu et al. 2023 (arXiv 2310.18339), MOELoRA-peft 2d9efa4: ``softmax(W e_t)`` with a learned embedding e_t of
the task; one gate for all layers. There r is the rank of all experts together and the scale alpha / r: experts of rank
r / E with alpha / E are the same here. The weights of a task are constants, so that its model can be merged.

Our reading: the released table has a row more than there are tasks, for padding; ours has none.

Shapes: B batch, E experts, M width of the embedding, N tasks.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo
from .base import Router, RouterConfig
from .ids import checked, the_only


class TaskConfig(RouterConfig):
    """Options of ``task``.

    Attributes:
        num_tasks: how many tasks there are; ``task_ids`` are 0..num_tasks - 1.
        embedding_dim: width of a task's embedding.
        share: as everywhere; by default all sites have one gate, as published.
    """

    kind: str = "task"
    share: Literal["module", "parent", "layer", "all"] = "all"
    num_tasks: Annotated[int, Field(ge=1)] = 16
    embedding_dim: Annotated[int, Field(ge=1)] = 64


@ROUTERS.register("task", "moelora_task")
class TaskRouter(Router[TaskConfig]):
    """Weights (..., E) = softmax(weight @ embedding[task]), the same for all tokens of a sequence.

    Parameters:
        embedding: (N, M), starts as N(0, 1). weight: (E, M), starts as a linear of torch does.
    """

    Config = TaskConfig
    any_width = True
    task_ids = "tasks"

    def __init__(self, config: TaskConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        self.embedding = nn.Parameter(torch.empty(config.num_tasks, config.embedding_dim))
        self.weight = nn.Parameter(torch.empty(site.num_experts, config.embedding_dim))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            drawn = torch.empty(self.embedding.shape, dtype=torch.float32)
            self.embedding.copy_(nn.init.normal_(drawn, generator=generator))
            drawn = torch.empty(self.weight.shape, dtype=torch.float32)
            self.weight.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))

    def _table(self) -> Tensor:
        """(N, E) float32 weights of every task."""
        return F.linear(self.embedding.float(), self.weight.float()).softmax(dim=-1)

    def route(self, inputs: RouteInput) -> RoutingRecord:
        """See the class.

        Raises:
            UserError: there are no ``task_ids``, or they do not fit.
        """
        ids = inputs.per_token(checked(inputs.given("task_ids"), self.config.num_tasks, "task_ids"))
        return RoutingRecord(
            indices=None, weights=F.embedding(ids, self._table()), num_experts=self.site.num_experts, normalized=True
        )

    @torch.no_grad()
    def constant_weights(self, context: RoutingContext) -> Tensor | None:
        """The weights of the task that the context names, if it names one for all its sequences."""
        one = the_only(context.task_ids)
        return None if one is None or not 0 <= one < self.config.num_tasks else self._table()[one]
