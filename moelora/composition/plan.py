"""From finished adapters to the site configuration that holds them: which sites, which ranks, which scales.

Adapters from different places differ in rank, scale and in the modules that they have something for. All of it is said
in one site configuration, so that sites can share a router and losses are pooled over all of them.

Shapes: D in, O out, r rank of one adapter at one module.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoints.peft_patterns import most_common, site_patterns
from ..config import SiteConfig
from ..errors import ConfigError
from ..experts import is_linear
from ..experts.ffn import linear_shape
from .adapter import Adapter

logger = logging.getLogger(__name__)

# What is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
LISTED = 10
OWN_OPTIONS = ("dropout", "expert_dropout")


def refuse_unfit(adapters: Sequence[Adapter]) -> None:
    """Check that there is something to compose.

    Raises:
        ConfigError: fewer than two adapters, two of one name, two that are the same, one without anything, or a scale
            that is not above 0.
    """
    if len(adapters) < 2:
        found = repr(adapters[0].name) if adapters else "none"
        raise ConfigError(
            f"expected two adapters or more, found {found}: a single one needs no router: load it with "
            "moelora.from_pretrained"
        )
    for index, adapter in enumerate(adapters):
        if not adapter.factors:
            raise ConfigError(f"adapter {adapter.name!r} has no factors for any module: leave it out")
        for module, factors in adapter.factors.items():
            if factors.scale <= 0:
                raise ConfigError(
                    f"adapter {adapter.name!r}: the scale of {module} is {factors.scale}, expected a number above 0: "
                    "change the signs of B instead"
                )
        for other in adapters[:index]:
            if same(adapter, other):
                raise ConfigError(
                    f"adapters {other.name!r} and {adapter.name!r} are the same, number for number: give it once, with "
                    "a larger weight if it is to count more"
                )


def same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters have the same factors and scales at the same modules."""
    return one.factors.keys() == other.factors.keys() and all(
        factors.scale == other.factors[module].scale
        and torch.equal(factors.A, other.factors[module].A)
        and torch.equal(factors.B, other.factors[module].B)
        for module, factors in one.factors.items()
    )


def modules_of(adapters: Sequence[Adapter], backbone: nn.Module) -> list[str]:
    """The modules that any of the adapters has factors for, in the order of the backbone.

    Raises:
        ConfigError: the backbone lacks one, it is no linear there, or its shape is another; all of it is named.
    """
    linears = {path: linear_shape(m) if is_linear(m) else None for path, m in backbone.named_modules() if path}
    problems = []
    for adapter in adapters:
        for module, factors in adapter.factors.items():
            if problem := _misfit(module, (factors.A.shape[1], factors.B.shape[0]), linears):
                problems.append(f"adapter {adapter.name!r}: {problem}")
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:LISTED])
        raise ConfigError(
            f"{len(problems)} updates do not fit {type(backbone).__name__}:{lines}{more}\n"
            "What to do: leave out the adapters of other backbones, or name the backbone that all were trained on."
        )
    wanted = {module for adapter in adapters for module in adapter.factors}
    return [path for path in linears if path in wanted]


def _misfit(module: str, shape: tuple[int, int], linears: Mapping[str, tuple[int, int] | None]) -> str:
    """What is wrong with an update of the shape (D, O) at a module; empty where nothing is."""
    if module not in linears:
        return f"{module}: there is no such module"
    there = linears[module]
    if there is None:
        return f"{module}: expected a linear, found a module of another kind"
    if there == shape:
        return ""
    return f"{module}: expected {there[0]} features in and {there[1]} out, found A and B for {shape[0]} and {shape[1]}"


def report_gaps(adapters: Sequence[Adapter], modules: Sequence[str]) -> None:
    """Warn, once for each adapter, of the modules that others have and it has not."""
    for adapter in adapters:
        absent = [module for module in modules if module not in adapter.factors]
        if absent:
            kinds = Counter(module.rpartition(".")[2] for module in absent)
            named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
            logger.warning(
                "adapter %r has nothing at %d of %d sites (%s): there it is the frozen layer",
                adapter.name,
                len(absent),
                len(modules),
                named,
            )


def site_config(
    adapters: Sequence[Adapter],
    modules: Sequence[str],
    backbone: nn.Module,
    router: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> SiteConfig:
    """The site configuration of kind ``frozen`` whose experts are the adapters, in their order.

    Args:
        modules: see :func:`modules_of`. router: its configuration.
        options: ``dropout`` and ``expert_dropout`` of the experts, for the training of a router over them.

    Raises:
        ConfigError: an option that follows from the adapters or does not exist, or one of the router that does not fit.
    """
    if others := sorted(set(options or {}) - set(OWN_OPTIONS)):
        raise ConfigError(
            f"experts.{others[0]} cannot be set here: the adapters say what they are; {' and '.join(OWN_OPTIONS)} can"
        )
    ranks = {m: tuple(a.factors[m].rank if m in a.factors else 0 for a in adapters) for m in modules}
    alphas = _alphas(adapters, modules)
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    experts = {
        "kind": "frozen",
        "num_experts": len(adapters),
        "r": _short(rank),
        "alpha": _short(alpha),
        "rank_pattern": {name: _short(value) for name, value in _pattern(ranks, rank).items()},
        "alpha_pattern": {name: _short(value) for name, value in _pattern(alphas, alpha).items()},
        "names": [adapter.name for adapter in adapters],
        **(options or {}),
    }
    return SiteConfig.parse({"target": _targets(modules, backbone), "experts": experts, "router": dict(router)})


def expert_names(site: SiteConfig) -> list[str]:
    """The names of the adapters behind the experts of a site, or else their indices."""
    names: list[str] | None = getattr(site.experts, "names", None)
    return names or [str(index) for index in range(site.experts.num_experts)]


def _alphas(adapters: Sequence[Adapter], modules: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """For each module the alphas whose quotient by the rank is the scale of each adapter."""
    each = []
    for adapter in adapters:
        mine = {module: factors.scale * factors.rank for module, factors in adapter.factors.items()}
        # Where it has nothing its alpha is of no matter: the usual one makes for the fewest exceptions.
        usual = most_common(mine.values())
        each.append({module: mine.get(module, usual) for module in modules})
    return {module: tuple(one[module] for one in each) for module in modules}


def _short(values: tuple[Any, ...]) -> Any:
    """One number where all are the same; the rank 0 has to be in a list."""
    return values[0] if len(set(values)) == 1 and values[0] else list(values)


def _pattern(values: Mapping[str, tuple[Any, ...]], usual: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """The values that are not the usual ones, by the last names of modules where all modules of that name agree."""
    pattern: dict[str, tuple[Any, ...]] = {}
    for ending, group in _by_ending(values).items():
        if len({values[module] for module in group}) > 1:
            pattern |= site_patterns({module: values[module] for module in group}, usual)
        elif values[group[0]] != usual:
            pattern[ending] = values[group[0]]
    return pattern


def _targets(modules: Sequence[str], backbone: nn.Module) -> list[str]:
    """The last names of the modules where they name just these, else their paths."""
    everywhere = _by_ending(path for path, _ in backbone.named_modules() if path)
    targets: list[str] = []
    for ending, group in _by_ending(modules).items():
        targets += [ending] if len(everywhere[ending]) == len(group) else group
    return targets


def _by_ending(paths: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(path.rpartition(".")[2], []).append(path)
    return groups
