"""``moelora convert``: from one checkpoint layout to another."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import stdout


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint in any layout: a folder or a hub id.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to write: new, or empty.")],
    to: Annotated[str, typer.Option(help="Layout to write: native or mixlora.")] = "native",
) -> None:
    """Write a checkpoint in another layout, without loading its backbone.

    Example: `moelora convert TUDB-Labs/some-mixlora runs/imported --to native`
    """
    from ..checkpoints import convert as convert_checkpoint

    convert_checkpoint(source, target, to=to)
    stdout().print(f"wrote {target} ({to})", highlight=False)
