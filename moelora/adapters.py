"""Several mixtures, the adapters, on one backbone: each keeps its own parts, and the active ones are in their places.

An adapter that is not active is outside the backbone's tree of modules, so that ``parameters``, ``state_dict``,
optimizers and sharding know of the active ones alone, and with one active adapter nothing differs from a model that
has no other. Of several, a container has that of another as its frozen layer: linear sites add up,
``W0 x + d1(x) + d2(x)``, each with its own router. An always-on adapter without a router may lie at linears inside
another's FFN block, where it is as good as a part of the frozen weights. What has no such meaning is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import MixtureConfig
from .errors import ConfigError
from .experts import BlockContainer, Container, LinearContainer, SavedModule
from .parts import Part, build_parts
from .slot import RoutingSlot

if TYPE_CHECKING:
    from .checkpoints import Stored

logger = logging.getLogger(__name__)


class Adapter:
    """One mixture that can be put into a backbone and taken out again.

    Attributes:
        name: what the model calls it. mixture: its configuration. parts: by their paths in the backbone.
        prefix: what stands before the paths in the names of its sites. card: text of the README.md to save with it.

    Raises:
        ConfigError: the name is none for a folder.
    """

    def __init__(self, name: str, mixture: MixtureConfig, parts: Mapping[str, Part]) -> None:
        if re.fullmatch(r"\w[\w-]*", name) is None:
            raise ConfigError(f"adapter name {name!r}: expected letters, digits, '_' and '-', as for a folder")
        self.name = name
        self.mixture = mixture
        self.parts = dict(parts)
        self.prefix = ""
        self.card: str | None = None
        self._first = 0
        for part in self.parts.values():
            _take_off(part)

    @property
    def containers(self) -> list[Container]:
        """In the order of the backbone's modules."""
        return [part for part in self.parts.values() if isinstance(part, Container)]

    @property
    def saved_modules(self) -> list[SavedModule]:
        """In the order of the backbone's modules."""
        return [part for part in self.parts.values() if isinstance(part, SavedModule)]

    def sites(self) -> list[list[str]]:
        """Paths of the sites of each entry of ``mixture.sites``."""
        groups = range(self._first, self._first + len(self.mixture.sites))
        return [[c.site.path for c in self.containers if c.group == group] for group in groups]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in a checkpoint, ``<path>.lora_A`` and so on; see ``Saving.adapter_tensors``."""
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for path, part in self.parts.items():
            for key, value in part.adapter_tensors().items():
                if id(value) not in seen:
                    seen.add(id(value))
                    tensors[f"{path}.{key}"] = value
        return tensors

    @torch.no_grad()
    def fill(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Copy checked tensors into the parts; names and shapes are those of :meth:`tensors`.

        Raises:
            KeyError: a tensor is missing or unknown.
        """
        missing = self.tensors()
        for name, value in values:
            missing.pop(name).copy_(value)
        if missing:
            raise KeyError(", ".join(missing))

    def rename(self, prefix: str, first: int) -> None:
        """Set what stands before the names of sites, and the number of the first site configuration."""
        if (prefix, first) == (self.prefix, self._first):
            return
        for container in self.containers:
            container.site = container.site.under(prefix)
            container.group += first - self._first
            if container.router is not None:
                container.router.site = container.router.site.under(prefix)
        self.prefix, self._first = prefix, first


def read_adapter(stored: Stored, backbone: PreTrainedModel, slot: RoutingSlot, name: str) -> Adapter:
    """Build what a checkpoint describes for a backbone without experts, which stays as it is, and fill it.

    Raises:
        CheckpointError, ConfigError: it does not fit or is damaged.
    """
    stored.check_backbone(backbone.config)
    stored.check_weights(backbone)
    mixture = stored.to_attach()
    adapter = Adapter(name, mixture, build_parts(backbone, mixture, slot))
    adapter.fill(stored.stream({key: tuple(value.shape) for key, value in adapter.tensors().items()}))
    if adapter.saved_modules and stored.reward is None:  # a reward model's were made for it
        whole = ", ".join(module.name for module in adapter.saved_modules)
        logger.warning("%s replaces whole modules of the backbone: %s", stored.folder, whole)
    return adapter


