"""Mixtures to export, what they are with one expert alone, and PEFT's own model of what was exported."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import moelora

LINEARS = ["q_proj", "o_proj", "gate_proj", "down_proj"]
TOPK = {"kind": "topk", "top_k": 2, "init_std": 0.5}
STATIC = {"kind": "static", "weights": [0.3, 0.0, 0.9]}
WIDTH = 64


def site(target: Any, experts: str | dict[str, Any] = "lora", router: Any = None) -> dict[str, Any]:
    """Three experts of different ranks where there is a router, else one."""
    options = {"kind": experts} if isinstance(experts, str) else experts
    ranks = {"r": 4} if options["kind"] == "shared_a" or router is None else {"r": [2, 4, 1]}
    alone = {"target": target, "experts": {"num_experts": 1 if router is None else 3, **ranks, **options}}
    return alone if router is None else {**alone, "router": router}


def attached(backbone: PreTrainedModel, *sites: dict[str, Any], **mixture: Any) -> moelora.MoELoRAModel:
    """A mixture whose tensors are all random."""
    model = moelora.attach(backbone, {"sites": list(sites), **mixture})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if "magnitude" in name:
                tensor.mul_(torch.empty_like(tensor).uniform_(0.7, 1.4, generator=generator))
            else:
                tensor.normal_(std=0.2, generator=generator)
    return model.eval()


def restricted(backbone: PreTrainedModel, model: moelora.MoELoRAModel, expert: int) -> moelora.MoELoRAModel:
    """The same experts on a fresh backbone, under weights that are 1 for one of them and 0 for all others."""
    config = model.mixture.to_dict()
    for each in config["sites"]:
        if each["router"] is not None:
            count = each["experts"]["num_experts"]
            weights = [1.0 if index == expert else 0.0 for index in range(count)]
            each["router"] = {"kind": "static", "weights": weights}
    alone = moelora.attach(backbone, config)
    tensors = {key: value for key, value in model.adapter_state().items() if ".router." not in key}
    alone.load_adapter_state(tensors)
    return alone.eval()


def ids() -> Tensor:
    return torch.randint(3, WIDTH, (3, 9), generator=torch.Generator().manual_seed(6))


def batches(seed: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:] = 0
    first, second = (torch.randint(3, WIDTH, (3, 9), generator=generator) for _ in range(2))
    return [{"input_ids": first, "attention_mask": mask}, {"input_ids": second}]


@torch.no_grad()
def logits(model: Any, **fields: Any) -> Tensor:
    result: Tensor = model(ids(), **fields).logits
    return result


def peft_logits(backbone: PreTrainedModel, folder: Path) -> Tensor:
    """What stock PEFT says with an exported folder on a copy of the backbone."""
    return logits(stock(copy.deepcopy(backbone), folder))


def stock(backbone: PreTrainedModel, folder: Path, name: str = "default") -> Any:
    """PEFT's own model with a folder, in evaluation mode."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # PEFT asks transformers for a name of old, and says that it knows Conv1D.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        return peft.PeftModel.from_pretrained(backbone, str(folder), adapter_name=name).eval()
