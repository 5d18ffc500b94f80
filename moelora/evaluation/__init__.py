"""How well a model answers."""

from __future__ import annotations

from .scoring import Comparison as Comparison
from .scoring import Report as Report
from .scoring import TaskScore as TaskScore
from .scoring import compare as compare
from .scoring import generate_answers as generate_answers
from .scoring import majority as majority
from .scoring import score as score
from .scoring import score_answers as score_answers
