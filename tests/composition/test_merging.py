"""Several adapters into one, against PEFT 0.21.2 (tests/fixtures/peft_lora_tiny_llama) and against dense matrices."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from export_cases import stock
from lora_cases import (
    FIXTURES,
    ROOT,
    WEIGHTED,
    adapter_of,
    fixture,
    logits_of,
    pair,
    random_adapter,
    total,
    update,
)
from transformers import LlamaForCausalLM

from moelora.composition import distance, merge_adapters
from moelora.composition.adapter import Factors
from moelora.composition.merging import METHODS
from moelora.errors import CheckpointError, ConfigError

WEIGHTS = [0.7, 0.4]
PRUNED = {"density": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {name: {} for name in ("cat", "linear", "svd", "lego")}
ALL = [(name, OPTIONS.get(name, PRUNED)) for name in METHODS]
RAGGED = [("cat", {}), ("svd", {}), ("lego", {}), ("ties_svd", PRUNED), ("dare_linear_svd", PRUNED)]


@pytest.mark.parametrize(
    ("method", "options"),
    [("cat", {}), ("linear", {}), ("svd", {}), ("ties", PRUNED), ("magnitude_prune", PRUNED)],
)
def test_the_logits_are_those_of_pefts_weighted_adapter(method: str, options: dict[str, Any]) -> None:
    merged = merge_adapters(pair(), method, WEIGHTS, **options)
    expected = WEIGHTED[f"logits.{method}"]
    assert (logits_of(merged) - expected).abs().max() < 1e-5
    other = "cat" if method != "cat" else "linear"
    assert (WEIGHTED[f"logits.{other}"] - expected).abs().max() > 1e-3, "the fixture tells methods apart"
    swapped = merge_adapters(pair(), method, WEIGHTS[::-1], **options)
    assert (logits_of(swapped) - expected).abs().max() > 1e-3


@pytest.fixture(scope="module")
def peft_model() -> Iterator[Any]:
    """PEFT's own model with the two adapters, whose generator is set just before it merges, as ours is."""
    base = LlamaForCausalLM.from_pretrained(FIXTURES / "tiny_llama_base", dtype=torch.float32)
    model = stock(base, ROOT / "plain_r4_a8", "plain")
    model.load_adapter(str(ROOT / "plain_r4_a8_second"), adapter_name="second")
    inject = model.base_model.inject_adapter

    def injected(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)
        torch.manual_seed(5)

    model.base_model.inject_adapter = injected
    yield model


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lego"])
def test_every_method_of_peft_gives_the_updates_that_peft_computes(peft_model: Any, method: str) -> None:
    pruned = {} if method in OPTIONS else PRUNED
    weights = [0.9, -0.6]
    peft_model.add_weighted_adapter(["plain", "second"], weights, method, combination_type=method, **pruned)
    random = {"seed": 5} if method.startswith("dare") else {}
    merged = merge_adapters(pair(), method, weights, **pruned, **random)
    for path in merged.factors:
        expected = peft_model.base_model.model.get_submodule(path).get_delta_weight(method)
        assert torch.allclose(update(merged, path).float(), expected, atol=1e-6), path
        assert expected.norm() > 0.1


