"""LoRA experts whose ``lora_A`` is a fixed sparse random matrix, as in FlyLoRA.

Published (Zou et al. 2025, arXiv 2510.08396, section 3; code read at gfyddha/FlyLoRA 91d9e36, which has no licence):
each row of A has exactly p = rho D entries that are not zero, at random places, drawn from N(0, 1 / r^2). A is never
trained; B starts at zero and is all that is trained. Two independent A are nearly orthogonal, which is why adapters of
several tasks can be merged: ``W0 + sum_i w_i (alpha / r) B_i A_i`` (equation 12).

Our reading: the places and values follow from the task's seed and the name of the projection, by a hash that is the
same on every machine. The released code seeds every task alike, so that all tasks have one A; its merging script
averages A and B by themselves, which is equation 12 only then. A is stored and multiplied dense.

Shapes: D in, O out, R stacked rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..config import SiteConfig
from ..errors import ConfigError
from ..registry import EXPERTS
from .bank import ExpertBank, PositiveFloat, PositiveInt
from .lora import LoRAConfig


class SparseProjectionConfig(LoRAConfig):
    """Options of ``sparse_projection``; the scale is alpha / r, with the rank of the whole expert.

    Attributes:
        density: rho, the share of the input features that each row of ``lora_A`` looks at; rho D is rounded down, and
            is at least 1 (``int(n * sparsity_ratio)`` in the released code).
        nnz: the number p of such features itself; takes the place of ``density``.
        task_seed: what tells the matrices of one task from those of another.
        stop_gradient: nothing flows back through ``lora_A`` into the layers below, as in the authors' fork of PEFT.
            The gradient of the layers below is then wrong; nothing is saved by it.
    """

    kind: str = "sparse_projection"
    num_experts: PositiveInt = 1
    r: PositiveInt | list[PositiveInt] = 32
    alpha: PositiveFloat | list[PositiveFloat] = 64.0
    init: Literal["sparse"] = "sparse"  # type: ignore[assignment]
    density: Annotated[float, Field(gt=0, le=1)] = 0.25
    nnz: PositiveInt | None = None
    task_seed: int = 0
    stop_gradient: bool = False

    @property
    def linear_only(self) -> str:
        own = "experts.stop_gradient reaches single linears only: leave it off" if self.stop_gradient else ""
        return super().linear_only or own


@EXPERTS.register("sparse_projection")
class SparseProjectionExperts(ExpertBank):
    """``alpha / r * B_e A_e x`` with A_e fixed, sparse and random.

    Parameters:
        lora_A: (R, D), not trained. lora_B: (O, R).
    """

    Config = SparseProjectionConfig
    config: SparseProjectionConfig

    def __init__(self, config: SparseProjectionConfig, in_features: int, out_features: int, name: str = "") -> None:
        super().__init__(config, in_features, out_features, name)
        self.lora_A.requires_grad_(False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """``lora_A`` from ``generator``, or else from the task's seed and this bank's name; ``lora_B`` zero."""
        width = self.lora_A.shape[1]
        nnz = nonzeros(self.config, width)
        if self.lora_A.is_meta:  # there is nothing to fill, and a generator draws on its own device only
            return
        if generator is None:
            generator = torch.Generator().manual_seed(seed_of(self.config.task_seed, self.name))
        places = torch.rand(self.lora_A.shape, generator=generator).argsort(dim=1)[:, :nnz]
        values = torch.randn(places.shape, generator=generator)
        values /= torch.tensor([float(rank) for rank in self.ranks for _ in range(rank)]).unsqueeze(1)
        with torch.no_grad():
            self.lora_A.copy_(torch.zeros(self.lora_A.shape).scatter_(1, places, values))
            self.lora_B.zero_()

    def dropped(self, hidden_states: Tensor) -> Tensor:
        return super().dropped(hidden_states.detach() if self.config.stop_gradient else hidden_states)


def nonzeros(config: SparseProjectionConfig, in_features: int) -> int:
    """p, how many entries of each row of ``lora_A`` are not zero.

    Raises:
        ConfigError: more than there are features.
    """
    if config.nnz is None:
        # 0.29 * 100 is 28.999999999999996.
        return max(1, math.floor(config.density * in_features + 1e-9))
    if config.nnz > in_features:
        raise ConfigError(
            f"experts.nnz is {config.nnz} but the linear has {in_features} features: choose 1..{in_features}, or set "
            "density"
        )
    return config.nnz


def seed_of(task_seed: int, name: str) -> int:
    """A seed for each task and projection, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{task_seed}:{name}".encode()).digest()[:7], "big")


def stack_tasks(
    site: SiteConfig, tasks: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> tuple[SiteConfig, dict[str, Tensor]]:
    """One mixture in which the adapters of several tasks go on routing by themselves: their exact weighted average.

    Each task becomes an expert with ranks of its own: ``A = [A_1; ..; A_t]``, ``B = [B_1, .., B_t]``, the weights are
    in ``alpha``, and the router chooses ``top_k`` ranks within each expert. Equation 12 leaves the routing out.

    Args:
        site: the site configuration that all tasks were trained with, with router ``flylora``.
        tasks: the :meth:`~moelora.MoELoRAModel.adapter_state` of each task's model.
        weights: one for each task; 1 / t by default.

    Returns:
        The configuration to attach, and the tensors for ``load_adapter_state``.

    Raises:
        ConfigError: the tasks do not belong together, or a weight is not above 0.
    """
    experts, count = site.experts, len(tasks)
    weights = [1 / count] * count if weights is None else list(weights)
    if len(weights) != count or not all(weight > 0 for weight in weights):
        raise ConfigError(f"weights are {weights}: give each of the {count} tasks a number above 0")
    if site.router is None or site.router.kind != "flylora":
        raise ConfigError("only adapters with router 'flylora' are stacked: it alone can choose within each task")
    if experts.num_experts > 1 and site.router.within == "site":
        raise ConfigError("the ranks of several experts were chosen among all: train with router.within 'expert'")
    if any(task.keys() != tasks[0].keys() for task in tasks):
        raise ConfigError("the tasks have tensors of different names: train them all with one site configuration")
    stacked = {
        "num_experts": count * experts.num_experts,
        "r": [rank for _ in tasks for rank in experts.ranks],
        "alpha": [alpha * weight for weight in weights for alpha in experts.alphas],
    }
    values = {**site.to_dict(), "experts": {**experts.to_dict(), **stacked}}
    values["router"] = {**site.router.to_dict(), "within": "expert"}
    tensors = {
        name: torch.cat([task[name] for task in tasks], dim=1 if name.endswith("lora_B") else 0) for name in tasks[0]
    }
    return SiteConfig.parse(values), tensors
