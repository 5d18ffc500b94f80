"""What other mixtures can do and a reward model cannot, refused in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..config import MixtureConfig
from ..errors import ConfigError, UserError
from ..model import MoELoRAModel


class Refusing(MoELoRAModel):
    """The part of a reward model that says no."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's ``generate``, within ``disable_experts()`` alone.

        Raises:
            UserError: experts are on.
        """
        if self.slot.enabled:
            raise UserError(
                "a reward model gives rewards and writes no text: score(prompts, responses) judges one; its backbone "
                "by itself generates within `with model.disable_experts()`"
            )
        return super().generate(*args, **kwargs)

    def merge_and_unload(
        self, approximate: bool = False, batches: Iterable[Mapping[str, Any]] | None = None, **fields: Any
    ) -> PreTrainedModel:
        """Not of a reward model.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a reward model looks at each text under several sets of experts, and weights have room for one: it cannot "
            "be merged; unload() gives the backbone back"
        )

    def add_adapter(  # type: ignore[override]
        self, adapter_name: str, mixture: MixtureConfig | Mapping[str, Any] | str | Path
    ) -> None:
        """Not of a reward model.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(_ONE_ADAPTER)

    def load_adapter(self, path: str | Path, adapter_name: str, **hub: Any) -> None:  # type: ignore[override]
        """Not of a reward model.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(_ONE_ADAPTER)


_ONE_ADAPTER = (
    "a reward model has one adapter, whose experts its heads belong to: for another one, unload() this model and put "
    "the other on the backbone, as moelora.attach or RewardModel.from_pretrained(path, backbone=...) do"
)
