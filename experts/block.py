"""Block site: routing once before an FFN, each expert adapting its projections, the frozen projections run once.

Shapes: B batch, S sequence, T = B·S tokens, D width of the block, F width between the projections, K picks, R stacked
rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from ..config import SiteConfig
from ..dispatch import block as dispatch
from ..errors import ConfigError
from ..registry import EXPERTS
from ..routers.base import Router
from ..routing import RoutingRecord, SiteInfo
from ..slot import RoutingSlot
from .bank import ExpertBank
from .container import Container
from .ffn import FFNSpec, linear_shape, split_halves, trace_ffn

# Nonlinearities that the compiled kernels know.
FORMULAS: dict[type[nn.Module], dispatch.Formula] = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
}


class BlockContainer(Container):
    """A frozen FFN with experts inside: ``y = W2 (sum_e w_e a_e) + sum_e w_e s B2e A2e a_e``.

    a_e is the activation of expert e, ``act(W1 x + s B1e A1e x) * (W3 x + s B3e A3e x)``. W1 x and W3 x are computed
    once, and so is W2, because it is linear: three frozen matrix products for any top_k.

    Parameters:
        experts.<projection>.lora_A: (R, in). experts.<projection>.lora_B: (out, R). router.*: see the router.

    A dropout of the backbone's own before the down projection (T5 has one) falls on the frozen part of the mix only.

    Attributes:
        implementation: of the experts, a name in ``dispatch.block.IMPLEMENTATIONS``, or ``"auto"`` for the fastest.
    """

    experts: nn.ModuleDict

    def __init__(
        self,
        base: nn.Module,
        config: SiteConfig,
        site: SiteInfo,
        slot: RoutingSlot,
        group: int = 0,
        router: Router[Any] | None = None,
        spec: FFNSpec | None = None,
    ) -> None:
        super().__init__(base, config, site, slot, group, router)
        self.spec = trace_ffn(base, site.name) if spec is None else spec
        self.implementation: dispatch.Implementation = "auto"
        wanted = self.spec.projections if config.projections is None else config.projections
        unknown = [name for name in wanted if name not in self.spec.projections]
        if unknown:
            raise ConfigError(
                f"site {site.name!r}: projections {unknown} are not in this block; it has {self.spec.projections}"
            )
        self._refuse_what_has_no_meaning(len(wanted))
        self.experts = nn.ModuleDict()
        for name in wanted:
            self.experts[name.replace(".", "__")] = self.new_bank(*linear_shape(base.get_submodule(name)), name)

    def _refuse_what_has_no_meaning(self, projections: int) -> None:
        kind = EXPERTS.get(self.config.experts.kind)
        reasons = []
        if self.router is not None and self.router.level == "rank":
            reasons.append(
                f"router {self.router.kind!r} weighs single ranks of one projection, but a block routes once, before "
                "projections that have ranks of their own"
            )
        if self.router is not None and self.router.needs_activations:
            reasons.append(
                f"router {self.router.kind!r} looks at the low-rank activations of one projection, but a block has "
                "several and routes before them"
            )
        if self.router is not None and self.router.needs_fit and projections > 1:
            reasons.append(
                f"router {self.router.kind!r} follows from the experts of one projection, but this block has several"
            )
        if self.router is not None and self.router.mix == "factors":
            reasons.append(
                f"router {self.router.kind!r} mixes factors, but a block has a nonlinearity between them: set mix to "
                "'outputs'"
            )
        if not kind.token_local:
            reasons.append(f"experts {kind.kind!r} look at other tokens, but a block hands tokens out to experts")
        if kind.needs_dense_weight:
            reasons.append(
                f"experts {kind.kind!r} rescale the output of the frozen projection, each in its own way, but a block "
                "runs the frozen down projection once for all of them"
            )
        if self.config.experts.linear_only:
            reasons.append(self.config.experts.linear_only)
        if reasons:
            raise ConfigError(
                f"site {self.site.name!r} is an FFN block: {'; '.join(reasons)}. Target the linears of the block by "
                "name to have linear sites"
            )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if not self.active:
            return self.base(hidden_states)  # type: ignore[no-any-return]
        record = self.decide(hidden_states)
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        normalized = record is None or record.normalized or self.router_weighs_updates
        inputs, indices_TK = self._inputs(x_TD, record)
        ranks = (*self.site.ranks, 0)  # the last is the frozen block itself, for weights of updates
        activation = _activation(self.base.get_submodule(self.spec.activation))
        name = dispatch.choose(inputs, activation) if self.implementation == "auto" else self.implementation
        mix_TF, update_TD = dispatch.IMPLEMENTATIONS[name](inputs, indices_TK, ranks, activation, normalized)
        if self.spec.inner_dropout is not None:
            mix_TF = self.base.get_submodule(self.spec.inner_dropout)(mix_TF)
        down = self.base.get_submodule(self.spec.down)
        out_TD = down(mix_TF)
        if not normalized and getattr(down, "bias", None) is not None:
            bias: Tensor = down.bias  # type: ignore[assignment]
            out_TD = out_TD + (inputs.weights_TK.sum(-1, keepdim=True) - 1) * bias
        if update_TD is not None:
            out_TD = out_TD + update_TD.to(out_TD.dtype)
        if record is not None and record.residual is not None:
            out_TD = out_TD + record.residual.reshape(-1, 1).to(out_TD.dtype) * x_TD
        if self.spec.outer_dropout is not None:
            out_TD = self.base.get_submodule(self.spec.outer_dropout)(out_TD)
        return out_TD.reshape(hidden_states.shape)  # type: ignore[no-any-return]

    def _inputs(self, x_TD: Tensor, record: RoutingRecord | None) -> tuple[dispatch.BlockInputs, Tensor]:
        spec = self.spec
        activated_TF = self.base.get_submodule(spec.activated)(x_TD)
        dtype = activated_TF.dtype
        activated = self._low_rank(spec.activated, x_TD, dtype)
        multiplied_TF, multiplied = None, None
        if spec.fused:
            activated_TF, multiplied_TF = split_halves(activated_TF, spec)
            if activated is not None:
                halves = [replace(activated, B_OR=rows) for rows in activated.B_OR.chunk(2, dim=0)]
                activated, multiplied = halves[spec.activated_half], halves[1 - spec.activated_half]
        elif spec.multiplied is not None:
            multiplied_TF = self.base.get_submodule(spec.multiplied)(x_TD)
            multiplied = self._low_rank(spec.multiplied, x_TD, dtype)
        if record is None:
            indices_TK = torch.zeros(x_TD.shape[0], 1, dtype=torch.long, device=x_TD.device)
            weights_TK = activated_TF.new_ones(x_TD.shape[0], 1)
        else:
            indices_TK, weights_TK = _slots(record)
            if self.router_weighs_updates and not record.normalized:
                indices_TK, weights_TK = _with_base(indices_TK, weights_TK, len(self.site.ranks))
        bank = self._bank(spec.down)
        keep = None
        if bank is not None and bank.training and bank.config.dropout > 0:
            keep = bank.dropped(torch.ones_like(activated_TF))
        down = self._low_rank(spec.down, None, dtype)
        inputs = dispatch.BlockInputs(
            activated_TF, multiplied_TF, activated, multiplied, down, weights_TK.to(dtype), keep
        )
        return inputs, indices_TK

    def _bank(self, projection: str) -> ExpertBank | None:
        name = projection.replace(".", "__")
        return self.experts[name] if name in self.experts else None  # type: ignore[return-value]  # noqa: SIM401

    def _low_rank(self, projection: str, x_TD: Tensor | None, dtype: torch.dtype) -> dispatch.LowRank | None:
        """The experts of one projection; without an input for the down projection."""
        bank = self._bank(projection)
        if bank is None:
            return None
        A, B = bank.down().to(dtype), bank.up().to(dtype)
        hidden = None if x_TD is None else bank.dropped(x_TD).to(dtype)
        return dispatch.LowRank(hidden, A, B, bank.scale(A, self.factors))

    @property
    def router_weighs_updates(self) -> bool:
        """Whether weights multiply what experts change, so that the frozen block makes up what is missing to 1."""
        return self.router is not None and self.router.weighs == "updates"


def _activation(module: nn.Module) -> dispatch.Activation:
    if isinstance(module, nn.GELU):
        return dispatch.Activation(module, "gelu_tanh" if module.approximate == "tanh" else "gelu")
    return dispatch.Activation(module, FORMULAS.get(type(module)))


def _with_base(indices_TK: Tensor, weights_TK: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """One slot more for each token: the frozen block, with the weight that is missing to 1."""
    rest_T1 = 1 - weights_TK.sum(-1, keepdim=True)
    index_T1 = torch.full_like(rest_T1, base, dtype=torch.long)
    return torch.cat([indices_TK, index_T1], dim=1), torch.cat([weights_TK, rest_T1], dim=1)


def _slots(record: RoutingRecord) -> tuple[Tensor, Tensor]:
    """(T, K) expert indices and weights; dense routing fills one slot per expert."""
    if record.indices is None:
        weights_TE = record.dense_weights().reshape(-1, record.num_experts)
        every = torch.arange(record.num_experts, device=weights_TE.device)
        return every.expand_as(weights_TE), weights_TE
    slots = record.indices.shape[-1]
    return record.indices.reshape(-1, slots), record.weights.reshape(-1, slots)
