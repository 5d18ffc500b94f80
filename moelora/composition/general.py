"""GenKnowSub between whole adapters: what general adapters have in common is taken off the others.

Published: arXiv 2505.10939; see ``routers/arrow.py`` for the two methods and for what PEFT does instead.

Our reading: only modules that an adapter has factors for change. Where it has none there is nothing to take off, and a
general adapter without factors for a module adds nothing there; the mean is over all general adapters all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor

from ..errors import ConfigError
from ..routers.arrow import gen_know_sub
from .adapter import Adapter, Factors

Method = Literal["exact", "peft_factors"]


def subtract_general(
    adapters: Sequence[Adapter], general: Sequence[Adapter], method: Method = "exact"
) -> list[Adapter]:
    """New adapters without what the general ones have in common; the arguments and their tensors stay as they are.

    Args:
        method: ``exact`` takes mean updates off updates, scales included: the rank of each becomes its own plus those
            of the general adapters. ``peft_factors`` takes mean factors off factors and leaves scales out of it, as
            PEFT does, which is another update; it needs adapters of one rank and the same modules.

    Raises:
        ConfigError: no such method, no general adapter, shapes that differ, or what ``peft_factors`` needs is not so.
    """
    if method not in get_args(Method):
        raise ConfigError(f"subtract is {method!r}: expected one of {', '.join(get_args(Method))}")
    return [
        replace(adapter, factors={module: _without(adapter, module, general, method) for module in adapter.factors})
        for adapter in adapters
    ]


def _without(adapter: Adapter, module: str, general: Sequence[Adapter], method: Method) -> Factors:
    own = adapter.factors[module]
    width = (own.A.shape[1], own.B.shape[0])
    exact = method == "exact"
    pairs: list[tuple[Tensor, Tensor]] = []
    for other in general:
        theirs = other.factors.get(module, Factors(own.A[:0], own.B[:, :0], 1.0))
        if (theirs.A.shape[1], theirs.B.shape[0]) != width:
            raise ConfigError(
                f"{module}: general adapter {other.name!r} reads {theirs.A.shape[1]} features and writes "
                f"{theirs.B.shape[0]}, adapter {adapter.name!r} {width[0]} and {width[1]}: they are of other backbones"
            )
        pairs.append(_pair(theirs, exact))
    try:
        [(A, B)] = gen_know_sub([_pair(own, exact)], pairs, method)
    except ConfigError as error:
        raise ConfigError(f"adapter {adapter.name!r}, {module}: {error}") from None
    return Factors(A, B, 1.0 if exact else own.scale)


def _pair(factors: Factors, scaled: bool) -> tuple[Tensor, Tensor]:
    return factors.A.float(), factors.B.float() * (factors.scale if scaled else 1.0)
