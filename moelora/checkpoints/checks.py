"""What layouts check whose configuration promises more than its own keys say: how many, how large, in which layers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from ..errors import CheckpointError
from .layout import Content
from .tensor_file import TensorFile

logger = logging.getLogger(__name__)

_IN_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<layer>[0-9]{1,6})\.(?P<inner>.+)")


def refuse_excess(path: Path, file: TensorFile, **claimed: int) -> None:
    """Refuse numbers of experts and ranks beyond all that a file holds, before a list is made of them.

    Args:
        path: of the configuration. claimed: by their keys in it.

    Raises:
        CheckpointError: one is larger than the number of tensors and than the longest side of any.
    """
    most = max([len(file.headers), *(size for header in file.headers.values() for size in header.shape)])
    for key, value in claimed.items():
        if value > most:
            raise CheckpointError(
                f"{path}: {key}: expected at most {most}, as {file.path.name} holds nothing longer, found {value}; the "
                "configuration was edited or belongs to another checkpoint: restore it"
            )


def gaps(sites: Iterable[str], layers: int | None = None) -> list[str]:
    """The first ten modules that are missing where each that is in one layer should be in all of them.

    Args:
        sites: paths of modules. layers: how many layers the backbone has; by default as many as are named.
    """
    found: dict[str, dict[str, set[int]]] = {}
    for site in sites:
        if match := _IN_LAYER.fullmatch(site):
            found.setdefault(match["stack"], {}).setdefault(match["inner"], set()).add(int(match["layer"]))
    missing = (
        f"{stack}{layer}.{name}"
        for stack, inner in found.items()
        for name, each in inner.items()
        for layer in range(max(layers or 0, 1 + max(max(others) for others in inner.values())))
        if layer not in each
    )
    return list(islice(missing, 10))


def refuse_gaps(path: Path, sites: Sequence[str], targets: Sequence[str] | str | None) -> None:
    """Refuse a file that lacks whole modules, which no missing tensor of a module that is there would tell.

    The code of the authors puts experts into every module whose name ends with a target, and leaves those without
    tensors as they are at the start; tensors of other modules it passes over.

    Args:
        path: of the file with the tensors. sites: modules that have tensors in it. targets: ``target_modules`` of the
            configuration; a regular expression is not run.

    Raises:
        CheckpointError: a target is in some layers only or in none, or a module is no target.
    """
    problems = []
    if missing := gaps(sites):
        problems.append(f"expected tensors of {', '.join(missing)}, as of the other layers, found none")
    if isinstance(targets, Sequence) and not isinstance(targets, str):
        if idle := [target for target in targets if not any(site.endswith(target) for site in sites)]:
            problems.append(
                f"expected tensors of {', '.join(idle).replace('.', '')}, which target_modules names, found none"
            )
        if strange := [site for site in sites if not site.endswith(tuple(targets))]:
            problems.append(f"expected no tensors of {', '.join(strange[:10])}, which target_modules does not name")
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}: copy the whole checkpoint again")


def against_gaps(content: Content) -> list[str]:
    """Reasons against a layout whose readers put experts into every layer."""
    sites = [name for names in content.sites for name in names]
    if missing := gaps(sites, content.architecture.num_hidden_layers):
        return [f"its readers put experts into every layer, this mixture has none at {', '.join(missing[:5])}"]
    return []


def tell_lost(layout: str, options: Iterable[str]) -> None:
    """Warn of options of training that a layout has no key for."""
    if named := ", ".join(options):
        logger.warning("options of training that layout %r does not keep: %s", layout, named)


def against_their_llama(layout: str, content: Content) -> list[str]:
    """Reasons against the layouts of LoRAMoE and HydraLoRA, whose authors changed PEFT and transformers alike."""
    targets = sorted({name.rpartition(".")[2] for names in content.sites for name in names})
    if len(targets) == 1:
        return [f"its code breaks with a single target module, found {targets[0]}"]
    if targets != ["down_proj", "gate_proj", "up_proj"]:
        logger.warning(
            "the released code of layout %r runs only with experts at gate_proj, up_proj and down_proj, all of them: "
            "with %s it has to be changed",
            layout,
            ", ".join(targets),
        )
    return []
