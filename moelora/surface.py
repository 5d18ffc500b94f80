"""What transformers asks of a model besides its forward, answered by the backbone."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# What TRL's trainers read of a configuration to learn that outputs have an ``aux_loss``, whose coefficients a mixture
# has multiplied in already; the backbone's own feed-forward layers are none of experts.
ROUTED = {"output_router_logits": False, "router_aux_loss_coef": 1.0, "num_experts": 0, "num_experts_per_tok": None}


class _Extended(list[str]):
    """``keys_to_ignore_at_inference`` with what a mixture adds to an output, in a config that several may share.

    Attributes:
        before: what the config had of its own. users: the mixtures that need the extras.
        routed: the part of the config that was given ``ROUTED``; none where the backbone is a mixture itself.
    """

    before: list[str] | None = None
    users = 1
    routed: PreTrainedConfig | None = None


def ignore_extras(config: PreTrainedConfig) -> None:
    """Let the Trainer leave out of its predictions what a mixture adds to the backbone's output."""
    before = vars(config).get("keys_to_ignore_at_inference")
    if isinstance(before, _Extended):
        before.users += 1
        return
    keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
    extended = _Extended(dict.fromkeys([*keys, "task_loss", "aux_losses", "aux_share", "aux_loss"]))
    extended.before = before
    config.keys_to_ignore_at_inference = extended
    text = config.get_text_config()
    if not any(hasattr(text, name) for name in ROUTED):
        extended.routed = text
        text.update(ROUTED)


def tells_aux_loss(config: PreTrainedConfig) -> bool:
    """Whether ``aux_loss`` of an output is the mixture's, and not one of a backbone with experts of its own."""
    extended = vars(config).get("keys_to_ignore_at_inference")
    return isinstance(extended, _Extended) and extended.routed is not None


def ignore_no_more(config: PreTrainedConfig) -> None:
    """Undo one :func:`ignore_extras`; the last one gives the config back as it was."""
    extended = vars(config).get("keys_to_ignore_at_inference")
    if not isinstance(extended, _Extended):
        return
    extended.users -= 1
    if extended.users:
        return
    for name in ROUTED if extended.routed is not None else ():
        delattr(extended.routed, name)
    if extended.before is None:
        del config.keys_to_ignore_at_inference
    else:
        config.keys_to_ignore_at_inference = extended.before


class Surface(PreTrainedModel):
    """A transformers model that hands on to ``backbone`` what it does not change.

    Attributes:
        backbone: the model inside.
    """

    backbone: PreTrainedModel

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the backbone's loss takes ``num_items_in_batch``; the Trainer asks."""
        declared = getattr(self.backbone, "accepts_loss_kwargs", None)
        if declared is not None:
            return bool(declared)
        parameters = inspect.signature(self.backbone.forward).parameters.values()
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def generation_config(self) -> Any:
        """The backbone's; setting it sets the backbone's."""
        return getattr(self.backbone, "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.backbone.generation_config = value

    @property
    def base_model(self) -> nn.Module:
        """The backbone without its head."""
        return self.backbone.base_model

    def can_generate(self) -> bool:  # type: ignore[override]
        return self.backbone.can_generate()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.resize_token_embeddings(*args, **kwargs).requires_grad_(False)

    def _supports_logits_to_keep(self) -> bool:
        return bool(self.backbone._supports_logits_to_keep())  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module | None:
        head: nn.Module | None = self.backbone.get_output_embeddings()
        return head
