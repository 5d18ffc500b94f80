"""A backbone of one linear, so that a layer that authors' code computed is a whole model with a checkpoint; and how one
is written as their savers do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from moelora import MoELoRAModel, checkpoints

PREFIX = "base_model.model.fc."


@dataclass
class LinearOutput(ModelOutput):
    y: Tensor | None = None


class OneLinear(PreTrainedModel):
    """``fc`` with the given weight (O, D) and bias."""

    config_class = PreTrainedConfig

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(PreTrainedConfig())
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            if bias is not None:
                self.fc.bias.copy_(bias)
        self.post_init()

    def forward(self, x: Tensor, return_dict: bool = True) -> LinearOutput:
        return LinearOutput(y=self.fc(x))

    def _init_weights(self, module: nn.Module) -> None:
        pass


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, pickled: bool = False) -> Path:
    """``adapter_config.json`` and the tensors beside it."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``, its target modules in a fixed order."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return {**config, "target_modules": sorted(config["target_modules"])}


def through(source: Path, folder: Path, *layouts: str) -> Path:
    """The checkpoint after being converted to each of the layouts in turn."""
    for step, layout in enumerate(layouts):
        checkpoints.convert(source, folder / f"step-{step}", to=layout)
        source = folder / f"step-{step}"
    return source


def assert_same_tensors(folder: Path, other: Path) -> None:
    """The tensor files of both, bit for bit."""
    ours, theirs = (_load(each) for each in (folder, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)


def _load(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.bin"
    if path.exists():
        return dict(torch.load(path, weights_only=True))
    return load_file(path.with_suffix(".safetensors"))


@torch.no_grad()
def fill(model: MoELoRAModel, seed: int = 0) -> None:
    """Give every tensor of the mixture numbers; ``lora_B`` of a fresh one is zero."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.adapter_tensors().values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
