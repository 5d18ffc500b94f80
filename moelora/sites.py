"""Which modules of a backbone a site configuration names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .config import SiteConfig, fits, parse_slice
from .errors import ConfigError


def match_saved(backbone: nn.Module, names: Iterable[str]) -> list[str]:
    """Paths of the modules that ``modules_to_save`` names, in the order of the backbone; of nested ones the outermost.

    Raises:
        ConfigError: a name matches nothing.
    """
    paths = [path for path, _ in backbone.named_modules() if path]
    found: dict[str, None] = {}
    for name in names:
        hits = [path for path in paths if fits(path, name)]
        if not hits:
            raise ConfigError(
                f"modules_to_save names {name!r}, which matches no module of {type(backbone).__name__}; it has: "
                f"{_endings(paths)}. The head of a classifier needs a backbone that has it, such as one of "
                "AutoModelForSequenceClassification"
            )
        found |= dict.fromkeys(path for path in hits if not path.startswith(tuple(f"{hit}." for hit in hits)))
    return sorted(found, key=paths.index)


def match_sites(backbone: nn.Module, site: SiteConfig) -> list[str]:
    """Paths of the modules that a site configuration names, in the order of the backbone.

    Raises:
        ConfigError: a target, or the layer filter, leaves nothing; the message lists names that exist.
    """
    paths = [path for path, _ in backbone.named_modules() if path]
    layers = sorted({layer for path in paths if (layer := layer_of(path)) is not None})
    if isinstance(site.layers, str):
        wanted = set(layers[parse_slice(site.layers)])
    else:
        wanted = {layer + len(layers) if layer < 0 else layer for layer in site.layers or layers}
        if missing := sorted(wanted.difference(layers)):
            raise ConfigError(f"layers {site.layers!r} names {missing}, which are not among the layers {layers}")
    result: list[str] = []
    for target in site.target:
        hits = [path for path in paths if _matches(path, target)]
        if not hits:
            _refuse_parameter(backbone, target)
            raise ConfigError(
                f"target {target!r} matches no module of {type(backbone).__name__}; it has: {_endings(paths)}"
            )
        kept = hits if site.layers is None else [path for path in hits if layer_of(path) in wanted]
        if not kept:
            raise ConfigError(f"layers {site.layers!r} leave no match for target {target!r}: layers are {layers}")
        result += kept
    return sorted(dict.fromkeys(result), key=paths.index)


def _endings(paths: Iterable[str]) -> str:
    """The last names of module paths, each once, without numbers."""
    endings = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    return ", ".join(ending for ending in endings if not ending.isdigit())


def _refuse_parameter(backbone: nn.Module, target: str) -> None:
    for path, parameter in backbone.named_parameters():
        if _matches(path, target):
            owner = backbone.get_submodule(path.rpartition(".")[0])
            raise ConfigError(
                f"target {target!r} names {path}, a tensor of the shape {tuple(parameter.shape)} that "
                f"{type(owner).__name__} computes with itself: experts can only be put beside a linear that is called. "
                "Where a backbone keeps its own experts in one tensor, target the linears of its attention, such as "
                "q_proj, or of a shared expert"
            )


def _matches(path: str, target: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.fullmatch(target[3:], path) is not None
        except re.error as error:
            raise ConfigError(f"target {target!r} is not a regular expression: {error}") from None
    return fits(path, target)


def layer_of(path: str) -> int | None:
    """The first number in a module path: the index of its layer."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def sharing_key(path: str, share: str) -> str:
    """Sites of one configuration with the same key have one router; ``share`` as in ``RouterConfig``.

    A layer is known by its path, since encoders, decoders and towers have layers of the same index.
    """
    names = path.split(".")
    layer = next((names[: depth + 1] for depth, name in enumerate(names) if name.isdigit()), [])
    keys = {"module": names, "parent": names[:-1], "layer": layer, "all": []}
    return ".".join(keys[share])


def refuse_idle_patterns(site: SiteConfig, paths: Iterable[str]) -> None:
    """Check that every pattern of ranks and the like fits a site.

    Raises:
        ConfigError: names one that fits none.
    """
    known = list(paths)
    for option in (name for name in type(site.experts).model_fields if name.endswith("_pattern")):
        for name in getattr(site.experts, option):
            if not any(fits(path, name) for path in known):
                raise ConfigError(
                    f"experts.{option} has {name!r}, which fits none of the {len(known)} sites, such as {known[0]!r}"
                )


def refuse_twins(backbone: nn.Module, paths: Iterable[str]) -> None:
    """Check that no site is also a part of another module, which would go on without its experts.

    Raises:
        ConfigError: names both places.
    """
    places: dict[int, list[str]] = {}
    for path, module in backbone.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)

    def place(path: str) -> tuple[int, str]:
        parent, _, child = path.rpartition(".")
        return id(backbone.get_submodule(parent)), child

    for path in paths:
        for other in places[id(backbone.get_submodule(path))]:
            if place(other) != place(path):
                raise ConfigError(
                    f"{path!r} and {other!r} are one module, of which only the first would get experts: give the "
                    "backbone a copy in one of the two places, or target a module around them that is shared as a whole"
                )


def refuse_overlaps(matched: Mapping[str, Sequence[str]]) -> None:
    """Check that no module is claimed twice, or lies inside a module that is claimed.

    Args:
        matched: the paths by the key that names them, such as ``sites.0``.

    Raises:
        ConfigError: names both.
    """
    claimed: dict[str, str] = {}
    for key, paths in matched.items():
        for path in paths:
            if path in claimed:
                raise ConfigError(f"{path!r} is claimed by {claimed[path]} and {key}: name it in one")
            claimed[path] = key
    for path in claimed:
        parent = path.rpartition(".")[0]
        while parent:
            if parent in claimed:
                raise ConfigError(
                    f"{path!r} ({claimed[path]}) lies inside {parent!r} ({claimed[parent]}), which adapts all of it "
                    "already; drop one of the two"
                )
            parent = parent.rpartition(".")[0]
