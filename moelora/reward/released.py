"""The files of the released DMoERM code: one whole state dict for each category.

Layout, of quanshr/DMoERM-v1 ecdbdc7: ``results/innermoe/<category>/ckpts/phase3.pth`` is ``torch.save`` of

* ``base_model.base_model.model. ... .model.layers.<i>.self_attn.{q,v}_proj.base_layer.weight``, and beside it
  ``lora_A.<capability>.weight`` (r, in) and ``lora_B.<capability>.weight`` (out, r). The code wraps the model in PEFT
  once for each capability, so that the prefix ``base_model.model.`` is repeated as often as there are capabilities;
* the body's other weights below the same prefix, trained in phase 1;
* ``base_value_head.{weight,bias}``, ``prelu.weight``, ``final_value_head{1,2}.{weight,bias}``.

Quirks: the heads of phase 2 lie in a plain dict and are in no file, nor were they ever trained, so they are copies of
the base head, from which that code made them. The order of the capabilities, in which states are joined, is that of the
code's table of categories and not in the file: it is an argument here. Scale is alpha / r = 1 for the released 32 / 32;
neither number is in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CheckpointError
from .config import GENERAL
from .model import RewardModel

NESTING = re.compile(r"^base_model\.(?:base_model\.model\.)+")
LORA = re.compile(r"^(?P<path>.+)\.lora_(?P<factor>[AB])\.(?P<capability>[^.]+)\.weight$")


def read_released(
    path: str | Path,
    body: PreTrainedModel,
    category: str,
    capabilities: Sequence[str],
    alpha: float = 32.0,
) -> RewardModel:
    """A reward model of one category from a file of the released code, or from the same tensors as ``.safetensors``.

    Args:
        body: a model of the file's architecture, whose weights are replaced by the file's. category: what to call it.
        capabilities: in the order of the code's table. alpha: of the LoRAs.

    Raises:
        CheckpointError: the file is missing or damaged, is not this layout, or does not fit the body.
    """
    tensors = _tensors(Path(path))
    flat = {NESTING.sub("", key): value for key, value in tensors.items()}
    found = [match for key in flat if (match := LORA.match(key)) is not None]
    names = {match["capability"] for match in found}
    if names != set(capabilities):
        raise CheckpointError(
            f"{path}: holds LoRAs of {', '.join(sorted(names)) or 'no capability'}, but {', '.join(capabilities)} were "
            "asked for: name exactly those, in the order of the code's table"
        )
    sites = sorted({match["path"] for match in found})
    rank = next(len(flat[match[0]]) for match in found if match["factor"] == "A")
    _fill_body(Path(path), body, flat, sites)
    reward = {"categories": {category: list(capabilities)}, "base": "none", "aggregator": "mlp"}
    experts = {"kind": "lora", "num_experts": 1, "r": rank, "alpha": alpha}
    model = RewardModel.attach(body, reward, {"sites": [{"target": sites, "experts": experts}]})
    _fill(Path(path), model, flat, category, capabilities)
    model.train(False)
    return model


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors")
    return dict(loaded)


def _fill_body(path: Path, body: PreTrainedModel, flat: Mapping[str, Tensor], sites: Sequence[str]) -> None:
    own = body.state_dict()
    given = {f"{name}.weight": f"{name}.base_layer.weight" for name in sites}
    missing = [name for name in own if given.get(name, name) not in flat]
    if missing:
        raise CheckpointError(f"{path}: lacks {len(missing)} weights of {type(body).__name__}, such as {missing[0]!r}")
    body.load_state_dict({name: _fitting(path, name, flat[given.get(name, name)], own[name]) for name in own})


@torch.no_grad()
def _fill(
    path: Path, model: RewardModel, flat: Mapping[str, Tensor], category: str, capabilities: Sequence[str]
) -> None:
    values: dict[str, Tensor] = {}
    heads = [GENERAL, *(f"{category}/{capability}" for capability in capabilities)]
    for name in ("weight", "bias"):
        values |= {f"reward.heads.{head}.{name}": flat[f"base_value_head.{name}"] for head in heads}
        for ours, theirs in (("first", "final_value_head1"), ("second", "final_value_head2")):
            values[f"reward.aggregators.{category}.{ours}.{name}"] = flat[f"{theirs}.{name}"]
    values[f"reward.aggregators.{category}.prelu.weight"] = flat["prelu.weight"]
    for site in model.containers():
        for factor, axis in (("A", 0), ("B", 1)):
            each = [flat[f"{site}.lora_{factor}.{capability}.weight"] for capability in capabilities]
            values[f"{site}.lora_{factor}"] = torch.cat(each, dim=axis)
    targets = model.adapter_tensors()
    for name, target in targets.items():
        if name != "reward.temperature":
            target.copy_(_fitting(path, name, values[name], target))


def _fitting(path: Path, name: str, value: Tensor, like: Tensor) -> Tensor:
    if value.shape != like.shape or not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{path}: {name}: expected finite numbers of the shape {tuple(like.shape)}, found {tuple(value.shape)}"
        )
    return value.to(like)
