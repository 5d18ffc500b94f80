"""What MoE-PEFT's layouts have in common: options of LoRA, names of projections, the head of a classifier, the files.

Source: TUDB-Labs/MoE-PEFT 40f8cb7.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import files
from ..config import Closed, SiteConfig
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS
from .layout import Content

logger = logging.getLogger(__name__)

# In the order in which the tensors of a layer are written.
ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "dense")
FFN = ("gate_up_proj", "gate_proj", "down_proj", "up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")
# The head of a classifier: its task_type, its key in the file, the module and the tensor that it is here.
CLASSIFIER, HEAD_KEY, HEAD, HEAD_TENSOR = "SEQ_CLS", "classifier", "score", "score.weight"
TASK_TYPES = ("CAUSAL_LM", "QUESTION_ANS", CLASSIFIER, None)
DORA = (
    "use_dora: expected false, found true: the reference neither trains nor saves DoRA's magnitudes, so what was "
    "trained is not in the file; retrain without DoRA"
)


class LoraOptions(Closed):
    """The options of LoRA, which MixLoRA's ``expert_lora`` may replace for the experts."""

    r: Annotated[int, Field(gt=0)]
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    use_dora: bool = False
    use_rslora: bool = False
    bias: str = "none"
    lora_init: str = "original"


def experts_of(options: LoraOptions, count: int) -> dict[str, Any]:
    """The configuration of so many experts with these options."""
    return {
        "kind": "rslora" if options.use_rslora else "lora",
        "num_experts": count,
        "r": options.r,
        "alpha": options.lora_alpha,
        "dropout": options.lora_dropout,
        "init": "gaussian" if options.lora_init == "gaussian" else "kaiming",
    }


@dataclass(frozen=True)
class Lora:
    """The LoRA options of one site configuration, as the file has them."""

    rslora: bool
    r: int
    alpha: float
    dropout: float

    @classmethod
    def of(cls, site: SiteConfig) -> Lora:
        experts = site.experts
        return cls(experts.kind == "rslora", experts.ranks[0], experts.alphas[0], experts.dropout)

    def numbers(self) -> dict[str, float]:
        alpha = int(self.alpha) if self.alpha == int(self.alpha) else self.alpha
        if isinstance(alpha, float):
            logger.warning("the published loaders take whole numbers for lora_alpha only, found %s", alpha)
        return {"r": self.r, "lora_alpha": alpha, "lora_dropout": self.dropout}


def saved_modules(task_type: str | None) -> list[str]:
    """The modules that a checkpoint of this task holds whole."""
    return [HEAD] if task_type == CLASSIFIER else []


def task_of(content: Content, reasons: list[str]) -> str:
    """The ``task_type`` of a mixture; adds to the reasons against writing it.

    The trainer's loader builds a head only where it finds the name of one of its tasks, which its saver leaves out.
    """
    if not content.mixture.modules_to_save:
        return "CAUSAL_LM"
    sites = tuple(f"{name}." for names in content.sites for name in names)
    whole = [name for name in content.tensors if not name.startswith(sites)]
    if content.mixture.modules_to_save != [HEAD] or whole != [HEAD_TENSOR]:
        reasons.append(f"of modules saved whole it has a head {HEAD!r} without a bias, found {', '.join(whole)}")
    logger.warning(
        "MoE-PEFT takes the head of a classifier only where adapter_config.json names one of its tasks with as many "
        "labels: add task_name, such as glue:sst2; the published loader of MixLoRA takes no classifiers at all"
    )
    return CLASSIFIER


def write_pair(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.bin`` as MoE-PEFT's trainer does, in this order and float32.

    Raises:
        OSError: writing failed.
    """
    (folder / ADAPTER_CONFIG).write_text(json.dumps(dict(config), indent=4), encoding="utf-8")
    values = {key: nn.Parameter(value.detach().to("cpu", torch.float32)) for key, value in tensors.items()}
    path = folder / ADAPTER_TENSORS[-1]
    try:
        torch.save(values, path)
    except RuntimeError as error:  # how torch reports a full disk
        raise files.os_error(error, path) from error
