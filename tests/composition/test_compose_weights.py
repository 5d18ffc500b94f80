"""The search for one weight for each adapter: the search itself, and what it finds on two skills."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_cases import random_lora
from skills import ANSWERS, examples

import moelora
from moelora.composition.weights import Found, SearchConfig, mean_loss, minimise, search_weights
from moelora.data import Collator, tokenize
from moelora.errors import ConfigError, DataError

NAMES = list(ANSWERS)


def bowl(weights: list[float]) -> float:
    return sum((weight - wanted) ** 2 for weight, wanted in zip(weights, (0.9, -0.4, 0.0), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_search_comes_near_to_the_minimum(seed: int) -> None:
    best, values = minimise(bowl, 3, bound=1.5, evaluations=40, seed=seed)
    assert len(values) == 40
    assert values[0] == bowl([0.0] * 3)
    assert bowl(best) == min(values) < 0.05 * values[0]


def test_the_search_repeats_itself_and_another_seed_goes_another_way() -> None:
    first, again, other = (minimise(bowl, 3, bound=1.5, evaluations=12, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first[1] != other[1]


def test_the_search_stays_within_its_bounds_and_reaches_them() -> None:
    seen: list[list[float]] = []

    def slope(weights: list[float]) -> float:
        seen.append(weights)
        return -weights[0] + weights[1]

    best, values = minimise(slope, 2, bound=1.5, evaluations=30)
    assert best == [1.5, -1.5] and len(values) == len(seen) == 30
    assert all(abs(weight) <= 1.5 for weights in seen for weight in weights)
    assert len({tuple(weights) for weights in seen}) > 20, "no point is read again and again"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_search_ends_after_so_many_evaluations(count: int) -> None:
    assert len(minimise(bowl, 3, bound=1.5, evaluations=count)[1]) == count


def test_a_value_that_is_no_number_is_never_the_best() -> None:
    best, values = minimise(lambda w: math.nan if w[0] > 0 else w[0] + 2, 1, bound=1.5, evaluations=20)
    assert best[0] < 0 and math.inf in values


# -- on two skills -----------------------------------------------------------------------------------------------------


def composed(skilled: list[Path], backbone: Path, **options: Any) -> moelora.MoELoRAModel:
    chosen = {"weights": "uniform", "mix": "factors", **options}
    return moelora.compose(skilled, "static", str(backbone), quantization="fp32", **chosen)


def batch_of(model: moelora.MoELoRAModel, task: str, count: int) -> dict[str, torch.Tensor]:
    tokens = tokenize(examples(task)[:count], model.tokenizer, 64)
    return Collator(model.tokenizer.pad_token_id)([tokens[i] for i in range(len(tokens))])


@pytest.mark.parametrize("mix", ["factors", "outputs"])
def test_five_examples_tell_which_adapter_is_wanted(mix: str, skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone, mix=mix)
    for index, task in enumerate(NAMES):
        found = search_weights(model, examples(task), max_length=64)
        own, other = found.weights[task], found.weights[NAMES[1 - index]]
        assert own > 0.5 and own > abs(other) + 0.3
        assert found.examples == 5 and len(found.history) == 40
        assert found.value == min(found.history) < 0.3 * found.before
        penalty = 0.05 * (abs(own) + abs(other)) / 2
        assert mean_loss(model, [batch_of(model, task, 5)]) + penalty == pytest.approx(found.value, rel=1e-5)


def test_the_search_starts_from_the_backbone(skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone)
    found = search_weights(model, examples(NAMES[0]), SearchConfig(evaluations=1), max_length=64)
    with model.disable_experts():
        loss = mean_loss(model, [batch_of(model, NAMES[0], 5)])
    assert found.before == found.value == pytest.approx(loss, rel=1e-6)
    assert found.weights == dict.fromkeys(NAMES, 0.0)


def test_the_loss_is_over_the_tokens_of_the_answers_however_they_are_batched(
    skilled: list[Path], skill_backbone: Path
) -> None:
    model = composed(skilled, skill_backbone)
    rows = examples(*NAMES, count=3)
    config = SearchConfig(evaluations=3, shots=6)
    whole, halves = (search_weights(model, rows, config, max_length=64, batch_size=size) for size in (6, 1))
    assert whole.history == pytest.approx(halves.history, rel=1e-5)
    assert whole.examples == 6


def test_what_was_found_is_saved_and_can_be_given(skilled: list[Path], skill_backbone: Path, tmp_path: Path) -> None:
    model = composed(skilled, skill_backbone)
    told: list[tuple[str, int, int]] = []
    config = SearchConfig(evaluations=6)
    found = search_weights(model, examples(NAMES[1]), config, max_length=64, progress=lambda *step: told.append(step))
    assert told == [("Searching weights", done, 6) for done in range(1, 7)]
    assert isinstance(found, Found) and not model.training
    ids = torch.tensor([[5, 6, 7, 8]])
    model.save_pretrained(tmp_path)
    again = moelora.from_pretrained(tmp_path, backbone=str(skill_backbone))
    given = composed(skilled, skill_backbone, weights=list(found.weights.values()))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected) and torch.equal(given(ids).logits, expected)
    assert given.mixture == again.mixture == model.mixture
    [site] = model.mixture.sites
    assert all(c.router.config == c.config.router == site.router for c in model.containers().values())
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert (merged(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_ragged_ranks_need_the_mixing_of_outputs(skill_backbone: Path) -> None:
    adapters = [random_lora("a", 1, {"q_proj": 2}), random_lora("b", 2, {"q_proj": 3})]
    with pytest.raises(ConfigError, match=r"needs experts of one rank.*set mix to 'outputs'"):
        moelora.compose(adapters, "static", str(skill_backbone), weights="uniform", mix="factors")
    model = moelora.compose(adapters, "static", str(skill_backbone), weights="uniform")
    assert len(search_weights(model, examples(NAMES[0]), SearchConfig(evaluations=4), max_length=64).history) == 4


def test_only_one_mix_with_given_weights_can_be_searched(skilled: list[Path], skill_backbone: Path) -> None:
    for router in ({"weights": "learned"}, {"router": "arrow"}):
        options = {"router": "static", **router}
        model = moelora.compose(skilled, backbone=str(skill_backbone), **options)
        with pytest.raises(ConfigError, match="compose with router 'static' and weights 'uniform'"):
            search_weights(model, examples(NAMES[0]))
    model = composed(skilled, skill_backbone)
    with pytest.raises(DataError, match="no examples"):
        search_weights(model, [])
    model.tokenizer = None
    with pytest.raises(ConfigError, match=r"set model\.tokenizer"):
        search_weights(model, examples(NAMES[0]))
