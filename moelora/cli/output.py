"""Where the verbs print, and the options that several of them share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..mixture import MoELoRAModel

Checkpoint = Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint: a folder or a hub id.")]
Backbone = Annotated[
    str | None,
    typer.Option(help="Backbone to load it on: a hub id, a folder, a .gguf file, or `auto` for the one that it names."),
]
Quantization = Annotated[
    str | None, typer.Option(help="Storage of the backbone: nf4, int8, bf16, fp16 or fp32. By default as in training.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else there.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as `max_length=256`.")
]


def stdout() -> Console:
    """The console of results."""
    return Console()


def stderr() -> Console:
    """The console of progress and errors."""
    return Console(stderr=True)


def print_json(value: Any) -> None:
    """Print plain values as indented JSON, without colours or wrapping."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print rows of text under column names, the first column to the left and the others to the right."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    stdout().print(table)


def load_model(path: str, backbone: str | None, quantization: str | None) -> MoELoRAModel:
    """The mixture at ``path`` with its tokenizer, in evaluation mode.

    Raises:
        UserError: the checkpoint or the backbone cannot be loaded.
    """
    from ..mixture import from_pretrained

    return from_pretrained(path, backbone=backbone, quantization=quantization)
