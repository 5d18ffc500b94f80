"""Rewriting a checkpoint in another layout, and saying what that layout has no place for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..errors import CheckpointError
from . import manifest
from .access import read
from .folder import Folder
from .layout import LAYOUTS, Content, Layout, Stored


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` wrote.

    Attributes:
        path: the folder. layout: its layout. files: size of each file in bytes, by name.
        lost: what is not the same in it, a line each: of sites ``experts.dropout: 0.1, now 0.0 (30 sites)``.
    """

    path: Path
    layout: str
    files: dict[str, int]
    lost: list[str]


def convert(src: str | Path, dst: str | Path, *, to: str, **hub: Any) -> Conversion:
    """Rewrite a checkpoint in another layout, without loading its backbone. What was written is read back.

    Args:
        src: as in :func:`~moelora.checkpoints.read`. dst: a folder that does not exist or is empty. to: name of a
            layout. **hub: as in :func:`~moelora.checkpoints.read`.

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
    content = Content(stored.backbone, stored.architecture, stored.mixture, stored.sites(), tensors, stored.reward)
    size = sum(value.numel() * value.element_size() for value in tensors.values()) + 1_000_000
    with files.staged(final, need=size) as staging:
        target.write(staging, content)
        if files.MANIFEST in target.files:
            manifest.write(staging)
        lost = list(_differences(stored, target.read(Folder(staging))))
        written = {name: (staging / name).stat().st_size for name in files.files_below(staging)}
        files.install(staging, final)
    return Conversion(final, target.kind, written, lost)


def _differences(before: Stored, after: Stored) -> Iterator[str]:
    """A line for each thing that differs between a checkpoint and what was written of it."""
    yield from _changes("backbone", before.backbone.to_dict(), after.backbone.to_dict())
    gone = [
        name for name, value in before.architecture.to_dict().items() if value != after.architecture.to_dict()[name]
    ]
    if gone:
        yield f"architecture: {', '.join(gone)}, by which a wrong backbone is told, are not in it"
    dtypes = [", ".join(sorted({header.dtype for header in each.file.headers.values()})) for each in (before, after)]
    if dtypes[0] != dtypes[1]:
        yield f"dtype: {dtypes[0]}, now {dtypes[1]}"
    whole = [each.mixture.modules_to_save for each in (before, after)]
    if whole[0] != whole[1]:
        yield f"modules_to_save: {', '.join(whole[0])}, now {', '.join(whole[1])}"
    if before.reward is not None and after.reward is None:
        yield "reward: what makes it a reward model, now without: it gives no rewards"
    counts: dict[str, int] = {}
    options, others = _options(before), _options(after)
    for site, values in options.items():
        for line in _changes("", values, others.get(site, {})):
            counts[line] = counts.get(line, 0) + 1
    yield from (f"{line} ({count} sites)" for line, count in counts.items())


def _options(stored: Stored) -> dict[str, dict[str, Any]]:
    """What holds at each site, with one rank and one alpha for each expert."""
    found = {}
    for group, names in zip(stored.mixture.sites, stored.sites(), strict=True):
        for name in names:
            site = group.at(name)
            experts = site.experts.to_dict() | {"r": list(site.experts.ranks), "alpha": list(site.experts.alphas)}
            values = {"experts": experts, "router": {} if site.router is None else site.router.to_dict()}
            found[name] = {f"{part}.{key}": value for part, each in values.items() for key, value in each.items()}
    return found


def _changes(prefix: str, before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for key, value in before.items():
        if key in after and after[key] != value:
            yield f"{prefix}{'.' if prefix else ''}{key}: {_shown(value)}, now {_shown(after[key])}"


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
