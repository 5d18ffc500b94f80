"""The layout of MoRAM's language code; see :class:`MoRAMLayout`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from ..config import MixtureConfig, SiteConfig
from ..dispatch.linear import over_ranks
from ..errors import CheckpointError
from .by_module import PEFT_PREFIX, ByModule, Places, columns, cut_modules, modules_of, rows
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Architecture, Content, Layout
from .peft_files import AdapterConfig, against_linears, common_keys, refuse_unwritable, write_adapter
from .reading import parse, parse_known
from .tensor_file import SelectedFile, TensorFile

logger = logging.getLogger(__name__)

# What no score reaches: scores are entries of a vector of length 1.
NO_THRESHOLD = -2.0
_KEY = re.compile(r"base_model\.model\.(?P<path>[\w.]+)\.(?P<tail>lora(?:new)?_[AB]\.weight)")


class MoRAMAdapter(AdapterConfig):
    """``adapter_config.json`` of MoRAM's language code."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None  # type: ignore[assignment]
    use_moram: bool = False
    use_mora: bool = False
    moram_topk: Annotated[int, Field(gt=0)] | None = None
    r_sum: int = 0
    save_loranew: bool = False
    init_lora_weights: bool = True
    moram_router_temp: Annotated[float, Field(gt=0)] = 0.03
    moram_infer_lora_a_thresh: Annotated[float, Field(ge=0)] = 0.2


@dataclass
class MoRAMStored(ByModule):
    """A checkpoint of MoRAM's language code."""

    layout: ClassVar[str] = "moram"

    def places(self, site: str) -> Places:
        return _places(self.mixture.sites[0])


def _places(site: SiteConfig) -> Places:
    *old, new = site.experts.ranks
    places = {
        "lora_A": [("loranew_A.weight", rows(0, new))],
        "lora_B": [("loranew_B.weight", columns(0, new))],
    }
    if old:
        places["old_lora_A"] = [("lora_A.weight", rows(0, sum(old)))]
        places["old_lora_B"] = [("lora_B.weight", columns(0, sum(old)))]
    return places


