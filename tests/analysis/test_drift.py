"""Jensen–Shannon divergence of routing: between tasks, and over the time in which later tasks are learnt."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import moelora
from moelora.analysis import RoutingRecorder, RoutingStats, SiteStats
from moelora.analysis.drift import between_tasks, divergence, routing_drift
from moelora.errors import DataError


def stats(*loads: list[list[float]], tasks: tuple[str, ...] = ("a", "b")) -> RoutingStats:
    """A recording whose sites have these loads (N, E)."""
    sites = [
        SiteStats(name=f"layers.{n}.mlp", layer=n, selections=load, tokens=[9] * len(load), entropy=0.0, margin=0.0)
        for n, load in enumerate(loads)
    ]
    return RoutingStats(tasks=tasks, sites=tuple(sites))


def test_the_divergence_by_hand() -> None:
    # p = (1/2, 1/2), q = (1, 0): m = (3/4, 1/4); KL(p|m) = (log2(2/3) + log2(2)) / 2, KL(q|m) = log2(4/3)
    wanted = ((math.log2(2 / 3) + 1) / 2 + math.log2(4 / 3)) / 2
    assert divergence([5, 5], [3, 0]) == pytest.approx(wanted, abs=1e-15)
    assert divergence([3, 0], [5, 5]) == pytest.approx(wanted, abs=1e-15), "symmetric"
    assert divergence([1, 2, 3], [10, 20, 30]) == 0, "of shares, not of counts"
    assert divergence([1, 0, 2, 0], [0, 7, 0, 1]) == pytest.approx(1, abs=1e-15), "nothing in common"
    assert np.isnan(divergence([0, 0], [1, 1])), "nothing was recorded"


def test_the_divergence_is_scipys() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    rng = np.random.default_rng(0)
    one, other = rng.random((5, 7, 12)), rng.random((5, 7, 12)) * (rng.random((5, 7, 12)) > 0.5)
    found = divergence(one, other)
    assert found.shape == (5, 7)
    assert np.allclose(found, distance.jensenshannon(one, other, base=2, axis=-1) ** 2, atol=1e-12)
    assert ((found > 0) & (found < 1)).all()


def test_experts_that_came_later_had_no_load() -> None:
    assert divergence([1, 1], [1, 1, 2]) == pytest.approx(float(divergence([1, 1, 0], [1, 1, 2])))
    assert divergence([1, 1], [1, 1, 0]) == 0


def test_tasks_are_compared_with_each_other() -> None:
    found = between_tasks(stats([[1, 0], [0, 1], [1, 1]], tasks=("a", "b", "c")).sites[0])
    half = float(divergence([1, 0], [1, 1]))
    assert np.allclose(found, [[0, 1, half], [1, 0, half], [half, half, 0]])


def test_drift_is_the_mean_over_sites_and_begins_when_a_task_was_learnt() -> None:
    first = stats([[4, 0], [9, 9]], [[2, 2], [5, 0]])
    second = stats([[4, 0, 0], [0, 6, 0]], [[0, 0, 8], [0, 0, 3]])
    drift = routing_drift([first, second])
    assert drift.tasks == ("a", "b")
    assert drift.between.tolist() == [[0, 0.5], [0.5, 0]], "apart at the first site, alike at the second"
    assert drift.sites == {"layers.0.mlp": 1.0, "layers.1.mlp": 0.0} and drift.between_tasks == 0.5
    assert np.isnan(drift.since[0, 1]), "b was not learnt yet"
    assert drift.since[0, 0] == drift.since[1, 1] == 0
    assert drift.since[1, 0] == pytest.approx(0.5), "it stayed at the first site and left all experts of the second"
    assert drift.since_learnt == drift.since[1, 0]
    written = json.loads(json.dumps(drift.to_dict(), allow_nan=False))
    assert written["since"][0] == [0.0, None] and written["between_tasks"] == 0.5


def test_a_single_task_has_nothing_to_drift_from() -> None:
    drift = routing_drift([stats([[1, 2]], tasks=("a",))])
    assert drift.between.tolist() == [[0]] and drift.since.tolist() == [[0]]
    assert math.isnan(drift.between_tasks) and math.isnan(drift.since_learnt)
    assert drift.to_dict()["since_learnt"] is None


SAME = stats([[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ([], "none was given"),
        ([SAME], "after each of the 2 tasks, got 1"),
        ([SAME, stats([[1, 2], [3, 4]], tasks=("b", "a"))], "recording 1 has the tasks b, a, the first has a, b"),
        ([SAME, stats([[1, 2], [3, 4]], [[1, 2], [3, 4]])], "recording 1 has other sites"),
        ([SAME, stats([[1], [3]])], "had 2 experts in recording 0 and has 1 in recording 1: what was pruned"),
    ],
)
def test_what_cannot_be_compared_is_refused(moments: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        routing_drift(moments)


def test_a_bank_that_grows_is_recorded_and_compared(tiny_llama: LlamaForCausalLM) -> None:
    site = {"target": "q_proj", "experts": {"kind": "rank1", "r": 4}, "router": {"kind": "moram", "top_k": 2}}
    model = moelora.attach(copy.deepcopy(tiny_llama), {"sites": [site]}).eval()
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    moments = []
    for task in range(2):
        if task:
            model.begin_task()
        with RoutingRecorder(model, ["a", "b"]) as recorder, torch.no_grad():
            model(ids, task_ids=torch.tensor([0, 1]))
        moments.append(recorder.result())
    drift = routing_drift(moments)
    assert [each.sites[0].num_experts for each in moments] == [4, 8]
    assert 0 < drift.since[1, 0] < 1, "some tokens of a chose atoms that came with b"
    assert 0 < drift.between[0, 1] < 1 and set(drift.sites) == {s.name for s in moments[0].sites}
