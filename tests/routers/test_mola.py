"""MoLA: top-k at linears, balanced layer by layer, with more experts in the upper layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora import routers
from moelora.routers import Router
from moelora.routing import RouteInput, RoutingContext, RoutingRecord, SiteInfo


def make(kind: str = "mola", layer: int | None = 0, **options: Any) -> Router[Any]:
    site = SiteInfo("s", layer, in_features=16, out_features=16, ranks=(2,) * 6, scales=(1.0,) * 6)
    entry = routers.get(kind)
    router: Router[Any] = entry(entry.Config.parse({"kind": kind, **options}), site)
    with torch.no_grad():
        router.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return router


def route(router: Router[Any], states: Tensor, mask: Tensor | None = None) -> RoutingRecord:
    record = router.route(RouteInput(states, None, RoutingContext(), router.site))
    record.mask = mask
    return record


def hidden(seed: int = 2) -> Tensor:
    return torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(seed))


def balance(router: Router[Any], records: list[RoutingRecord], **context: Any) -> float:
    loss: float = router.losses(records, RoutingContext(**context))["load_balance"].item()
    return loss


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_choice_and_weights_are_those_of_topk(top_k: int) -> None:
    ours, topk = (route(make(kind, top_k=top_k), hidden()) for kind in ("mola", "topk"))
    assert torch.equal(ours.indices, topk.indices)
    assert torch.equal(ours.weights, topk.weights)
    assert ours.normalized and make().weighs == "updates"
    with pytest.raises(ValueError, match="top_k is 7 but there are 6 experts"):
        make(top_k=7)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_an_even_gate_has_the_loss_1_in_each_layer_whatever_k_is(top_k: int) -> None:
    records = []
    for layer in (0, 0, 1, 2):
        router = make(layer=layer, top_k=top_k)
        with torch.no_grad():
            router.weight.zero_()
        records.append(route(router, hidden()))
    assert balance(router, records) == pytest.approx(3.0, rel=1e-6)
    assert balance(make(top_k=top_k, balance="pooled"), records) == pytest.approx(top_k, rel=1e-6)


def test_each_layer_pools_its_sites_and_layers_add_up() -> None:
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 3:], mask[2, :2] = False, False
    layers = (0, 1, 0, 1, 1)
    records = [route(make(layer=layer), hidden(seed), mask) for seed, layer in enumerate(layers)]
    expected = 0.0
    for layer in (0, 1):
        counts, probs, tokens = [0.0] * 6, [0.0] * 6, 0
        for record in (record for record, at in zip(records, layers, strict=True) if at == layer):
            for row, place in mask.nonzero().tolist():
                tokens += 1
                p = record.logits[row, place].double().softmax(-1)
                for expert in p.topk(2).indices.tolist():
                    counts[expert] += 1
                probs = [before + value for before, value in zip(probs, p.tolist(), strict=True)]
        share = [count / sum(counts) for count in counts]
        expected += 6 * sum(f * q / tokens for f, q in zip(share, probs, strict=True))
    assert balance(make(), records) == pytest.approx(expected, rel=1e-6)
    assert balance(make(balance="pooled"), records) != pytest.approx(expected, rel=1e-2)


def test_padding_never_counts() -> None:
    """The released code counts it."""
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[:, :7] = True
    right = torch.cat([hidden(), 5 * torch.ones(3, 3, 16)], dim=1)
    left = torch.cat([5 * torch.ones(3, 3, 16), hidden()], dim=1)
    alone = balance(make(), [route(make(), hidden())])
    assert balance(make(), [route(make(), right, mask)]) == pytest.approx(alone, rel=1e-6)
    assert balance(make(), [route(make(), left, mask.flip(1))]) == pytest.approx(alone, rel=1e-6)
    assert balance(make(), [route(make(), right)]) != pytest.approx(alone, rel=1e-2)


def test_only_the_pooled_loss_takes_the_load_of_a_whole_step() -> None:
    records = [route(make(), hidden())]
    share = torch.tensor([2.0, 0, 0, 0, 0, 0])
    assert balance(make(), records, load_share=share) == balance(make(), records)
    expected = 6 * 2 * records[0].probs.mean((0, 1))[0].item()
    assert balance(make(balance="pooled"), records, load_share=share) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_off_unless_asked_for() -> None:
    assert make().config.coefficients() == {"load_balance": 0.0}


def test_the_card_gives_upper_layers_more_experts(tiny_config: LlamaConfig) -> None:
    recipe = moelora.load_recipe("mola")
    tiny_config.num_hidden_layers = 30  # as many as the card's backbone has
    model = moelora.attach(LlamaForCausalLM(tiny_config).eval(), recipe.mixture)
    experts = [model.containers()[f"model.layers.{layer}.self_attn.q_proj"].site.num_experts for layer in range(30)]
    assert experts == [2] * 8 + [4] * 7 + [6] * 8 + [8] * 7
    assert len(model.containers()) == 7 * 30
    ids = torch.randint(3, 64, (2, 5))
    out = model(ids, labels=ids)
    losses = [out.aux_losses[f"sites.{site}.load_balance"].item() for site in range(4)]
    assert all(layers <= loss < 2 * layers for loss, layers in zip(losses, (8, 7, 8, 7), strict=True))
    assert torch.equal(out.loss, out.task_loss)
