"""Linear site: ``y = W0 x + B ((A x) * g)`` around any linear of a backbone.

Shapes: B batch, S sequence, D in, O out, R stacked rank.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config import SiteConfig
from ..dispatch.linear import Gate
from ..errors import ConfigError
from ..registry import EXPERTS
from ..routers.base import Router
from ..routing import SiteInfo
from ..slot import RoutingSlot
from .bank import ExpertBank
from .container import Container


class LinearContainer(Container):
    """A frozen linear (dense, 4-bit, 8-bit or GPT-2's Conv1D) with stacked LoRA experts beside it.

    Parameters:
        lora_A: (R, D). lora_B: (O, R). router.*: see the router.
    """

    experts: ExpertBank

    def __init__(
        self,
        base: nn.Module,
        config: SiteConfig,
        site: SiteInfo,
        slot: RoutingSlot,
        group: int = 0,
        router: Router[Any] | None = None,
    ) -> None:
        super().__init__(base, config, site, slot, group, router)
        self._refuse_what_is_no_whole_expert()
        self.experts = self.new_bank(site.in_features, site.out_features)
        self.experts.start_from(base)

    def _refuse_what_is_no_whole_expert(self) -> None:
        kind, router = EXPERTS.get(self.config.experts.kind), self.router
        if not kind.needs_dense_weight or router is None or (router.level == "expert" and router.mix == "outputs"):
            return
        does = "weighs single ranks" if router.level == "rank" else "mixes the factors of experts"
        raise ConfigError(
            f"site {self.site.name!r}: router {router.kind!r} {does}, but experts {kind.kind!r} rescale the output of "
            "the frozen linear by the norm of a whole expert: take experts of kind 'lora'"
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) to (..., O): the frozen linear plus the gated update."""
        out: Tensor = self.base(hidden_states)
        if not self.active:
            return out
        bank = self.experts
        low = bank.low(hidden_states) if self.router is not None and self.router.needs_activations else None
        record = self.decide(hidden_states, low)
        scale = bank.scale(hidden_states, self.factors)
        if record is None:
            gate = Gate(None, None, bank.ranks, scale)
        else:
            ranks = bank.ranks if record.level == "expert" else (1,) * record.num_experts
            gate = Gate(record.weights, record.indices, ranks, scale, record.mix == "factors")
        return bank.add_to(out, hidden_states, low, gate, self.base)

    @property
    def lora_A(self) -> Tensor:
        """(R, D) the stacked experts."""
        return self.experts.down()

    @property
    def lora_B(self) -> Tensor:
        """(O, R) the stacked experts."""
        return self.experts.up()

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
