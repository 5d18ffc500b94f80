"""One mixture out of finished LoRA adapters: their factors in frozen experts, a router over them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..backbone import DEFAULT_BACKBONE, load_backbone
from ..checkpoints import Architecture
from ..config import BackboneConfig, MixtureConfig
from ..errors import ConfigError
from ..experts.frozen import FrozenExperts
from ..mixture import attach
from ..model import MoELoRAModel
from ..registry import ROUTERS
from . import card
from .adapter import Adapter, read_adapter
from .general import Method, subtract_general
from .plan import Progress, modules_of, refuse_unfit, report_gaps, site_config

logger = logging.getLogger(__name__)

Source = str | Path | Adapter
NOWHERE = "unknown"
UNTRAINED = (
    "the router has %d parameters that nothing has trained yet: train them (moelora.composition.training.train_router, "
    "or `moelora compose --data`) before you judge this mixture"
)


def compose(
    adapters: Sequence[Source],
    router: str | Mapping[str, Any] = "arrow",
    backbone: PreTrainedModel | str | None = None,
    *,
    names: Sequence[str] | None = None,
    general: Sequence[Source] = (),
    subtract: Method = "exact",
    experts: Mapping[str, Any] | None = None,
    quantization: str | None = None,
    dtype: str | None = None,
    device_map: Any = None,
    progress: Progress | None = None,
    hub: Mapping[str, Any] | None = None,
    **options: Any,
) -> MoELoRAModel:
    """Make one mixture of finished LoRA adapters, which stay as they are.

    Ranks, scales and modules may differ. Where an adapter has nothing, its expert is the frozen layer, which a router
    may choose as any other, and a warning says so. A router that follows from the adapters (``arrow``) is ready at
    once, and so is one with given weights; any other has parameters to train, see
    :func:`moelora.composition.training.train_router`. The model is in evaluation mode; saving it writes a card that
    names the adapters.

    Args:
        adapters: folders or hub ids in any layout that moelora reads, such as PEFT's, or adapters in memory. Their
            order is that of the experts.
        router: a router that weighs experts, by name or with its options. ``top_k`` is by default its own or the number
            of adapters, whichever is less, and so is the number of tasks.
        backbone: a loaded model, a name for :func:`~moelora.load_backbone`, or ``"auto"`` for the one that the adapters
            name. ``None`` does so only for the backbone that ships with moelora: a file does not get to choose what is
            downloaded.
        names: of the experts; by default those of the folders.
        general: adapters whose common part is taken off the others (GenKnowSub). subtract: how; see
            :func:`~moelora.composition.general.subtract_general`.
        experts: ``dropout`` and ``expert_dropout``, for training a router over the adapters.
        quantization, dtype, device_map: for loading the backbone; by default as the adapters say.
        progress: told of what takes long. hub: ``token``, ``cache_dir``, ``local_files_only``, as in transformers.
        **options: options of the router, such as ``top_k=2``.

    Raises:
        ConfigError: fewer than two adapters, the same one twice, a router that does not fit, or adapters that do not
            fit the backbone, which is then as it was.
        CheckpointError: an adapter cannot be read, or is more than plain LoRA.
    """
    model = assemble(
        adapters,
        {**({"kind": router} if isinstance(router, str) else router), **options},
        backbone,
        names=names,
        general=general,
        subtract=subtract,
        experts=experts,
        loading={"quantization": quantization, "dtype": dtype, "device_map": device_map},
        progress=progress,
        hub=hub,
    ).model
    if untrained := untrained_parameters(model):
        logger.warning(UNTRAINED, untrained)
    return model


@dataclass(frozen=True)
class Assembled:
    """A mixture, the adapters that it was made of, and the general ones whose common part was taken off."""

    model: MoELoRAModel
    members: list[card.Member]
    general: list[card.Member]


def assemble(
    adapters: Sequence[Source],
    router: Mapping[str, Any],
    backbone: PreTrainedModel | str | None,
    *,
    names: Sequence[str] | None = None,
    general: Sequence[Source] = (),
    subtract: Method = "exact",
    experts: Mapping[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    hub: Mapping[str, Any] | None = None,
) -> Assembled:
    """As :func:`compose`, without a word about a router that has to be trained."""
    tell = progress or _silent
    options = fitted_options(router, len(adapters))
    read = read_all([*adapters, *general], hub, tell)
    chosen, common = named(read[: len(adapters)], names), read[len(adapters) :]
    refuse_unfit(chosen)
    _compare_backbones([*chosen, *common])
    tokenizer = None
    if not isinstance(backbone, PreTrainedModel):
        backbone, tokenizer = _load([*chosen, *common], backbone, loading or {}, hub or {}, tell)
    model = _put_on(backbone, chosen, common, subtract, options, experts, tell)
    model.tokenizer = tokenizer
    sources = [None if isinstance(source, Adapter) else str(source) for source in (*adapters, *general)]
    members = [card.Member(adapter, source) for adapter, source in zip([*chosen, *common], sources, strict=True)]
    assembled = Assembled(model, members[: len(chosen)], members[len(chosen) :])
    model.card = card.page(model, assembled.members, assembled.general, subtract)
    return assembled


def _put_on(
    backbone: PreTrainedModel,
    chosen: Sequence[Adapter],
    common: Sequence[Adapter],
    subtract: Method,
    router: Mapping[str, Any],
    experts: Mapping[str, Any] | None,
    tell: Progress,
) -> MoELoRAModel:
    """The mixture on its backbone, which is as it was if anything does not fit."""
    for adapter in (*chosen, *common):
        if differences := adapter.architecture.differences(Architecture.of(backbone.config)):
            raise ConfigError(f"adapter {adapter.name!r} does not fit this backbone: {'; '.join(differences)}")
    modules = modules_of(chosen, backbone)
    parts = subtract_general(chosen, common, subtract) if common else chosen
    report_gaps(parts, modules)
    model = attach(backbone, MixtureConfig(sites=[site_config(parts, modules, backbone, router, experts)]))
    try:
        _fill(model, parts, tell)
        tell("Fitting the router", 0, 1)
        model.fit_routers()
        tell("Fitting the router", 1, 1)
    except Exception:
        model.unload()
        raise
    model.train(False)
    return model


def untrained_parameters(model: MoELoRAModel) -> int:
    """How many parameters of the routers are there to be trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def fitted_options(router: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The options of a router over so many adapters, where its defaults are for another number of them.

    Raises:
        ConfigError: no such router, or one that weighs single ranks.
    """
    cls = ROUTERS.get(router.get("kind", ""))
    if cls.level != "expert":
        known = ", ".join(name for name in ROUTERS if ROUTERS.get(name).level == "expert")
        raise ConfigError(
            f"router {cls.kind!r} weighs single ranks, which it is trained together with: choose one of {known}"
        )
    fields = cls.Config.model_fields
    options = dict(router)
    if "num_tasks" in fields:
        options.setdefault("num_tasks", count)
    default = fields["top_k"].default if "top_k" in fields else None
    if isinstance(default, int) and default > count:
        options.setdefault("top_k", count)
    return options


def read_all(
    sources: Sequence[Source], hub: Mapping[str, Any] | None = None, tell: Progress | None = None
) -> list[Adapter]:
    """Read adapters, or take those that are in memory; names are those of folders and repositories.

    Raises:
        CheckpointError: one cannot be read or is more than plain LoRA.
    """
    tell = tell or _silent
    found = []
    for index, source in enumerate(sources):
        tell("Reading adapters", index, len(sources))
        adapter = source if isinstance(source, Adapter) else read_adapter(source, name_of(source), **(hub or {}))
        found.append(replace(adapter, factors={m: f for m, f in adapter.factors.items() if f.rank}))
    tell("Reading adapters", len(sources), len(sources))
    return found


def named(adapters: Sequence[Adapter], names: Sequence[str] | None) -> list[Adapter]:
    """The adapters under the names that were given, or else their own, each of which has to be there once.

    Raises:
        ConfigError: not one name for each, or a name twice.
    """
    if names is not None and len(names) != len(adapters):
        raise ConfigError(f"names lists {len(names)} for {len(adapters)} adapters: give one for each")
    wanted = [adapter.name for adapter in adapters] if names is None else list(names)
    twice = next((name for name in wanted if wanted.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{wanted.count(twice)} adapters are named {twice!r}: give each a name of its own with names")
    return [replace(adapter, name=name) for adapter, name in zip(adapters, wanted, strict=True)]


def name_of(source: str | Path) -> str:
    """The last part of a path or a hub id, fit to be a name."""
    path = Path(source).expanduser()
    last = path.resolve().name if path.exists() else path.name
    return re.sub(r"[^\w .+-]", "_", last).lstrip(" .+-")[:100] or "adapter"


def _said(backbone: BackboneConfig) -> str:
    return backbone.name if backbone.revision is None else f"{backbone.name} at {backbone.revision}"


def _compare_backbones(adapters: Sequence[Adapter]) -> None:
    """Warn where adapters name different backbones: paths and hub ids may have the same weights behind them."""
    first: dict[str, str] = {}
    for adapter in adapters:
        if adapter.backbone.name != NOWHERE:
            first.setdefault(_said(adapter.backbone), adapter.name)
    if len(first) > 1:
        logger.warning(
            "the adapters name different backbones (%s): they only go together if these have the same weights",
            ", ".join(f"{name!r} {backbone}" for backbone, name in first.items()),
        )


def _load(
    adapters: Sequence[Adapter],
    backbone: str | None,
    loading: Mapping[str, Any],
    hub: Mapping[str, Any],
    tell: Progress,
) -> tuple[PreTrainedModel, Any]:
    """The backbone that the caller named, or allowed the adapters to name, and its tokenizer."""
    known: dict[str, BackboneConfig] = {}
    for adapter in adapters:
        if adapter.backbone.name != NOWHERE:
            known.setdefault(adapter.backbone.name, adapter.backbone)
    listed = " and ".join(repr(name) for name in known) or "no backbone"
    if backbone is None and set(known) != {DEFAULT_BACKBONE}:
        raise ConfigError(
            f"the adapters name {listed}: pass backbone='auto' to load that, or another folder or hub id with the same "
            "weights"
        )
    if backbone in (None, "auto"):
        if len(known) != 1:
            raise ConfigError(f"the adapters name {listed}, so 'auto' cannot tell which to load: pass its name")
        backbone = next(iter(known))
    base = known.get(backbone)
    if base is None:  # other weights, or another place of the same: loaded as the adapters' own would be
        base = next(iter(known.values()), BackboneConfig(quantization=None))
        base = base.model_copy(update={"name": backbone, "revision": None, "subfolder": None})
    changes = {key: value for key, value in loading.items() if key != "device_map" and value is not None}
    tell("Loading the backbone", 0, 1)
    loaded = load_backbone(
        BackboneConfig.parse({**base.to_dict(), **changes}), device_map=loading.get("device_map"), **hub
    )
    tell("Loading the backbone", 1, 1)
    return loaded


def _fill(model: MoELoRAModel, adapters: Sequence[Adapter], tell: Progress) -> None:
    """Copy the factors of every adapter into its expert; what it lacks is an expert of rank 0."""
    containers = model.containers()
    for done, (module, container) in enumerate(containers.items()):
        tell("Filling experts", done, len(containers))
        assert isinstance(container.experts, FrozenExperts)
        for index, adapter in enumerate(adapters):
            if module in adapter.factors:
                container.experts.load_expert(index, adapter.factors[module].A, adapter.factors[module].B)
    tell("Filling experts", len(containers), len(containers))


def _silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""
