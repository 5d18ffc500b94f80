"""Finding a checkpoint, telling its layout, and the operations that do not care which layout it is."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import files
from ..config import BackboneConfig, MixtureConfig
from ..errors import CheckpointError
from . import manifest
from .detection import candidates, detect, only
from .folder import Folder
from .hub import Hub, RemoteFolder
from .layout import LAYOUTS, Architecture, Content, Layout, Stored
from .reading import is_hub_id, regular_file

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


def convert(src: str | Path, dst: str | Path, *, to: str, **hub: Any) -> None:
    """Rewrite a checkpoint in another layout, without loading its backbone.

    Args:
        src: as in :func:`read`. dst: a folder that does not exist or is empty. to: name of a layout.
        **hub: as in :func:`read`.

    Raises:
        ConfigError: no such layout.
        CheckpointError: ``src`` cannot be read, ``to`` cannot express it, or ``dst`` is taken or not writable.
    """
    target: Layout = LAYOUTS.create(to)
    final = Path(dst)
    if final.is_dir() and any(final.iterdir()):
        raise CheckpointError(f"{final}: expected a new or empty folder, found files in it: choose another")
    stored = read(src, **hub)
    tensors = stored.tensors(stored.declared())
    content = Content(stored.backbone, stored.architecture, stored.mixture, stored.sites(), tensors)
    size = sum(value.numel() * value.element_size() for value in tensors.values()) + 1_000_000
    with files.staged(final, need=size) as staging:
        target.write(staging, content)
        if files.MANIFEST in target.files:
            manifest.write(staging)
        files.install(staging, final)


@dataclass(frozen=True)
class Description:
    """What :func:`describe` found out.

    Attributes:
        layout, detail: name of the layout and what else there is to say, such as a generation.
        sites: for each entry of ``mixture.sites`` the names of its sites.
        parameters: of the adapter, over all experts and routers. dtypes: parameters by dtype.
        bytes: size of all files. damage: what does not agree with the manifest, ``None`` where there is no manifest.
    """

    path: str
    layout: str
    detail: str
    backbone: BackboneConfig
    architecture: Architecture
    mixture: MixtureConfig
    sites: Sequence[Sequence[str]]
    parameters: int
    dtypes: dict[str, int]
    bytes: int
    damage: list[str] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        configs = {name: getattr(self, name).to_dict() for name in ("backbone", "architecture", "mixture")}
        return {**{name: value for name, value in asdict(self).items() if name not in configs}, **configs}


def describe(path: str | Path, **hub: Any) -> Description:
    """Layout, backbone, sites, experts and size of a checkpoint, from its configuration and headers alone.

    Raises:
        CheckpointError: as in :func:`read`.
    """
    stored = read(path, **hub)
    folder = stored.folder
    dtypes: dict[str, int] = {}
    for header in stored.file.headers.values():
        count = 1
        for size in header.shape:
            count *= size
        dtypes[header.dtype] = dtypes.get(header.dtype, 0) + count
    names = files.files_below(folder)
    whole = regular_file(folder / files.MANIFEST)
    return Description(
        path=str(folder),
        layout=stored.layout,
        detail=stored.detail,
        backbone=stored.backbone,
        architecture=stored.architecture,
        mixture=stored.mixture,
        sites=stored.sites(),
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        bytes=sum((folder / name).stat().st_size for name in names if regular_file(folder / name)),
        damage=manifest.problems(folder) if whole else None,
    )


def _check_hub_id(path: str | Path) -> None:
    text = str(path)
    if isinstance(path, Path) or text.startswith((".", "~", os.sep)) or not is_hub_id(text):
        raise CheckpointError(f"{path}: no such folder; expected the folder of a checkpoint, or a hub id 'owner/name'")
