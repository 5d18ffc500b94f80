"""What ``moelora compose`` does: compose, train or search where that is asked for, and write a folder."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from .. import data as examples
from ..config import Closed, DataConfig
from ..errors import CheckpointError, ConfigError
from ..registry import ROUTERS
from . import card
from .compose import UNTRAINED, Assembled, assemble, name_of, named, read_all, untrained_parameters
from .general import Method, subtract_general
from .plan import Progress
from .training import default_trainer, task_order, train_router
from .weights import SearchConfig, search_weights

logger = logging.getLogger(__name__)


class Settings(Closed):
    """All that the command is told.

    Attributes:
        adapters: folders or hub ids. names: of the adapters; by default those of the folders.
        output: the folder to write. weights: of the adapters, of a merge or of the router ``static``.
        general, subtract, router, experts, backbone, quantization: as in :func:`moelora.compose`.
        data: examples to train or to search on. trainer: ``args`` in place of those of the router's model card.
        max_length: of an example, in tokens. search: options of the search for weights; ``None`` for no search.
        merge: ``method`` and its options, for one LoRA instead of a mixture. command: for the card.
    """

    adapters: list[str]
    output: Path
    names: list[str] | None = None
    weights: list[float] | Literal["uniform", "learned"] | None = None
    general: list[str] = Field(default_factory=list)
    subtract: Method = "exact"
    router: dict[str, Any] | None = None
    experts: dict[str, Any] = Field(default_factory=dict)
    backbone: str | None = None
    quantization: str | None = None
    data: DataConfig | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)
    max_length: Annotated[int, Field(gt=0)] = 512
    search: SearchConfig | None = None
    merge: dict[str, Any] | None = None
    seed: int = 0
    command: str = ""


def run(settings: Settings, progress: Progress | None = None) -> dict[str, Any]:
    """Carry out the command.

    Returns:
        What was done, in plain JSON types; ``text`` says it in words.

    Raises:
        UserError: something that was given has to be mended.
        TrainingError: a loss or a gradient was not finite.
    """
    folder = settings.output.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: expected a new or empty folder, found files in it: choose another")
    return _mix(settings, progress) if settings.merge is None else _merge(settings, settings.merge, progress)


# -- one mixture -------------------------------------------------------------------------------------------------------


def _mix(settings: Settings, progress: Progress | None) -> dict[str, Any]:
    router = _router(settings)
    if settings.trainer and (settings.data is None or settings.search is not None):
        raise ConfigError(
            f"trainer is {settings.trainer}, but nothing is trained: name examples with --data and leave out "
            "--search, or leave out --steps, --learning-rate and other options of the trainer"
        )
    splits = None if settings.data is None else examples.load_examples(settings.data)
    if splits is not None and "num_tasks" in ROUTERS.get(router["kind"]).Config.model_fields:
        names = settings.names or [name_of(adapter) for adapter in settings.adapters]
        router.setdefault("num_tasks", len(task_order(names, splits)))
    torch.manual_seed(settings.seed)
    made = assemble(
        settings.adapters,
        router,
        settings.backbone,
        names=settings.names,
        general=settings.general,
        subtract=settings.subtract,
        experts=settings.experts,
        loading={"quantization": settings.quantization},
        progress=progress,
    )
    result = _described(made, settings)
    if splits is None:
        if untrained := untrained_parameters(made.model):
            logger.warning(UNTRAINED, untrained)
    elif settings.search is not None:
        result |= _search(made, splits.train, settings, progress)
    else:
        result |= _train(made, splits, settings)
    if settings.command and made.model.card is not None:
        made.model.card = f"{made.model.card}\n## Command\n\n```sh\n{settings.command}\n```\n"
    made.model.save_pretrained(settings.output)
    return result


def _router(settings: Settings) -> dict[str, Any]:
    """The options of the router: what was given, and what follows from the weights and the search.

    Raises:
        ConfigError: they contradict each other.
    """
    weighed = settings.weights is not None or settings.search is not None
    router = {"kind": "static" if weighed else "arrow", **(settings.router or {})}
    if weighed and ROUTERS.get(router["kind"]).kind != "static":
        raise ConfigError(f"weights that hold for every token are those of router 'static', not {router['kind']!r}")
    if settings.search is not None:
        if settings.data is None:
            raise ConfigError("a search for weights needs a few examples: name them with --data")
        if settings.weights is not None:
            raise ConfigError("weights are either given or searched for: leave out --weights or --search")
        router = {"weights": "uniform", "mix": "factors", **router}
    if settings.weights is not None:
        router["weights"] = settings.weights
    return router


def _train(made: Assembled, splits: examples.Splits, settings: Settings) -> dict[str, Any]:
    [site] = made.model.mixture.sites
    assert site.router is not None
    trainer = default_trainer(site.router.kind, **settings.trainer.get("args", {}))
    trainer = type(trainer).parse({**trainer.to_dict(), **settings.trainer, "args": trainer.args})
    # Without checkpoints there is nothing to keep, and the folder stays empty until the end.
    keeps = trainer.args.get("save_strategy") != "no"
    trained = train_router(
        made.model,
        splits,
        trainer,
        max_length=settings.max_length,
        seed=settings.seed,
        output_dir=settings.output if keeps else None,
    )
    return {"training": asdict(trained), "text": f"{_text(made, settings)}\n{trained}"}


def _search(
    made: Assembled, rows: list[examples.Example], settings: Settings, progress: Progress | None
) -> dict[str, Any]:
    found = search_weights(
        made.model, rows, settings.search, max_length=settings.max_length, seed=settings.seed, progress=progress
    )
    listed = ", ".join(f"{name} {weight:.3f}" for name, weight in found.weights.items())
    said = f"weights: {listed}; loss with penalty {found.value:.4f}, of the backbone {found.before:.4f}"
    return {"search": asdict(found), "text": f"{_text(made, settings)}\n{said}"}


def _described(made: Assembled, settings: Settings) -> dict[str, Any]:
    [site] = made.model.mixture.sites
    assert site.router is not None
    return {
        "path": str(settings.output),
        "backbone": made.model.backbone_config.name,
        "adapters": [card.facts(member) for member in made.members],
        "general": [card.facts(member) for member in made.general],
        "router": site.router.to_dict(),
        "sites": len(made.model.containers()),
        "trainable_parameters": untrained_parameters(made.model),
        "text": _text(made, settings),
    }


def _text(made: Assembled, settings: Settings) -> str:
    [site] = made.model.mixture.sites
    assert site.router is not None
    names = ", ".join(member.adapter.name for member in made.members)
    return (
        f"wrote {settings.output}: {len(made.members)} adapters ({names}), router {site.router.kind} at "
        f"{len(made.model.containers())} linears"
    )


# -- one LoRA ----------------------------------------------------------------------------------------------------------


def _merge(settings: Settings, merge: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    from .merging import distance, merge_adapters
    from .writing import write_peft

    for name in ("router", "data", "search", "experts", "trainer", "backbone", "quantization"):
        if getattr(settings, name):
            raise ConfigError(f"{name} belongs to a mixture, and merging makes one LoRA: leave out {name} or --merge")
    options = dict(merge)
    method = options.pop("method", None)
    if method is None:
        raise ConfigError("merge has options but no method: name one with --merge")
    read = read_all([*settings.adapters, *settings.general], tell=progress)
    adapters = named(read[: len(settings.adapters)], settings.names)
    if settings.general:
        adapters = subtract_general(adapters, read[len(adapters) :], settings.subtract)
    weights = settings.weights
    if weights == "learned":
        raise ConfigError("weights that are learned belong to a mixture: give numbers, or 'uniform'")
    numbers = [1 / len(adapters)] * len(adapters) if weights == "uniform" else weights
    assert numbers is None or not isinstance(numbers, str)
    merged = merge_adapters(adapters, method, numbers, **options)
    write_peft(merged, settings.output)
    off = distance(merged, adapters, numbers).relative
    ranks = sorted({factors.rank for factors in merged.factors.values()})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    text = (
        f"wrote {settings.output}: one LoRA of rank {shown} for {len(merged.factors)} linears, by {method}; it is "
        f"{off:.2%} off the weighted sum of the updates"
    )
    return {
        "path": str(settings.output),
        "method": method,
        "adapters": [card.facts(card.Member(a, source)) for a, source in zip(adapters, settings.adapters, strict=True)],
        "weights": numbers,
        "ranks": ranks,
        "distance": off,
        "text": text,
    }
