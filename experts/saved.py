"""Modules that are trained and saved whole beside the experts, such as the head of a classifier."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..slot import RoutingSlot
from .dense import QUANTIZED


class SavedModule(nn.Module):
    """A frozen module and a trained copy of it in its place; the copy is a part of the mixture.

    The copy has the dtype of the original. Where the original shares a weight with another module, such as embeddings
    tied to the output, the copy has its own.

    Attributes:
        base: the module that was there, untouched, which takes part while experts are disabled. trained: the copy.

    Raises:
        ConfigError: the module has no parameters, or its weight is quantised and cannot be trained.
    """

    def __init__(self, base: nn.Module, name: str, slot: RoutingSlot) -> None:
        super().__init__()
        if next(base.parameters(), None) is None:
            raise ConfigError(f"modules_to_save names {name!r}, which has no parameters: name a module that has")
        if any(type(parameter).__name__ in QUANTIZED for parameter in base.parameters()):
            raise ConfigError(
                f"modules_to_save names {name!r}, whose weight is quantised and cannot be trained whole: put experts "
                "there, or load the backbone without quantization"
            )
        self.base = base
        self.name = name
        self.slot = slot
        self.trained = copy.deepcopy(base).requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the trained copy makes of the arguments, or the frozen module while experts are disabled."""
        return self.active(*args, **kwargs)

    @property
    def active(self) -> nn.Module:
        """The module that takes part in a forward now."""
        return self.trained if self.slot.enabled else self.base

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of the copy by their names in it."""
        return dict(self.trained.state_dict(keep_vars=True))

    def __getattr__(self, name: str) -> Any:
        # Backbones read attributes of their modules, such as the weight of embeddings.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("trained", "base"):
                raise
            return getattr(self.active, name)

    def extra_repr(self) -> str:
        return f"name={self.name!r}"
