"""A trainer whose loss has terms of the parameters themselves, beside those of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import ConfigError
from .sft import SFTTrainer


class Penalty(NamedTuple):
    """A term of the loss: ``coef * value``; ``value`` is a scalar with its graph."""

    coef: float
    value: Tensor


class PenalisedTrainer(SFTTrainer):
    """:class:`SFTTrainer` with :meth:`penalties` in the loss of every optimizer step.

    Each counts once in a step, however many micro-batches and ranks it has. The log has them as ``aux/<name>``, not
    scaled, and ``aux_warmup_steps`` warms them up with the other losses; in evaluation they do not count.
    """

    def penalties(self) -> Mapping[str, Penalty]:
        """The terms as the parameters are now, by name."""
        return {}

    def refuse_sharded(self, why: str) -> None:
        """Raise a ConfigError, which begins with ``why``, where a process holds a part of each parameter only."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if self.is_fsdp_enabled or (plugin is not None and int(plugin.zero_stage) == 3):
            raise ConfigError(f"{why}, and here each process holds a part of them: use DDP, or ZeRO stage 2 or less")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.model.training:
            # Once in an optimizer step: each micro-batch adds its part, and ranks are averaged.
            part = 1 / self.current_gradient_accumulation_steps
            _, within = self._factors(num_items_in_batch)
            for name, (coef, value) in self.penalties().items():
                value = value.to(loss.device)
                loss = loss + coef * self.aux_scale * value * (part / within)
                self._window.add({f"aux/{name}": value}, part)
        return (loss, outputs) if return_outputs else loss
