"""Trainers: one file per training paradigm. Importing this package registers the built-in ones."""

from __future__ import annotations

from ..registry import TRAINERS
from . import clip, continual, continual_moe_adapter, lora_mixer, remix, reward, sft
from .alarm import AlarmConfig, CollapseAlarm
from .clip import ClipTrainer
from .continual import ContinualTrainer
from .live import LiveProgress, TimeBudget
from .lora_mixer import LoRAMixerTrainer
from .mixture_trainer import MixtureTrainer
from .optimizer import GroupOptions
from .progress import Decision, ProgressConfig, ProgressScheduler
from .progress_ledger import Ledger
from .remix import RemixTrainer
from .reward import RewardTrainer
from .scalezero import ScaleZero
from .scalezero_config import ScaleZeroConfig
from .sft import SFTTrainer

names = TRAINERS.names
get = TRAINERS.get

__all__ = [
    "TRAINERS",
    "AlarmConfig",
    "ClipTrainer",
    "CollapseAlarm",
    "ContinualTrainer",
    "Decision",
    "GroupOptions",
    "Ledger",
    "LiveProgress",
    "LoRAMixerTrainer",
    "MixtureTrainer",
    "ProgressConfig",
    "ProgressScheduler",
    "RemixTrainer",
    "RewardTrainer",
    "SFTTrainer",
    "ScaleZero",
    "ScaleZeroConfig",
    "TimeBudget",
    "clip",
    "continual",
    "continual_moe_adapter",
    "get",
    "lora_mixer",
    "names",
    "remix",
    "reward",
    "sft",
]
