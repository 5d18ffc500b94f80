"""LoRA-Mixer: experts by domain label first, then a dense softmax in training and its top k in inference.

Source: arXiv 2507.00029. No code was released, and the text was known to us from notes, reviews and quotations only:
equations 3 and 5 and the staged training are followed, the rest is our reading. The "specialization balance loss" of
its first version and the "routing specialization loss" of its second are one formula, for one router:

    alpha * sum_i p_i f_i  -  lambda * mean H(p(x))

with p_i the mean probability of expert i over real tokens, f_i the share of tokens that prefer it, and H the entropy.
There is no factor E: even usage has the value alpha / E. The minus as printed makes each token's routing flatter, while
the paper's prose says that it makes experts specialise; ``entropy_sign: sharpen`` does what the prose says. Of the
three readings of "hard-soft" two are the stages (hard, then soft) and the inference of the soft stage (top k of the
softmax); the third is ``straight_through``.

Shapes: D in, E experts, K picks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ..errors import UserError
from ..registry import ROUTERS
from ..routing import RouteInput, RoutingContext, RoutingRecord
from .gate import GateConfig, GateRouter
from .ids import checked, the_only
from .losses import pooled_mean, required
from .topk import check_top_k, top_indices


class LoRAMixerConfig(GateConfig):
    """Options of ``lora_mixer``.

    Attributes:
        stage: ``hard`` sends each sequence to the expert whose index is its ``task_ids``; ``soft`` routes. A context
            with ``phase`` "hard" or "soft" decides instead.
        top_k: experts per token in the evaluation of the soft stage; training takes all.
        renormalize_topk: divide the kept probabilities by their sum.
        straight_through: train on the top k as well, with the gradient of the dense softmax.
        objective: ``sbl`` (or ``rsl``) is the published loss; ``mutual_information`` is our own with the same aim:
            ``entropy_coef * mean H(p(x)) - balance_coef * H(mean p)``, least where tokens are sure and usage is even.
        usage: f of the published loss: ``top1`` counts each token's first choice (equation 3), ``topk_share`` takes
            the normalised probabilities of its first top_k (the prose of section 3.3).
        entropy_sign: ``printed`` or ``sharpen``, see the module.
        balance_coef, entropy_coef: alpha and lambda.
    """

    kind: str = "lora_mixer"
    init: Literal["kaiming", "normal"] = "normal"
    stage: Literal["hard", "soft"] = "soft"
    top_k: Annotated[int, Field(ge=1)] = 3
    renormalize_topk: bool = True
    straight_through: bool = False
    objective: Literal["sbl", "mutual_information"] = "sbl"
    usage: Literal["top1", "topk_share"] = "top1"
    entropy_sign: Literal["printed", "sharpen"] = "printed"
    balance_coef: Annotated[float, Field(ge=0)] = 1.0
    entropy_coef: Annotated[float, Field(ge=0)] = 0.1

    @field_validator("objective", mode="before")
    @classmethod
    def _one_loss_two_names(cls, value: Any) -> Any:
        return "sbl" if value == "rsl" else value

    @model_validator(mode="after")
    def _of_the_objective(self) -> LoRAMixerConfig:
        if self.objective == "mutual_information" and (self.usage, self.entropy_sign) != ("top1", "printed"):
            raise ValueError("usage and entropy_sign belong to objective sbl; mutual_information has neither")
        return self

    def check(self, num_experts: int, total_rank: int) -> None:
        check_top_k(self.top_k, num_experts)

    def coefficients(self) -> dict[str, float]:
        if self.objective == "mutual_information":
            return {"usage_entropy": -self.balance_coef, "token_entropy": self.entropy_coef}
        sign = -1 if self.entropy_sign == "printed" else 1
        return {"specialization_balance": self.balance_coef, "token_entropy": sign * self.entropy_coef}


@ROUTERS.register("lora_mixer", "rsl", "sbl")
class LoRAMixerRouter(GateRouter[LoRAMixerConfig]):
    """One expert of weight 1 by label; or softmax(x W^T), all of it in training, the top k of it in evaluation."""

    Config = LoRAMixerConfig

    def route(self, inputs: RouteInput) -> RoutingRecord:
        """See the class.

        Raises:
            UserError: the hard stage without ``task_ids``, or with one that is no expert.
        """
        if self.stage(inputs.context) == "hard":
            return self._by_label(inputs)
        logits, probs = self.gate(inputs)
        straight = self.training and self.config.straight_through
        every = self.training or self.config.top_k == self.site.num_experts
        indices, weights = None, probs
        if straight or not every:
            chosen = None if inputs.replay is None else inputs.replay.indices
            indices = top_indices(probs, self.config.top_k) if chosen is None else chosen
            weights = self._kept(probs, indices)
        if straight and indices is not None:
            hard = torch.zeros_like(probs).scatter(-1, indices, weights.detach())
            indices, weights = None, hard + (probs - probs.detach())
        return RoutingRecord(
            indices=indices,
            weights=weights,
            num_experts=self.site.num_experts,
            normalized=self.config.renormalize_topk or (every and not straight),
            logits=logits,
            probs=probs,
        )

    def constant_weights(self, context: RoutingContext) -> Tensor | None:
        """In the hard stage the one expert that the context names, if it names one for all its sequences."""
        label = the_only(context.task_ids) if self.stage(context) == "hard" else None
        if label is None or not 0 <= label < self.site.num_experts:
            return None
        return (torch.arange(self.site.num_experts, device=self.weight.device) == label).float()

    def stage(self, context: RoutingContext) -> str:
        """``hard`` or ``soft``."""
        return context.phase if context.phase in ("hard", "soft") else self.config.stage

    def losses(self, records: list[RoutingRecord], context: RoutingContext) -> dict[str, Tensor]:
        """The two parts of the objective, each a mean over routers of a value over the real tokens of its sites.

        ``specialization_balance`` is ``sum_i p_i f_i`` with gradient through p only, or ``usage_entropy`` is H(mean p);
        ``token_entropy`` is mean H(p(x)). Both are 0 in the hard stage, which leaves the router alone.
        """
        names = [*self.config.coefficients()]
        if any(record.probs is None for record in records):
            return {name: records[0].weights.new_zeros(()) for name in names}
        routers: dict[object, list[RoutingRecord]] = {}
        for record in records:
            routers.setdefault(id(record) if record.owner is None else record.owner, []).append(record)
        parts = torch.stack([torch.stack([self._use(own), _token_entropy(own)]) for own in routers.values()]).mean(0)
        return dict(zip(names, parts.unbind(), strict=True))

    def _by_label(self, inputs: RouteInput) -> RoutingRecord:
        labels = checked(inputs.given("task_ids"), self.site.num_experts, "task_ids")
        indices = inputs.per_token(labels).long().unsqueeze(-1)
        weights = torch.ones(indices.shape, dtype=torch.float32, device=indices.device)
        return RoutingRecord(indices, weights, self.site.num_experts, normalized=True)

    def _kept(self, probs: Tensor, indices: Tensor) -> Tensor:
        """(..., K) the probabilities of the chosen experts."""
        kept = probs.gather(-1, indices)
        return kept / kept.sum(dim=-1, keepdim=True) if self.config.renormalize_topk else kept

    def _use(self, records: list[RoutingRecord]) -> Tensor:
        """Scalar: the part of the objective that is about the usage of experts by one router."""
        probs = [required(record.probs) for record in records]
        mean_E = pooled_mean(records, probs)
        if self.config.objective == "mutual_information":
            return -(mean_E * mean_E.clamp_min(torch.finfo(mean_E.dtype).tiny).log()).sum()
        return torch.dot(mean_E, pooled_mean(records, [self._preferred(each.detach()) for each in probs]))

    def _preferred(self, probs: Tensor) -> Tensor:
        """(..., E) which experts a token prefers, its values summing to 1."""
        indices = top_indices(probs, 1 if self.config.usage == "top1" else self.config.top_k)
        kept = probs.gather(-1, indices)
        return torch.zeros_like(probs).scatter(-1, indices, kept / kept.sum(dim=-1, keepdim=True))


def _token_entropy(records: list[RoutingRecord]) -> Tensor:
    """Scalar: mean over real tokens of the entropy of their probabilities."""
    logs = [required(record.logits).log_softmax(dim=-1) for record in records]
    return -pooled_mean(records, [(log.exp() * log).sum(dim=-1, keepdim=True) for log in logs]).squeeze(0)


class PreserveLoss:
    """``sum_i ||theta_i - theta_i(0)||^2`` over chosen parameters: 0, with gradient 0, until they move.

    For the soft stage, where experts that were trained by label should stay near to what they are. A trainer makes it
    when the stage begins and adds it, times a factor, to its loss:

        preserve = PreserveLoss({n: t for n, t in model.adapter_tensors().items() if "lora_" in n})
        loss = output.loss + beta * preserve()

    Args:
        tensors: the parameters by name, such as a part of ``model.adapter_tensors()``.

    Attributes:
        start: detached copies of what they were; a run that is resumed puts back those of its beginning.

    Raises:
        UserError: there are none.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            raise UserError("PreserveLoss was given no tensors: pass those that should stay near to what they are")
        self.tensors = dict(tensors)
        self.start = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def __call__(self) -> Tensor:
        """Scalar float32, or float64 for such parameters, on the device of the first."""
        squares = [_square(tensor - self.start[name]) for name, tensor in self.tensors.items()]
        return torch.stack([square.to(squares[0].device) for square in squares]).sum()


def _square(change: Tensor) -> Tensor:
    return change.to(torch.promote_types(change.dtype, torch.float32)).square().sum()
