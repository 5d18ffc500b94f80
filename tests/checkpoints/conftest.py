"""A small mixture saved natively, MixLoRA's fixtures, and how a checkpoint is opened for its backbone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import moelora
from moelora import checkpoints

sys.path.insert(0, str(Path(__file__).parent))  # for one_linear.py

FIXTURES = Path(__file__).parents[1] / "fixtures" / "mixlora_tiny"
MIXTURE = {
    "sites": [
        {
            "target": "mlp",
            "experts": {"kind": "lora", "num_experts": 4, "r": 2, "alpha": 4},
            "router": {"kind": "topk", "top_k": 2},
        },
        {"target": ["q_proj", "v_proj"], "experts": {"kind": "rslora", "num_experts": 1, "r": 2, "dropout": 0.1}},
    ]
}

Load = Callable[[Path], dict[str, Tensor]]
MakeModel = Callable[[], moelora.MoELoRAModel]


def shapes(model: moelora.MoELoRAModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.adapter_tensors().items()}


@pytest.fixture
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture
def reference_backbone() -> PreTrainedModel:
    """The tiny Llama that the reference code was run on."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(FIXTURES / "backbone", dtype=torch.float32)
    return model.eval()


@pytest.fixture
def make_model(tiny_config: LlamaConfig) -> MakeModel:
    """Every call gives the same mixture on the same tiny Llama; lora_B is not zero."""

    def make() -> moelora.MoELoRAModel:
        torch.manual_seed(0)
        model = moelora.attach(LlamaForCausalLM(tiny_config), MIXTURE)
        with torch.no_grad():
            for parameter in model.adapter_tensors().values():
                parameter.normal_(std=0.2)
        return model.eval()

    return make


@pytest.fixture
def native(make_model: MakeModel, tmp_path: Path) -> Path:
    """A native checkpoint of ``make_model()``."""
    make_model().save_pretrained(tmp_path / "native")
    return tmp_path / "native"


@pytest.fixture
def mixlora(tmp_path: Path) -> Path:
    """A copy of the checkpoint that the reference code saved."""
    folder = tmp_path / "mixlora"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.bin"):
        shutil.copy(FIXTURES / "mixlora" / name, folder)
    return folder


@pytest.fixture
def load_native(make_model: MakeModel) -> Load:
    """Open a checkpoint and read it into the structure of ``make_model()``."""
    declared = shapes(make_model())
    return lambda folder: checkpoints.read(folder).tensors(declared)


@pytest.fixture
def load_mixlora(reference_backbone: PreTrainedModel) -> Load:
    """Open a checkpoint and read it into the structure of the reference mixture."""
    declared = shapes(moelora.attach(reference_backbone, checkpoints.read(FIXTURES / "mixlora").mixture))
    return lambda folder: checkpoints.read(folder).tensors(declared)
