"""``moelora convert``: from one checkpoint layout to another."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from .common import (
    AsJson,
    CacheDir,
    LocalFilesOnly,
    Revision,
    Subfolder,
    Token,
    hub_options,
    print_json,
    print_lines,
    size_text,
)


class ListsLayouts(TyperCommand):
    """Names the layouts that can be written in its help; they are looked up when help asks for them, not before."""

    def format_help(self, *args: Any, **kwargs: Any) -> None:
        from ..checkpoints import LAYOUTS, Layout

        names = [name for name in LAYOUTS if LAYOUTS.get(name).write is not Layout.write]
        for param in self.params:
            if param.name == "to":
                cast(Any, param).help = f"Layout to write: {', '.join(names)}."
        super().format_help(*args, **kwargs)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint in any layout: a folder or a hub id.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to write: new, or empty.")],
    to: Annotated[str, typer.Option(help="Layout to write.")] = "native",
    as_json: AsJson = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Write a checkpoint in another layout, without loading its backbone, and say what that layout cannot keep.

    Example: `moelora convert TUDB-Labs/some-mixlora runs/imported --to native`
    """
    from ..checkpoints import convert as convert_checkpoint

    hub = hub_options(revision, subfolder, token, cache_dir, local_files_only)
    done = convert_checkpoint(source, target, to=to, **hub)
    if as_json:
        print_json({"path": done.path, "layout": done.layout, "files": done.files, "lost": done.lost})
        return
    lines = [f"wrote {done.path} ({done.layout}): {len(done.files)} files, {size_text(sum(done.files.values()))}"]
    lines += [f"  {name}: {size_text(size)}" for name, size in done.files.items()]
    if done.lost:
        lines += [f"not the same in layout {done.layout}:", *(f"  {line}" for line in done.lost)]
    print_lines(lines)
