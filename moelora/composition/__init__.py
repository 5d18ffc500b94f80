"""Mixtures out of finished LoRA adapters, and finished LoRA adapters out of mixtures."""

from __future__ import annotations

from . import lego as lego
from . import peft_methods as peft_methods
from .adapter import Adapter, read_adapter
from .export import Export, Gguf, export_experts, export_lora
from .merging import Distance, distance, merge_adapters
from .squeeze import squeeze
from .writing import write_peft

__all__ = [
    "Adapter",
    "Distance",
    "Export",
    "Gguf",
    "distance",
    "export_experts",
    "export_lora",
    "merge_adapters",
    "read_adapter",
    "squeeze",
    "write_peft",
]
