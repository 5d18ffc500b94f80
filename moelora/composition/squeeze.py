"""Making a finished adapter smaller: LoRA-Squeeze after training.

Source: LoRA-Squeeze (arXiv 2602.10993), Post-Squeeze: the factors of the best approximation of the update in a smaller
rank, by QR, QR and the singular value decomposition of an r x r matrix; see ``canonical.py``. The scale is in the
factors, so the result has scale 1 (alpha = r). What is lost is known beforehand: ``sqrt(sum of the dropped s_i^2)`` at
each module, which :func:`~moelora.composition.distance` measures. Moments of an optimizer mean nothing for the new
factors: train on with a fresh one.
"""

from __future__ import annotations

from ..errors import ConfigError
from .adapter import Adapter
from .merging import merge_adapters


def squeeze(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> Adapter:
    """The best approximation of an adapter in a smaller rank, module by module; ``adapter`` stays as it is.

    Args:
        rank: at most this rank everywhere. energy: or, for each module by itself, the smallest rank that keeps this
            share of the squared Frobenius norm of its update; ranks then differ from module to module.

    Raises:
        ConfigError: neither or both are given, or one is out of range.
    """
    if rank is None and energy is None:
        raise ConfigError("squeeze needs rank=... or energy=...: say how much to keep")
    return merge_adapters([adapter], "svd", name=adapter.name, rank=rank, energy=energy)
