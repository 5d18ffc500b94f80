"""LoRAMoE against numbers of the authors' own code (tests/fixtures/loramoe_tiny, see its README.txt).

The adapter is put in place here by hand, so that these tests stand apart from our checkpoint reader. Their loss counts
padding, so parity is asked with ``count_padding``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora.experts import LinearContainer
from moelora.mixture import MoELoRAModel

ROOT = Path(__file__).parents[1] / "fixtures" / "loramoe_tiny"
SCALARS = json.loads((ROOT / "reference.json").read_text())["variants"]
INPUTS = load_file(ROOT / "inputs.safetensors")
VARIANTS = ["loramoe_n4_blc", "loramoe_n8_noblc"]
KEY = re.compile(r"base_model\.model\.(model\.layers\.\d+\.mlp\.\w+)\.lora_(route|A|B)(\d*)\.weight")


def build(variant: str, **router: Any) -> MoELoRAModel:
    """The variant's model with dropout off, and the authors' tensors in it."""
    config = json.loads((ROOT / variant / "adapter_config.json").read_text())
    site = {
        "target": config["target_modules"],
        "experts": {"num_experts": config["lora_nums"], "r": config["r"], "alpha": config["lora_alpha"]},
        "router": {
            "kind": "loramoe",
            "aux_loss_coef": config["blc_weight"],
            "delta": config["blc_alpha"],
            "count_padding": True,
            **router,
        },
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
    """The slice of our stacked tensor (or of its gradient) that one of the authors' keys names."""
    match = KEY.fullmatch(key)
    assert match is not None, key
    site, matrix, expert = match.groups()
    name = f"{site}.router.weight" if matrix == "route" else f"{site}.lora_{matrix}"
    tensor = model.adapter_tensors()[name]
    values = tensor.grad if grad else tensor.data
    assert values is not None
    if matrix == "route":
        return values
    rank = model.mixture.sites[0].experts.r
    part = slice(int(expert) * rank, (int(expert) + 1) * rank)
    return values[part] if matrix == "A" else values[:, part]


def run(model: MoELoRAModel, types: Tensor | None = None, rows: int = 4) -> Any:
    batch = {name: INPUTS[name][:rows] for name in ("input_ids", "attention_mask", "labels")}
    return model(**batch, task_types=INPUTS["task_types"][:rows] if types is None else types)


def blc(model: MoELoRAModel, out: Any) -> float:
    return model.mixture.sites[0].router.aux_loss_coef * out.aux_losses["localized_balance"].item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_projection_routes_and_computes_as_theirs(variant: str) -> None:
    reference = load_file(ROOT / variant / "reference.safetensors")
    model = build(variant).eval()
    outputs: dict[str, Tensor] = {}
    for name, container in model.containers().items():
        assert isinstance(container, LinearContainer)
        container.register_forward_hook(lambda m, args, out, name=name: outputs.__setitem__(name, out.detach()))
    with moelora.trace(model) as tape, torch.no_grad():
        logits = model(INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"]).logits
    assert (logits - reference["logits"]).abs().max() <= 1e-5
    assert len(outputs) == 6
    for name, out in outputs.items():
        assert (out - reference[f"{name}.out"]).abs().max() <= 1e-5, name
        assert (tape[name][0].weights - reference[f"{name}.route_weight"]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_balance_of_each_projection_and_the_total(variant: str) -> None:
    reference, expected = load_file(ROOT / variant / "reference.safetensors"), SCALARS[variant]
    model = build(variant)
    with moelora.trace(model) as tape:
        out = run(model)
    context = moelora.routing.RoutingContext(task_types=INPUTS["task_types"])
    for name, container in model.containers().items():
        loss = container.router.losses(tape[name], context)["localized_balance"]
        assert abs(expected["blc_weight"] * loss.item() - reference[f"{name}.blc"].item()) <= 1e-5
    assert abs(blc(model, out) - expected["blc_total"]) <= 1e-5
    assert abs(out.task_loss.item() - expected["ce_loss"]) <= 1e-5
    assert abs(out.loss.item() - expected["total_loss"]) <= 2e-5


def test_the_balance_depends_on_the_types_as_theirs_does() -> None:
    expected = SCALARS["loramoe_n4_blc"]
    model = build("loramoe_n4_blc")
    for types, value in expected["blc_by_task_types"].items():
        assert abs(blc(model, run(model, torch.tensor(json.loads(types)))) - value) <= 1e-5, types
    assert abs(blc(model, run(model, rows=1)) - expected["blc_batch1"]) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant: str) -> None:
    reference = load_file(ROOT / variant / "reference.safetensors")
    model = build(variant)
    run(model).loss.backward()
    keys = [key for key in reference if key.startswith("grad.")]
    assert len(keys) == 6 * (1 + 2 * SCALARS[variant]["lora_nums"])
    for key in keys:
        got = locate(model, key.removeprefix("grad."), grad=True)
        assert (got - reference[key]).norm() <= 1e-4 * reference[key].norm() + 1e-9, key


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_steps_of_adamw(variant: str) -> None:
    model = build(variant)
    optimizer = torch.optim.AdamW(model.adapter_tensors().values(), lr=1e-2, weight_decay=0.0)
    for expected in SCALARS[variant]["adamw_lr1e-2_wd0_traj_total"]:
        loss = run(model).loss
        assert abs(loss.item() - expected) <= 1e-4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_padding_enters_their_loss_and_not_ours() -> None:
    theirs, ours = build("loramoe_n4_blc"), build("loramoe_n4_blc", count_padding=False)
    lengths = INPUTS["attention_mask"].sum(-1)
    longer = {
        "input_ids": torch.nn.functional.pad(INPUTS["input_ids"], (0, 5)),
        "attention_mask": torch.nn.functional.pad(INPUTS["attention_mask"], (0, 5)),
    }
    types = INPUTS["task_types"]
    assert lengths.min() < lengths.max()
    for model, same in ((theirs, False), (ours, True)):
        short = model(INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"], task_types=types)
        padded = model(**longer, task_types=types)
        difference = abs(blc(model, short) - blc(model, padded))
        assert (difference <= 1e-6) == same
        assert same or difference > 1e-3
    assert abs(blc(ours, run(ours)) - blc(theirs, run(theirs))) > 1e-2


def test_the_paper_divides_by_the_mean_and_the_code_by_its_square() -> None:
    """The two forms differ by the mean of Z, which one projection shows."""
    released, paper = build("loramoe_n4_blc"), build("loramoe_n4_blc", form="paper")
    name = "model.layers.0.mlp.gate_proj"
    context = moelora.routing.RoutingContext(task_types=INPUTS["task_types"])
    with moelora.trace(released) as tape:
        run(released)
    weights = tape[name][0].weights.double()
    own = INPUTS["task_types"].unsqueeze(-1) == torch.tensor([1, 1, 0, 0])
    mean = (torch.where(own, 1.1, 0.9) * weights.sum(1)).mean()
    values = [
        model.containers()[name].router.losses(tape[name], context)["localized_balance"].item()
        for model in (released, paper)
    ]
    assert values[1] / values[0] == pytest.approx(mean.item(), rel=1e-5)
