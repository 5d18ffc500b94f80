"""ReMix against an enumeration of every selection of a two-layer network, in float64 (tests/fixtures/remix_rloo).

Shapes: N = 144 selections, L = 2 layers, E experts, K picks, D features.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moelora.experts import Container, build
from moelora.routers import rloo
from moelora.slot import RoutingSlot

ROOT = Path(__file__).parents[1] / "fixtures" / "remix_rloo"
CONFIG = json.loads((ROOT / "config.json").read_text())
T = load_file(ROOT / "remix_rloo.safetensors")
LOSSES_N, Q_N = T["losses"], T["logQ"].exp()
LAYERS = range(CONFIG["layers"])


def log_probs(P: list[Tensor]) -> Tensor:
    """(N,) of every selection, with graph to the routers P, over the states that the selections lead to."""
    state_ND, total = T["x"].expand(len(LOSSES_N), -1), torch.zeros(len(LOSSES_N), dtype=torch.float64)
    for layer in LAYERS:
        picks_NK = T["selections"][:, layer]
        total = total + rloo.plackett_luce(state_ND @ P[layer].T, picks_NK)
        A, B = T["A"][layer][picks_NK], T["B"][layer][picks_NK]
        update = torch.einsum("nkdr,nkre,ne->nd", B, A, state_ND)
        state_ND = torch.tanh(state_ND @ T["W"][layer].T + CONFIG["omega"] * update)
    assert torch.allclose((state_ND - T["target"]).square().sum(-1), LOSSES_N, atol=1e-12, rtol=0)
    return total


def routers() -> list[Tensor]:
    return [T["P"][layer].clone().requires_grad_() for layer in LAYERS]


def scores() -> list[Tensor]:
    """(N, E, D) gradient of the log-probability of each selection, for each layer."""
    P = routers()
    rows = [torch.autograd.grad(value, P, retain_graph=True) for value in log_probs(P)]
    return [torch.stack([row[layer] for row in rows]) for layer in LAYERS]


def pairs() -> tuple[Tensor, Tensor]:
    """(2, N·N) every pair of selections, and (N·N,) its probability."""
    each = torch.arange(len(LOSSES_N))
    chosen = torch.cartesian_prod(each, each).T
    return chosen, Q_N[chosen].prod(0)


def estimates(chosen: Tensor, score: Tensor) -> Tensor:
    """(C, E, D) the estimate from each tuple of selections (M, C)."""
    advantage_MC = rloo.advantages(LOSSES_N[chosen]) * chosen.shape[1]  # each tuple by itself, not a mean over them
    return torch.einsum("mc,mced->ced", advantage_MC, score[chosen])


def test_log_probabilities_are_those_of_the_enumeration_and_sum_to_1() -> None:
    found = log_probs(routers())
    assert (found - T["logQ"]).abs().max() <= 1e-12
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_two_selections_give_the_exact_gradient_in_expectation() -> None:
    chosen, chance = pairs()
    P = routers()
    advantage = rloo.advantages(LOSSES_N[chosen]) * chosen.shape[1]
    (advantage * chance * log_probs(P)[chosen]).sum().backward()
    for layer in LAYERS:
        assert (P[layer].grad - T["exact_grad_P"][layer]).abs().max() <= 1e-12
        # Divided by M instead of M - 1 it is another gradient: the check above would not let that pass.
        error = (P[layer].grad / 2 - T["exact_grad_P"][layer]).abs().max().item()
        assert error == pytest.approx(CONFIG["max_abs_err_if_1_over_M"][layer], abs=1e-12)
        assert error > 0.1


@pytest.mark.parametrize("selections", [3, 4])
def test_more_selections_give_the_exact_gradient_too(selections: int) -> None:
    """For the twelve selections of the second layer after the first one of the first."""
    mine = (T["selections"][:, 0] == T["selections"][0, 0]).all(-1).nonzero().squeeze(-1)
    chance = Q_N[mine] / Q_N[mine].sum()
    P = routers()
    log_prob = log_probs(P)[mine]
    exact = torch.autograd.grad(((log_prob - log_prob.logsumexp(0)).exp() * LOSSES_N[mine]).sum(), P, retain_graph=True)
    tuples = torch.cartesian_prod(*[torch.arange(len(mine))] * selections).T
    advantage = rloo.advantages(LOSSES_N[mine][tuples]) * tuples.shape[1]
    found = torch.autograd.grad((advantage * chance[tuples].prod(0) * log_prob[tuples]).sum(), P)
    assert (found[1] - exact[1]).abs().max() <= 1e-12
    assert exact[1].abs().max() > 0.1


def test_the_baseline_lowers_the_variance_forty_times() -> None:
    chosen, chance = pairs()
    for layer, score in enumerate(scores()):
        plain = (LOSSES_N[chosen][..., None, None] * score[chosen]).mean(0)
        traces = {}
        for name, estimate in (("rloo", estimates(chosen, score)), ("reinforce_nobaseline", plain)):
            weight = chance[:, None, None]
            mean = (weight * estimate).sum(0)
            assert (mean - T["exact_grad_P"][layer]).abs().max() <= 1e-12
            traces[name] = ((weight * estimate.square()).sum(0) - mean.square()).sum().item()
            expected = CONFIG["variance_trace_and_bias"][f"layer{layer}"][name][0]
            assert traces[name] == pytest.approx(expected, rel=1e-12)
        assert traces["reinforce_nobaseline"] > 40 * traces["rloo"]


def test_the_surrogate_has_the_gradient_of_its_definition() -> None:
    P = routers()
    chosen = torch.tensor([[3], [77], [140]])
    rloo.surrogate(LOSSES_N[chosen], log_probs(P)[chosen]).backward()
    for layer, score in enumerate(scores()):
        gap = LOSSES_N[chosen[:, 0]] - LOSSES_N[chosen[:, 0]].mean()
        expected = torch.einsum("m,med->ed", gap / 2, score[chosen[:, 0]])
        assert torch.allclose(P[layer].grad, expected, atol=1e-12)


# -- the network with our own sites -----------------------------------------------------------------------------------


def network() -> list[Container]:
    """The two layers; alpha / r is 3, which the router has to take back."""
    slot, sites = RoutingSlot(), []
    for layer in LAYERS:
        base = nn.Linear(CONFIG["D"], CONFIG["D"], bias=False).requires_grad_(False)
        experts = {"num_experts": CONFIG["n"], "r": CONFIG["r"], "alpha": 3 * CONFIG["r"]}
        config = {"target": "x", "experts": experts, "router": {"kind": "remix", "top_k": CONFIG["k"]}}
        site = build(base, config, name=f"layer{layer}", slot=slot)
        with torch.no_grad():
            base.weight.copy_(T["W"][layer])
            site.lora_A.copy_(T["A"][layer].flatten(0, 1))
            site.lora_B.copy_(T["B"][layer].permute(1, 0, 2).flatten(1))
            site.router.weight.copy_(T["P"][layer])
        sites.append(site)
    return sites


def run(sites: list[Container], rows: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Output and loss of each row, its choices at both layers, and their log-probability."""
    heard = []
    hidden = T["x"].float().expand(rows, 1, -1)
    with sites[0].slot.using(listener=lambda site, record: heard.append(record)):
        for site in sites:
            hidden = torch.tanh(site(hidden))
    losses = (hidden - T["target"]).square().sum(-1).squeeze(-1)
    log_prob = rloo.example_log_prob(heard, rows) if sites[0].training else losses
    return hidden.squeeze(1), losses, [record.indices.squeeze(1) for record in heard], log_prob


