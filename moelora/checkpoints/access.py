"""Finding a checkpoint, telling its layout, and the operations that do not care which layout it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from .. import files
from ..config import BackboneConfig, MixtureConfig
from ..errors import CheckpointError
from . import manifest
from .folder import Folder
from .layout import LAYOUTS, Architecture, Content, Layout, Stored
from .reading import is_hub_id, load_mapping, regular_file

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
    places = (revision, subfolder, token, cache_dir, local_files_only)
    patterns = [name for layout in LAYOUTS for name in LAYOUTS.get(layout).files]
    folder = _locate(path, patterns, *places)
    files.recover(folder)
    opened = Folder(folder)
    layout = detect(opened)
    if further := layout.further_files(opened):
        opened = Folder(_locate(path, [*patterns, *further], *places))
    return layout.read(opened)


def detect(folder: Folder) -> Layout:
    """The layout of a folder, from what its files contain.

    Raises:
        CheckpointError: none fits, or more than one; the message says what is there and what would fit.
    """
    found = {}
    for name in LAYOUTS:
        layout: Layout = LAYOUTS.create(name)
        if reason := layout.detect(folder):
            found[name] = (layout, reason)
    if len(found) == 1:
        return next(iter(found.values()))[0]
    if found:
        reasons = " and ".join(f"{name} ({reason})" for name, (_, reason) in found.items())
        raise CheckpointError(
            f"{folder.path}: expected the files of one layout, found those of {len(found)}: {reasons}; move one of "
            "them to another folder"
        )
    raise CheckpointError(f"{folder.path}: {_nothing_known(folder.path)}")


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


def _locate(
    path: str | Path,
    patterns: Sequence[str],
    revision: str | None,
    subfolder: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    inner = "" if subfolder is None else subfolder.strip("/")
    if inner and any(part in ("", ".", "..") for part in inner.replace("\\", "/").split("/")):
        raise CheckpointError(f"subfolder {subfolder!r}: expected a folder below {path}, without '..'")
    local = Path(path).expanduser()
    if local.exists():
        folder = local / inner
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: expected the folder of a checkpoint, found no folder; give its folder")
        return folder
    _check_hub_id(path)
    try:
        snapshot = snapshot_download(
            str(path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[f"{inner}/{name}" if inner else name for name in patterns],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: no such folder here, and it could not be had from the hub: {reason}; check the name, the "
            "network and, for a private repository, the token"
        ) from error
    return Path(snapshot) / inner


def _check_hub_id(path: str | Path) -> None:
    text = str(path)
    if isinstance(path, Path) or text.startswith((".", "~", os.sep)) or not is_hub_id(text):
        raise CheckpointError(f"{path}: no such folder; expected the folder of a checkpoint, or a hub id 'owner/name'")


def _nothing_known(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder in this repository; check the subfolder"
    newest = manifest.latest(folder)
    if newest is not None:
        return f"expected a checkpoint, found a run with several; give one of them, the newest whole one is {newest}"
    known = "; ".join(f"{name}: {', '.join(LAYOUTS.get(name).files)}" for name in LAYOUTS)
    listed = sorted(path.name for path in folder.iterdir())
    hint = ""
    if "adapter_config.json" in listed:
        peft_type = load_mapping(folder / "adapter_config.json").get("peft_type")
        hint = f" (adapter_config.json has peft_type {peft_type!r}, which is not read)"
    shown = ", ".join(listed[:20]) or "nothing"
    return f"expected a checkpoint in a known layout ({known}), found {shown}{hint}; give the folder with these files"
