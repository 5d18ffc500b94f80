"""HydraLoRA's experts, one lora_A and several lora_B, against plain loops in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import moelora
from moelora import experts
from moelora.config import MixtureConfig
from moelora.errors import ConfigError
from moelora.experts import BlockContainer, Container, LinearContainer
from moelora.routing import RoutingRecord

HYDRA = {"kind": "hydra", "aux_loss_coef": 0.0}


def build(base: nn.Module, router: dict[str, Any] | None = None, **options: Any) -> Container:
    settings = {"kind": "shared_a", "num_experts": 3, "r": 4, "alpha": 8, **options}
    container = experts.build(base, {"target": "x", "experts": settings, "router": router or HYDRA})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in container.adapter_tensors().values():
            tensor.normal_(std=0.4, generator=generator)
    return container.double()


def run(container: Container, x: Tensor) -> tuple[Tensor, RoutingRecord]:
    records: list[RoutingRecord] = []
    with container.slot.using(listener=lambda site, record: records.append(record)):
        out = container(x)
    return out, records[0]


def pieces(lora_B: Tensor, rank: int = 4) -> list[Tensor]:
    return list(lora_B.split(rank, dim=1))


@pytest.mark.parametrize("router", [HYDRA, {"kind": "topk", "top_k": 2}, {"kind": "adamole"}])
def test_a_linear_site_is_the_published_loop(router: dict[str, Any]) -> None:
    base = nn.Linear(16, 12)
    container = build(base, router, alpha=[8.0, 4.0, 2.0])
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    target = torch.randn(2, 7, 12, dtype=torch.float64)
    out, record = run(container, x)
    (out * target).sum().backward()
    bank = container.experts
    A, B = (tensor.detach().clone().requires_grad_() for tensor in (bank.lora_A, bank.lora_B))
    weights = record.dense_weights().double()
    expected = base(x)
    for expert, (B_e, alpha) in enumerate(zip(pieces(B), (8, 4, 2), strict=True)):
        expected = expected + weights[..., expert : expert + 1].detach() * (alpha / 4) * (x @ A.T @ B_e.T)
    (expected * target).sum().backward()
    assert (out - expected).abs().max() <= 1e-12
    assert torch.allclose(bank.lora_A.grad, A.grad, rtol=1e-10, atol=1e-12)
    assert torch.allclose(bank.lora_B.grad, B.grad, rtol=1e-10, atol=1e-12)


def test_the_router_of_hydralora_is_the_published_loop_too() -> None:
    """Softmax in float32, so compared to the precision of that; with its gradient."""
    base = nn.Linear(16, 12)
    container = build(base)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    target = torch.randn(2, 7, 12, dtype=torch.float64)
    (container(x) * target).sum().backward()
    bank = container.experts
    G = container.router.weight.detach().clone().requires_grad_()
    rho = (x @ G.T).softmax(-1)
    expected = base(x) + sum(
        rho[..., e : e + 1] * 2.0 * (x @ bank.lora_A.T @ B_e.T) for e, B_e in enumerate(pieces(bank.lora_B))
    )
    assert (container(x) - expected).abs().max() <= 1e-5
    (expected * target).sum().backward()
    assert (container.router.weight.grad - G.grad).norm() <= 1e-5 * G.grad.norm()


@pytest.mark.parametrize("implementation", ["sorted", "reference"])
def test_a_block_site_is_the_loop_over_adapted_blocks(tiny_llama: LlamaForCausalLM, implementation: str) -> None:
    container = build(tiny_llama.model.layers[0].mlp)
    assert isinstance(container, BlockContainer)
    container.implementation = implementation
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    target = torch.randn(2, 7, 32, dtype=torch.float64)
    out, record = run(container, x)
    (out * target).sum().backward()
    base: Any = container.base
    A, B = {}, {}
    for name, bank in container.experts.items():
        A[name], B[name] = (tensor.detach().clone().requires_grad_() for tensor in (bank.lora_A, bank.lora_B))

    def adapted(name: str, hidden: Tensor, expert: int) -> Tensor:
        return base.get_submodule(name)(hidden) + 2.0 * hidden @ A[name].T @ pieces(B[name])[expert].T

    expected = torch.zeros_like(x)
    for expert in range(3):
        a = F.silu(adapted("gate_proj", x, expert)) * adapted("up_proj", x, expert)
        weight = record.weights[..., expert : expert + 1].double().detach()
        expected = expected + weight * adapted("down_proj", a, expert)
    (expected * target).sum().backward()
    assert (out - expected).abs().max() <= 1e-6  # the weights sum to 1 in float32 only
    for name, bank in container.experts.items():
        for ours, theirs in ((bank.lora_A.grad, A[name].grad), (bank.lora_B.grad, B[name].grad)):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm(), name


def test_A_is_stored_and_computed_once() -> None:
    container = build(nn.Linear(16, 12))
    assert container.experts.lora_A.shape == (4, 16)
    assert container.experts.lora_B.shape == (12, 12)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with FlopCounterMode(display=False) as flops:
        low = container.experts.low(x)
    assert flops.get_total_flops() == 2 * 14 * 16 * 4
    assert low.shape == (2, 7, 12)
    assert torch.allclose(low, x @ container.experts.down().T)
    with FlopCounterMode(display=False) as flops:
        container(x)
    frozen, gate, up = 2 * 14 * 16 * 12, 2 * 14 * 16 * 3, 2 * 14 * 12 * 12
    assert flops.get_total_flops() == frozen + gate + up + 2 * 14 * 16 * 4


def test_a_fresh_bank_draws_A_once_and_adds_nothing() -> None:
    base = nn.Linear(64, 12)
    site = {"target": "x", "experts": {"kind": "shared_a", "num_experts": 3, "r": 4}, "router": HYDRA}
    container = experts.build(base, site)
    bank = container.experts
    assert 0 < bank.lora_A.abs().max() <= 1 / 8  # 1 / sqrt(D)
    assert not bank.lora_B.any()
    x = torch.randn(5, 64)
    assert torch.equal(container(x), base(x))
    bank.reset_parameters(torch.Generator().manual_seed(2))
    first = bank.lora_A.detach().clone()
    bank.reset_parameters(torch.Generator().manual_seed(2))
    assert torch.equal(bank.lora_A, first)


def test_one_mask_for_all_experts_or_as_released_one_for_each() -> None:
    base = nn.Linear(16, 12)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    outputs = {}
    for choice in ("shared", "separate"):
        container = build(base, dropout=0.5, expert_dropout=choice).train()
        assert isinstance(container, LinearContainer)
        torch.manual_seed(5)
        outputs[choice], record = run(container, x)
        torch.manual_seed(5)
        masks = [F.dropout(torch.ones_like(x), 0.5) for _ in range(1 if choice == "shared" else 3)]
        bank, expected = container.experts, base(x)
        for expert, B_e in enumerate(pieces(bank.lora_B)):
            dropped = x * masks[expert % len(masks)]
            expected = expected + record.weights[..., expert : expert + 1] * 2.0 * (dropped @ bank.lora_A.T @ B_e.T)
        assert (outputs[choice] - expected).abs().max() <= 1e-6, choice
        container.eval()
        assert torch.equal(container(x), container(x))
    assert not torch.allclose(outputs["shared"], outputs["separate"])


def test_experts_of_different_ranks_cannot_share_A() -> None:
    site = {"target": "mlp", "experts": {"kind": "shared_a", "num_experts": 3, "r": [4, 4, 2]}, "router": HYDRA}
    with pytest.raises(ConfigError, match=r"experts\.r is \[4, 4, 2\], but experts that share lora_A have one rank"):
        MixtureConfig.parse({"sites": [site]})
    site["experts"] = {"kind": "shared_a", "num_experts": 3, "r": [4, 4, 4]}
    assert MixtureConfig.parse({"sites": [site]}).sites[0].experts.total_rank == 12


def test_the_update_of_constant_weights_is_a_matrix() -> None:
    base = nn.Linear(16, 12)
    bank = build(base).experts
    weights = torch.tensor([0.5, 0.2, 0.3])
    expected = sum(w * 2.0 * B_e @ bank.lora_A for w, B_e in zip(weights, pieces(bank.lora_B), strict=True))
    assert torch.allclose(bank.delta(weights, base), expected.float(), atol=1e-6)


def test_the_card_is_saved_and_loaded(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = moelora.attach(tiny_llama, moelora.load_recipe("hydra").mixture).eval()
    kinds = {(site.experts.kind, site.router.kind) for site in model.mixture.sites}
    assert kinds == {("shared_a", "softmax")}
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.2)
    ids = torch.randint(3, 64, (2, 8))
    out = model(ids, labels=ids)
    assert torch.equal(out.loss, out.task_loss), "HydraLoRA has no balance loss, and needs no types"
    model.save_pretrained(tmp_path / "saved")
    fresh = LlamaForCausalLM(tiny_llama.config).eval()
    fresh.load_state_dict(
        {
            name.replace(".base.", "."): value
            for name, value in model.backbone.state_dict().items()
            if ".experts." not in name and ".router." not in name
        }
    )
    again = moelora.from_pretrained(tmp_path / "saved", backbone=fresh)
    assert torch.equal(again(ids).logits, out.logits)
