"""Arrow and GenKnowSub against numbers of PEFT 0.21.2 (tests/fixtures/peft_arrow_tiny_llama, see its README.txt)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora.experts.frozen import FrozenExperts
from moelora.mixture import MoELoRAModel
from moelora.routers.arrow import ArrowRouter, Factors, gen_know_sub, top_right_singular

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = FIXTURES / "peft_arrow_tiny_llama"
IO = load_file(ROOT / "io.safetensors")
TASKS = [load_file(ROOT / f"task_{i}" / "adapter_model.safetensors") for i in range(4)]
GENERAL = [load_file(ROOT / f"gen_{i}" / "adapter_model.safetensors") for i in range(2)]
MODULES = sorted(key.removeprefix("top1_T1.proto.base_model.model.") for key in IO if key.startswith("top1_T1.proto."))
OPTIONS: dict[str, dict[str, Any]] = {
    "top1_T1": {"top_k": 1},
    "top2_T1": {"top_k": 2},
    "top3_T05": {"top_k": 3, "temperature": 0.5},
    "top2_gks": {"top_k": 2},
}


def factors(adapter: dict[str, Tensor], module: str) -> Factors:
    A, B = (adapter[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
    return A, B


def experts_of(name: str, module: str) -> list[Factors]:
    """What PEFT's experts are at a module, once its subtraction is done."""
    experts = [factors(adapter, module) for adapter in TASKS]
    if name != "top2_gks":
        return experts
    return gen_know_sub(experts, [factors(adapter, module) for adapter in GENERAL], "peft_factors")


def build(name: str, **options: Any) -> MoELoRAModel:
    backbone = LlamaForCausalLM.from_pretrained(FIXTURES / "tiny_llama_base", dtype=torch.float32).eval()
    site = {
        "target": ["q_proj", "v_proj", "down_proj"],
        "experts": {"kind": "frozen", "num_experts": 4, "r": 4, "alpha": 8},
        "router": {"kind": "arrow", "seed": 42, **OPTIONS[name], **options},
    }
    model = moelora.attach(backbone, {"sites": [site]}).eval()
    assert sorted(model.containers()) == MODULES
    for module, container in model.containers().items():
        assert isinstance(container.experts, FrozenExperts)
        for index, (A, B) in enumerate(experts_of(name, module)):
            container.experts.load_expert(index, A, B)
    return model


def stored(name: str, module: str) -> Tensor:
    return IO[f"{name}.proto.base_model.model.{module}"]


def logits(model: MoELoRAModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IO["input_ids"], attention_mask=IO["attention_mask"]).logits
    return result


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_with_stored_prototypes_are_those_of_peft(name: str) -> None:
    model = build(name)
    for module, container in model.containers().items():
        with torch.no_grad():
            container.router.prototypes.copy_(stored(name, module))
    assert (logits(model) - IO[f"{name}.logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_power_iteration_finds_the_prototypes_and_logits_of_peft(name: str) -> None:
    model = build(name, method="power")
    model.fit_routers()
    for module, container in model.containers().items():
        assert (container.router.prototypes - stored(name, module)).abs().max() < 1e-5, module
    assert (logits(model) - IO[f"{name}.logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["top2_T1", "top2_gks"])
def test_exact_prototypes_are_the_singular_vectors_of_the_product(name: str) -> None:
    model = build(name)
    model.fit_routers()
    for module, container in model.containers().items():
        for index, (A, B) in enumerate(experts_of(name, module)):
            exact = torch.linalg.svd(B.double() @ A.double()).Vh[0]
            cosine = (container.router.prototypes[index].double() @ exact).abs()
            assert cosine.item() == pytest.approx(1, abs=1e-6), (module, index)
            assert (top_right_singular(A, B).double() @ exact).abs().item() == pytest.approx(1, abs=1e-6)


def test_fifteen_power_iterations_leave_two_prototypes_of_peft_far_from_the_exact_ones() -> None:
    cosines, ratios = [], []
    for module in MODULES:
        for index, (A, B) in enumerate(experts_of("top2_T1", module)):
            _, sizes, right = torch.linalg.svd(B.double() @ A.double())
            cosines.append(float((stored("top2_T1", module)[index].double() @ right[0]).abs()))
            ratios.append(float(sizes[1] / sizes[0]))
    off = sorted(index for index, cosine in enumerate(cosines) if cosine < 0.8)
    assert len(cosines) == 24 and len(off) == 2
    assert sorted(cosines[index] for index in off) == pytest.approx([0.226, 0.689], abs=2e-3)
    assert all(ratios[index] > 0.94 for index in off)


def test_exact_prototypes_route_otherwise_than_peft() -> None:
    model = build("top2_T1")
    model.fit_routers()
    assert (logits(model) - IO["top2_T1.logits"]).abs().max() > 1e-3


def test_subtraction_leaves_the_adapters_as_they_are() -> None:
    before = [_hash(adapter) for adapter in (*TASKS, *GENERAL)]
    for method in ("exact", "peft_factors"):
        experts = [factors(adapter, MODULES[0]) for adapter in TASKS]
        gen_know_sub(experts, [factors(adapter, MODULES[0]) for adapter in GENERAL], method)
    assert [_hash(adapter) for adapter in (*TASKS, *GENERAL)] == before


def test_exact_subtraction_is_that_of_the_updates_and_that_of_peft_is_not() -> None:
    module = MODULES[0]
    experts = [factors(adapter, module) for adapter in TASKS]
    general = [factors(adapter, module) for adapter in GENERAL]
    mean = sum(B @ A for A, B in general) / len(general)
    for (A, B), (A_new, B_new), (A_peft, B_peft) in zip(
        experts, gen_know_sub(experts, general), gen_know_sub(experts, general, "peft_factors"), strict=True
    ):
        assert A_new.shape[0] == 4 + 2 * 4
        assert torch.allclose(B_new @ A_new, B @ A - mean, atol=1e-6)
        assert not torch.allclose(B_peft @ A_peft, B @ A - mean, atol=1e-2)


def test_prototypes_are_saved(tmp_path: Path) -> None:
    model = build("top2_T1")
    model.fit_routers()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    backbone = LlamaForCausalLM.from_pretrained(FIXTURES / "tiny_llama_base", dtype=torch.float32).eval()
    loaded = moelora.from_pretrained(tmp_path, backbone=backbone)
    assert torch.equal(logits(loaded), expected)
    router = loaded.containers()[MODULES[0]].router
    assert isinstance(router, ArrowRouter) and router.prototypes.any()


def _hash(adapter: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(adapter[key].numpy().tobytes() for key in sorted(adapter))).hexdigest()
