"""One finished LoRA adapter, held apart from any backbone.

Shapes: D in, O out, r rank, which may differ from module to module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoints
from ..checkpoints import Architecture
from ..config import BackboneConfig
from ..errors import CheckpointError


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one linear: ``scale * B @ A``.

    Attributes:
        A: (r, D). B: (O, r). scale: alpha / r, or what the adapter has in its place.
    """

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: factors by the path of the module that they belong to, in the order of the backbone's layers.

    Attributes:
        name: what messages and experts call it. backbone, architecture: what it says it was trained on.
    """

    name: str
    factors: Mapping[str, Factors]
    backbone: BackboneConfig
    architecture: Architecture


def read_adapter(path: str | Path, name: str | None = None, **hub: Any) -> Adapter:
    """Read a finished adapter in any layout that :mod:`moelora.checkpoints` knows, such as a PEFT LoRA folder.

    Args:
        path: a folder or a hub id. name: by default the folder's name. **hub: as in :func:`moelora.from_pretrained`.

    Raises:
        CheckpointError: it cannot be read, or is more than one LoRA expert that is always on: it has several experts, a
            router, magnitudes (DoRA), or modules that are saved whole.
    """
    stored = checkpoints.read(path, **hub)
    reasons = [
        f"{len(modules)} sites with {site.experts.num_experts} experts of kind {site.experts.kind}"
        for site, modules in zip(stored.mixture.sites, stored.sites(), strict=True)
        if site.experts.num_experts > 1 or site.router is not None or site.experts.kind not in ("lora", "rslora")
    ]
    if stored.mixture.modules_to_save:
        reasons.append(f"modules that are saved whole: {', '.join(stored.mixture.modules_to_save)}")
    if reasons:
        raise CheckpointError(
            f"{path}: expected plain LoRA, one factor pair for each linear, found {'; '.join(reasons)}"
        )
    declared = stored.declared()
    tensors = stored.tensors(declared)
    factors = {
        f"{module}{projection.replace('__', '.')}": Factors(
            tensors[f"{module}{projection}.lora_A"],
            tensors[f"{module}{projection}.lora_B"],
            site.experts.at(module).scales[0],
        )
        for site, modules in zip(stored.mixture.sites, stored.sites(), strict=True)
        for module in modules
        for projection in _projections(module, declared)
    }
    return Adapter(name or stored.folder.name, factors, stored.backbone, stored.architecture)


def _projections(module: str, names: Iterable[str]) -> list[str]:
    """What stands between a site and its factors: nothing at a linear, ``.up_proj`` and so on in a block.

    A block with one expert that is always on is the same as that expert's factors at the block's linears.
    """
    parts = [name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")]
    return [part.removeprefix(module) for part in parts if part == module or part.startswith(f"{module}.")]
