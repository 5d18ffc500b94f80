"""Linear site: ``y = W0 x + B ((A x) * g)`` around any linear of a backbone.

Shapes: B batch, S sequence, D in, O out, R stacked rank.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..config import SiteConfig
from ..dispatch import linear
from ..routing import RoutingSlot, SiteInfo
from .bank import ExpertBank
from .container import Container


class LinearContainer(Container):
    """A frozen linear (dense, 4-bit, 8-bit or GPT-2's Conv1D) with stacked LoRA experts beside it.

    Parameters:
        lora_A: (R, D). lora_B: (O, R). router.*: see the router.
    """

    experts: ExpertBank

    def __init__(self, base: nn.Module, config: SiteConfig, site: SiteInfo, slot: RoutingSlot, group: int = 0) -> None:
        super().__init__(base, config, site, slot, group)
        self.experts = self.new_bank(site.in_features, site.out_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) to (..., O): the frozen linear plus the gated update."""
        out: Tensor = self.base(hidden_states)
        if not self.slot.enabled:
            return out
        bank = self.experts
        record = self.decide(hidden_states)
        x = bank.dropped(hidden_states)
        gate = bank.scale(x, self.factors)
        if record is not None:
            gate = record.gate(bank.ranks).to(x.dtype) * gate
        return out + linear.stacked(x, bank.lora_A, bank.lora_B, gate).to(out.dtype)

    @property
    def lora_A(self) -> nn.Parameter:
        return self.experts.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        return self.experts.lora_B

    # Backbones read these from their linears, for example to pick a dtype.
    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.site.in_features

    @property
    def out_features(self) -> int:
        return self.site.out_features
