"""``moelora eval``: score a checkpoint on the test data of a recipe."""

from __future__ import annotations

from .output import AsJson, Backbone, Checkpoint, Overrides, Quantization, load_model, print_json


def evaluate(
    path: Checkpoint,
    overrides: Overrides = None,
    backbone: Backbone = None,
    quantization: Quantization = None,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint.

    Example: `moelora eval runs/quickstart`
    """
    print_json([path, overrides, backbone, quantization, as_json, load_model])
