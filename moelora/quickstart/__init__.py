"""The quickstart: plan a run that fits the minutes, carry it out, report it, reload it."""

from __future__ import annotations

from .execute import run
from .plan import Settings
from .reload import check

__all__ = ["Settings", "check", "run"]
