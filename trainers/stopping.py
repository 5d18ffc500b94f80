"""A Trainer that ends a run before a number that is not finite reaches the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from .checkpointing import CheckpointingTrainer
from .finite import bad_gradients, first_non_finite
from .meter import only_listener


class StoppingTrainer(CheckpointingTrainer):
    """Looks at every loss before its backward pass, and at the gradient of every step.

    DeepSpeed takes its step inside of the last backward pass, so a gradient that is not finite, of a loss that is, is
    noticed there when the step was taken; nothing is saved after it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: list[Any] = []
        self._done = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step; kept for naming a bad one."""
        if self.state.global_step >= self.state.max_steps:  # resumed after its last step, of which there is no next
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._batches, self._done = batches, 0
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        with self._looking_at_losses(inputs):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._done += 1
        return loss

    @contextmanager
    def _looking_at_losses(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Within the block every loss is looked at before its backward pass, which under DeepSpeed takes the step."""
        before, backward = torch.get_rng_state(), self.accelerator.backward

        def look(loss: Tensor, **kwargs: Any) -> None:
            if not bool(loss.isfinite().all()):
                torch.set_rng_state(before)
                self._stop(
                    f"the loss of micro-batch {self._done + 1} of {len(self._batches)} is {float(loss.detach())}",
                    "all outputs of the forward pass are finite; does any token of the step have a label?",
                    [inputs],
                )
            backward(loss, **kwargs)

        vars(self.accelerator)["backward"] = look
        try:
            yield
        finally:
            del vars(self.accelerator)["backward"]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        scaler = getattr(self.accelerator, "scaler", None)  # with float16 the scaler skips such a step by itself
        if scaler is None and norm is not None and not bool(torch.as_tensor(norm).isfinite()):
            bad = ", ".join(bad_gradients(self.model)[:3]) or "none that this process holds"
            self._stop(
                f"the norm of the gradient is {float(norm)}; parameters with such a gradient: {bad}",
                "all outputs of the forward pass are finite, so it came about in the backward pass",
                self._batches,
                taken=self.is_deepspeed_enabled,
            )
        return norm

    @torch.no_grad()
    def _stop(self, what: str, otherwise: str, batches: list[Any], taken: bool = False) -> None:
        """Find the first module with a non-finite output, then raise."""
        origin = None
        # Where each process holds a part, all would have to take part in looking, and after the step it is too late.
        for batch in () if self.is_deepspeed_enabled or self.is_fsdp_enabled else batches:
            inputs = self._prepare_inputs(batch)
            with only_listener(self.model.slot):
                origin = first_non_finite(self.model, lambda given=inputs: self.model(**given))  # type: ignore[misc]
            if origin is not None:
                break
        where = f"; {otherwise}" if origin is None else f"; {origin.describe(inputs, self.processing_class)}"
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            where = ""
        state = (
            "DeepSpeed has taken the step: go on from the last checkpoint with --resume latest"
            if taken
            else "The step was not taken: weights and optimizer are those of the step before"
        )
        raise TrainingError(
            f"step {self.state.global_step + 1}: {what}{where}. {state}. Lower learning_rate, set max_grad_norm, or "
            "look at the sequences of the step"
        )
