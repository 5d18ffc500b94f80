"""Sparse fixed projections: the non-zeros that were asked for, the same everywhere, never trained, merged exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora.config import SiteConfig
from moelora.errors import ConfigError
from moelora.experts import LinearContainer, build
from moelora.experts.sparse_projection import SparseProjectionConfig, SparseProjectionExperts, seed_of, stack_tasks

ROUTER = {"kind": "flylora", "top_k": 3}


def bank(width: int = 40, name: str = "layer.q_proj", **options: Any) -> SparseProjectionExperts:
    return SparseProjectionExperts(SparseProjectionConfig(**{"r": 8, **options}), width, 16, name)


def site(**experts: Any) -> dict[str, Any]:
    return {
        "target": ["q_proj", "v_proj"],
        "experts": {"kind": "sparse_projection", "r": 8, "alpha": 16, **experts},
        "router": ROUTER,
    }


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 10),
        ({"density": 0.3}, 12),
        ({"density": 0.29}, 11),
        ({"density": 0.001}, 1),
        ({"density": 1.0}, 40),
        ({"nnz": 7, "density": 1.0}, 7),
    ],
)
def test_every_row_has_exactly_as_many_non_zeros_as_asked_for(options: dict[str, Any], wanted: int) -> None:
    assert ((bank(**options).down() != 0).sum(1) == wanted).all()


def test_a_product_that_rounding_spoils_is_not_rounded_down_twice() -> None:
    assert ((bank(width=100, density=0.29).down() != 0).sum(1) == 29).all()  # 0.29 * 100 < 29 in floating point


def test_more_non_zeros_than_features_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts.nnz is 41 but the linear has 40 features: choose 1..40"):
        bank(nnz=41)


def test_values_are_normal_with_the_reciprocal_of_each_experts_rank() -> None:
    A = bank(width=4000, num_experts=2, r=[8, 32]).down()
    for rows, rank in ((A[:8], 8), (A[8:], 32)):
        values = rows[rows != 0]
        assert abs(values.mean()) < 4 / rank / len(values) ** 0.5
        assert values.std() == pytest.approx(1 / rank, rel=0.03)


def test_places_are_spread_over_all_features() -> None:
    used = (bank(width=64, r=512).down() != 0).sum(0)
    assert used.min() > 80 and used.max() < 180  # 128 on average, standard deviation 10


def test_the_matrix_follows_from_the_task_and_the_name_alone() -> None:
    one = bank().down()
    torch.manual_seed(1)
    assert torch.equal(one, bank().down())
    assert not torch.equal(one, bank(name="layer.k_proj").down())
    assert not torch.equal(one, bank(task_seed=1).down())
    assert torch.equal(bank(task_seed=1, name="a").down(), bank(task_seed=1, name="a").down())
    assert seed_of(0, "model.layers.0.self_attn.q_proj") == 23345356323635274


def test_matrices_of_two_tasks_are_nearly_orthogonal() -> None:
    """||A_1 A_2^T||_F is p / (r sqrt n) on average (theorem 3.4); T-c8 of the paper's merging."""
    width, rank = 4096, 32
    norms = []
    for name in "abcd":
        one, two = (bank(width, name, r=rank, task_seed=task).down() for task in (1, 2))
        norms.append((one @ two.T).norm().item())
    assert sum(norms) / 4 == pytest.approx(width / 4 / (rank * width**0.5), rel=0.1)


def test_sites_and_projections_of_a_model_have_matrices_of_their_own(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [{**site(num_experts=1), "target": "mlp", "router": None}]})
    gates = [c.experts.gate_proj.down() for c in model.containers().values()]
    assert not torch.equal(gates[0], gates[1])
    first = next(iter(model.containers().values())).experts
    assert not torch.equal(first.gate_proj.down(), first.up_proj.down())
    assert first.gate_proj.name == "model.layers.0.mlp.gate_proj"


def test_the_projection_is_never_trained(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [site()]}).train()
    before = {name: t.clone() for name, t in model.adapter_tensors().items() if name.endswith("lora_A")}
    trained = {name for name, t in model.adapter_tensors().items() if t.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_B"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    ids = torch.randint(3, 64, (2, 9))
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(model.adapter_tensors()[name], value) for name, value in before.items())
    assert any(model.adapter_tensors()[name].any() for name in trained)


def test_gradients_stop_at_the_projection_on_request_only() -> None:
    def gradient(**options: Any) -> Tensor:
        torch.manual_seed(0)
        built = build(nn.Linear(32, 16).requires_grad_(False), {**site(**options), "target": "any"})
        nn.init.normal_(built.experts.lora_B)
        x = torch.randn(5, 32, requires_grad=True)
        built(x).square().sum().backward()
        assert built.experts.lora_B.grad.any()
        return torch.cat([x.grad.flatten(), built(x).detach().flatten()])

    whole, stopped = gradient(), gradient(stop_gradient=True)
    assert torch.equal(whole[5 * 32 :], stopped[5 * 32 :])
    assert (whole[: 5 * 32] - stopped[: 5 * 32]).norm() > 0.01 * whole[: 5 * 32].norm()


def test_a_block_refuses_to_stop_gradients(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"is an FFN block: experts.stop_gradient reaches single linears only"):
        moelora.attach(tiny_llama, {"sites": [{**site(stop_gradient=True), "target": "mlp", "router": None}]})


