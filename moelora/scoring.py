"""The scoring pass: a forward of the backbone without experts, which comes before the forward of the mixture.

Routers with ``needs_scoring`` (X-LoRA, arXiv 2402.07148) look at the last hidden states of the whole model. Those
states do not depend on what the experts do afterwards, and behind a causal mask not on later tokens either. So
generation need not start anew for every token, as the published code does: each of the two streams of keys and values
has its own cache, and a token costs two token forwards.

The two caches are one object: the layers of the scoring stream stand behind those of the mixture in the
``DynamicCache`` that the caller holds. Reordering by a beam search, cropping, repeating and copying then reach both.

Shapes: B batch, S sequence, H hidden size, L layers of the backbone's cache.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .config import MixtureConfig
from .errors import ConfigError
from .experts import Container
from .registry import ROUTERS
from .routers.base import Router
from .routing import RoutingContext
from .slot import RoutingSlot

# What the scoring pass answers by itself, or is not asked for.
_OWN = ("return_dict", "output_hidden_states", "output_attentions", "past_key_values", "use_cache", "cache_params")


def refuse_unscorable(backbone: PreTrainedModel, mixture: MixtureConfig) -> None:
    """Raise where a router needs a scoring pass that this backbone cannot give.

    Raises:
        ConfigError: the backbone is no text model of one stack.
    """
    kinds = [site.router.kind for site in mixture.sites if site.router is not None]
    kind = next((kind for kind in kinds if ROUTERS.get(kind).needs_scoring), None)
    config = backbone.config
    one_stack = not config.is_encoder_decoder and config.get_text_config() is config
    if kind is not None and not (one_stack and backbone.main_input_name == "input_ids"):
        raise ConfigError(
            f"router {kind!r} looks at the last hidden states of a text model of one stack, but "
            f"{type(backbone).__name__} has another input or several stacks: take a decoder-only text model, or "
            "another router"
        )


class ScoringPass:
    """Runs the backbone without experts before each forward of the mixture, and keeps its own stream of the cache.

    The pass runs under ``no_grad`` and in the mode the model is in, as the published code does: dropout of the
    backbone's own is on in training. Nothing of a module is changed, so nothing can be left behind by an error, and
    no listener hears the pass. Under gradient checkpointing it runs once, outside every checkpointed segment.

    Args:
        backbone: the model with containers in place. slot: theirs.
        routers: the routers with ``needs_scoring`` by the names of their sites; at least one.
    """

    def __init__(self, backbone: PreTrainedModel, slot: RoutingSlot, routers: Mapping[str, Router[Any]]) -> None:
        self.backbone = backbone
        self.slot = slot
        self.routers = routers
        self.depth = len(DynamicCache(config=backbone.config))
        self._stream: list[Any] = []

    @classmethod
    def of(
        cls, backbone: PreTrainedModel, slot: RoutingSlot, containers: Mapping[str, Container]
    ) -> ScoringPass | None:
        """The pass that these containers need, or ``None`` where no router looks at the whole model."""
        routers = {name: c.router for name, c in containers.items() if c.router is not None and c.router.needs_scoring}
        return cls(backbone, slot, routers) if routers else None

    def before(self, context: RoutingContext, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutingContext:
        """The context of a forward of the backbone with these arguments: with states and scores.

        States that the context has already are taken as they are.

        Raises:
            ConfigError: the cache cannot hold a second stream, or was filled without one.
        """
        self._stream = []
        states = context.scoring_states
        if states is None:
            states = self._run(context, self._arguments(args, kwargs))
        with torch.autocast(states.device.type, enabled=False):
            made = {router: router.score(states, context) for router in dict.fromkeys(self.routers.values())}
        return replace(context, scoring_states=states, scores={n: made[router] for n, router in self.routers.items()})

    def after(self, output: Any) -> None:
        """Put the layers of the scoring stream behind those of the cache that this forward made or filled.

        Args:
            output: of the backbone; ``None`` after an error.
        """
        stream, self._stream = self._stream, []
        if output is None or len(stream) != self.depth:
            return
        values = output.values() if isinstance(output, Mapping) else output
        cache = next((value for value in values if isinstance(value, DynamicCache)), None)
        if cache is not None and len(cache.layers) >= self.depth:
            cache.layers[self.depth :] = stream

    def _run(self, context: RoutingContext, given: dict[str, Any]) -> Tensor:
        """(B, S, H) the last hidden states of the backbone, after its final norm."""
        base = self.backbone.base_model
        # The hooks of the backbone itself, which run the pass, must not run in it.
        forward = base.forward if base is self.backbone else base
        with torch.no_grad(), self._constant(context):
            output = forward(**self._known(given), **self._cache(given), return_dict=True)
        states: Tensor | None = output.get("last_hidden_state")
        if states is None:
            raise ConfigError(f"{type(base).__name__} gives no last_hidden_state, which a scoring pass is for")
        kept = output.get("past_key_values")
        if isinstance(kept, DynamicCache):
            self._stream = kept.layers
        return states

    @contextmanager
    def _constant(self, context: RoutingContext) -> Iterator[None]:
        """Within the block experts are off, or have the constant weights of their routers, and nobody listens."""
        slot = self.slot
        state, listeners = slot.state(), slot.listeners
        on = any(router.scoring_pass_value != 0 for router in self.routers.values())
        slot.listeners = []
        slot.restore((replace(context, scoring_pass=True), on, {}))
        try:
            yield
        finally:
            slot.listeners = listeners
            slot.restore(state)
            if on:
                # Older torch: autocast keeps its half-precision copies of weights, and those made here have no graph.
                torch.clear_autocast_cache()

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the backbone's forward by name."""
        names = list(inspect.signature(type(self.backbone).forward).parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _known(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What of the arguments the body of the backbone takes: not those of its head, such as labels."""
        head = inspect.signature(type(self.backbone).forward).parameters
        body = inspect.signature(type(self.backbone.base_model).forward).parameters
        anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in body.values())
        return {
            name: value
            for name, value in given.items()
            if name not in _OWN and (name in body or (anything and name not in head))
        }

    def _cache(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments under which the scoring pass goes on in its own stream."""
        cache = given.get("past_key_values", given.get("cache_params"))
        if cache is None:
            # A training forward fills a cache that nobody goes on from; a second one would only take memory.
            unasked = {"use_cache": False} if self.backbone.training else {}
            return {"use_cache": given["use_cache"]} if given.get("use_cache") is not None else unasked
        if not isinstance(cache, DynamicCache) or cache.offloading or "cache_params" in given:
            raise ConfigError(
                f"{self._kind()} needs a second stream in the cache, which this {type(cache).__name__} cannot hold: "
                "take a DynamicCache that is not offloaded (leave cache_implementation out), or pass use_cache=False"
            )
        if cache.get_seq_length() == 0 and len(cache) in (0, self.depth):
            return {"past_key_values": copy.deepcopy(cache), "use_cache": given.get("use_cache", True)}
        stream = copy.copy(cache)
        stream.layers = cache.layers[self.depth :]
        if len(stream) != self.depth or stream.get_seq_length() != cache.get_seq_length():
            raise ConfigError(
                f"{self._kind()} needs a second stream in the cache, but this cache was filled without it (with "
                "experts disabled, in a forward that failed, or by another model): begin with an empty cache"
            )
        return {"past_key_values": stream, "use_cache": given.get("use_cache", True)}

    def _kind(self) -> str:
        return f"router {next(iter(self.routers.values())).kind!r}"
