"""Experts: parameterisations of one expert bank, and the two containers that put a bank and a router at a site."""

from __future__ import annotations

from ..registry import EXPERTS
from . import dora, freezing, frozen, lora, low_rank, rank1, shared_a, sparse_projection, staged
from .bank import ExpertBank, ExpertsConfig
from .block import BlockContainer
from .build import build
from .container import Container
from .ffn import is_linear
from .linear import LinearContainer
from .saved import SavedModule
from .staged_linear import Staged, StagedLinear, stage_linears

names = EXPERTS.names
get = EXPERTS.get

__all__ = [
    "EXPERTS",
    "BlockContainer",
    "Container",
    "ExpertBank",
    "ExpertsConfig",
    "LinearContainer",
    "SavedModule",
    "Staged",
    "StagedLinear",
    "build",
    "dora",
    "freezing",
    "frozen",
    "get",
    "is_linear",
    "lora",
    "low_rank",
    "names",
    "rank1",
    "shared_a",
    "sparse_projection",
    "stage_linears",
    "staged",
]
