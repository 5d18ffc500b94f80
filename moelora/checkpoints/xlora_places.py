"""Where the adapters of an X-LoRA checkpoint lie: what its configuration says, within bounds.

The code of both authors reads any path or hub id that the file names. Here a file does not get to choose what is read:
an adapter must lie in the checkpoint's folder or at most :data:`UP` folders above it, which in the hub's cache is still
the same repository (``<repository>/snapshots/<commit>``), and nothing is downloaded that was not asked for by name.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from ..errors import CheckpointError
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder

UP = 2
_LONGEST = 255  # name of a file, in bytes


def told(folder: Folder, path: str) -> Iterator[str]:
    """Places, seen from the checkpoint, that the path of an adapter in its configuration may mean, best first.

    PEFT takes a path from where its process runs; a copied checkpoint has its adapters beside it, so the path may also
    start at the checkpoint, or its end alone may lie there.
    """
    root = os.path.abspath(folder.path)
    for start in (root, os.getcwd()):
        try:
            yield PurePosixPath(os.path.relpath(os.path.join(start, path), root)).as_posix()
        except ValueError:  # another drive
            continue
    names = path.replace("\\", "/").strip("/").split("/")
    ends = (names[first:] for first in range(len(names)))
    yield from ("/".join(end) for end in ends if ".." not in end)


def allowed(place: str) -> bool:
    """Whether a place is near enough to a checkpoint to be read."""
    names = place.split("/")
    up = names.count("..")
    near = up <= UP and names[:up] == [".."] * up and not os.path.isabs(place)
    return near and place not in ("", ".") and all(len(os.fsencode(name)) <= _LONGEST for name in names)


def find(folder: Folder, places: Iterable[str]) -> tuple[str, Folder] | None:
    """The first of these places that has an adapter, and its folder."""
    for place in dict.fromkeys(places):
        if allowed(place) and folder.has(f"{place}/{ADAPTER_CONFIG}"):
            return place, Folder(folder.path / place)
    return None


def adapter_files(places: Iterable[str]) -> tuple[str, ...]:
    """Patterns of the files of adapters at these places of a repository; without places, of those in any folder."""
    inside = [glob.escape(place) for place in dict.fromkeys(places) if allowed(place) and not place.startswith("..")]
    return tuple(f"{place}/{name}" for place in inside or ["*"] for name in (ADAPTER_CONFIG, *ADAPTER_TENSORS))


def missing(folder: Folder, file: str, key: str, path: str, places: Iterable[str]) -> CheckpointError:
    """That there is no adapter where the configuration says.

    Args:
        file: of the configuration. key: what names the adapter there. path: what it says. places: that were tried.
    """
    tried = [place for place in dict.fromkeys(places) if allowed(place)]
    name = path.replace("\\", "/").rstrip("/").rpartition("/")[2] or "adapter"
    return CheckpointError(
        f"{folder.path / file}: {key}: expected the folder of an adapter in this checkpoint or beside it, at most {UP} "
        f"folders up, found {path!r} and no {ADAPTER_CONFIG} in {', '.join(tried) or 'it'}; what lies elsewhere is not "
        f"read or downloaded because a file says so: copy that adapter's folder to {folder.path / name}"
    )