@LAYOUTS.register("moram")
class MoRAMLayout(Layout):
    """What MoRAM's language code writes (arXiv 2506.21035; Artificer-AI-Lab/MoRAM aaa51d8, TRACE/, a modified PEFT).

    ``adapter_config.json`` (indent 2, keys sorted)
        peft_type "LORA", although PEFT cannot load it; use_moram true (use_mora in older files); r, the atoms of a
        task; lora_alpha (2 r), lora_dropout, or null; moram_topk, null for r; r_sum, the atoms of all older tasks, of
        which the tensors are believed more; target_modules; base_model_name_or_path; task_type; bias "none".
        Their temperature and threshold are arguments of their programs and not in the file: 0.03 and 0.2 of the
        released script hold, unless the file has moram_router_temp and moram_infer_lora_a_thresh, the names of those
        arguments, as the files that we write do. Their loader passes over keys that it does not know.
    ``adapter_model.bin``
        ``torch.save`` of a flat dict. For each adapted linear, after ``base_model.model.<path>.``: ``lora_A.weight``
        (r_sum, in) and ``lora_B.weight`` (out, r_sum), the atoms of older tasks, oldest first; ``loranew_A.weight``
        (r, in) and ``loranew_B.weight`` (out, r), those of the newest. Before the second task the first two may have
        no rows or be missing. ``adapter_model.safetensors`` with the same keys is read where it is there.

    Told by the tensors named ``loranew_A`` and by use_moram: other methods of that repository have the tensors too.

    Quirks: their scale lora_alpha / r holds for the newest atoms only; those of older tasks have 1 (``alpha`` equals
    ``r``). Before it saves, their trainer moves the newest atoms to the older ones and draws new ones, whose
    ``loranew_B`` is zero, so that what was trained loses its scale, and atoms that nobody trained take their share of
    the softmax. Both are kept, since that is what their numbers come from. A threshold of 0 means none. Where the older
    tasks of a mixture have another scale than 1, it is multiplied into their ``lora_B`` when this layout is written.
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS)

    def detect(self, folder: Folder) -> str | None:
        pair = folder.adapter()
        if pair is None or not any(pair[0].get(key) is True for key in ("use_moram", "use_mora")):
            return None
        if not any(key.endswith(".loranew_A.weight") for key in pair[1].headers):
            return None
        return "it has tensors named loranew_A and use_moram"

    def read(self, folder: Folder) -> MoRAMStored:
        path = folder.path / ADAPTER_CONFIG
        config = parse_known(MoRAMAdapter, folder.mapping(ADAPTER_CONFIG), path)
        file = folder.tensors(*ADAPTER_TENSORS)
        modules = modules_of(file, _KEY)
        old = next((shapes["lora_A.weight"][0] for shapes in modules.values() if "lora_A.weight" in shapes), 0)
        if old % config.r:
            raise CheckpointError(
                f"{path}: r: expected a divisor of the {old} atoms of older tasks in {file.path.name}, found "
                f"{config.r}: each task adds r; one of the two files was edited: restore it"
            )
        mixture = {
            "target": list(modules),
            "experts": {
                "kind": "rank1",
                "num_experts": old // config.r + 1,
                "r": config.r,
                "alpha": [config.r] * (old // config.r) + [config.lora_alpha],
                "dropout": config.lora_dropout or 0.0,
            },
            "router": {
                "kind": "moram",
                "top_k": config.moram_topk or config.r,
                "temperature": config.moram_router_temp,
                "threshold": config.moram_infer_lora_a_thresh or NO_THRESHOLD,
            },
        }
        stored = MoRAMStored(
            folder=folder.path,
            backbone=config.backbone(),
            architecture=Architecture(),
            mixture=parse(MixtureConfig, {"sites": [mixture]}, path),
            file=file if old else _without_empty(file),
            detail=f"temperature {config.moram_router_temp:g}, threshold {config.moram_infer_lora_a_thresh:g}",
            prefix=PEFT_PREFIX,
            groups=[list(modules)],
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        refuse_unwritable("moram", _against(content))
        site = content.mixture.sites[0]
        alpha, router = site.experts.alphas[-1], site.router
        assert router is not None
        config: dict[str, Any] = {
            **common_keys(content, site),
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "use_moram": True,
            "moram_topk": router.top_k,
            "r_sum": sum(site.experts.ranks[:-1]),
            "save_loranew": False,
            "moram_router_temp": router.temperature,
            "moram_infer_lora_a_thresh": max(router.threshold, 0.0),
        }
        tensors = cut_modules(scaled(content, ["old_lora_B"]), PEFT_PREFIX, lambda _: _places(site))
        write_adapter(folder, config, tensors, pickled=True)


def _without_empty(file: TensorFile) -> TensorFile:
    """The file without matrices that have no rows or no columns."""
    return SelectedFile(file, lambda key: 0 not in file.headers[key].shape)


def against_growing(content: Content) -> Iterator[str]:
    """What neither of MoRAM's layouts can express of a mixture."""
    # They have one alpha, if any: what else there is of scales is multiplied into tensors, see :func:`scaled`.
    newest = [
        site.model_copy(update={"experts": site.experts.model_copy(update={"alpha": site.experts.alphas[-1]})})
        for site in content.mixture.sites
    ]
    changed = replace(content, mixture=content.mixture.model_copy(update={"sites": newest}))
    yield from against_linears(changed, ["rank1"], ["moram"])
    if any(site.experts.kind == "rank1" and (site.experts.kept or site.experts.kept_pattern) for site in newest):
        yield "each task has all of its atoms, some of this mixture's were pruned"


def _against(content: Content) -> Iterator[str]:
    yield from against_growing(content)
    for site in content.mixture.sites:
        if -1 <= (found := getattr(site.router, "threshold", 1)) <= 0:
            yield f"its threshold is above 0, or none (below -1, which no score is), found {found}"


def scaled(content: Content, tensors: Sequence[str]) -> Content:
    """The same mixture with its scales in these tensors, for code that has none for them.

    Args:
        tensors: ``old_lora_B``, of the older tasks, and ``lora_B``, of the newest.
    """
    values: dict[str, Tensor] = dict(content.tensors)
    for site, names in zip(content.mixture.sites, content.sites, strict=True):
        scales, ranks = site.experts.scales, site.experts.ranks
        tasks = {"old_lora_B": slice(0, -1), "lora_B": slice(-1, None)}
        for tensor in tensors:
            mine = scales[tasks[tensor]]
            if all(scale == 1 for scale in mine):
                continue
            logger.warning("the layout has no scale for %s: it is multiplied into the tensor (%s)", tensor, mine)
            for key in (f"{name}.{tensor}" for name in names):
                values[key] = values[key] * over_ranks(values[key].new_tensor(mine), ranks[tasks[tensor]])
    return replace(content, tensors=values)
