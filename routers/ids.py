"""Identities of tasks, requests and modalities, as the routers that go by them read them.

Shapes: B batch.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import UserError


def checked(ids: Tensor, count: int, name: str, least: int = 0) -> Tensor:
    """``ids`` (B,) as they are, after a look at their range where that makes no GPU wait.

    On a GPU an id out of range fails at the first look-up, as it does everywhere in torch.

    Args:
        count: number of ids there are. name: of the field of the context. least: the smallest allowed, -1 where "none"
            is an answer.

    Raises:
        UserError: the ids are on the CPU and one is not in ``least..count - 1``.
    """
    if ids.device.type == "cpu" and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < least or high >= count:
            raise UserError(f"{name} holds {low}..{high}, but there are only 0..{count - 1}: number them from 0")
    return ids


def the_only(ids: Tensor | None) -> int | None:
    """The id of the whole batch; ``None`` where sequences differ or nothing was said. Waits for a GPU."""
    if ids is None or ids.numel() == 0:
        return None
    first = int(ids.reshape(-1)[0])
    return first if bool((ids == first).all()) else None
