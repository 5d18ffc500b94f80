"""Telling the layout of a folder by what its files contain, and saying what a folder is that has none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .. import files
from ..errors import CheckpointError
from . import manifest
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Layout

_MARKERS = (ADAPTER_CONFIG, "moelora_config.json", "xlora_config.json")
_WEIGHTS = re.compile(r"(?:model|pytorch_model|consolidated).*\.(?:safetensors|bin|pth)|.*\.gguf")
_STEP = re.compile(r"checkpoint-(\d{1,18})")


def candidates(folder: Folder, layouts: Iterable[str] | None = None) -> dict[str, tuple[Layout, str]]:
    """The layouts that a folder looks like, each with the reason; of all layouts, or of those named."""
    found = {}
    for name in LAYOUTS if layouts is None else layouts:
        layout: Layout = LAYOUTS.create(name)
        if reason := layout.detect(folder):
            found[name] = (layout, reason)
    return found


def only(folder: Folder, found: dict[str, tuple[Layout, str]]) -> Layout:
    """The one candidate.

    Raises:
        CheckpointError: there are several, or none; says what the folder is instead.
    """
    if len(found) == 1:
        return next(iter(found.values()))[0]
    if found:
        reasons = " and ".join(f"{name} ({reason})" for name, (_, reason) in found.items())
        raise CheckpointError(
            f"{folder.path}: expected the files of one layout, found those of {len(found)}: {reasons}; move one of "
            "them to another folder"
        )
    raise CheckpointError(f"{folder.path}: {what_else(folder)}")


def detect(folder: Folder) -> Layout:
    """The layout of a folder.

    Raises:
        CheckpointError: none fits, or more than one; the message says what is there and what would fit.
    """
    return only(folder, candidates(folder))


def what_else(folder: Folder) -> str:
    """What a folder is that is no checkpoint, and what to do."""
    names = folder.names()
    several = sorted({name.split("/")[0] for marker in _MARKERS for name in folder.below(marker)}, key=_in_order)
    if ADAPTER_CONFIG in names:
        return _adapter(folder)
    if several:
        return _several(folder, several)
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if weights:
        return _model(folder, names, weights)
    listed = ", ".join(names[:20]) or "nothing"
    return f"{_expected()}, found {listed}; give the folder that holds its files"


def _expected() -> str:
    return f"expected a checkpoint in a known layout ({', '.join(LAYOUTS)})"


def _adapter(folder: Folder) -> str:
    kind = folder.mapping(ADAPTER_CONFIG).get("peft_type")
    pair = folder.adapter()
    if pair is None:
        return f"expected {' or '.join(ADAPTER_TENSORS)} beside {ADAPTER_CONFIG}, found neither: copy the whole folder"
    if kind != "LORA":
        return (
            f"{_expected()}, but {ADAPTER_CONFIG} has peft_type {kind!r}, which is not read; an adapter that PEFT "
            "itself loads can be turned into a LoRA, which is, with peft.save_as_lora"
        )
    keys = ", ".join(list(pair[1].headers)[:3]) or "none"
    return (
        f"{_expected()}, but the tensors beside {ADAPTER_CONFIG} ({keys}, ...) are named as in none: convert them with "
        "the program that wrote them"
    )


def _several(folder: Folder, several: list[str]) -> str:
    shown = ", ".join(several[:20]) + (", ..." if len(several) > 20 else "")
    if any(_STEP.fullmatch(name) for name in several):
        whole = manifest.latest(folder.path) if folder.below(files.MANIFEST) else None
        newest = f"the newest whole one is {whole}" if whole else f"the newest is {several[-1]}"
        return f"expected a checkpoint, found a run with several ({shown}); give one of them, {newest}"
    return (
        f"expected a checkpoint, found a folder of {len(several)} ({shown}): give one of them (subfolder), or put "
        "several LoRAs together into one mixture with 'moelora compose'"
    )


def _model(folder: Folder, names: list[str], weights: list[str]) -> str:
    about: Any = folder.mapping("config.json") if "config.json" in names else {}
    kind = f" of type {about['model_type']!r}" if isinstance(about.get("model_type"), str) else ""
    size = sum(folder.size(name) for name in weights)
    return (
        f"expected a checkpoint of a mixture, found a whole model{kind} ({size / 1e9:.3g} GB in {len(weights)} files) "
        "without one: it can be a backbone; give the folder of the mixture, and this as its backbone"
    )


def _in_order(name: str) -> tuple[str, int]:
    match = _STEP.fullmatch(name)
    return ("checkpoint-", int(match[1])) if match else (name, 0)
