"""The native layout; see :class:`NativeLayout`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__, files
from ..config import FORMAT_VERSION, BackboneConfig, Closed, MixtureConfig
from ..errors import CheckpointError
from ..sites import sharing_key
from . import manifest
from .folder import Folder
from .layout import LAYOUTS, Architecture, Content, Layout, Part, Shape, Stored
from .reading import is_hub_id, load_mapping, not_finite, open_tensors, parse, regular_file

logger = logging.getLogger(__name__)

CONFIG = "moelora_config.json"
TENSORS = "moelora.safetensors"
CARD = "README.md"


class NativeConfig(Closed):
    """The contents of ``moelora_config.json``."""

    format_version: int
    moelora: str
    backbone: BackboneConfig
    architecture: Architecture
    mixture: MixtureConfig
    sites: list[list[Annotated[str, Field(pattern=r"^[\w.-]+$")]]]
    reward: dict[str, Any] | None = None


@dataclass
class NativeStored(Stored):
    """A native checkpoint; the file has the mixture's own names."""

    layout: ClassVar[str] = "native"
    names: list[list[str]]

    def declared(self) -> dict[str, Shape]:
        return {key: header.shape for key, header in self.file.headers.items()}

    def sites(self) -> list[list[str]]:
        return self.names

    def to_attach(self) -> MixtureConfig:
        """The mixture with site names in place of regular expressions: one from a file could run for ever."""
        sites = [
            site.model_copy(update={"target": list(names), "layers": None})
            if any(target.startswith("re:") for target in site.target)
            else site
            for site, names in zip(self.mixture.sites, self.names, strict=True)
        ]
        return self.mixture.model_copy(update={"sites": sites})

    def parts(self, declared: Mapping[str, Shape]) -> dict[str, list[Part]]:
        return {name: [Part(self._key(name), shape)] for name, shape in declared.items()}

    def _key(self, name: str) -> str:
        """The name in the file. A router that sites share is called after the first of them, and a layout from which
        the file was converted may not have known which module of a layer the backbone has first.
        """
        path, _, tail = name.rpartition(".router.")
        for site, names in zip(self.mixture.sites, self.names, strict=True):
            if name not in self.file.headers and path in names and site.router is not None:
                share = sharing_key(path, site.router.share)
                others = (other for other in names if sharing_key(other, site.router.share) == share)
                return next((key for key in (f"{o}.router.{tail}" for o in others) if key in self.file.headers), name)
        return name


@LAYOUTS.register("native")
class NativeLayout(Layout):
    """The layout that moelora trains, saves and resumes in: one folder.

    ``moelora_config.json``
        format_version (1); moelora, the version that wrote it; backbone (name, quantization, dtype, revision,
        subfolder); architecture (model_type, hidden_size, num_hidden_layers, hidden_act: compared with the backbone
        before anything is attached); mixture, every field written out; sites, for each entry of mixture.sites the
        names of its modules in the order of the backbone; reward, of a reward model only: its categories, their
        capabilities and how they are joined (``moelora/reward/config.py``).
    ``moelora.safetensors``
        the adapter's tensors and nothing else, in the dtype they were trained in: ``<site>.lora_A`` (R, in) and
        ``<site>.lora_B`` (out, R) at a linear site, ``<site>.<projection>.lora_A`` and so on at a block site,
        ``<site>.router.<tensor>``; R is the sum of the ranks of all experts, expert 0 first.
    ``README.md``
        the model card.
    ``manifest.json``
        written last: name, size and sha256 of each file. In a checkpoint of a training run it lists the trainer's files
        as well. Reading verifies the two files above; :func:`~moelora.checkpoints.verify` all of them.

    Quirks: where a target is a regular expression, loading uses the stored site names in its place, so that no
    expression from a file is ever run.
    """

    files = (CONFIG, TENSORS, CARD, files.MANIFEST)

    def detect(self, folder: Folder) -> str | None:
        return f"it has {CONFIG}" if folder.has(CONFIG) else None

    def read(self, folder: Folder) -> NativeStored:
        path = folder.path / CONFIG
        with files.reading(folder.path):
            values = load_mapping(path)
            manifest.refuse_newer(path, values)
            config = parse(NativeConfig, values, path)
            file = open_tensors(folder.path / TENSORS)
            manifest.check(folder.path, [CONFIG, TENSORS])
        if len(config.sites) != len(config.mixture.sites):
            raise CheckpointError(
                f"{path}: sites: expected one list for each of the {len(config.mixture.sites)} entries of "
                f"mixture.sites, found {len(config.sites)}; the file was edited: restore it"
            )
        _refuse_huge(path, config, {key: header.shape for key, header in file.headers.items()})
        parts = (config.backbone, config.architecture, config.mixture, file, config.sites)
        return NativeStored(folder.path, *parts, reward=config.reward)

    def write(self, folder: Path, content: Content) -> None:
        _write(folder, content, None)


