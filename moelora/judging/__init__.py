"""Capability labels from a language model that judges pairs of replies, over any OpenAI-compatible endpoint."""

from .config import JudgeConfig, Limits, Prices
from .labelling import Labels, label, survey

__all__ = ["JudgeConfig", "Labels", "Limits", "Prices", "label", "survey"]
