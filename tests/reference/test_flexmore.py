"""FlexMoRE: logits of a FlexOlmo whose second expert was replaced by low-rank factors, from the authors' formula.

transformers keeps FlexOlmo's experts in one tensor, so its model cannot carry experts itself: here each layer gets a
dense FFN, expert 0, as its block, and the mixture is attached to that.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import FlexOlmoForCausalLM
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoMLP

import moelora
from moelora.experts.low_rank import factor

FOLDER = Path(__file__).parents[1] / "fixtures" / "flexmore_tiny"
SITE = {
    "target": "mlp",
    "experts": {"kind": "low_rank", "num_experts": 2},
    "router": {"kind": "topk", "top_k": 2, "normalize": False, "aux_loss_coef": 0.0},
}
RANKS = [1, 2, 4, 8, 32]


def full_weights() -> dict[str, Tensor]:
    return load_file(FOLDER / "full_2expert" / "model.safetensors")


def dense_model() -> FlexOlmoForCausalLM:
    """The FlexOlmo of the fixture with expert 0 alone in the place of its sparse block."""
    model = FlexOlmoForCausalLM.from_pretrained(FOLDER / "full_2expert")
    weights = full_weights()
    for index, layer in enumerate(model.model.layers):
        layer.mlp = FlexOlmoMLP(model.config)
        for name in ("gate_proj", "up_proj", "down_proj"):
            stored = weights[f"model.layers.{index}.mlp.experts.0.{name}.weight"]
            layer.mlp.get_submodule(name).weight = torch.nn.Parameter(stored)
    return model.eval()


def mixture(ranks: list[int]) -> moelora.MoELoRAModel:
    site = {**SITE, "experts": {**SITE["experts"], "r": ranks, "num_experts": len(ranks)}}
    model = moelora.attach(dense_model(), {"sites": [site]})
    weights = full_weights()
    with torch.no_grad():
        for name, container in model.containers().items():
            container.router.weight.copy_(weights[f"{name}.gate.weight"])
    return model


@pytest.mark.parametrize("rank", RANKS)
def test_the_logits_are_those_of_the_reference(rank: int) -> None:
    model = mixture([0, rank])
    stored = load_file(FOLDER / f"adapters_r{rank}.safetensors")
    with torch.no_grad():
        for name, container in model.containers().items():
            for projection in ("gate_proj", "up_proj", "down_proj"):
                bank = container.experts[projection]
                bank.lora_A.copy_(stored[f"{name}.experts.1.{projection}_a.weight"])
                bank.lora_B.copy_(stored[f"{name}.experts.1.{projection}_b.weight"])
    io = load_file(FOLDER / "io.safetensors")
    logits = model(io["input_ids"]).logits
    assert (logits - io[f"r{rank}.logits"]).abs().max() <= 1e-5
    if rank == 32:
        assert (logits - io["full.logits"]).abs().max() <= 1e-5


@pytest.mark.parametrize("rank", RANKS)
def test_our_factors_are_those_of_the_reference(rank: int) -> None:
    stored, weights = load_file(FOLDER / f"adapters_r{rank}.safetensors"), full_weights()
    for name, A in stored.items():
        if not name.endswith("_a.weight"):
            continue
        path = name.removesuffix("_a.weight")
        difference = weights[f"{path}.weight"] - weights[f"{path.replace('experts.1', 'experts.0')}.weight"]
        ours_A, ours_B = factor(difference, rank)
        B = stored[f"{path}_b.weight"]
        assert (ours_B @ ours_A - B @ A).abs().max() <= 1e-5
        assert ours_A.norm().item() == pytest.approx(A.norm().item(), rel=1e-4)
        assert ours_B.norm().item() == pytest.approx(B.norm().item(), rel=1e-4)


def test_the_order_of_experts_does_not_matter() -> None:
    io = load_file(FOLDER / "io.safetensors")
    weights = full_weights()
    logits = []
    for order in ([0, 1], [1, 0]):
        model = mixture([[0, 32][expert] for expert in order])
        with torch.no_grad():
            for name, container in model.containers().items():
                container.router.weight.copy_(weights[f"{name}.gate.weight"][order])
                for projection in ("gate_proj", "up_proj", "down_proj"):
                    full, base = (weights[f"{name}.experts.{e}.{projection}.weight"] for e in (1, 0))
                    container.experts[projection].load_difference(order.index(1), full - base)
        logits.append(model(io["input_ids"]).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-5
    assert (logits[0] - io["full.logits"]).abs().max() <= 1e-5
