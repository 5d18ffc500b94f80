"""Trainers: one file per training paradigm. Importing this package registers the built-in ones."""

from __future__ import annotations

from ..registry import TRAINERS
from . import sft
from .live import LiveProgress, TimeBudget
from .mixture_trainer import MixtureTrainer
from .sft import SFTTrainer

names = TRAINERS.names
get = TRAINERS.get

__all__ = ["TRAINERS", "LiveProgress", "MixtureTrainer", "SFTTrainer", "TimeBudget", "get", "names", "sft"]
