"""A mixture as X-LoRA's files have it: a classifier, and one plain LoRA adapter for each expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..config import MixtureConfig, SiteConfig
from ..errors import CheckpointError
from .layout import LAYOUTS, Content
from .peft_files import refuse_unwritable
from .peft_patterns import most_common, site_patterns
from .xlora_parts import NAMES, ROUTER


@dataclass(frozen=True)
class Plan:
    """What of a mixture goes where.

    Attributes:
        names: of the experts, which their folders get. layers: the classifier's tensors, first linear to last, each by
            ``weight`` and ``bias``.
    """

    content: Content
    names: Sequence[str]
    layers: Sequence[Mapping[str, Tensor]]

    @classmethod
    def of(cls, layout: str, content: Content) -> Plan:
        """Check that the layout has a place for everything.

        Raises:
            CheckpointError: it has not; the message says all that stands against it.
        """
        refuse_unwritable(layout, _against(content))
        site = content.mixture.sites[0]
        paths = {path for paths in content.sites for path in paths}
        layers: dict[int, dict[str, Tensor]] = {}
        left = []
        for name, value in content.tensors.items():
            owner, marker, tail = name.rpartition(ROUTER)
            if marker and owner in paths:
                index, _, which = tail.partition(".")
                layers.setdefault(int(index), {})[which] = value
            elif name.rpartition(".lora_")[0] not in paths:
                left.append(name)
        if left:
            raise CheckpointError(f"{', '.join(left[:20])}: no place in layout {layout!r}: keep the native layout")
        names = getattr(site.experts, "names", None) or [f"adapter_{e + 1}" for e in range(site.experts.num_experts)]
        return cls(content, names, [layers[index] for index in sorted(layers)])

    @property
    def router(self) -> Any:
        return self.site.router

    @property
    def site(self) -> SiteConfig:
        return self.content.mixture.sites[0]

    def options(self) -> dict[str, Any]:
        """What both configuration files have."""
        values: dict[str, Any] = {theirs: getattr(self.router, ours) for ours, theirs in NAMES.items()}
        if values["scaling_pass_value"] is None:
            values["scaling_pass_value"] = 1 / self.site.experts.num_experts
        trained = self.site.experts.kind != "frozen"
        return {"hidden_size": self.layers[0]["weight"].shape[1], "use_trainable_adapters": trained, **values}

    def classifier(self, linears: Sequence[str]) -> dict[str, Tensor]:
        """The classifier's tensors under these names of its linears."""
        named = zip(linears, self.layers, strict=True)
        return {f"{name}.{which}": value for name, layer in named for which, value in layer.items()}

    def write_experts(self, folder: Path) -> None:
        """Write each expert as an adapter in PEFT's layout, in a folder of its own."""
        peft = LAYOUTS.create("peft")
        for name, content in zip(self.names, alone(self.content), strict=True):
            (folder / name).mkdir()
            peft.write(folder / name, content)


def alone(content: Content) -> Iterator[Content]:
    """Each expert of a mixture of linears as a mixture of its own, always on at the sites where it has anything.

    Args:
        content: with one configuration of sites.
    """
    site = content.mixture.sites[0]
    for expert in range(site.experts.num_experts):
        ranks, alphas, tensors = {}, {}, {}
        for path in content.sites[0]:
            experts = site.experts.at(path)
            rank, start = experts.ranks[expert], sum(experts.ranks[:expert])
            if rank == 0:
                continue
            ranks[path], alphas[path] = rank, experts.alphas[expert]
            piece = slice(start, start + rank)
            tensors[f"{path}.lora_A"] = content.tensors[f"{path}.lora_A"][piece].clone()
            tensors[f"{path}.lora_B"] = content.tensors[f"{path}.lora_B"][:, piece].contiguous()
        whole = len(ranks) == len(content.sites[0])
        mixture = _one_expert(site, expert, ranks, alphas, whole)
        yield replace(content, mixture=mixture, sites=[list(ranks)], tensors=tensors)


def _one_expert(
    site: SiteConfig, expert: int, ranks: Mapping[str, int], alphas: Mapping[str, float], whole: bool
) -> MixtureConfig:
    """The configuration of :func:`alone`.

    Args:
        ranks, alphas: of the sites where the expert has anything. whole: those are all.
    """
    scaling = _scalings(site)[expert]
    kind = {"kind": scaling} if isinstance(scaling, str) else {"kind": "frozen", "scaling": [scaling]}
    r, alpha = most_common(ranks.values()), most_common(alphas.values())
    experts = {
        **kind,
        "num_experts": 1,
        "r": r,
        "alpha": alpha,
        "dropout": site.experts.dropout,
        "rank_pattern": site_patterns(ranks, r),
        "alpha_pattern": site_patterns(alphas, alpha),
    }
    where: dict[str, Any] = {"target": list(ranks)}
    if whole:
        where = {"target": site.target, "layers": site.layers}
    return MixtureConfig.parse({"sites": [{**where, "experts": experts}]})


def _scalings(site: SiteConfig) -> list[Any]:
    """How each expert is scaled: ``lora``, ``rslora``, or a number."""
    experts = site.experts
    scaling = getattr(experts, "scaling", experts.kind)
    return scaling if isinstance(scaling, list) else [scaling] * experts.num_experts


def _against(content: Content) -> Iterator[str]:
    """Reasons against both layouts."""
    mixture = content.mixture
    if mixture.modules_to_save:
        yield "it has no modules that are saved whole"
    if len(mixture.sites) > 1:
        yield f"it has one configuration of experts for all linears, this mixture has {len(mixture.sites)}"
    site = mixture.sites[0]
    if site.router is None or site.router.kind != "xlora":
        yield f"its router is xlora, found {'none' if site.router is None else site.router.kind}"
    elif site.router.share != "all":
        yield f"all linears have one classifier (share: all), found share: {site.router.share}"
    if site.experts.kind not in ("frozen", "lora", "rslora"):
        yield f"its experts are plain LoRA (frozen, lora, rslora), found {site.experts.kind}"
        return
    blocks = [path for path in content.sites[0] if f"{path}.lora_B" not in content.tensors]
    if blocks:
        yield f"its sites are linears, {blocks[0]!r} is an FFN block"
        return
    ranks = [site.experts.at(path).ranks for path in content.sites[0]]
    if empty := [e for e in range(site.experts.num_experts) if not any(each[e] for each in ranks)]:
        yield f"an adapter has at least one linear, expert {empty[0]} has none"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], beside: Path) -> None:
    """Write a safetensors file with the permissions of the file ``beside`` it.

    Raises:
        OSError: writing failed.
    """
    values = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        save_file(values, path)
    except SafetensorError as error:  # how it reports a full disk
        raise files.os_error(error, path) from error
    path.chmod(beside.stat().st_mode)  # safetensors makes a file for its owner only