class Adapters:
    """The adapters of one model, and the places of those that are active.

    Attributes:
        known: all of them, by name. active: those in the backbone. slot: all parts share it.
    """

    def __init__(self, backbone: PreTrainedModel, slot: RoutingSlot) -> None:
        self.backbone = backbone
        self.slot = slot
        self.known: dict[str, Adapter] = {}
        self.active: list[Adapter] = []
        self._placed: list[tuple[str, Part]] = []

    def get(self, name: str) -> Adapter:
        """The adapter of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.known:
            raise ConfigError(f"adapter {name!r} is not known: there are {', '.join(map(repr, self.known))}")
        return self.known[name]

    def check_new(self, name: str) -> None:
        """Check that no adapter is called so.

        Raises:
            ConfigError: one is.
        """
        if name in self.known:
            raise ConfigError(f"there is an adapter {name!r} already: choose another name, or delete_adapter({name!r})")

    def sole(self) -> Adapter:
        """The active adapter, where it is one.

        Raises:
            ConfigError: several are active.
        """
        if len(self.active) > 1:
            names = ", ".join(repr(adapter.name) for adapter in self.active)
            raise ConfigError(f"this takes one active adapter, but {names} are: call set_adapter with one of them")
        return self.active[0]

    def idle(self) -> Iterator[Adapter]:
        """Those outside the backbone."""
        return (adapter for adapter in self.known.values() if adapter not in self.active)

    def innermost_first(self) -> list[Container]:
        """The active containers, each after those that are a part of its frozen layer."""
        return [part for _, part in self._placed if isinstance(part, Container)]

    def put_in(self, adapters: Sequence[Adapter]) -> None:
        """Put these into the backbone, in which there are none."""
        first = 0
        for adapter in adapters:
            adapter.rename(f"{adapter.name}:" if len(adapters) > 1 else "", first)
            first += len(adapter.mixture.sites)
        for path, part in _in_order(adapters):
            owner, child = self._place(path)
            _put_on(part, owner.get_submodule(child))
            setattr(owner, child, part)
            self._placed.append((path, part))
        self.active = list(adapters)
        self.slot.adapters = tuple(adapters)

    def take_out(self) -> None:
        """Put the frozen layers back in their places."""
        while self._placed:
            path, part = self._placed.pop()
            owner, child = self._place(path)
            setattr(owner, child, part.base)
            _take_off(part)
        self.active = []
        self.slot.adapters = ()

    def _place(self, path: str) -> tuple[nn.Module, str]:
        parent, _, child = path.rpartition(".")
        return self.backbone.get_submodule(parent), child


def _put_on(part: Part, base: nn.Module) -> None:
    part.train(base.training)  # before it has the base, whose own parts keep their modes
    part.base = base


def _take_off(part: Part) -> None:
    part.base = None  # type: ignore[assignment]


def _in_order(adapters: Sequence[Adapter]) -> list[tuple[str, Part]]:
    """The parts, from the inside out: linears before blocks around them, and at one linear as in ``adapters``.

    Experts that rescale what the frozen linear gives come first there, so that they see that and no other's update.
    """
    parts = [(path, part) for adapter in adapters for path, part in adapter.parts.items()]
    return sorted(parts, key=lambda each: (-each[0].count("."), not _rescales(each[1])))


def _rescales(part: Part) -> bool:
    return isinstance(part, LinearContainer) and part.experts.rescales


def refuse_conflicts(adapters: Sequence[Adapter]) -> None:
    """Check that these adapters may be active together.

    Raises:
        ConfigError: names two that may not, where, why, and what to do.
    """
    claims: dict[str, list[tuple[Adapter, Part]]] = {}
    for adapter in adapters:
        for path, part in adapter.parts.items():
            claims.setdefault(path, []).append((adapter, part))
    for path, here in claims.items():
        for (one, first), (other, second) in combinations(here, 2):
            if reason := _against_one_place(first, second):
                _refuse(one, other, f"both have a part at {path!r}, and {reason}")
        around = path.rpartition(".")[0]
        while around:
            for (outer, whole), (inner, part) in product(claims.get(around, ()), here):
                if reason := _against_inside(whole, part):
                    _refuse(outer, inner, f"{path!r} of the latter lies in {around!r} of the former, and {reason}")
            around = around.rpartition(".")[0]
    _refuse_two_passes(adapters)


def _against_one_place(first: Part, second: Part) -> str:
    """Why two parts at one place do not add up; empty where they do."""
    parts = (first, second)
    if any(isinstance(part, SavedModule) for part in parts):
        return "a module that is trained whole is in the place of the frozen one, which leaves nothing to add to"
    if any(isinstance(part, BlockContainer) for part in parts):
        return "experts of a block are on both sides of its nonlinearity, so that those of two mixtures do not add up"
    if all(_rescales(part) for part in parts):
        return "both rescale the output of the frozen linear, which only the innermost of them sees"
    return ""


def _against_inside(whole: Part, part: Part) -> str:
    """Why a part may not lie in another; empty where it may."""
    if isinstance(whole, SavedModule):
        return "a module that is trained whole is in the place of all of it"
    plain = isinstance(part, LinearContainer) and part.router is None
    if not plain or not all(bank.mergeable for bank in part.banks()):
        return (
            "inside a block of experts a linear may carry no more than one expert without a router, which is as good "
            "as a part of its weight"
        )
    return ""


def _refuse_two_passes(adapters: Sequence[Adapter]) -> None:
    """A scoring pass is one forward; with experts of its own in it, it is no other adapter's."""
    scoring: dict[str, Adapter] = {}
    own = False
    for adapter in adapters:
        for container in adapter.containers:
            if container.router is not None and container.router.needs_scoring:
                scoring[adapter.name] = adapter
                own = own or container.router.scoring_pass_value != 0
    if len(scoring) > 1 and own:
        one, other, *_ = scoring.values()
        _refuse(
            one,
            other,
            "the routers of both look at a forward that comes first, in which the experts of one take part "
            "(scaling_pass_value is not 0), so that it is not the other's",
        )


def _refuse(one: Adapter, other: Adapter, reason: str) -> None:
    raise ConfigError(
        f"adapters {one.name!r} and {other.name!r} cannot be active together: {reason}: activate one of the two, or "
        "make one of them without that"
    )
