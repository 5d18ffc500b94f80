"""Mixtures out of finished LoRA adapters, and finished LoRA adapters out of mixtures."""

from __future__ import annotations

from . import lego as lego
from . import peft_methods as peft_methods
from .adapter import Adapter, read_adapter
from .merging import Distance, distance, merge_adapters
from .squeeze import squeeze

__all__ = ["Adapter", "Distance", "distance", "merge_adapters", "read_adapter", "squeeze"]
