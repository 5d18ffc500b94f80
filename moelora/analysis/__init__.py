"""What the experts of a model do: record, measure, draw, and report in one self-contained page."""

from __future__ import annotations

from .analyze import analyze
from .recorder import RoutingRecorder
from .report import write as write_report
from .stats import RoutingStats, SiteStats

__all__ = ["RoutingRecorder", "RoutingStats", "SiteStats", "analyze", "write_report"]
