"""``manifest.json``: the name, size and sha256 of every file of a checkpoint, written last.

A folder whose manifest holds is whole. Names are checked as text only (relative, no ``..``, no drive, no backslash):
the files of a hub snapshot are links, so a check of resolved paths would refuse honest ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated

import safetensors
import torch
from pydantic import Field, field_validator

from .. import __version__, files
from ..config import Closed
from ..errors import CheckpointError
from .reading import load_mapping, parse, regular_file

logger = logging.getLogger(__name__)


class Entry(Closed):
    """One file: its name relative to the folder with forward slashes, its size in bytes, its sha256 in hex."""

    name: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        parts = name.split("/")
        if not name or any(part in ("", ".", "..") for part in parts) or re.search(r'[\\:\x00-\x1f<>"|?*]', name):
            raise ValueError("a file of a checkpoint has a relative name with forward slashes and without '..'")
        return name


class Manifest(Closed):
    """The contents of ``manifest.json``; ``versions`` says what wrote it."""

    format_version: int
    versions: dict[str, str]
    files: list[Entry]

    @field_validator("files")
    @classmethod
    def _once(cls, entries: list[Entry]) -> list[Entry]:
        names = [entry.name for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError(f"a file is listed twice: {next(name for name in names if names.count(name) > 1)!r}")
        return entries

    def entry(self, name: str) -> Entry | None:
        """What is said about one file."""
        return next((entry for entry in self.files if entry.name == name), None)


def write(folder: Path, names: Iterable[str] | None = None, keep: Manifest | None = None) -> None:
    """Write the manifest of ``folder`` over ``names`` (all its files by default), and what ``keep`` says of others."""
    chosen = files.files_below(folder) if names is None else sorted(names)
    entries = [_measure(folder, name) for name in chosen]
    if keep is not None:
        entries += [entry for entry in keep.files if entry.name not in chosen]
    versions = {"moelora": __version__, "torch": str(torch.__version__), "safetensors": safetensors.__version__}
    content = Manifest(format_version=1, versions=versions, files=sorted(entries, key=lambda entry: entry.name))
    (folder / files.MANIFEST).write_text(content.to_json(), encoding="utf-8")


def read(folder: Path) -> Manifest:
    """The manifest of ``folder``.

    Raises:
        CheckpointError: it is missing, unreadable, of a newer format, or lists a name that leaves the folder.
    """
    path = folder / files.MANIFEST
    if not regular_file(path):
        raise CheckpointError(
            f"{path}: missing: saving was interrupted, or the copy is incomplete; copy the whole folder again or use "
            "an older checkpoint"
        )
    values = load_mapping(path)
    refuse_newer(path, values)
    return parse(Manifest, values, path)


def refuse_newer(path: Path, values: Mapping[str, object]) -> None:
    """Raise :class:`CheckpointError` where ``format_version`` is not one that this version reads."""
    version = values.get("format_version")
    if version != 1 or isinstance(version, bool):
        raise CheckpointError(
            f"{path}: format_version is {json.dumps(version)}, this version of moelora ({__version__}) reads 1: "
            "upgrade moelora if a newer one wrote the file"
        )


def problems(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """What does not agree with the manifest, a line per file; ``names`` restricts it to these files.

    Raises:
        CheckpointError: there is no usable manifest.
    """
    content = read(folder)
    found = []
    for name in [entry.name for entry in content.files] if names is None else names:
        entry = content.entry(name)
        path = folder / PurePosixPath(name)
        if entry is None:
            found.append(f"{path}: not listed in {files.MANIFEST}; expected an entry for it")
        elif not regular_file(path):
            found.append(f"{path}: missing; expected a file of {entry.bytes} bytes")
        elif (size := path.stat().st_size) != entry.bytes:
            found.append(f"{path}: expected {entry.bytes} bytes, found {size}")
        elif (digest := _sha256(path)) != entry.sha256:
            found.append(f"{path}: expected sha256 {entry.sha256}, found {digest}")
    return found


def check(folder: Path, names: Iterable[str] | None = None) -> None:
    """Raise :class:`CheckpointError` with all :func:`problems`, if any."""
    found = problems(folder, names)
    if found:
        raise CheckpointError(
            "; ".join(found) + "; the files are damaged or were changed: copy the checkpoint again, or use an older one"
        )


def verify(path: str | Path) -> None:
    """Check every file that the manifest of a checkpoint lists, size and sha256.

    Raises:
        CheckpointError: no manifest, or files that are missing or differ, all of them named.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected the folder of a checkpoint, found no folder; check the path")
    with files.reading(folder):
        check(folder)


def commit(staging: Path, final: Path) -> None:
    """Make a written folder, all files below it, the checkpoint ``final``: manifest, to disk, rename.

    Files that ``final`` already had and ``staging`` has not are kept.

    Raises:
        CheckpointError: the disk is full or not writable; what was there before is whole.
    """
    with files.plain_errors(final):
        write(staging)
    files.install(staging, final)


def latest(run_dir: str | Path) -> Path | None:
    """The newest whole ``checkpoint-N`` below ``run_dir``, or ``None``; damaged ones are named in a warning."""
    numbered = {
        int(match[1]): path
        for path in Path(run_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-([0-9]{1,18})", path.name)) and path.is_dir()
    }
    for step in sorted(numbered, reverse=True):
        try:
            verify(numbered[step])
        except CheckpointError as error:
            logger.warning("%s is not whole, trying the one before it: %s", numbered[step].name, error)
        else:
            return numbered[step]
    return None


def _measure(folder: Path, name: str) -> Entry:
    path = folder / name
    return Entry(name=name, bytes=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
