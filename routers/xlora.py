"""X-LoRA: a classifier looks at the last hidden states of the whole model and scales every expert at every site.

Source: Buehler and Buehler 2024 (arXiv 2402.07148); EricLBuehler/xlora 8217992; huggingface/peft 5d602fd (0.21.2). A
first forward without experts, the scoring pass of ``moelora/scoring.py``, gives the hidden states h after the final
norm; a linear or an MLP makes of them one scaling for each expert, for all sites together or (``layerwise``) for each
site. The experts are finished adapters (``frozen``); only the classifier is trained.

Our reading: the classifier runs once per forward, in float32. Scalings multiply the update, where the released code
multiplies the input of ``lora_A``: the same, dropout included. In the scoring pass every expert has the weight
``scaling_pass_value * global_scaling_weight``, without a top-k. Differences from the released code: ``softmax_topk`` is
per token, as in PEFT since 2025 (PEFT 0.17.1 and the authors' package take one softmax over the flattened batch); a
chosen scaling of exactly 0 stays chosen; ties go to the lower index.

Shapes: B batch, S sequence, H hidden size of the backbone, M sites that share the router, E experts, K picks.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo
from .base import Router, RouterConfig
from .topk import check_top_k, top_indices


class XLoRAConfig(RouterConfig):
    """Options of ``xlora``.

    Attributes:
        share: ``all`` sites of the site configuration have one classifier, as published.
        depth: linears of the classifier. size: width between them.
        relu: ReLU and dropout between the linears. dropout: its probability. bias: the linears have one.
        layerwise: the classifier gives each site scalings of its own.
        softmax: scalings are a softmax over the experts; else they are what the classifier gives. temperature: divides
            what enters that softmax.
        top_k: keep so many of the largest scalings of a token, not renormalised; ``None`` keeps all.
        softmax_topk: a softmax over the scalings that are kept; meant for ``softmax: false``.
        scaling_pass_value: weight of every expert in the scoring pass; ``None`` means 1 / E.
        global_scaling_weight: factor of all updates.
    """

    kind: str = "xlora"
    share: Literal["module", "parent", "layer", "all"] = "all"
    depth: Annotated[int, Field(ge=1)] = 1
    size: Annotated[int, Field(ge=1)] = 2048
    relu: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    bias: bool = True
    layerwise: bool = False
    softmax: bool = True
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    softmax_topk: bool = False
    scaling_pass_value: float | None = 0.0
    global_scaling_weight: float = 1.0

    def check(self, num_experts: int, total_rank: int) -> None:
        if self.top_k is not None:
            check_top_k(self.top_k, num_experts)


@ROUTERS.register("xlora")
class XLoRARouter(Router[XLoRAConfig]):
    """Weights (..., E) = softmax(classifier(h) / temperature), or its K largest; no losses.

    Parameters:
        layers.i.weight, layers.i.bias: (size, H), then (size, size), last (E or M * E, size); row ``m * E + e`` of a
            layerwise classifier is expert e at the m-th of the sites, in the order of the backbone.

    Raises:
        ConfigError: the width of the backbone's hidden states is not known.
    """

    Config = XLoRAConfig
    needs_scoring = True

    def __init__(self, config: XLoRAConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        if site.hidden_size is None:
            raise ConfigError(
                f"router 'xlora' of site {site.name!r} classifies the last hidden states of a backbone, whose width is "
                "not known here: attach the mixture to a model, or give build(...) its hidden_size"
            )
        self.members = site.members or (site.name,)
        outputs = site.num_experts * (len(self.members) if config.layerwise else 1)
        widths = [site.hidden_size, *[config.size] * (config.depth - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(before, after, bias=config.bias) for before, after in pairwise(widths))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As ``nn.Linear`` starts: uniform within 1 / sqrt(width), weights and biases."""
        with torch.no_grad():
            for layer in self._linears:
                bound = 1 / math.sqrt(layer.in_features)
                for parameter in layer.parameters():
                    drawn = torch.empty(parameter.shape, dtype=torch.float32)
                    parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))

    @property
    def scoring_pass_value(self) -> float:
        value = self.config.scaling_pass_value
        return (1 / self.site.num_experts if value is None else value) * self.config.global_scaling_weight

    def score(self, states: Tensor, context: RoutingContext) -> Tensor:
        """(B, S, E) float32 logits, or (B, S, M, E) of a layerwise classifier, for states (B, S, H).

        Raises:
            ConfigError: the states have another width.
        """
        return self._classify(states, self._keep(states, context.generator) if self._drops else None)

    def route(self, inputs: RouteInput) -> RoutingRecord:
        experts = self.site.num_experts
        tokens = inputs.hidden_states.shape[:-1]
        if inputs.context.scoring_pass:
            device = inputs.hidden_states.device
            return RoutingRecord(None, torch.full((*tokens, experts), self.scoring_pass_value, device=device), experts)
        noise = None
        logits = inputs.context.scores.get(inputs.site.name)
        if logits is None:  # a container without a model around it, which is given the states by hand
            states = inputs.given("scoring_states")
            noise = inputs.draw(lambda generator: self._keep(states, generator)) if self._drops else None
            logits = self._classify(states, noise)
        if self.config.layerwise:
            members = inputs.site.members or (inputs.site.name,)
            logits = logits[..., members.index(inputs.site.name), :]
        logits = self._fitted(logits, inputs)
        probs = (logits / self.config.temperature).softmax(dim=-1) if self.config.softmax else None
        indices, weights = self._kept(logits if probs is None else probs, inputs)
        sums_to_one = self.config.softmax_topk or (self.config.softmax and self.config.top_k is None)
        return RoutingRecord(
            indices=indices,
            weights=weights * self.config.global_scaling_weight,
            num_experts=experts,
            normalized=sums_to_one and self.config.global_scaling_weight == 1,
            logits=logits,
            probs=probs,
            noise=None if noise is None else inputs.to_replay(noise),
        )

    def _kept(self, scalings: Tensor, inputs: RouteInput) -> tuple[Tensor | None, Tensor]:
        """Indices (..., K) and weights (..., K) under a top-k, else ``None`` and weights (..., E)."""
        indices = None if inputs.replay is None else inputs.replay.indices
        if self.config.top_k is not None:
            if indices is None:
                indices = top_indices(scalings, self.config.top_k)
            scalings = scalings.gather(-1, indices)
        return indices, scalings.softmax(dim=-1) if self.config.softmax_topk else scalings

    def _fitted(self, logits: Tensor, inputs: RouteInput) -> Tensor:
        """(..., E) the logits in the shape and on the device of the site's tokens."""
        tokens = inputs.hidden_states.shape[:-1]
        if logits.shape[:-1].numel() != tokens.numel():
            raise ConfigError(
                f"site {inputs.site.name!r} has tokens of the shape {tuple(tokens)}, but scoring_states has "
                f"{tuple(logits.shape[:-1])}: give the states of the same tokens"
            )
        return logits.to(inputs.hidden_states.device).reshape(*tokens, self.site.num_experts)

    @property
    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    @property
    def _drops(self) -> bool:
        return self.training and self.config.relu and self.config.dropout > 0 and self.config.depth > 1

    def _keep(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, S, (depth - 1) * size) factors of the classifier's dropout."""
        width = (self.config.depth - 1) * self.config.size
        drawn = torch.rand(*states.shape[:-1], width, device=states.device, generator=generator)
        return (drawn >= self.config.dropout) / (1 - self.config.dropout)

    def _classify(self, states: Tensor, keep: Tensor | None) -> Tensor:
        if states.shape[-1] != self.site.hidden_size:
            raise ConfigError(
                f"router 'xlora' expects scoring_states of the width {self.site.hidden_size}, got {states.shape[-1]}"
            )
        hidden = states.to(self._linears[0].weight.device, torch.float32)
        for index, layer in enumerate(self._linears):
            hidden = F.linear(hidden, layer.weight.float(), None if layer.bias is None else layer.bias.float())
            if index < len(self.layers) - 1 and self.config.relu:
                hidden = hidden.relu()
                if keep is not None:
                    hidden = hidden * keep[..., index * self.config.size : (index + 1) * self.config.size].to(hidden)
        return hidden.unflatten(-1, (len(self.members), -1)) if self.config.layerwise else hidden
