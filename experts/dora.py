"""DoRA experts: each has a magnitude for every output feature besides its two factors.

Source: Liu et al. 2024 (arXiv 2402.09353), equations 5 and 6 and section 4.3; its mixture, MixDoRA, appears in Li et
al. 2024 (arXiv 2404.15159, version 1). With W the frozen weight (O, D), s the scale and n_e the norm of each row of
``W + s B_e A_e``, taken as a constant by the gradient (section 4.3), expert e turns ``W x`` into
``m_e / n_e (W + s B_e A_e) x``; what it adds, and what a router weighs, is

    d_e(x) = (m_e / n_e - 1) W x + (m_e / n_e) s B_e A_e x.

A bias of the linear is not scaled. m_e starts at the norm of the rows of W, so that a fresh expert adds nothing.

Our reading, and differences from what is released:

* The magnitude is a parameter that is trained and saved. In MoE-PEFT (40f8cb7) neither the optimizer nor the checkpoint
  has it, so that its MixDoRA is MixLoRA once reloaded.
* Dropout falls on the input of ``lora_A`` alone, as for every other kind. PEFT and the authors' code drop features of
  ``W x`` in d_e as well, at the price of a second product with the frozen weight.
* The norm is computed in float32 whatever the backbone's dtype is.

Shapes: D in, O out, E experts, R stacked rank, r rank of one expert.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..dispatch import linear as dispatch
from ..dispatch.linear import Gate, over_ranks
from ..registry import EXPERTS
from .bank import ExpertBank
from .dense import dense_weight
from .lora import LoRAConfig


class DoRAConfig(LoRAConfig):
    """DoRA experts with scale alpha / r."""

    kind: str = "dora"


@EXPERTS.register("dora")
class DoRAExperts(ExpertBank):
    """``(m_e / n_e - 1) W x + (m_e / n_e) s B_e A_e x``; see the text of the module.

    Costs, for each forward, the product ``W A^T`` (O, R) and the unpacking of a quantised weight: as much as one token
    more for each rank. The frozen weight meets the tokens once for all experts.

    Parameters:
        magnitude: (E, O), positive at the start.
    """

    Config = DoRAConfig
    needs_dense_weight = True

    def __init__(self, config: DoRAConfig, in_features: int, out_features: int, name: str = "") -> None:
        super().__init__(config, in_features, out_features, name)
        self.magnitude = nn.Parameter(torch.ones(len(self.ranks), out_features))

    @torch.no_grad()
    def start_from(self, base: nn.Module) -> None:
        """Set the magnitudes to the norms of the rows, and so make every expert add nothing while ``lora_B`` is 0."""
        if self.magnitude.is_meta:  # nothing to fill
            return
        self.to(cast(Tensor, base.weight).device)
        self.magnitude.copy_(self.norms(base))

    @torch.no_grad()
    def norms(self, base: nn.Module) -> Tensor:
        """(E, O) float32: the norm of each row of ``W + s B_e A_e``, without forming that matrix.

        ``|w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b`` for a row w of W and the row b of B_e.
        """
        weight_OD = dense_weight(base, self.name).float()
        # Autocast would turn the float32 products into half precision.
        with torch.autocast(weight_OD.device.type, enabled=False):
            A_RD, B_OR = self.down().float(), self.up().float()
            ranks = list(self.ranks)
            parts = zip(
                self.config.scales,
                A_RD.split(ranks, dim=0),
                B_OR.split(ranks, dim=1),
                (weight_OD @ A_RD.T).split(ranks, dim=1),
                strict=True,
            )
            frozen_O = weight_OD.square().sum(1)
            squares = [
                frozen_O + 2 * scale * (cross_Or * B_Or).sum(1) + scale**2 * ((B_Or @ (A_rD @ A_rD.T)) * B_Or).sum(1)
                for scale, A_rD, B_Or, cross_Or in parts
            ]
            # A row of zeros stays one, rather than 0 / 0.
            return torch.stack(squares).clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def add_to(self, out: Tensor, hidden_states: Tensor, low: Tensor | None, gate: Gate, base: nn.Module) -> Tensor:
        low = self.low(hidden_states) if low is None else low
        ratio_EO = self.magnitude.float() / self.norms(base)
        change_EO = (ratio_EO - 1) * self._factors(gate).unsqueeze(1)
        weights = gate.per_unit()
        gain = change_EO.sum(0) if weights is None else weights.float() @ change_EO
        bias = cast("Tensor | None", base.bias)
        frozen = out if bias is None else out - bias
        up_OR = self.up() * over_ranks(ratio_EO.T, self.ranks)
        return dispatch.from_low(out + gain.to(out.dtype) * frozen, low, up_OR, gate)

    def _factors(self, gate: Gate) -> Tensor:
        """(E,) float32 run-time factors of the experts: what the gate's scale has beyond alpha / r."""
        scales = self.magnitude.new_tensor(self.config.scales, dtype=torch.float32)
        if not isinstance(gate.scale, Tensor):
            return gate.scale / scales
        starts = [sum(self.ranks[:expert]) for expert in range(len(self.ranks))]
        return gate.scale[starts].float() / scales

    @torch.no_grad()
    def delta(self, weights: Tensor, base: nn.Module) -> Tensor:
        """(O, D) float32: what the experts with constant weights (E,) add to the frozen weight."""
        ratio_EO = self.magnitude.float() / self.norms(base)
        weights = weights.float()
        gain_O = weights @ (ratio_EO - 1)
        up_OR = self.up().float() * over_ranks(ratio_EO.T, self.ranks)
        gate_R = over_ranks(weights * weights.new_tensor(self.config.scales), self.ranks)
        return gain_O.unsqueeze(1) * dense_weight(base, self.name).float() + (up_OR * gate_R) @ self.down().float()
