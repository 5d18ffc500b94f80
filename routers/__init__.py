"""Routers: one file per routing method. Importing this package registers the built-in ones."""

from __future__ import annotations

from ..registry import ROUTERS
from . import (
    adamole,
    arrow,
    mask,
    meteora,
    mola,
    phatgoose,
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
    "mask",
    "meteora",
    "mola",
    "names",
    "phatgoose",
    "softmax",
    "static",
    "switch",
    "task",
    "topk",
    "topp",
    "xlora",
]
