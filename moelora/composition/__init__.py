"""Mixtures out of finished LoRA adapters, and finished LoRA adapters out of mixtures."""

from __future__ import annotations

from .adapter import Adapter, read_adapter

__all__ = ["Adapter", "read_adapter"]
