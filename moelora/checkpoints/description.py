"""What a checkpoint holds, as far as its configuration and the headers of its tensors tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..config import BackboneConfig, MixtureConfig
from . import manifest
from .access import read
from .layout import Architecture
from .reading import regular_file


@dataclass(frozen=True)
class Description:
    """What :func:`describe` found out.

    Attributes:
        path: the folder; of a checkpoint of the hub that of its files in the cache.
        layout, detail: name of the layout and what else there is to say, such as a generation.
        sites: for each entry of ``mixture.sites`` the names of its sites.
        parameters: of the adapter, over all experts and routers. dtypes: parameters by dtype.
        bytes: size of all files. damage: what does not agree with the manifest, ``None`` where there is no manifest.
        reward: of a reward model its configuration, see ``moelora/reward/config.py``.
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
    reward: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        configs = {name: getattr(self, name).to_dict() for name in ("backbone", "architecture", "mixture")}
        return {**{name: value for name, value in asdict(self).items() if name not in configs}, **configs}


def describe(path: str | Path, **hub: Any) -> Description:
    """Layout, backbone, sites, experts and size of a checkpoint, from its configuration and headers alone.

    Raises:
        CheckpointError: as in :func:`~moelora.checkpoints.read`.
    """
    stored = read(path, **hub)
    folder = stored.folder
    dtypes: dict[str, int] = {}
    for header in stored.file.headers.values():
        dtypes[header.dtype] = dtypes.get(header.dtype, 0) + math.prod(header.shape)
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
        reward=stored.reward,
    )
