"""ReMix: constant weights, sampled experts, and a router that learns from the loss as a policy does.

Source: arXiv 2603.10160, read in full; no code was found. Equation 5: ``y = W x + omega * sum_j B_j A_j x`` over the k
chosen experts, with omega constant, 2 / (k r) as LoRA scales or 2 / sqrt(k r) as rsLoRA does. In training the k experts
are drawn without replacement from ``q = softmax(P x)``, their order included in the probability (Plackett-Luce);
afterwards they are the k most probable. Weights that are learnt collapse to one expert; constant ones keep the
effective support at exactly k.

The loss gives the router no gradient along its weights. It comes from the records' ``log_prob``, through the surrogate
of ``routers/rloo.py``, which ``moelora/policy.py`` computes for a whole model. Our readings: a decision for each token
and each linear (the paper writes neither); the router's input is detached inside log q, since the paper defines the
gradient of P alone; no balance loss.

Shapes: B batch, S sequence, T tokens, D in, E experts, K picks.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..errors import ConfigError, UserError
from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo
from .gate import GateConfig, GateRouter
from .rloo import gumbel_top_k, plackett_luce, seeded_exponential
from .topk import check_top_k, top_indices


class RemixConfig(GateConfig):
    """Options of ``remix``.

    Attributes:
        top_k: experts per token.
        scale: omega is 2 / (k r) with ``lora``, 2 / sqrt(k r) with ``rslora``. It takes the place of the experts' own
            scale, whatever alpha is.
        omega: the constant itself, for experts of different ranks or to set it freely.
        route_level: a decision for each ``token``, or one for each ``sequence`` from the mean of its input over the
            tokens of the prompt (the context's ``prompt_mask``, else all real tokens). In ``generate`` what was chosen
            for the prompt holds for all generated tokens.
        score_through_input: let the gradient of log q reach the layers below as well: the exact gradient of the
            expected loss in them, with more variance.
    """

    kind: str = "remix"
    init: Literal["kaiming", "normal"] = "normal"
    top_k: Annotated[int, Field(ge=1)] = 2
    scale: Literal["lora", "rslora"] = "lora"
    omega: Annotated[float, Field(gt=0)] | None = None
    route_level: Literal["token", "sequence"] = "token"
    score_through_input: bool = False

    def check(self, num_experts: int, total_rank: int) -> None:
        check_top_k(self.top_k, num_experts)

    def refuses_packing(self) -> str | None:
        return "the router learns by comparing the losses of single examples, and a packed row has one of several"


@ROUTERS.register("remix")
class RemixRouter(GateRouter[RemixConfig]):
    """Weights (..., K) that make every chosen update ``omega B A x``; sampled in training, top-k in evaluation."""

    Config = RemixConfig
    samples = True

    def __init__(self, config: RemixConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        self.factors = tuple(self.omega / scale for scale in site.scales)

    @property
    def omega(self) -> float:
        """The factor of every chosen expert's ``B A x``.

        Raises:
            ConfigError: it would follow from the rank, but the experts differ in rank.
        """
        if self.config.omega is not None:
            return self.config.omega
        if len(set(self.site.ranks)) > 1:
            raise ConfigError(
                f"site {self.site.name!r}: the experts have the ranks {list(self.site.ranks)}, so 2 / (k r) is not one "
                "number: give them one rank, or set router.omega"
            )
        size = self.config.top_k * self.site.ranks[0]
        return 2 / size if self.config.scale == "lora" else 2 / math.sqrt(size)

    def route(self, inputs: RouteInput) -> RoutingRecord:
        """See the class.

        Raises:
            UserError: a shared router samples without ``selection_seeds``; or sequences cannot be told apart.
        """
        hidden = inputs.hidden_states if self.config.score_through_input else inputs.hidden_states.detach()
        hidden = hidden.float()
        by_sequence = self.config.route_level == "sequence"
        if by_sequence:
            hidden = _pooled(hidden, inputs)
        logits = F.linear(hidden, self.weight.float())
        chosen, noise = self._choose(logits.detach(), inputs, by_sequence)
        log_prob = plackett_luce(logits, chosen) if self.training else None
        indices = chosen
        if by_sequence:
            tokens = inputs.hidden_states.shape[:-1]
            indices, logits = _to_tokens(chosen, tokens), _to_tokens(logits, tokens)
        return RoutingRecord(
            indices=indices,
            weights=self._weights(indices),
            num_experts=self.site.num_experts,
            logits=logits,
            probs=logits.softmax(dim=-1),
            log_prob=log_prob,
            noise=noise,
            sequence_indices=chosen if by_sequence else None,
        )

    def constant_weights(self, context: RoutingContext) -> Tensor | None:
        """With k = E every expert is always on."""
        if self.config.top_k < self.site.num_experts:
            return None
        return torch.tensor(self.factors, dtype=torch.float32, device=self.weight.device)

    def _weights(self, indices: Tensor) -> Tensor:
        """(..., K) float32: omega over the experts' own scale, which the container multiplies in."""
        if len(set(self.factors)) == 1:
            return torch.full(indices.shape, self.factors[0], dtype=torch.float32, device=indices.device)
        return torch.tensor(self.factors, dtype=torch.float32, device=indices.device)[indices]

    def _choose(self, logits: Tensor, inputs: RouteInput, by_sequence: bool) -> tuple[Tensor, Tensor | None]:
        """(..., K) experts in the order in which they were drawn, and the drawn numbers if they have to be kept."""
        seeds = inputs.context.selection_seeds
        drawn = None
        if self.training and seeds is None:
            self._refuse_unseeded()
            # Also in a replay, where the global generator has to move on as it did.
            drawn = inputs.draw(lambda generator: torch.empty_like(logits).exponential_(generator=generator))
        kept = None if drawn is None else inputs.to_replay(drawn)
        before = _chosen_before(inputs, logits.shape[0], by_sequence)
        if before is not None:
            return before, kept
        if not self.training:
            return top_indices(logits, self.config.top_k), None
        if seeds is not None:
            drawn = seeded_exponential(logits.shape, seeds, self.site.name, logits.device)
        assert drawn is not None
        return gumbel_top_k(logits, drawn, self.config.top_k), kept

    def _refuse_unseeded(self) -> None:
        if len(self.site.members) > 1:
            raise UserError(
                f"the router of {self.site.name!r} is shared by {len(self.site.members)} sites, which sample together: "
                "run training forwards through moelora.policy, or inside `with "
                "model.routing_context(selection_seeds=(...))`"
            )


def _chosen_before(inputs: RouteInput, rows: int, by_sequence: bool) -> Tensor | None:
    """The choice that a recomputation repeats, or that holds since the prompt."""
    if inputs.replay is not None and inputs.replay.indices is not None:
        indices = inputs.replay.indices
        return indices.reshape(rows, -1, indices.shape[-1])[:, 0] if by_sequence else indices
    if not by_sequence or not inputs.context.selections:
        return None
    kept = inputs.context.selections.get(inputs.site.name)
    if kept is None or kept.shape[0] == rows:
        return kept
    if rows % kept.shape[0]:
        raise UserError(f"site {inputs.site.name!r}: experts were chosen for {len(kept)} sequences, but {rows} come")
    return kept.repeat_interleave(rows // kept.shape[0], dim=0)


def _pooled(hidden: Tensor, inputs: RouteInput) -> Tensor:
    """(B, D) mean of the hidden states over each sequence's tokens, padding left out."""
    context, width = inputs.context, hidden.shape[-1]
    masks = [mask for mask in (context.token_mask, context.prompt_mask) if mask is not None]
    if hidden.dim() == 2 and masks and masks[0].numel() == len(hidden):
        hidden = hidden.view(*masks[0].shape, width)  # backbones such as OPT make one row of all tokens
    if hidden.dim() < 3 or any(mask.shape != hidden.shape[:-1] for mask in masks):
        raise UserError(
            f"site {inputs.site.name!r} routes whole sequences, but hidden states {tuple(inputs.hidden_states.shape)} "
            f"with masks {[tuple(mask.shape) for mask in masks]} do not tell which tokens are whose: pass an "
            "attention_mask (and a prompt_mask) of the input's own shape"
        )
    if not masks:
        return hidden.flatten(1, -2).mean(dim=1)
    real = torch.stack([mask.to(hidden.device) for mask in masks]).all(dim=0)
    total = torch.where(real.unsqueeze(-1), hidden, 0).flatten(1, -2).sum(dim=1)
    return total / real.flatten(1).sum(dim=1, keepdim=True).clamp(min=1)


def _to_tokens(values: Tensor, tokens: torch.Size) -> Tensor:
    """(..., C) for every token, from (B, C) for every sequence."""
    batch, width = values.shape
    return values.unsqueeze(1).expand(batch, tokens.numel() // batch, width).reshape(*tokens, width)