# -- merging ---------------------------------------------------------------------------------------------------------


def task(seed: int, **options: Any) -> LinearContainer:
    torch.manual_seed(7)
    base = nn.Linear(64, 48)
    built = build(base.requires_grad_(False), {**site(task_seed=seed, **options), "target": "any"}, name="s")
    assert isinstance(built, LinearContainer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        built.experts.lora_B.normal_(generator=generator)
        built.router.bias.uniform_(-0.05, 0.05, generator=generator)
    return built


def stacked(tasks: list[LinearContainer], weights: list[float] | None = None) -> LinearContainer:
    states = [{name: t.detach() for name, t in each.adapter_tensors().items()} for each in tasks]
    config, tensors = stack_tasks(tasks[0].config, states, weights)
    built = build(tasks[0].base, config, name="s")
    assert isinstance(built, LinearContainer)
    with torch.no_grad():
        for name, tensor in built.adapter_tensors().items():
            tensor.copy_(tensors[name])
    return built


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 0.5]])
def test_stacked_tasks_are_the_weighted_average_of_what_each_adds(weights: list[float] | None) -> None:
    tasks = [task(seed) for seed in (1, 2, 3)]
    merged = stacked(tasks, weights)
    x = torch.randn(4, 6, 64)
    with torch.no_grad(), moelora.trace(merged) as tape:
        base = merged.base(x)
        got = merged(x) - base
        each = [(one(x) - base) * w for one, w in zip(tasks, weights or [1 / 3] * 3, strict=True)]
    assert torch.allclose(got, sum(each), atol=1e-5)
    assert (tape["s"][0].dense_weights().unflatten(-1, (3, 8)).sum(-1) == 3).all()


def test_choosing_among_the_ranks_of_all_tasks_is_something_else() -> None:
    merged = stacked([task(seed) for seed in (1, 2)])
    x = torch.randn(30, 64)
    with torch.no_grad():
        right = merged(x)
        merged.router.config = merged.router.config.model_copy(update={"within": "site", "top_k": 6})
        assert not torch.allclose(merged(x), right, atol=1e-3)


def test_averaging_the_factors_by_themselves_is_not_the_papers_merging() -> None:
    """The released script averages A and B; that is equation 12 only where all tasks have one A."""

    def both(seeds: tuple[int, int]) -> tuple[Tensor, Tensor]:
        tasks = [task(seed) for seed in (1, 2)]
        for one, seed in zip(tasks, seeds, strict=True):
            one.experts.lora_A.data.copy_(bank(64, "s", task_seed=seed).down())
        paper = sum(one.experts.delta(torch.ones(1), one.base) for one in tasks) / 2
        A, B = (sum(getattr(one.experts, name) for one in tasks) / 2 for name in ("lora_A", "lora_B"))
        return paper, 2.0 * (B @ A).detach()

    paper, script = both((1, 2))
    assert (script - paper).norm() > 0.5 * paper.norm()
    # With one A the script is right, but for what it makes of the two B: their average, as equation 12 has it.
    paper, script = both((1, 1))
    assert torch.allclose(script, paper, atol=1e-5)


def test_dense_merging_is_labelled_an_approximation_unless_all_ranks_are_chosen(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [site()]}).eval()
    for name, tensor in model.adapter_tensors().items():
        if name.endswith("lora_B"):
            nn.init.normal_(tensor, std=0.3)
    ids = torch.randint(3, 64, (2, 9))
    with pytest.raises(ConfigError, match=r"cannot be merged exactly: routers \['flylora'\]"):
        model.merge_and_unload()
    containers = model.containers()
    name, container = next(iter(containers.items()))
    wanted = container.base.weight + 2.0 * container.lora_B @ container.lora_A  # equation 12: all ranks
    merged = moelora.merging.merge(model, approximate=True, batches=[{"input_ids": ids}])
    assert torch.allclose(merged.backbone.get_submodule(name).weight, wanted, atol=1e-6)
    assert not merged.sites[name].exact and merged.sites[name].update_error > 0.05


def test_with_all_ranks_merging_is_exact(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, {"sites": [{**site(), "router": {"kind": "flylora", "top_k": 8}}]}).eval()
    for name, tensor in model.adapter_tensors().items():
        if name.endswith("lora_B"):
            nn.init.normal_(tensor, std=0.3)
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        routed = model(ids).logits
        merged = moelora.merging.merge(model)
        assert all(each.exact for each in merged.sites.values())
        assert torch.allclose(merged.backbone(ids).logits, routed, atol=1e-4)


def test_what_does_not_stack_is_refused() -> None:
    one = task(1)
    state = dict(one.adapter_tensors())
    with pytest.raises(ConfigError, match="each of the 2 tasks a number above 0"):
        stack_tasks(one.config, [state, state], [1.0, 0.0])
    with pytest.raises(ConfigError, match="tensors of different names"):
        stack_tasks(one.config, [state, {}])
    plain = SiteConfig.parse({"target": "any", "experts": {"kind": "sparse_projection"}})
    with pytest.raises(ConfigError, match="with router 'flylora'"):
        stack_tasks(plain, [state])
    with pytest.raises(ConfigError, match="within 'expert'"):
        stack_tasks(SiteConfig.parse({**site(num_experts=2), "target": "any"}), [state])
