"""``moelora info``: what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import typer

from .common import AsJson, Checkpoint, print_json


def info(path: Checkpoint, as_json: AsJson = False) -> None:
    """Say what a checkpoint holds, without loading its backbone.

    Example: `moelora info runs/quickstart`
    """
    from ..checkpoints import describe

    found = describe(path).to_dict()
    if as_json:
        print_json(found)
    else:
        _print_nested(found)


def _print_nested(values: dict[str, Any], indent: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            typer.echo(f"{indent}{key}:")
            _print_nested(value, indent + "  ")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                typer.echo(f"{indent}{key}.{index}:")
                _print_nested(item, indent + "  ")
        else:
            typer.echo(f"{indent}{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
