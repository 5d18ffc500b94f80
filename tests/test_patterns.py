"""Ranks and scales of single sites: ``rank_pattern`` and ``alpha_pattern`` of experts, from configuration to merge."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sites_by_hand import EVEN, IDS, by_hand, logits, mixture
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.config import SiteConfig
from moelora.errors import CheckpointError, ConfigError
from moelora.experts import EXPERTS, BlockContainer, ExpertsConfig, LinearContainer

Q0, Q1, V1 = (f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"))


def options(kind: str = "lora", **values: Any) -> ExpertsConfig:
    config: ExpertsConfig = EXPERTS.get(kind).Config.parse({"kind": kind, "num_experts": 2, "r": 4, **values})
    return config


# -- configuration ---------------------------------------------------------------------------------------------------


def test_a_site_has_the_first_pattern_that_its_path_ends_with() -> None:
    config = options(
        rank_pattern={Q1: 1, "q_proj": 2, "1.self_attn.q_proj": 3},
        alpha_pattern={"self_attn.v_proj": [5, 6], "q_proj": 7},
        alpha=9,
        dropout=0.25,
    )
    assert [(config.at(site).ranks, config.at(site).alphas) for site in (Q0, Q1, V1, "model.lm_head")] == [
        ((2, 2), (7, 7)),
        ((1, 1), (7, 7)),
        ((4, 4), (5, 6)),
        ((4, 4), (9, 9)),
    ]
    assert config.at("q_proj").ranks == (2, 2)  # the whole path
    assert config.at("my_q_proj").ranks == (4, 4)  # a name ends at a dot
    at = config.at(Q1)
    assert (at.rank_pattern, at.alpha_pattern, at.dropout, at.kind) == ({}, {}, 0.25, "lora")
    assert at.at(Q0) is at
    assert config.at(Q0).scales == (3.5, 3.5)


def test_a_site_configuration_without_patterns_is_every_sites_own() -> None:
    site = SiteConfig.parse({"target": "q_proj", "experts": {"num_experts": 1}})
    assert site.at(Q0) is site
    with_pattern = SiteConfig.parse({"target": "q_proj", "experts": {"num_experts": 1, "rank_pattern": {Q1: 2}}})
    assert with_pattern.at(Q1).experts.r == 2 and with_pattern.at(Q1).target == ["q_proj"]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"rank_pattern": {"q_proj": [1, 2, 3]}}, "rank_pattern.q_proj lists 3 values for 2 experts"),
        ({"alpha_pattern": {"q_proj": [1.0]}}, "alpha_pattern.q_proj lists 1 values for 2 experts"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj.* greater than 0"),
        ({"rank_pattern": {"q_proj": [2, 0]}}, "rank_pattern.q_proj.* greater than 0"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern.q_proj.* greater than 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern.q_proj"),
        ({"rank_pattern": [2]}, "rank_pattern"),
        ({"kind": "frozen", "rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj.* greater than 0"),
        ({"kind": "frozen", "rank_pattern": {"q_proj": [2, -1]}}, "rank_pattern.q_proj.* greater than or equal to 0"),
        ({"kind": "frozen", "scaling": ["lora"]}, "scaling lists 1 values for 2 experts"),
        ({"kind": "shared_a", "rank_pattern": {"q_proj": [2, 3]}}, "experts that share lora_A have one rank"),
    ],
)
def test_patterns_that_do_not_hold_together_are_refused(experts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SiteConfig.parse({"target": "q_proj", "experts": {"num_experts": 2, **experts}, "router": EVEN})


def test_a_router_of_single_ranks_is_checked_against_each_pattern() -> None:
    site = {"target": ["q_proj"], "router": {"kind": "flylora", "top_k": 6}}
    experts = {"kind": "sparse_projection", "num_experts": 1, "r": 8}
    SiteConfig.parse({**site, "experts": {**experts, "rank_pattern": {"1.self_attn.q_proj": 6}}})
    with pytest.raises(ConfigError, match="6"):
        SiteConfig.parse({**site, "experts": {**experts, "rank_pattern": {"1.self_attn.q_proj": 5}}})


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_fits_no_site_is_refused_by_name(tiny_llama: LlamaForCausalLM, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"experts.{option} has 'k_proj', which fits none of the 4 sites, such as"):
        mixture(tiny_llama, {option: {"q_proj": 2, "k_proj": 2}})
    assert type(tiny_llama.model.layers[0].self_attn.q_proj) is nn.Linear
    # Layers that are left out are no sites.
    with pytest.raises(ConfigError, match=f"{option} has '1.self_attn.q_proj'"):
        mixture(tiny_llama, {option: {"1.self_attn.q_proj": 2}}, layers=[0])


# -- forward ---------------------------------------------------------------------------------------------------------


def patterned(kind: str) -> dict[str, Any]:
    """Options with a rank and an alpha of its own at one site each, as far as the kind has a choice."""
    ranks: Any = 3 if kind in ("shared_a",) else [1, 3]
    return {"kind": kind, "rank_pattern": {"1.self_attn.q_proj": ranks}, "alpha_pattern": {"v_proj": [2.0, 6.0]}}


@pytest.mark.parametrize("kind", sorted(EXPERTS.names()))
def test_every_kind_takes_ranks_and_alphas_by_site(tiny_llama: LlamaForCausalLM, kind: str, tmp_path: Path) -> None:
    backbone = copy.deepcopy(tiny_llama)
    routed = {"router": None} if EXPERTS.get(kind).Config.together else {}
    model = mixture(tiny_llama, patterned(kind), **routed)
    ranks = {name: container.experts.ranks for name, container in model.containers().items()}
    assert ranks.pop(Q1) == ((3, 3) if kind == "shared_a" else (1, 3)) and set(ranks.values()) == {(4, 4)}
    scales = {name: container.site.scales for name, container in model.containers().items()}
    rank = {"rslora": 2.0, "low_rank": 1.0}.get(kind, 4.0)
    assert scales[V1] == pytest.approx((2 / rank, 6 / rank)) and scales[Q0] == pytest.approx((8 / rank, 8 / rank))
    expected = logits(model)
    assert not torch.allclose(expected, logits(backbone), atol=1e-3)
    # Native keeps every bit, and the patterns.
    model.save_pretrained(tmp_path / "native")
    again = moelora.from_pretrained(tmp_path / "native", copy.deepcopy(backbone))
    assert torch.equal(logits(again), expected)
    assert again.mixture == model.mixture
    ours, theirs = again.adapter_tensors(), model.adapter_tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # Constant weights can be merged.
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["lora", "rslora", "frozen"])
def test_outputs_are_each_sites_own_ranks_and_scales_by_hand(tiny_llama: LlamaForCausalLM, kind: str) -> None:
    model = mixture(tiny_llama, patterned(kind))
    x = torch.randn(2, 5, 32)
    root = {"rslora": math.sqrt}.get(kind, float)
    for name, ranks, alphas in [(Q0, [4, 4], [8, 8]), (Q1, [1, 3], [8, 8]), (V1, [4, 4], [2, 6])]:
        container = model.containers()[name]
        assert isinstance(container, LinearContainer)
        scales = [alpha / root(rank) for alpha, rank in zip(alphas, ranks, strict=True)]
        weights = torch.full((2, 5, 2), 0.5)
        assert torch.allclose(container(x), by_hand(container, x, ranks, scales, weights), atol=1e-6)


def test_a_growing_bank_keeps_its_patterns(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backbone = copy.deepcopy(tiny_llama)
    experts = {
        "kind": "rank1",
        "num_experts": 1,
        "rank_pattern": {"1.self_attn.q_proj": [2], "v_proj": 3},
        "alpha_pattern": {"v_proj": [6]},
    }
    model = mixture(tiny_llama, experts, router={"kind": "moram"})
    before = {name: value.detach().clone() for name, value in model.adapter_tensors().items()}
    model.begin_task()
    ranks = {name: container.experts.ranks for name, container in model.containers().items()}
    assert (ranks[Q0], ranks[Q1], ranks[V1]) == ((4, 4), (2, 2), (3, 3))
    assert {name: c.site.scales for name, c in model.containers().items()}[V1] == (2, 2)
    assert model.mixture.sites[0].experts.rank_pattern == {"1.self_attn.q_proj": [2, 2], "v_proj": 3}
    after = model.adapter_tensors()
    assert all(torch.equal(after[name.replace("lora_", "old_lora_")], value) for name, value in before.items())
    assert (after[f"{Q1}.lora_A"].shape, after[f"{V1}.lora_B"].shape) == ((2, 32), (16, 3))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(moelora.from_pretrained(tmp_path, copy.deepcopy(backbone))), logits(model))


def test_a_file_whose_pattern_asks_for_more_than_it_holds_is_refused(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    mixture(tiny_llama, {"rank_pattern": {"v_proj": 2}}).save_pretrained(tmp_path)
    path = tmp_path / "moelora_config.json"
    path.write_text(path.read_text().replace('"v_proj": 2', '"v_proj": 1000000000'))
    checkpoints.manifest.write(tmp_path)
    with pytest.raises(CheckpointError, match="ask for a stacked rank of 2000000000"):
        checkpoints.read(tmp_path)


def test_patterns_of_a_block_are_those_of_its_path(tiny_llama: LlamaForCausalLM) -> None:
    experts = {"rank_pattern": {"1.mlp": [1, 3]}, "alpha_pattern": {"0.mlp": 2}}
    backbone = copy.deepcopy(tiny_llama)
    model = mixture(tiny_llama, experts, {"kind": "topk", "top_k": 1}, target="mlp")
    first, second = model.containers().values()
    assert isinstance(first, BlockContainer) and isinstance(second, BlockContainer)
    assert {bank.ranks for bank in first.banks()} == {(4, 4)} and {bank.ranks for bank in second.banks()} == {(1, 3)}
    assert first.site.scales == (0.5, 0.5) and second.site.scales == (8, 8 / 3)
    with pytest.raises(ConfigError, match="has 'up_proj', which fits none"):
        mixture(backbone, {"rank_pattern": {"up_proj": 2}}, target="mlp")


# -- routers that sites share ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layerwise", [False, True])
def test_sites_of_different_ranks_share_a_classifier(
    tiny_llama: LlamaForCausalLM, layerwise: bool, tmp_path: Path
) -> None:
    backbone = copy.deepcopy(tiny_llama)
    experts = {"kind": "frozen", "num_experts": 3, "r": [2, 3, 1], "rank_pattern": {"v_proj": [0, 1, 4], Q1: [1, 1, 1]}}
    model = mixture(tiny_llama, experts, {"kind": "xlora", "layerwise": layerwise})
    routers = {id(container.router) for container in model.containers().values()}
    assert len(routers) == 1
    with torch.no_grad(), moelora.trace(model) as tape:
        model(IDS)
        inputs: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [
            container.register_forward_hook(lambda m, args, out: inputs.update({m.site.name: (args[0], out)}))
            for container in model.containers().values()
        ]
        model(IDS)
    for handle in handles:
        handle.remove()
    for name, container in model.containers().items():
        assert isinstance(container, LinearContainer)
        x, out = inputs[name]
        ranks = list(container.experts.ranks)
        weights = tape.records[name][-1].dense_weights()
        scales = [8 / rank if rank else 1.0 for rank in ranks]
        assert torch.allclose(out, by_hand(container, x, ranks, scales, weights), atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(moelora.from_pretrained(tmp_path, backbone)), logits(model))


def test_a_shared_router_of_single_ranks_needs_the_same_ranks(tiny_llama: LlamaForCausalLM) -> None:
    experts = {"kind": "sparse_projection", "num_experts": 1, "r": 4, "rank_pattern": {Q1: 3}}
    with pytest.raises(ConfigError, match=f"site '{Q1}'.*cannot share the router"):
        mixture(tiny_llama, experts, {"kind": "flylora", "top_k": 2, "share": "all"}, target="q_proj")


def test_experts_beside_a_linear_of_rank_zero_take_no_memory(tiny_llama: LlamaForCausalLM) -> None:
    model = mixture(tiny_llama, {"kind": "frozen", "rank_pattern": {Q1: [0, 0]}})
    assert model.adapter_tensors()[f"{Q1}.lora_A"].shape == (0, 32)
    assert model.adapter_tensors()[f"{Q1}.lora_B"].shape == (32, 0)
