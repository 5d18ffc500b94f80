"""Trainers: one file per training paradigm. Importing this package registers the built-in ones."""

from __future__ import annotations

from ..registry import TRAINERS
from . import remix, sft
from .live import LiveProgress, TimeBudget
from .mixture_trainer import MixtureTrainer
from .remix import RemixTrainer
from .sft import SFTTrainer

names = TRAINERS.names
get = TRAINERS.get

__all__ = [
    "TRAINERS",
    "LiveProgress",
    "MixtureTrainer",
    "RemixTrainer",
    "SFTTrainer",
    "TimeBudget",
    "get",
    "names",
    "remix",
    "sft",
]
