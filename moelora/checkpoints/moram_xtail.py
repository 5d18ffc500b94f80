"""The layout of MoRAM's vision code; see :class:`MoRAMXTAILLayout`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from .. import files
from ..config import BackboneConfig, MixtureConfig, SiteConfig
from ..errors import CheckpointError
from .by_module import ByModule, Places, columns, cut_modules, modules_of, rows
from .folder import Folder
from .layout import LAYOUTS, Architecture, Content, Layout, refuse
from .moram import against_growing, scaled
from .peft_files import UNKNOWN, refuse_unwritable
from .pickled import PickleFile
from .reading import parse
from .tensor_file import SelectedFile

WRITTEN = "moram.pth"
# The released commands; the file says nothing of them.
TEMPERATURE, THRESHOLD = 0.01, 0.2
_STATE = "state_dict/"
_RANKS = "lora_ranks/"
_INNER = {
    **{f"attn.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOWERS = {"transformer": "text_model", "visual.transformer": "vision_model"}
_THEIRS = re.compile(r"(?P<tower>(?:visual\.)?transformer)\.resblocks\.(?P<layer>\d{1,4})\.(?P<inner>[\w.]+)")
_OURS = re.compile(r"(?P<tower>\w+_model)\.encoder\.layers\.(?P<layer>\d{1,4})\.(?P<inner>[\w.]+)")
_KEY = re.compile(rf"{_STATE}(?P<path>{_THEIRS.pattern})\.(?P<tail>(?:old_)?lora_[AB])")


@dataclass
class MoRAMXTAILStored(ByModule):
    """A checkpoint of MoRAM's vision code; sites have transformers' names."""

    layout: ClassVar[str] = "moram_xtail"

    def places(self, site: str) -> Places:
        return _places(self.mixture.sites[0])

    def key(self, site: str, tail: str) -> str:
        return f"{self.prefix}{theirs(site)}.{tail}"


def _places(site: SiteConfig) -> Places:
    *old, new = site.experts.ranks
    places = {"lora_A": [("lora_A", rows(0, new))], "lora_B": [("lora_B", columns(0, new))]}
    if old:
        places["old_lora_A"] = [("old_lora_A", rows(0, sum(old)))]
        places["old_lora_B"] = [("old_lora_B", columns(0, sum(old)))]
    return places


@LAYOUTS.register("moram_xtail")
class MoRAMXTAILLayout(Layout):
    """What MoRAM's vision code writes for CLIP (arXiv 2506.21035; Artificer-AI-Lab/MoRAM aaa51d8, XTAIL/).

    ``<data set>.pth``, one for each task, with the atoms of all tasks so far
        ``torch.save`` of ``{"state_dict": ..., "lora_ranks": ...}``. The first, for each adapted linear of open_clip's
        CLIP: ``<module>.lora_A`` (r, in), ``<module>.lora_B`` (out, r), from the second task on ``<module>.old_lora_A``
        (Q, in) and ``<module>.old_lora_B`` (out, Q) with the atoms of older tasks, oldest first, and ``<module>.gate``
        (1, r), which nothing reads and which is left out here. The second, for each module: ``rank`` r and ``old_rank``
        Q, whole numbers.

    Modules have open_clip's names there and those of transformers' ``CLIPModel`` here:

    ============================================= ===================================================
    ``visual.transformer.resblocks.{l}``          ``vision_model.encoder.layers.{l}``
    ``transformer.resblocks.{l}``                 ``text_model.encoder.layers.{l}``
    ``.attn.{q,k,v,out}_proj``                    ``.self_attn.{q,k,v,out}_proj``
    ``.mlp.c_fc``, ``.mlp.c_proj``                ``.mlp.fc1``, ``.mlp.fc2``
    ============================================= ===================================================

    Told by what the file holds, since its name is anything: give a folder with one of these files. On the hub they are
    not looked for, because a ``.pth`` there may be a whole model: download the file first. Neither the backbone is
    named (load a ``CLIPModel`` and pass it) nor are the router's options: as in the released commands the temperature
    is 0.01, the threshold 0.2, and r atoms are chosen. The scale is 1; another one is multiplied into ``lora_B`` when
    this layout is written.

    Quirks: open_clip's attention has one matrix for q, k and v, which their code splits; transformers' has three.
    """

    files = ()

    def detect(self, folder: Folder) -> str | None:
        found = list(_files(folder))
        return f"{found[0].path.name} holds lora_ranks" if found else None

    def read(self, folder: Folder) -> MoRAMXTAILStored:
        file, *others = _files(folder)
        if others:
            named = ", ".join(each.path.name for each in (file, *others))
            raise CheckpointError(
                f"{folder.path}: expected one file of a task, found {named}: each holds the tasks before it too; put "
                "the one that you want, such as that of the last task, in a folder of its own"
            )
        modules = modules_of(file, _KEY)
        sizes = {path: (_rows(shapes, "lora_A"), _rows(shapes, "old_lora_A")) for path, shapes in modules.items()}
        _compare_ranks(file, sizes)
        rank, old = next(iter(sizes.values()), (0, 0))
        if not rank or old % rank:
            raise CheckpointError(
                f"{file.path}: expected modules of CLIP with lora_A, and a multiple of its rows in old_lora_A, found "
                f"{len(modules)} modules, the first with {rank} and {old} rows: it is no whole checkpoint of MoRAM"
            )
        try:
            groups = [sorted((ours(path) for path in modules), key=_in_order)]
        except CheckpointError as error:
            raise CheckpointError(f"{file.path}: {error}") from None
        experts = {"kind": "rank1", "num_experts": old // rank + 1, "r": rank, "alpha": rank}
        router = {"kind": "moram", "top_k": rank, "temperature": TEMPERATURE, "threshold": THRESHOLD}
        site = {"target": groups[0], "experts": experts, "router": router}
        stored = MoRAMXTAILStored(
            folder=folder.path,
            backbone=BackboneConfig(name=UNKNOWN, quantization=None),
            architecture=Architecture(),
            mixture=parse(MixtureConfig, {"sites": [site]}, file.path),
            file=SelectedFile(file, lambda key: not key.endswith(".gate")),
            detail=f"temperature {TEMPERATURE:g} and threshold {THRESHOLD:g}, which are not in the file",
            prefix=_STATE,
            groups=groups,
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        refuse_unwritable("moram_xtail", _against(content))
        site = content.mixture.sites[0]
        content = scaled(content, ["old_lora_B", "lora_B"])
        tensors = cut_modules(content, "", lambda _: _places(site))
        state = {_key_of(key): value.detach().cpu().contiguous() for key, value in tensors.items()}
        *old, new = site.experts.ranks
        ranks = {theirs(name): {"rank": new, "old_rank": sum(old)} for names in content.sites for name in names}
        try:
            torch.save({"state_dict": state, "lora_ranks": ranks}, folder / WRITTEN)
        except RuntimeError as error:  # how torch reports a full disk
            raise files.os_error(error, folder / WRITTEN) from error


def _files(folder: Folder) -> Iterator[PickleFile]:
    """Those of its ``.pth`` files that MoRAM wrote; training runs have others, such as random states."""
    for name in filter(folder.has, folder.names("*.pth")):
        try:
            file = PickleFile(folder.path / name, depth=3)
        except CheckpointError:
            continue
        if any(key.startswith(_RANKS) for key in file.plain):
            yield file


def theirs(site: str) -> str:
    """The module of open_clip for one of transformers."""
    return _renamed(site, _OURS, {v: k for k, v in _TOWERS.items()}, {v: k for k, v in _INNER.items()}, ".resblocks.")


def ours(path: str) -> str:
    """The module of transformers for one of open_clip."""
    return _renamed(path, _THEIRS, _TOWERS, _INNER, ".encoder.layers.")


def _renamed(path: str, form: re.Pattern[str], towers: Mapping[str, str], inner: Mapping[str, str], layers: str) -> str:
    match = form.fullmatch(path)
    if match is None or match["tower"] not in towers or match["inner"] not in inner:
        raise CheckpointError(f"{path}: expected a linear of CLIP's attention or MLP, which MoRAM's vision code adapts")
    return f"{towers[match['tower']]}{layers}{match['layer']}.{inner[match['inner']]}"


def _key_of(key: str) -> str:
    site, _, tail = key.rpartition(".")
    return f"{theirs(site)}.{tail}"


def _in_order(site: str) -> tuple[str, int]:
    match = _OURS.fullmatch(site)
    assert match is not None
    return match["tower"], int(match["layer"])


def _rows(shapes: Mapping[str, tuple[int, ...]], tensor: str) -> int:
    return shapes[tensor][0] if shapes.get(tensor) else 0


def _compare_ranks(file: PickleFile, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check that ``lora_ranks`` says of every module what its tensors say.

    Raises:
        CheckpointError: it does not; every difference is named.
    """
    said = {key.removeprefix(_RANKS): value for key, value in file.plain.items() if key.startswith(_RANKS)}
    shown: dict[str, Any] = {}
    for path, (rank, old) in sizes.items():
        shown |= {f"{path}/rank": rank, f"{path}/old_rank": old}
    problems = [
        f"misshapen: lora_ranks of {name}: expected {shown.get(name, 'no such module')}, found {said.get(name)!r}"
        for name in dict.fromkeys((*shown, *said))
        if shown.get(name) != said.get(name)
    ]
    refuse(file.path, problems, "its CLIP")


def _against(content: Content) -> Iterator[str]:
    """What the layout cannot express of a mixture."""
    yield from against_growing(content)
    for name in (name for names in content.sites for name in names):
        try:
            theirs(name)
        except CheckpointError as error:
            yield str(error)
            return