def save(
    path: str | Path,
    mixture: MixtureConfig,
    backbone: BackboneConfig,
    tensors: Mapping[str, Tensor],
    *,
    sites: Sequence[Sequence[str]],
    architecture: Architecture,
    card: str | None = None,
    reward: Mapping[str, Any] | None = None,
) -> None:
    """Write a native checkpoint; a reader sees the old one or the new one, never a part.

    Files of others in the folder stay, and stay in its manifest.

    Args:
        tensors: by the mixture's names. sites: as in :class:`~moelora.checkpoints.layout.Content`.
        card: text of the README.md; without it a short one is written, unless there already is one.
        reward: as in :class:`~moelora.checkpoints.layout.Content`.

    Raises:
        CheckpointError: a tensor is not finite, or the disk is full or not writable; the old checkpoint is whole.
    """
    folder = Path(path)
    content = Content(backbone, architecture, mixture, sites, tensors, reward)
    bad = [f"{name} ({count} elements)" for name, value in tensors.items() if (count := not_finite(value))]
    if bad:
        raise CheckpointError(
            f"{folder}: not saved: expected finite numbers, found NaN or infinite ones in {', '.join(bad)}; training "
            "has diverged: go back to the last checkpoint, with a lower learning rate"
        )
    size = sum(value.numel() * value.element_size() for value in tensors.values()) + 1_000_000
    with files.staged(folder, need=size) as staging:
        if card is None and (folder / CARD).is_file():
            card = (folder / CARD).read_text(encoding="utf-8", errors="surrogateescape")
        _write(staging, content, card)
        manifest.write(staging, keep=_manifest_before(folder))
        files.install(staging, folder)


def _manifest_before(folder: Path) -> manifest.Manifest | None:
    files.recover(folder)
    if not regular_file(folder / files.MANIFEST):
        return None
    try:
        return manifest.read(folder)
    except CheckpointError as error:
        logger.warning("replacing a damaged manifest: %s", error)
        return None


def _write(folder: Path, content: Content, card: str | None) -> None:
    config = NativeConfig(
        format_version=FORMAT_VERSION,
        moelora=__version__,
        backbone=content.backbone,
        architecture=content.architecture,
        mixture=content.mixture,
        sites=[list(names) for names in content.sites],
        reward=None if content.reward is None else dict(content.reward),
    )
    (folder / CONFIG).write_text(config.to_json(), encoding="utf-8")
    # Bytes that are no UTF-8 are those of a card that was there.
    (folder / CARD).write_text(card or default_card(content), encoding="utf-8", errors="surrogateescape")
    values = {name: value.detach().cpu().contiguous() for name, value in content.tensors.items()}
    try:
        save_file(values, folder / TENSORS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise files.os_error(error, folder / TENSORS) from error
    # safetensors makes a file that only its owner may read.
    (folder / TENSORS).chmod((folder / CONFIG).stat().st_mode)


def default_card(content: Content) -> str:
    """A short model card: what it is, on which backbone, and how to load it."""
    name = content.backbone.name
    rows = "".join(
        f"| {', '.join(site.target)} | {len(names)} | {site.experts.num_experts} × {site.experts.kind}, "
        f"r = {site.experts.r} | {site.router.kind if site.router is not None else 'always on'} |\n"
        for site, names in zip(content.mixture.sites, content.sites, strict=True)
    )
    count = sum(value.numel() for value in content.tensors.values())
    shown = json.dumps(name)
    return (
        f"{front_matter(name)}\n# A mixture of LoRA experts\n\n"
        f"{count:,} adapter parameters on the frozen backbone `{name}`, written by moelora {__version__}.\n\n"
        f"| target | sites | experts | router |\n| --- | --- | --- | --- |\n{rows}\n"
        f'```python\nimport moelora\n\nmodel = moelora.from_pretrained("path/to/this/folder", backbone={shown})\n```\n'
    )


def front_matter(backbone: str, *tags: str) -> str:
    """The YAML at the top of a model card, by which the hub finds and labels it."""
    front: dict[str, Any] = {"library_name": "moelora", "tags": ["moelora", "mixture-of-experts", "lora", *tags]}
    if "/" in backbone and is_hub_id(backbone):
        front["base_model"] = backbone
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---\n"


def _refuse_huge(path: Path, config: NativeConfig, shapes: Mapping[str, Shape]) -> None:
    """Refuse a configuration that would allocate more than the file has numbers for."""
    for index, (site, names) in enumerate(zip(config.mixture.sites, config.sites, strict=True)):
        stacked = max(site.experts.at(name).total_rank for name in names) if names else 0
        own = tuple(f"{name}." for name in names)
        # A bank that has grown keeps the ranks of older tasks in a tensor of their own, or in one for each task.
        mine = {key: max(shape, default=0) for key, shape in shapes.items() if key.startswith(own)}
        older = {name: sum(mine[key] for key in mine if key.startswith(name) and ".old_lora_A" in key) for name in own}
        found = max((size for key, size in mine.items() if ".old_" not in key), default=0) + max(
            older.values(), default=0
        )
        if stacked > found:
            raise CheckpointError(
                f"{path}: mixture.sites.{index}.experts: num_experts and r ask for a stacked rank of {stacked}, but no "
                f"tensor of these sites in {TENSORS} is longer than {found}; the file was edited: restore it"
            )
