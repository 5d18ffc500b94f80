"""Routers: one file per routing method. Importing this package registers the built-in ones."""

from __future__ import annotations

from ..registry import ROUTERS
from . import (
    adamole,
    arrow,
    flylora,
    lora_mixer,
    mask,
    meteora,
    moe_adapter,
    mola,
    moram,
    phatgoose,
    remix,
    rloo,
    smora,
    softmax,
    static,
    switch,
    task,
    topk,
    topp,
    xlora,
)
from .base import LinearRouter, LinearRouterConfig, Router, RouterConfig

names = ROUTERS.names
get = ROUTERS.get

__all__ = [
    "ROUTERS",
    "LinearRouter",
    "LinearRouterConfig",
    "Router",
    "RouterConfig",
    "adamole",
    "arrow",
    "flylora",
    "get",
    "lora_mixer",
    "mask",
    "meteora",
    "moe_adapter",
    "mola",
    "moram",
    "names",
    "phatgoose",
    "remix",
    "rloo",
    "smora",
    "softmax",
    "static",
    "switch",
    "task",
    "topk",
    "topp",
    "xlora",
]
