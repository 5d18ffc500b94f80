"""Which examples of several data sets an epoch takes, and in which order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from ..errors import DataError


def shares(
    sizes: Mapping[str, int], temperature: float = 1.0, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The part of each source, ``n_i^(1/T) / sum_j n_j^(1/T)``, or its weight over the sum of all weights.

    Source: multilingual BERT and T5 sample languages and tasks so (arXiv 1910.10683, section 3.5.2).
    """
    if weights is None:
        logs = {name: math.log(size) / temperature for name, size in sizes.items()}
        most = max(logs.values())  # taken out, so that a temperature near 0 does not overflow
        weights = {name: math.exp(value - most) for name, value in logs.items()}
    total = math.fsum(weights[name] for name in sizes)
    return {name: weights[name] / total for name in sizes}


def quotas(parts: Mapping[str, float], size: int) -> dict[str, int]:
    """Whole numbers that sum to ``size``, each less than 1 from its part of it (largest remainders)."""
    total = sum(Fraction(part) for part in parts.values())
    exact = {name: Fraction(part) * size / total for name, part in parts.items()}
    counts = {name: int(value) for name, value in exact.items()}
    missing = size - sum(counts.values())
    by_remainder = sorted(parts, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[:missing]:
        counts[name] += 1
    return counts


def mixing_plan(
    sizes: Mapping[str, int],
    *,
    temperature: float = 1.0,
    weights: Mapping[str, float] | None = None,
    size: int | None = None,
    seed: int = 0,
) -> list[tuple[str, int]]:
    """An epoch: pairs of a source and the index of one of its examples, in an order that depends on ``seed`` alone.

    Each source gives its quota. One with a smaller quota than examples gives as many different ones; one with a
    larger gives all of them, as often as they fit in whole, and then different ones again.

    Args:
        sizes: examples of each source. temperature, weights: see :func:`shares`.
        size: of the epoch; ``None`` means the sum of ``sizes``.

    Raises:
        DataError: a source is empty, or so small a part of the epoch that it gives nothing.
    """
    if not sizes:
        return []
    for name, count in sizes.items():
        if count == 0:
            raise DataError(f"data.sources.{name}: no example is left to train on")
    counts = quotas(shares(sizes, temperature, weights), sum(sizes.values()) if size is None else size)
    plan: list[tuple[str, int]] = []
    for number, (name, count) in enumerate(counts.items()):
        if count == 0:
            raise DataError(
                f"data.sources.{name}: its share of an epoch is less than one example: raise data.size, its weight, or "
                "the temperature"
            )
        generator = np.random.default_rng([seed, number])
        taken: list[int] = []
        while len(taken) < count:
            taken += generator.permutation(sizes[name]).tolist()[: count - len(taken)]
        plan += [(name, index) for index in taken]
    order = np.random.default_rng([seed, len(counts)]).permutation(len(plan))
    return [plan[index] for index in order]
