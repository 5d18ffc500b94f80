"""What PEFT's layout of Arrow consists of: the options of the router, and its adapters as experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..config import Closed
from ..registry import ROUTERS
from ..routing import SiteInfo
from .layout import Part, Shape, Stored
from .tensor_file import Header, TensorFile
from .xlora_parts import Expert, union

PROTOTYPES = ".router.prototypes"
ITERATIONS = 15  # for which PEFT has no option

Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class ArrowOptions(Closed):
    """``arrow_config`` in the ``adapter_config.json`` of the router."""

    top_k: Annotated[int, Field(gt=0)] = 3
    router_temperature: Annotated[float, Field(gt=0)] = 1.0
    use_gks: bool = False
    task_adapter_names: Annotated[list[Name], Field(min_length=1)]
    gks_adapter_names: list[Name] | None = None
    rng_seed: int | None = None

    def router(self) -> dict[str, Any]:
        """Our router with these options."""
        values = {"kind": "arrow", "top_k": self.top_k, "temperature": self.router_temperature}
        if self.rng_seed is None:
            return {**values, "method": "exact"}
        return {**values, "method": "power", "n_iter": ITERATIONS, "seed": self.rng_seed}

    def general(self) -> list[str]:
        """Names of the adapters that are subtracted."""
        return (self.gks_adapter_names or []) if self.use_gks else []


class Subtracted(TensorFile):
    """The tensors of finished adapters, less the mean of the same tensor of general ones, in float32 as PEFT does it.

    Args:
        adapters: keys after a label and a slash. general: files with the same keys, without label.
    """

    def __init__(self, adapters: TensorFile, general: Sequence[TensorFile]) -> None:
        self.path = adapters.path
        self.headers = {key: Header("float32", header.shape) for key, header in adapters.headers.items()}
        self._adapters = adapters
        self._general = general

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        found = {}
        for key, value in self._adapters.load(keys).items():
            inner = key.rpartition("/")[2]
            mean = torch.stack([file.load([inner])[inner].float() for file in self._general]).mean(0)
            found[key] = value.float() - mean
        return found


@dataclass
class PeftArrowStored(Stored):
    """An Arrow router of PEFT with its task adapters.

    Attributes:
        experts: the adapters, in the order of ``task_adapter_names``.
    """

    layout: ClassVar[str] = "peft_arrow"
    experts: Sequence[Expert]

    def sites(self) -> list[list[str]]:
        return [union(self.experts)]

    def declared(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for path in union(self.experts):
            factors = [expert.factors[path] for expert in self.experts]
            total, (width, out) = sum(factor.rank for factor in factors), factors[0].widths
            shapes |= {f"{path}{PROTOTYPES}": (len(factors), width)}
            shapes |= {f"{path}.lora_A": (total, width), f"{path}.lora_B": (out, total)}
        return shapes

    def parts(self, declared: Mapping[str, Shape]) -> dict[str, list[Part]]:
        return {name: self._parts(name, shape) for name, shape in declared.items()}

    def derive(self, name: str, shape: Shape, read: Callable[[str], Tensor]) -> Tensor:
        """The prototypes of a site, made of its experts by the router itself."""
        path = name.removesuffix(PROTOTYPES)
        site = self.mixture.sites[0].at(path)
        return prototypes(site.router, read(f"{path}.lora_A"), read(f"{path}.lora_B"), site.experts.ranks)

    def _parts(self, name: str, shape: Shape) -> list[Part]:
        path, _, which = name.rpartition(".")
        result: list[Part] = []
        start = 0
        for expert in self.experts:
            if (factor := expert.factors.get(path)) is None:
                continue
            piece = slice(start, start + factor.rank)
            start += factor.rank
            if which == "lora_A":
                result.append(Part(f"{expert.label}/{factor.A}", (factor.rank, shape[1]), (piece,)))
            else:
                result.append(Part(f"{expert.label}/{factor.B}", (shape[0], factor.rank), (slice(None), piece)))
        return result


def prototypes(router: Any, lora_A: Tensor, lora_B: Tensor, ranks: Sequence[int]) -> Tensor:
    """(E, D) float32: the prototypes that a router of these options makes of the experts of a site."""
    width = lora_A.shape[1]
    site = SiteInfo("", None, width, lora_B.shape[0], tuple(ranks), (1.0,) * len(ranks))
    made = ROUTERS.create("arrow", router, site)
    made.fit(lora_A, lora_B, ranks)
    found: Tensor = made.prototypes
    return found
