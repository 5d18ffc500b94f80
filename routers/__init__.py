"""Routers: one file per routing method. Importing this package registers the built-in ones."""

from __future__ import annotations

from ..registry import ROUTERS
from . import (
    adamole,
    arrow,
    lora_mixer,
    mask,
    meteora,
    mola,
    phatgoose,
    remix,
    rloo,
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
    "get",
    "lora_mixer",
    "mask",
    "meteora",
    "mola",
    "names",
    "phatgoose",
    "remix",
    "rloo",
    "softmax",
    "static",
    "switch",
    "task",
    "topk",
    "topp",
    "xlora",
]