def test_random_methods_follow_their_seed_and_leave_the_generator() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (merge_adapters(pair(), "dare_linear", seed=seed, **PRUNED) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    same = [torch.equal(first.factors[path].A, again.factors[path].A) for path in first.factors]
    assert all(same)
    assert not torch.equal(first.factors[path := next(iter(first.factors))].A, other.factors[path].A)
    masks = [factors.A != 0 for factors in first.factors.values()]
    assert not torch.equal(masks[0], masks[1]), "every module draws its own"


@pytest.mark.parametrize(("method", "options"), ALL, ids=[name for name, _ in ALL])
def test_the_given_adapters_stay_as_they_are(method: str, options: dict[str, Any]) -> None:
    adapters = pair()
    before = [{path: (f.A.clone(), f.B.clone()) for path, f in adapter.factors.items()} for adapter in adapters]
    merged = merge_adapters(adapters, method, WEIGHTS, **options)
    for adapter, values in zip(adapters, before, strict=True):
        for path, (A, B) in values.items():
            assert torch.equal(adapter.factors[path].A, A) and torch.equal(adapter.factors[path].B, B)
            assert merged.factors[path].A.data_ptr() != adapter.factors[path].A.data_ptr()
    assert all(f.scale == 1.0 and f.A.dtype == f.B.dtype == torch.float32 for f in merged.factors.values())


@pytest.mark.parametrize(("method", "options"), RAGGED, ids=[name for name, _ in RAGGED])
def test_ranks_scales_and_modules_may_differ(method: str, options: dict[str, Any]) -> None:
    one = random_adapter(1, {"layers.10.q": 2, "layers.2.q": 3}, scale=0.5)
    two = random_adapter(2, {"layers.2.q": 4, "layers.2.v": 1}, scale=2.0)
    merged = merge_adapters([one, two], method, [1.0, -2.0], **options)
    assert list(merged.factors) == ["layers.2.q", "layers.2.v", "layers.10.q"], "in the order of layers"
    # What one adapter alone has is that adapter's, unless a part of it is thrown away.
    if method in ("cat", "svd", "lego"):
        assert torch.allclose(update(merged, "layers.2.v"), -2 * update(two, "layers.2.v"), atol=1e-5)
        assert torch.allclose(update(merged, "layers.10.q"), update(one, "layers.10.q"), atol=1e-5)
    ranks = [factors.rank for factors in merged.factors.values()]
    assert ranks == ([7, 1, 2] if method == "cat" else [4, 1, 2])


def test_concatenation_is_exact_and_the_mixture_of_factors_is_not() -> None:
    adapters, path = [random_adapter(seed, {"q": 3}, scale=1.5) for seed in range(3)], "q"
    weights = [0.2, 0.5, -1.0]
    wanted = total(adapters, weights, path)
    assert torch.allclose(update(merge_adapters(adapters, "cat", weights), path), wanted, atol=1e-5)
    linear = merge_adapters(adapters, "linear", [0.2, 0.5, 1.0])
    roots = [(w * 1.5) ** 0.5 for w in (0.2, 0.5, 1.0)]
    factors = [adapter.factors[path] for adapter in adapters]
    crossed = sum(
        a * b * f.B.double() @ g.A.double()
        for a, f in zip(roots, factors, strict=True)
        for b, g in zip(roots, factors, strict=True)
    )
    assert torch.allclose(update(linear, path), crossed, atol=1e-5)
    assert distance(linear, adapters, [0.2, 0.5, 1.0]).relative > 0.5


def test_the_default_weights_make_a_sum() -> None:
    adapters = [random_adapter(seed, {"q": 2}) for seed in range(2)]
    merged = merge_adapters(adapters, "cat", name="both")
    assert merged.name == "both" and merged.backbone.name == "tiny"
    assert torch.allclose(update(merged, "q"), update(adapters[0], "q") + update(adapters[1], "q"), atol=1e-5)


def test_the_distance_is_that_of_the_dense_matrices() -> None:
    adapters = [random_adapter(1, {"q": 3, "v": 2}, 2.0), random_adapter(2, {"q": 2, "k": 4}, 0.5)]
    weights = [0.7, 1.3]
    merged = merge_adapters(adapters, "svd", weights, rank=2)
    found = distance(merged, adapters, weights)
    errors, norms = [], []
    for path in ("q", "v", "k"):
        wanted = total(adapters, weights, path)
        error, size = (update(merged, path) - wanted).norm().item(), wanted.norm().item()
        assert found.modules[path].error == pytest.approx(error, rel=1e-9, abs=1e-5)
        assert found.modules[path].wanted == pytest.approx(size, rel=1e-9)
        assert found.modules[path].rank == 2
        errors.append(error), norms.append(size)
    assert found.modules["q"].relative > 0.1 and found.modules["v"].relative < 1e-6
    whole = (sum(e * e for e in errors) / sum(n * n for n in norms)) ** 0.5
    assert found.relative == pytest.approx(whole, rel=1e-5)
    assert f"q: rank 2, off by {found.modules['q'].relative:.2%}" in str(found).splitlines()
    assert found.to_dict()["modules"]["q"]["relative"] == found.modules["q"].relative


def test_a_module_that_only_one_side_has_counts_as_a_difference() -> None:
    one, two = random_adapter(1, {"q": 2}), random_adapter(2, {"v": 2})
    found = distance(one, [two])
    assert found.modules["v"].relative == 1.0 and found.modules["v"].rank == 0
    assert found.modules["q"].relative == float("inf")
    assert distance(one, [one]).relative < 1e-12


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tiez", {}, r"unknown merging method 'tiez'.*did you mean 'ties'"),
        ("svd", {"rnak": 3}, r"method 'svd'.*unknown key 'rnak'.*did you mean 'rank'"),
        ("svd", {"rank": 0}, r"method 'svd'.*rank.*greater than 0"),
        ("svd", {"rank": 2, "energy": 0.5}, "give one of them"),
        ("ties", {}, "density: this key is missing"),
        ("ties", {"density": 1.5}, "density.*less than or equal to 1"),
        ("linear", {}, r"'linear'.*needs adapters of one rank; at q they have \[2, 3\]: take 'cat'"),
        ("dare_ties", PRUNED, r"'dare_ties'.*needs adapters of one rank"),
    ],
)
def test_what_cannot_be_done_is_said(method: str, options: dict[str, Any], message: str) -> None:
    adapters = [random_adapter(1, {"q": 2}), random_adapter(2, {"q": 3})]
    with pytest.raises(ConfigError, match=message):
        merge_adapters(adapters, method, **options)


