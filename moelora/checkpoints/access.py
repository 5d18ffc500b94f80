"""Finding a checkpoint here or on the hub, and opening it in whatever layout it is."""

from __future__ import annotations

import fnmatch
import logging
import os
from dataclasses import replace
from pathlib import Path

from .. import files
from ..errors import CheckpointError
from .detection import candidates, detect, only
from .folder import Folder
from .hub import Hub, RemoteFolder
from .layout import LAYOUTS, Stored
from .reading import is_hub_id

logger = logging.getLogger(__name__)


def read(
    path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Stored:
    """Open a checkpoint in any layout: everything is read and checked but the numbers.

    Args:
        path: a folder, or a hub id. The other arguments are those of transformers; all but ``subfolder`` are for hub
            ids.

    Raises:
        CheckpointError: nothing there, no layout or several, damaged, or not to be trusted.
    """
    inner = "" if subfolder is None else subfolder.strip("/")
    if inner and any(part in ("", ".", "..") for part in inner.replace("\\", "/").split("/")):
        raise CheckpointError(f"subfolder {subfolder!r}: expected a folder below {path}, without '..'")
    local = Path(path).expanduser()
    if not local.exists():
        _check_hub_id(path)
        return _from_hub(Hub(str(path), revision, inner, token, cache_dir, local_files_only))
    folder = local / inner
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected the folder of a checkpoint, found no folder; give its folder")
    files.recover(folder)
    opened = Folder(folder)
    return detect(opened).read(opened)


def _from_hub(hub: Hub) -> Stored:
    """Open a checkpoint of the hub: small files first, large ones only where a layout is sure to need them."""
    patterns = [name for layout in LAYOUTS for name in LAYOUTS.get(layout).files]
    path = hub.fetch(patterns)
    hub = hub.pinned(path)
    folder = Folder(path)
    found = candidates(folder) if path.is_dir() else {}
    if not found:
        folder = _listed(hub, path)
        found = candidates(folder, [name for name in LAYOUTS if LAYOUTS.get(name).model_files])
    layout = only(folder, found)
    if more := [*layout.further_files(folder), *layout.model_files]:
        if isinstance(folder, RemoteFolder):
            size = sum(size for name, size in folder.sizes.items() if any(fnmatch.fnmatchcase(name, m) for m in more))
            logger.info("%s is of layout %s: fetching %s", hub, layout.kind, files.megabytes(size))
        path = hub.fetch([*patterns, *more])
    return layout.read(Folder(path))


def _listed(hub: Hub, path: Path) -> Folder:
    """The folder as the hub lists it, where what was fetched of it is no checkpoint.

    Raises:
        CheckpointError: there is no such folder.
    """
    sizes = hub.listing()
    if sizes:
        return RemoteFolder(path, hub, sizes)
    if sizes is None and path.is_dir():
        return Folder(path)
    everything = replace(hub, subfolder="").listing() or {}
    folders = ", ".join(sorted({name.rpartition("/")[0] for name in everything if "/" in name})[:20]) or "none"
    raise CheckpointError(f"{hub}: no such folder in this repository; it has {folders}: check the subfolder")


def _check_hub_id(path: str | Path) -> None:
    text = str(path)
    if isinstance(path, Path) or text.startswith((".", "~", os.sep)) or not is_hub_id(text):
        raise CheckpointError(f"{path}: no such folder; expected the folder of a checkpoint, or a hub id 'owner/name'")
