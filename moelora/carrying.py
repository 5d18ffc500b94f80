"""What of a mixture puts adapters on its backbone: under the names that PEFT and transformers have for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from .adapters import Adapter, Adapters, read_adapter, refuse_conflicts
from .config import MixtureConfig
from .errors import ConfigError, UserError
from .experts import Container, SavedModule
from .parts import build_parts
from .passes import Passes
from .slot import RoutingSlot
from .surface import Surface, ignore_no_more


class Carrying(Surface):
    """The part of a mixture that knows which adapters there are and which of them are in the backbone.

    Attributes:
        slot: what all containers of all adapters share.
    """

    slot: RoutingSlot
    _adapters: Adapters
    _passes: Passes
    _unloaded: bool

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters, in the order in which they came."""
        return list(self._adapters.known)

    @property
    def active_adapters(self) -> list[str]:  # type: ignore[override]
        """Names of the adapters that take part, in the order in which they add up."""
        return [adapter.name for adapter in self._adapters.active]

    @property
    def active_adapter(self) -> str:
        """Name of the adapter that takes part, where it is one.

        Raises:
            ConfigError: several do; see :attr:`active_adapters`.
        """
        return self._sole().name

    @property
    def mixture(self) -> MixtureConfig:
        """The configuration of the active adapter; of several, their sites one after the other."""
        self.refuse_unloaded()
        configs = [adapter.mixture for adapter in self._adapters.active]
        if len(configs) == 1:
            return configs[0]
        return MixtureConfig(
            sites=[site for config in configs for site in config.sites],
            modules_to_save=[name for config in configs for name in config.modules_to_save],
        )

    @mixture.setter
    def mixture(self, value: MixtureConfig) -> None:
        self._sole().mixture = value

    @property
    def card(self) -> str | None:
        """Text of the README.md where ``save_pretrained`` is given none, such as that of a composition."""
        return self._sole().card

    @card.setter
    def card(self, value: str | None) -> None:
        self._sole().card = value

    def containers(self) -> dict[str, Container]:
        """Every container of the active adapters by the name of its site, in the order of the backbone's modules.

        The name is the site's path in the backbone; where several adapters are active, their names and a colon stand
        before it, ``"math:model.layers.0.mlp"``.
        """
        return {c.site.name: c for adapter in self._adapters.active for c in adapter.containers}

    def innermost_first(self) -> list[Container]:
        """The active containers, each after those of other adapters that are a part of its frozen layer."""
        return self._adapters.innermost_first()

    def saved_modules(self) -> dict[str, SavedModule]:
        """Every module of the active adapters that is trained whole, by its path in the backbone."""
        return {module.name: module for adapter in self._adapters.active for module in adapter.saved_modules}

    # -- changes -------------------------------------------------------------------------------------------------

    def add_adapter(  # type: ignore[override]
        self, adapter_name: str, mixture: MixtureConfig | Mapping[str, Any] | str | Path
    ) -> None:
        """Put a fresh adapter beside those that there are; :meth:`set_adapter` lets it take part.

        Args:
            mixture: as for :func:`moelora.attach`.

        Raises:
            ConfigError: the name is taken, or the mixture does not fit; the model is then as it was.
        """
        from .mixture import mixture_config

        config = mixture_config(mixture)
        with self._changing(adapter_name):
            parts = build_parts(self.backbone, config, self.slot)
            self._adapters.known[adapter_name] = Adapter(adapter_name, config, parts)

    def load_adapter(self, path: str | Path, adapter_name: str, **hub: Any) -> None:  # type: ignore[override]
        """Put an adapter from a checkpoint beside those that there are; :meth:`set_adapter` lets it take part.

        Args:
            path: a folder or a hub id, in any layout that ``moelora.checkpoints`` reads. **hub: as for
                :func:`moelora.from_pretrained`.

        Raises:
            CheckpointError: it is missing, damaged, or does not fit the backbone; the model is then as it was.
            ConfigError: the name is taken.
        """
        from . import checkpoints

        self._adapters.check_new(adapter_name)
        stored = checkpoints.read(path, **hub)
        with self._changing(adapter_name):
            self._adapters.known[adapter_name] = read_adapter(stored, self.backbone, self.slot, adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let exactly these adapters take part.

        What an adapter has of its own stays with it, trained tensors and which of them are trained included. The
        optimizer does not follow: make another one, or another Trainer.

        Args:
            adapter_name: one, or several that add up.

        Raises:
            ConfigError: an unknown name, none at all, or adapters that cannot be active together.
            UserError: a forward is running.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        chosen = [self._adapters.get(name) for name in names]
        if not chosen or len(set(names)) < len(names):
            raise ConfigError(
                f"set_adapter got {names}: give one adapter, or several different ones; to run without any, use `with "
                "model.disable_experts()`"
            )
        self._refuse_unchangeable()
        if chosen == self._adapters.active:
            return
        refuse_conflicts(chosen)
        self._carry(chosen)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Forget adapters; those that stay active are as before.

        Raises:
            ConfigError: an unknown name, or no active adapter would be left.
            UserError: a forward is running.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        gone = [self._adapters.get(name) for name in names]
        self._refuse_unchangeable()
        left = [adapter for adapter in self._adapters.active if adapter not in gone]
        if not left:
            others = [name for name in self.adapters if name not in names]
            raise ConfigError(
                f"deleting {', '.join(map(repr, names))} would leave no active adapter: "
                + (f"call set_adapter with another one first ({', '.join(others)})" if others else "use unload()")
            )
        for name in names:
            self._adapters.known.pop(name, None)
        if left != self._adapters.active:
            self._carry(left)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As of any transformers model; what is new is frozen, as the backbone is.

        Raises:
            ConfigError: an adapter has a part at the embeddings or at the head, which would keep its size.
        """
        for adapter in self._adapters.known.values() if args or kwargs else ():
            for path in adapter.parts:
                inside = list(self.backbone.get_submodule(path).modules())
                if any(module in inside for module in (self.get_input_embeddings(), self.get_output_embeddings())):
                    raise ConfigError(
                        f"adapter {adapter.name!r} has a part at {path!r}, which would keep its size: resize the "
                        "embeddings of the backbone before it gets experts (unload() gives it back)"
                    )
        return super().resize_token_embeddings(*args, **kwargs)

    def disable_adapters(self) -> None:
        """Make the model its backbone until :meth:`enable_adapters`; see also ``disable_experts``, a block."""
        self.slot.enabled = False

    def enable_adapters(self) -> None:
        """Undo :meth:`disable_adapters`."""
        self.slot.enabled = True

    def unload(self) -> PreTrainedModel:
        """Put the frozen layers back in their places and return the backbone; this model is of no use afterwards.

        Raises:
            ConfigError: that was done already.
        """
        self.refuse_unloaded()
        self._unloaded = True
        self._passes.remove()
        ignore_no_more(self.config)
        self._adapters.take_out()
        return self.backbone

    def refuse_unloaded(self) -> None:
        """Raise a ConfigError where the backbone is no longer this mixture's."""
        if self._unloaded:
            raise ConfigError(
                "this mixture was unloaded: its backbone is a model of its own again, or another mixture's"
            )

    # -- how -----------------------------------------------------------------------------------------------------

    def _sole(self) -> Adapter:
        self.refuse_unloaded()
        return self._adapters.sole()

    def _refuse_unchangeable(self) -> None:
        self.refuse_unloaded()
        if self._passes.running:
            raise UserError("a forward or generate() of this model is running: change its adapters when it is done")

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """Within the block the backbone is bare, so that an adapter of that name can be built for it."""
        self._adapters.check_new(name)
        self._refuse_unchangeable()
        active = self._adapters.active
        self._passes.remove()
        self._adapters.take_out()
        try:
            yield
        finally:
            self._carry(active)

    def _carry(self, adapters: Sequence[Adapter]) -> None:
        """Have these adapters in the backbone and no other."""
        self._passes.remove()
        self._adapters.take_out()
        self._adapters.put_in(adapters)
        self._passes = Passes(self.backbone, self.slot, self.containers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of any module; adapters that are not active are moved and cast as well."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse:
            for adapter in self._adapters.idle():
                for part in adapter.parts.values():
                    part._apply(fn)  # type: ignore[no-untyped-call]
        return self
