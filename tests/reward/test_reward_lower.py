"""States below the first layer with experts: kept, shared and bounded, and no reward changes."""

from __future__ import annotations

import pytest
import torch
from reward.reward_made import TEMPLATE, build_batch, build_reward
from transformers import LlamaConfig

from moelora.errors import ConfigError
from moelora.lower import LowerStates
from moelora.reward.model import RewardModel

CATEGORIES = [0, 1, -1, 1]


def rewards(model: RewardModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(ids, mask, category_ids=torch.tensor(CATEGORIES)).logits
    assert logits is not None
    return logits[:, 0]


def remembering(limit: int = 2**20) -> tuple[RewardModel, LowerStates]:
    model = build_reward("1:", threshold=0.0)
    lower = model.remember(limit)
    assert lower is not None
    return model, lower


def test_what_is_kept_gives_the_same_rewards_without_the_layers() -> None:
    plain, (model, lower) = build_reward("1:", threshold=0.0), remembering()
    ids, mask = build_batch()
    expected = rewards(plain, ids, mask)
    for batch in ((ids, mask), build_batch(left=True), (ids, mask)):
        torch.testing.assert_close(rewards(model, *batch), expected, atol=1e-6, rtol=0)
    assert lower.layer == "model.layers.1" and (lower.computed, lower.found) == (4, 8)
    assert lower.bytes == sum(4 * 32 * int(row.sum()) for row in mask)
    ran: list[int] = []
    model.backbone.model.layers[0].self_attn.register_forward_hook(lambda *_: ran.append(0))
    rewards(model, ids, mask)
    assert not ran, "the lower layer ran although its states are kept"
    prompts, responses = ["2 + 2?", "Spell 'cab'."], ["4", "c, a, b"]
    for one, other in zip(model.score(prompts, responses), plain.score(prompts, responses), strict=True):
        assert one.reward == pytest.approx(other.reward, abs=1e-6) and one.category == other.category
    model.remember(0)
    ran.clear()
    rewards(model, ids, mask)
    assert ran and model.lower is None


def test_each_module_is_left_in_its_mode() -> None:
    model = build_reward("1:").train()
    model.remember(10**7)
    still = model.backbone.get_submodule("model.layers.2.mlp").eval()
    model(*build_batch(), category_ids=torch.zeros(4, dtype=torch.int64))
    assert model.lower is not None and model.lower.computed == 4
    assert not any(module.training for module in still.modules()) and model.backbone.model.layers[0].training


def test_gradients_are_the_same() -> None:
    found = []
    ids, mask = build_batch()
    for model in (build_reward("1:"), remembering()[0]):
        model.train()(ids, mask, category_ids=torch.tensor(CATEGORIES)).logits.square().sum().backward()
        found.append({n: p.grad for n, p in model.adapter_tensors().items() if p.grad is not None})
    assert set(found[0]) == set(found[1]) and any("lora_A" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_what_was_kept_in_inference_can_be_trained_on() -> None:
    model, lower = remembering()
    ids, mask = build_batch()
    with torch.inference_mode():
        model(ids, mask, category_ids=torch.tensor(CATEGORIES))
    model.train()(ids, mask, category_ids=torch.tensor(CATEGORIES)).logits.sum().backward()
    assert lower.found == 4


def test_no_more_is_kept_than_was_allowed() -> None:
    ids, mask = build_batch()
    expected = rewards(build_reward("1:"), ids, mask)
    model, lower = remembering(4 * 32 * 12)  # the longest text alone
    for _ in range(2):
        torch.testing.assert_close(rewards(model, ids, mask), expected, atol=1e-6, rtol=0)
        assert 0 < lower.bytes <= lower.limit


def test_states_are_shared_on_one_backbone_only() -> None:
    model, lower = remembering()
    with pytest.raises(ConfigError, match="another backbone"):
        build_reward("1:").remember(lower)
    site = {**TEMPLATE["sites"][0], "layers": "1:"}
    other = RewardModel.attach(model.unload(), {}, {"sites": [site]})
    assert other.remember(lower) is lower


def test_below_the_first_layer_there_is_nothing_to_keep() -> None:
    assert build_reward().remember(2**20) is None


def test_checkpointing_does_without() -> None:
    model, lower = remembering()
    model.gradient_checkpointing_enable()
    ids, mask = build_batch()
    model.train()(ids, mask, category_ids=torch.tensor(CATEGORIES)).logits.sum().backward()
    assert lower.computed == 0


def test_the_configuration_of_the_class_is_left_alone() -> None:
    model = build_reward()
    assert "confidence" in model.config.keys_to_ignore_at_inference
    assert "confidence" not in LlamaConfig().keys_to_ignore_at_inference