def test_evaluation_takes_the_most_probable_experts() -> None:
    out, losses, picks, _ = run([site.eval() for site in network()], 1)
    assert (out[0] - T["y_topk"]).abs().max() <= 1e-5
    assert [sorted(layer[0].tolist()) for layer in picks] == CONFIG["topk_inference"]
    assert losses.item() == pytest.approx(CONFIG["loss_topk"], rel=1e-5)


def test_sampled_sites_have_the_losses_and_chances_of_the_enumeration() -> None:
    rows = 40_000
    _, losses, picks, log_prob = run([site.train() for site in network()], rows)
    number = {tuple(map(tuple, selection.tolist())): row for row, selection in enumerate(T["selections"])}
    drawn = [number[one, two] for one, two in zip(*(map(tuple, layer.tolist()) for layer in picks), strict=True)]
    assert torch.allclose(losses.double(), LOSSES_N[drawn], rtol=1e-4)
    assert torch.allclose(log_prob.double(), T["logQ"][drawn], atol=1e-4)
    counts, expected = torch.bincount(torch.tensor(drawn), minlength=len(Q_N)), rows * Q_N
    likely = expected > 5
    chi2 = ((counts - expected).square() / expected)[likely].sum().item()
    assert chi2 < likely.sum().item() + 4 * (2 * likely.sum().item()) ** 0.5
