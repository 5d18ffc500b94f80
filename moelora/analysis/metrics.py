"""Numbers that say how a site spreads its tokens over its experts.

All take a load (..., E): selections, or summed weights, of each expert; and work on the last axis.
Shapes: E experts, N tasks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# An expert with less than this part of an equal share is called dead.
DEAD_BELOW = 0.05

Array = NDArray[np.float64]


def shares(load: ArrayLike) -> Array:
    """(..., E) the load as parts of 1; NaN where nothing was recorded."""
    values = np.asarray(load, dtype=np.float64)
    total = values.sum(axis=-1, keepdims=True)
    parts: Array = np.divide(values, total, out=np.full_like(values, np.nan), where=total > 0)
    return parts


def utilisation(load: ArrayLike) -> Array:
    """(..., E) the load divided by an equal share: 1 is fair, 0 unused, E / K the most that top-K routing can reach."""
    parts = shares(load)
    ratio: Array = parts * parts.shape[-1]
    return ratio


def entropy(load: ArrayLike) -> Array:
    """(...) entropy of the shares in nats; NaN where nothing was recorded."""
    parts = shares(load)
    logs = np.log(parts, out=np.zeros_like(parts), where=parts > 0)
    result: Array = -(parts * logs).sum(axis=-1) + 0.0
    return result


def balance(load: ArrayLike) -> Array:
    """(...) entropy of the shares divided by log E: 1 is an even spread, 0 a single expert. 1 for E = 1."""
    spread = entropy(load)
    experts = np.asarray(load).shape[-1]
    return spread / np.log(experts) if experts > 1 else np.ones_like(spread)


def effective_experts(load: ArrayLike) -> Array:
    """(...) exponential of the entropy: the number of equally used experts that would spread the load as much."""
    result: Array = np.exp(entropy(load))
    return result


def variation(load: ArrayLike) -> Array:
    """(...) coefficient of variation of the load: its standard deviation over experts divided by its mean."""
    result: Array = utilisation(load).std(axis=-1)
    return result


def dead_experts(load: ArrayLike) -> NDArray[np.bool_]:
    """(..., E) experts with less than ``DEAD_BELOW`` of an equal share; an unused one has exactly 0 load."""
    return utilisation(load) < DEAD_BELOW


def task_specialisation(load_NE: ArrayLike) -> float:
    """How differently the tasks of one site use its experts: 0 all alike, near 1 every task with experts of its own.

    The part of a task's selections that would have to go to other experts for it to be routed like the average task;
    the mean over tasks, every task counted alike. Tasks without load are left out; 0 with fewer than two tasks.
    """
    values = np.asarray(load_NE, dtype=np.float64)
    parts = shares(values[values.sum(axis=-1) > 0])
    if len(parts) < 2:
        return 0.0
    return float(np.abs(parts - parts.mean(axis=0)).sum(axis=-1).mean() / 2)
