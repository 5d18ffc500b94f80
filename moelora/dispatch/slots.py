"""Products of tokens with the experts that they chose, by compiled kernels on a CPU in float32.

Shapes: T tokens, I in, O out, C columns of any matrix of tokens, E experts, K slots per token, R stacked rank,
N occupied slots sorted by expert, Q the largest rank of an expert.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from . import extension

# Multiply-adds that are worth another thread.
WORK = 1 << 18


class SlotsStruct(ctypes.Structure):
    """``Slots`` of slots.h."""

    _fields_ = [
        ("token", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("edge", ctypes.c_void_p),
        ("experts", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


class Factors(ctypes.Structure):
    """``Factors`` of slots.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rank_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
    ]


class Rows(ctypes.Structure):
    """``Rows`` of slots.h."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


def at(tensor: Tensor | None) -> int | None:
    """Address of a tensor's numbers."""
    return None if tensor is None else tensor.data_ptr()


def rows(tensor: Tensor | None) -> Rows:
    """A matrix (T, C) whose columns lie next to each other."""
    return Rows(None, 0) if tensor is None else Rows(tensor.data_ptr(), tensor.stride(0))


def by_rank(A_RI: Tensor | None, scale_R: Tensor | None) -> Factors:
    """What the kernels take of a stacked ``lora_A``; none for ``None``. The tensors must outlive it."""
    return Factors() if A_RI is None else Factors(A_RI.data_ptr(), A_RI.stride(0), 1, at(scale_R))


def by_column(B_OR: Tensor | None, scale_R: Tensor | None) -> Factors:
    """The same of a stacked ``lora_B``, which the kernels read as its transpose."""
    return Factors() if B_OR is None else Factors(B_OR.data_ptr(), 1, B_OR.stride(0), at(scale_R))


def rowwise(tensor: Tensor) -> Tensor:
    """The tensor itself if the kernels can walk through it, else a copy: numbers of a row lie next to each other."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(0) >= tensor.shape[-1] else tensor.contiguous()


@functools.cache
def edges(ranks: tuple[int, ...]) -> Tensor:
    """(E + 1,) int64: where the ranks of each expert start in the stack; the last is R."""
    return torch.tensor(list(accumulate(ranks, initial=0)))


def add_few(
    ranks: Sequence[int],
    out_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
) -> None:
    """Add ``sum_k w_k B_e A_e x`` to ``out``, slot by slot without sorting them; no tensor may have gaps."""
    kernels = extension.library()
    assert kernels is not None
    tokens, slots = indices_TK.shape
    kernels.moelora_few(
        at(indices_TK), at(weights_TK), tokens, slots, at(edges(tuple(ranks))), len(ranks),
        at(x_TI), at(A_RI), at(B_OR), x_TI.shape[1], out_TO.shape[1], at(out_TO),
    )  # fmt: skip


class Slots:
    """The occupied slots, sorted by expert, and the products with the experts' factors over them.

    Args:
        indices_TK: (T, K) int64 experts; anything outside 0..E-1 is an empty slot. ranks: rank of each expert.

    Attributes:
        slot_N: position of each occupied slot in the flattened (T·K) slots, sorted by expert, stable.
        count: N. width: Q. struct: what the kernels take.
    """

    def __init__(self, indices_TK: Tensor, ranks: Sequence[int]) -> None:
        kernels = extension.library()
        assert kernels is not None
        self.kernels = kernels
        tokens, slots = indices_TK.shape
        indices_TK = indices_TK.contiguous()
        slot, self.token = (torch.empty(tokens * slots, dtype=torch.long) for _ in range(2))
        self.offset = torch.empty(len(ranks) + 1, dtype=torch.long)
        self.edge = edges(tuple(ranks))
        kernels.moelora_sort(at(indices_TK), tokens, slots, len(ranks), at(slot), at(self.token), at(self.offset))
        self.count, self.width = int(self.offset[-1]), max(ranks)
        self.slot_N = slot[: self.count]
        self.struct = SlotsStruct(at(self.token), at(self.offset), at(self.edge), len(ranks), self.width)

    def threads(self, columns: int) -> int:
        """How many are worth while for rows of so many columns."""
        work = self.count * columns * self.width
        return max(1, min(torch.get_num_threads(), work // WORK, columns // 32))

    def to_ranks(self, x_TC: Tensor, factors: Factors) -> Tensor:
        """(N, Q) ``scale M x`` of each slot's token and expert."""
        y = x_TC.new_empty(self.count, self.width)
        columns = x_TC.shape[1]
        slots, x, m = ctypes.byref(self.struct), ctypes.byref(rows(x_TC)), ctypes.byref(factors)
        self.kernels.moelora_to_ranks(slots, x, columns, m, at(y), self.threads(columns))
        return y

    def from_ranks(
        self, y_NQ: Tensor, factors: Factors, out_TC: Tensor | None, x_TC: Tensor | None, d_factors: Tensor | None
    ) -> None:
        """Add ``M^T y`` to ``out`` where it is given, and write ``sum_n y x^T`` into ``d_factors`` where x is."""
        given = out_TC if out_TC is not None else x_TC
        assert given is not None
        columns = given.shape[1]
        slots, x, m = ctypes.byref(self.struct), ctypes.byref(rows(x_TC)), ctypes.byref(factors)
        self.kernels.moelora_from_ranks(
            slots, at(y_NQ), m, at(out_TC), x, at(d_factors), columns, self.threads(columns)
        )