def test_adapters_of_other_backbones_are_refused() -> None:
    one = random_adapter(1, {"q": 2})
    with pytest.raises(CheckpointError, match=r"'random1' and 'random3'.*q: expected \(in, out\) = \(12, 10\), found"):
        merge_adapters([one, random_adapter(3, {"q": 2}, width=14)], "cat")
    narrow, wide = (adapter_of(one.factors, name, hidden_size=size) for name, size in (("narrow", 32), ("wide", 64)))
    with pytest.raises(CheckpointError, match=r"'narrow' and 'wide'.*hidden_size: expected 32, found 64"):
        merge_adapters([narrow, wide], "cat")
    with pytest.raises(ConfigError, match="there are 1 weights for 2 adapters"):
        merge_adapters(pair(), "cat", [1.0])
    with pytest.raises(ConfigError, match="no adapters"):
        merge_adapters([], "cat")


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_finite_number_is_refused(weight: float) -> None:
    for call in (lambda given: merge_adapters(pair(), "cat", given), lambda given: distance(pair()[0], pair(), given)):
        with pytest.raises(ConfigError, match=rf"weights are \[1.0, {weight}\]: expected finite numbers"):
            call([1.0, weight])


def test_a_method_of_peft_without_peft_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.utils.merge_utils", None)
    with pytest.raises(ConfigError, match=r"pip install moelora\[peft\]"):
        merge_adapters(pair(), "ties", **PRUNED)
    assert merge_adapters(pair(), "svd").factors, "the others do without it"


def test_an_adapter_that_adds_nothing_somewhere_is_left_out_there() -> None:
    empty = Factors(torch.zeros(0, 12), torch.zeros(10, 0), 1.0)
    one = random_adapter(1, {"q": 2, "v": 2})
    merged = merge_adapters([one, adapter_of({"q": empty, "k": empty})], "svd")
    assert torch.allclose(update(merged, "q"), update(one, "q"), atol=1e-5)
    assert list(merged.factors) == ["q", "v"]


def test_half_precision_is_merged_in_full() -> None:
    adapters = [fixture(name, 2.0) for name in ("plain_r4_a8", "plain_r4_a8_second")]
    halves = [
        adapter_of({p: Factors(f.A.bfloat16(), f.B.bfloat16(), f.scale) for p, f in a.factors.items()})
        for a in adapters
    ]
    for method, options in (("cat", {}), ("ties", PRUNED)):
        merged = merge_adapters(halves, method, WEIGHTS, **options)
        path = next(iter(merged.factors))
        assert merged.factors[path].A.dtype == torch.float32
    merged = merge_adapters(halves, "cat", WEIGHTS)
    assert torch.allclose(update(merged, path), total(halves, WEIGHTS, path), atol=1e-6)
