"""``moelora analyze``: show where a mixture routes."""

from __future__ import annotations

from .output import Backbone, Checkpoint, Overrides, Quantization, load_model, print_json


def analyze(
    path: Checkpoint,
    overrides: Overrides = None,
    backbone: Backbone = None,
    quantization: Quantization = None,
) -> None:
    """Write the routing report of a checkpoint.

    Example: `moelora analyze runs/quickstart`
    """
    print_json([path, overrides, backbone, quantization, load_model])
