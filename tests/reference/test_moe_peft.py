"""LoRAMoE and MoLA in MoE-PEFT's own form, against numbers of its code (tests/fixtures/mixlora_tiny).

The adapter is put in place here by hand, so that these tests stand apart from our checkpoint reader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora.mixture import MoELoRAModel

ROOT = Path(__file__).parents[1] / "fixtures" / "mixlora_tiny"
SCALARS = json.loads((ROOT / "reference.json").read_text())["variants"]
INPUTS = load_file(ROOT / "inputs.safetensors")
ROUTERS: dict[str, dict[str, Any]] = {
    "moepeft_loramoe": {"kind": "softmax", "aux_loss_coef": 0.0},
    "moepeft_mola": {"kind": "mola", "top_k": 2, "balance": "pooled", "aux_loss_coef": 0.001},
}
VARIANTS = list(ROUTERS)


def build(variant: str, **router: Any) -> MoELoRAModel:
    """The variant's model with dropout off, and its tensors in it."""
    config = json.loads((ROOT / variant / "adapter_config.json").read_text())
    site = {
        "target": config["target_modules"],
        "experts": {"num_experts": config["num_experts"], "r": config["r"], "alpha": config["lora_alpha"]},
        "router": {**ROUTERS[variant], **router},
    }
    backbone = LlamaForCausalLM.from_pretrained(ROOT / "backbone", dtype=torch.float32, attn_implementation="eager")
    model = moelora.attach(backbone, {"sites": [site]}).train()
    filled = 0
    for key, value in torch.load(ROOT / variant / "adapter_model.bin", weights_only=True).items():
        with torch.no_grad():
            locate(model, key).copy_(value)
        filled += value.numel()
    assert filled == sum(tensor.numel() for tensor in model.adapter_tensors().values())
    return model


def locate(model: MoELoRAModel, key: str, grad: bool = False) -> Tensor:
    """The slice of our stacked tensor (or of its gradient) that one of their keys names."""
    _, _, layer, part, projection, *rest, _ = key.split(".")
    site = f"model.layers.{layer}.{part}.{projection}"
    name = f"{site}.router.weight" if rest == ["moe_gate"] else f"{site}.{rest[-1]}"
    tensor = model.adapter_tensors()[name]
    values = tensor.grad if grad else tensor.data
    assert values is not None
    if rest == ["moe_gate"]:
        return values
    rank, expert = model.mixture.sites[0].experts.r, int(rest[1])
    rows = slice(expert * rank, (expert + 1) * rank)
    return values[rows] if rest[-1] == "lora_A" else values[:, rows]


def in_their_order(model: MoELoRAModel) -> list[str]:
    """Names of the sites as their code goes through them: within a layer q, k, v, o, gate, down, up."""
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
    names = list(model.containers())
    return sorted(names, key=lambda name: (name.split(".")[2], order.index(name.rpartition(".")[2])))


def run(model: MoELoRAModel) -> Any:
    return model(INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"], labels=INPUTS["labels"])


def aux(model: MoELoRAModel, out: Any) -> float:
    coefficients = model.mixture.sites[0].router.coefficients()
    return sum(coefficients[name] * value.item() for name, value in out.aux_losses.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_router_logits_and_logits(variant: str) -> None:
    reference = load_file(ROOT / variant / "reference.safetensors")
    model = build(variant)
    with moelora.trace(model) as tape, torch.no_grad():
        logits = model(INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"]).logits
    assert (logits - reference["logits"]).abs().max() <= 1e-5
    with torch.no_grad():
        inferred = model.eval()(INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"]).logits
    assert (inferred - reference["logits_inference_mode"]).abs().max() <= 1e-5
    for layer in range(2):
        with torch.no_grad():
            out = model.backbone.model.layers[layer].mlp(reference[f"layers.{layer}.mlp_in"])
        assert (out - reference[f"layers.{layer}.mlp_out"]).abs().max() <= 1e-5
    records = [tape[name][0] for name in in_their_order(model)]
    router_logits = torch.cat([record.logits.reshape(-1, 4) for record in records])
    assert (router_logits - reference["router_logits"]).abs().max() <= 1e-5
    if "topk_indices" in reference:
        indices = torch.cat([record.indices.reshape(-1, 2) for record in records])
        weights = torch.cat([record.weights.reshape(-1, 2) for record in records])
        # Padding has the embedding 0 and so equal logits: theirs takes any two experts there, ours the first two.
        real = INPUTS["attention_mask"].bool().flatten().repeat(len(records))
        tied = reference["router_logits"].std(-1) == 0
        assert torch.equal(indices[real], reference["topk_indices"][real])
        assert tied.any() and not (tied & real).any()
        assert (indices[tied] == torch.tensor([0, 1])).all()
        assert (weights - reference["topk_weights_renorm"]).abs().max() <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses(variant: str) -> None:
    expected = SCALARS[variant]
    model = build(variant)
    out = run(model)
    assert abs(out.task_loss.item() - expected["ce_loss"]) <= 1e-5
    assert abs(aux(model, out) - expected.get("aux_loss_masked_scaled", 0.0)) <= 1e-7
    assert abs(out.loss.item() - expected["total_loss"]) <= 1e-5
    theirs = model(INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"], labels=INPUTS["labels_moepeft_style"])
    assert abs(theirs.task_loss.item() - expected["ce_loss_moepeft_labels"]) <= 1e-5


def test_the_pooled_balance_is_not_that_of_the_authors_of_mola() -> None:
    """MoE-PEFT pools all rows (balanced value k); MoLA's own code takes each layer by itself (balanced value 1)."""
    expected = SCALARS["moepeft_mola"]["aux_loss_masked_scaled_per_router_chunk"]
    model = build("moepeft_mola", balance="per_layer")
    with moelora.trace(model) as tape:
        out = run(model)
    total = 0.0
    for layer in range(2):
        records = [tape[name][0] for name in model.containers() if name.startswith(f"model.layers.{layer}.")]
        real = torch.cat([record.probs[INPUTS["attention_mask"].bool()] for record in records]).double()
        chosen = torch.nn.functional.one_hot(real.topk(2).indices, 4).sum(1).double()
        total += 4 * torch.dot(chosen.sum(0) / chosen.sum(), real.mean(0)).item()
    assert out.aux_losses["load_balance"].item() == pytest.approx(total, rel=1e-6)
    alone = [router_loss / 0.001 for router_loss in expected]
    for name, value in zip(in_their_order(model), alone, strict=True):
        one = model.containers()[name].router.losses(tape[name], moelora.routing.RoutingContext())
        assert one["load_balance"].item() == pytest.approx(value / 2, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant: str) -> None:
    reference = load_file(ROOT / variant / "reference.safetensors")
    model = build(variant)
    run(model).loss.backward()
    keys = [key for key in reference if key.startswith("grad.")]
    assert len(keys) == len(model.containers()) * (1 + 2 * 4)
    for key in keys:
        got = locate(model, key.removeprefix("grad."), grad=True)
        assert (got - reference[key]).norm() <= 1e-4 * reference[key].norm() + 1e-9, key


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_steps_of_adamw(variant: str) -> None:
    model = build(variant)
    optimizer = torch.optim.AdamW(model.adapter_tensors().values(), lr=1e-2, weight_decay=0.01)
    for ce, balance in SCALARS[variant]["adamw_lr1e-2_wd0.01_traj_ce_aux"]:
        out = run(model)
        assert abs(out.task_loss.item() - ce) <= 1e-4
        assert abs((out.loss - out.task_loss).item() - (balance or 0.0)) <= 1e-6
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
