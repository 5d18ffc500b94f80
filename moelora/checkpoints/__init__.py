"""Checkpoints: reading any published layout, writing and converting, and the guarantees of a save."""

from __future__ import annotations

from . import (
    flexmore,
    flylora,
    hydralora,
    loramoe,
    manifest,
    meteora,
    mixlora,
    moe_peft,
    mola,
    moram,
    moram_xtail,
    native,
    peft,
    peft_arrow,
    peft_xlora,
    phi4,
    smora,
    xlora,
)
from .access import read
from .conversion import Conversion, convert
from .description import Description, describe
from .layout import LAYOUTS, Architecture, Content, Layout, Part, Stored
from .manifest import commit, latest, verify

names = LAYOUTS.names

__all__ = [
    "LAYOUTS",
    "Architecture",
    "Content",
    "Conversion",
    "Description",
    "Layout",
    "Part",
    "Stored",
    "commit",
    "convert",
    "describe",
    "flexmore",
    "flylora",
    "hydralora",
    "latest",
    "loramoe",
    "manifest",
    "meteora",
    "mixlora",
    "moe_peft",
    "mola",
    "moram",
    "moram_xtail",
    "names",
    "native",
    "peft",
    "peft_arrow",
    "peft_xlora",
    "phi4",
    "read",
    "smora",
    "verify",
    "xlora",
]
