"""Two adapters of different layouts on one backbone; puts what the tests share where they find it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from adapters_made import FIRST, MIXLORA, base, randomize

import moelora
from moelora.mixture import MoELoRAModel


@pytest.fixture
def two() -> MoELoRAModel:
    """A PEFT LoRA on q_proj and v_proj, active, and a mixture of two kinds of sites beside it."""
    model = moelora.from_pretrained(FIRST, base(), adapter_name="chat")
    model.add_adapter("math", MIXLORA)
    return randomize(model, "math")
