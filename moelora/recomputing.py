"""Gradient checkpointing of a mixture: a recomputation repeats the routing of the forward that it stands for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .errors import ConfigError
from .saving import Saving
from .slot import RoutingSlot


class Recomputing(Saving):
    """The part of a mixture that switches gradient checkpointing on and off.

    Attributes:
        slot: what a recomputation repeats the routing of.
    """

    slot: RoutingSlot

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Checkpoint the backbone's layers so that a recomputation replays the routing of its forward.

        Raises:
            ConfigError: reentrant checkpointing was asked for; it would cut the auxiliary losses from their graph.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise ConfigError(
                "use_reentrant=True: reentrant checkpointing runs the forward without a graph, so auxiliary losses "
                "would train nothing; set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        self.backbone.activation_checkpointing_enable(options, every_n_layers=every_n_layers, offload=offload)
        self._take_over_checkpointing()

    def _take_over_checkpointing(self) -> None:
        """Keep which layers the backbone checkpoints and how, but let a recomputation replay the routing."""
        replaying = {"use_reentrant": False, "context_fn": self.slot.checkpoint_contexts}
        for module in self.backbone.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                vars(module)["_gradient_checkpointing_func"] = partial(function, **replaying)
        # Non-reentrant checkpointing needs no gradient at the embeddings; without it the backward pass stops at the
        # lowest layer with experts.
        self.backbone.disable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        self.backbone.activation_checkpointing_disable()

    def gradient_checkpointing_disable(self) -> None:
        """The older name of :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def _check_checkpointing(self) -> None:
        """Refuse checkpointing that was switched on behind the mixture's back: it would not replay the routing."""
        if not (self.training and torch.is_grad_enabled()):
            return
        layer = next((m for m in self.backbone.modules() if getattr(m, "gradient_checkpointing", False)), None)
        if layer is None:
            return
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("context_fn") != self.slot.checkpoint_contexts:
            raise ConfigError(
                "gradient checkpointing was enabled on the backbone itself, so a recomputation could not replay the "
                "routing; call model.gradient_checkpointing_enable() on the mixture instead"
            )
