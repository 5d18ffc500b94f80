"""The reward model: what its rewards depend on, and what they do not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from reward.reward_made import CATEGORIES, TEMPLATE, build_backbone, build_batch, build_reward

import moelora
from moelora import checkpoints
from moelora.checkpoints import manifest
from moelora.errors import CheckpointError, ConfigError, DataError, UserError
from moelora.reward.categories import Category
from moelora.reward.config import RewardConfig
from moelora.reward.model import RewardModel
from moelora.reward.stacked import first_layer, last_states

PROMPTS = ["2 + 2?", "Write the letters of 'cab' in order.", "2 + 2?", "10 - 3, and say why?"]
RESPONSES = ["4", "a b c", "It is five, since two and two are five.", "7"]


def rewards(model: RewardModel, ids: torch.Tensor, mask: torch.Tensor, categories: list[int]) -> torch.Tensor:
    with torch.no_grad():
        output = model(ids, mask, category_ids=torch.tensor(categories))
    assert output.logits is not None
    return output.logits[:, 0]


# -- what views are ----------------------------------------------------------------------------------------------


def test_views_of_one_shared_base() -> None:
    config = RewardConfig.parse({"categories": CATEGORIES})
    assert [(view.name, view.experts) for view in config.views] == [
        ("general", (0,)),
        ("sums/right", (0, 1)),
        ("sums/short", (0, 2)),
        ("letters/right", (0, 3)),
        ("letters/clean", (0, 4)),
        ("letters/short", (0, 5)),
        ("outer", (6,)),
    ]


def test_views_of_a_base_for_each_category() -> None:
    config = RewardConfig.parse({"categories": CATEGORIES, "base": "category", "outer_expert": False})
    views = {view.name: view.experts for view in config.views}
    assert views["general"] == (0,) and views["sums"] == (1,) and views["letters"] == (2,)
    assert views["letters/clean"] == (2, 6) and views["outer"] == ()


def test_without_categories_there_is_one_expert() -> None:
    model = build_reward(categories={})
    ids, mask = build_batch()
    with torch.no_grad():
        output = model(ids, mask)
    assert output.logits.shape == (4, 1) and output.category_ids.tolist() == [-1] * 4
    assert output.capability_logits.shape == (4, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": {"general": ["a"]}}, "general"),
        ({"categories": {"a/b": Category(capabilities={"c": ""})}}, "'a/b' cannot be a name"),
        ({"base": "category"}, "no categories"),
        ({"categories": CATEGORIES, "aggregator": "mpl"}, "did you mean 'mlp'"),
        ({"categories": "nonsense"}, "dmoerm"),
        ({"categories": CATEGORIES, "threshold": 2}, "threshold"),
    ],
)
def test_what_does_not_hold_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardConfig.parse(options)


def test_a_template_describes_one_expert_and_the_backbone_stays_as_it_was() -> None:
    backbone = build_backbone()
    site = {**TEMPLATE["sites"][0], "experts": {"num_experts": 2}, "router": {"kind": "topk"}}
    with pytest.raises(ConfigError, match=r"sites\.0: .* single one"):
        RewardModel.attach(backbone, {}, {"sites": [site]})
    with pytest.raises(ConfigError, match="matches no module"):
        RewardModel.attach(backbone, {}, {"sites": [{"target": "nowhere", "experts": {"num_experts": 1}}]})
    assert not hasattr(backbone, "reward")
    RewardModel.attach(backbone, {}, TEMPLATE)


# -- what a reward does not depend on ----------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, "1:"])
@pytest.mark.parametrize("aggregator", ["mlp", "linear", "mean"])
def test_neither_padding_nor_batch_mates_matter(layers: str | None, aggregator: str) -> None:
    model = build_reward(layers, aggregator=aggregator)
    categories = [0, 1, -1, 1]
    ids, mask = build_batch()
    together = rewards(model, ids, mask, categories)
    left = rewards(model, *build_batch(left=True), categories)
    alone = torch.cat(
        [
            rewards(model, ids[row : row + 1, : mask[row].sum()], mask[row : row + 1, : mask[row].sum()], [number])
            for row, number in enumerate(categories)
        ]
    )
    wide = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5))
    for other in (left, alone, rewards(model, *wide, categories)):
        torch.testing.assert_close(other, together, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers", [None, "1:", "2:"])
def test_one_stacked_pass_is_as_good_as_a_pass_for_each_view(layers: str | None) -> None:
    model = build_reward(layers)
    ids, mask = build_batch()
    count = len(model.reward.views)
    rows = torch.arange(4).repeat_interleave(count)
    with torch.no_grad():
        stacked = last_states(model, ids, mask, rows, torch.arange(count).repeat(4)).view(4, count, -1)
        for view in range(count):
            one = last_states(model, ids, mask, None, torch.full((4,), view))
            torch.testing.assert_close(stacked[:, view], one, atol=1e-6, rtol=0)
    assert (stacked[:, 0] - stacked[:, 1]).abs().max() > 1e-3, "views have to differ for this to say anything"


def test_layers_below_the_first_with_experts_see_each_text_once() -> None:
    model = build_reward("2:")
    assert first_layer(model) == "model.layers.2"
    seen: dict[int, int] = {}
    for number, layer in enumerate(model.backbone.model.layers):
        layer.register_forward_hook(lambda m, args, out, n=number: seen.__setitem__(n, len(out)))
    ids, mask = build_batch()
    rewards(model, ids, mask, [1, 1, 0, -1])
    assert seen == {0: 4, 1: 4, 2: 3 + 3 + 2 + 1}


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model = build_reward("1:").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids, mask = build_batch()
        model(ids, mask, category_ids=torch.tensor([0, 1, 1, -1])).logits.square().sum().backward()
        found.append({n: p.grad for n, p in model.adapter_tensors().items() if p.grad is not None})
    assert set(found[0]) == set(found[1]) and any("lora_B" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


# -- layers of it ------------------------------------------------------------------------------------------------


def test_an_aggregator_that_passes_one_capability_on_is_that_capability() -> None:
    """W1 = [I 0 .. 0], slope 1, W2 the head of the first capability."""
    model = build_reward()
    aggregator: Any = model.parts.aggregators["letters"]
    head: Any = model.parts.heads["letters/right"]
    with torch.no_grad():
        aggregator.first.weight.zero_()[:, :32] = torch.eye(32)
        aggregator.first.bias.zero_()
        aggregator.prelu.weight.fill_(1.0)
        aggregator.second.weight.copy_(head.weight)
        aggregator.second.bias.copy_(head.bias)
        ids, mask = build_batch()
        output = model(ids, mask, category_ids=torch.ones(4, dtype=torch.int64))
    torch.testing.assert_close(output.logits[:, 0], output.capability_logits[:, 0], atol=1e-6, rtol=0)


def test_the_order_of_capabilities_is_a_permutation_of_the_aggregators_columns() -> None:
    model = build_reward()
    other = build_reward(categories={"sums": CATEGORIES["sums"], "letters": ["short", "right", "clean"]})
    order = [2, 0, 1]
    source, target = model.adapter_tensors(), other.adapter_tensors()
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
            if "lora" in name:  # the experts 3, 4, 5 of the second category, of rank 2 each
                axis = 0 if name.endswith("lora_A") else 1
                parts = source[name].split(2, dim=axis)
                tensor.copy_(torch.cat([*parts[:3], *(parts[3 + old] for old in order), parts[6]], dim=axis))
        blocks = source["reward.aggregators.letters.first.weight"].split(32, dim=1)
        target["reward.aggregators.letters.first.weight"].copy_(torch.cat([blocks[old] for old in order], dim=1))
    ids, mask = build_batch()
    torch.testing.assert_close(
        rewards(other, ids, mask, [1] * 4), rewards(model, ids, mask, [1] * 4), atol=1e-6, rtol=0
    )


def test_the_routed_reward_is_that_of_the_category_alone() -> None:
    model = build_reward(threshold=0.0)
    ids, mask = build_batch()
    lengths = torch.tensor([5, 4, 3, 2])
    with torch.no_grad():
        output = model(ids, mask, prompt_lengths=lengths)
    assert set(output.routed_ids.tolist()) == {0, 1}, "both categories have to occur"
    assert output.routed_ids.tolist() == output.category_ids.tolist()
    torch.testing.assert_close(
        output.logits[:, 0], rewards(model, ids, mask, output.routed_ids.tolist()), atol=1e-6, rtol=0
    )


def test_below_the_threshold_the_general_expert_answers() -> None:
    model = build_reward(threshold=1.0)
    found = model.score(PROMPTS, RESPONSES)
    assert {each.category for each in found} == {"general"} and all(each.routed in CATEGORIES for each in found)
    general = model.score(PROMPTS, RESPONSES, categories=["general"] * 4)
    assert [each.reward for each in found] == [each.reward for each in general]
    assert found[0].capabilities == {}


def test_the_category_is_told_by_the_prompt_alone() -> None:
    model = build_reward(threshold=0.0)
    found = model.score(["the same prompt"] * 4, RESPONSES)
    assert len({(each.routed, each.confidence) for each in found}) == 1
    ids, mask = build_batch()
    lengths = torch.tensor([5, 4, 3, 2])
    changed = ids.clone()
    changed[0, 5:] = 9
    for other in (changed, ids):
        routed = model.route(other, mask, lengths)
        assert routed[0].tolist() == model.route(ids, mask, lengths)[0].tolist()
        torch.testing.assert_close(routed[1], model.route(ids, mask, lengths)[1], atol=1e-6, rtol=0)


# -- texts -------------------------------------------------------------------------------------------------------


def test_scores_depend_on_neither_order_nor_batch_size() -> None:
    model = build_reward(threshold=0.0)
    one = model.score(PROMPTS, RESPONSES, batch_size=1)
    for batch_size in (2, 16):
        found = model.score(PROMPTS[::-1], RESPONSES[::-1], batch_size=batch_size)[::-1]
        assert [each.category for each in found] == [each.category for each in one]
        for each, alone in zip(found, one, strict=True):
            assert each.reward == pytest.approx(alone.reward, abs=1e-6)
            assert each.capabilities == pytest.approx(alone.capabilities, abs=1e-6)
            assert list(each.capabilities) == CATEGORIES[each.category]


def test_a_forward_of_tokens_finds_the_prompt_by_the_chat_template() -> None:
    model = build_reward(threshold=0.0)
    found = model.score(PROMPTS, RESPONSES)
    texts = [
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": p}, {"role": "assistant", "content": r}], tokenize=False
        )
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    model.tokenizer.pad_token = "<|unused|>"
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        batch = model.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            output = model(batch["input_ids"], batch["attention_mask"])
        assert output.logits[:, 0].tolist() == pytest.approx([each.reward for each in found], abs=1e-6)


def test_a_reward_function_takes_messages_and_texts() -> None:
    model = build_reward(threshold=0.0)
    function = model.reward_function()
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    replies = [[{"role": "assistant", "content": response}] for response in RESPONSES]
    assert function(messages, replies, answer=["x"] * 4) == function(PROMPTS, RESPONSES)
    named = function(PROMPTS, RESPONSES, category=["sums"] * 4)
    assert named == [each.reward for each in model.score(PROMPTS, RESPONSES, categories=["sums"] * 4)]


def test_scoring_leaves_the_mode_as_it_was() -> None:
    model = build_reward().train()
    first = model.score(PROMPTS, RESPONSES)
    assert model.training and first == model.score(PROMPTS, RESPONSES)


def test_what_cannot_be_scored() -> None:
    model = build_reward()
    with pytest.raises(ConfigError, match="did you mean 'sums'"):
        model.score(PROMPTS, RESPONSES, categories=["sum"] * 4)
    with pytest.raises(DataError, match="a prompt"):
        model.score(PROMPTS, RESPONSES[:2])
    model.tokenizer = None
    with pytest.raises(UserError, match="tokenizer"):
        model.score(PROMPTS, RESPONSES)
    with pytest.raises(UserError, match="input_ids"):
        model()


@pytest.mark.parametrize("number", [2, -2, 7])
def test_numbers_that_no_category_has_are_refused(number: int) -> None:
    model, (ids, mask) = build_reward(), build_batch()
    wrong = torch.tensor([0, number, 0, 1])
    with pytest.raises(UserError, match=f"category_ids holds {number}: .* from -1 to 1"):
        model(ids, mask, category_ids=wrong)
    for each in (number, -1):  # the general expert has no aggregator
        with pytest.raises(UserError, match=f"category_ids holds {each}: .* from 0 to 1"):
            model(states=torch.zeros(2, 3, 32), category_ids=torch.tensor([0, each]))
    with pytest.raises(UserError, match=r"view_ids holds 6: .* from 0 to 5"):
        model(ids, mask, view_ids=torch.full((4, 1), model.reward.numbers["outer"]))


def test_a_category_that_is_not_known_is_no_name() -> None:
    with pytest.raises(ConfigError, match="category None is unknown: known are general, sums"):
        build_reward().score(PROMPTS[:1], RESPONSES[:1], categories=[None])  # type: ignore[list-item]


@pytest.mark.parametrize("aggregator", ["mlp", "linear", "mean"])
def test_small_modules_compute_in_float32_under_autocast(aggregator: str) -> None:
    model, states = build_reward(aggregator=aggregator), torch.randn(4, 3, 32, generator=torch.manual_seed(3))
    ids, mask = build_batch()
    numbers = torch.tensor([0, 1, 1, 0])
    expected = model(states=states, category_ids=numbers).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(states=states, category_ids=numbers).logits, expected)
        assert torch.equal(model.parts.head("general", states[:, 0]), model.parts.head("general", states[:, 0].float()))
        assert model.route(ids, mask)[1].dtype == torch.float32


@pytest.mark.parametrize("aggregator", ["mlp", "linear", "mean"])
def test_a_model_cast_to_a_half_precision_gives_nearly_the_same(aggregator: str) -> None:
    model, (ids, mask) = build_reward(aggregator=aggregator), build_batch()
    numbers = torch.tensor([0, 1, -1, 1])
    with torch.no_grad():
        expected = model(ids, mask, category_ids=numbers).logits
        sure = model.route(ids, mask)[1]
        half = model.to(torch.bfloat16)
        torch.testing.assert_close(half(ids, mask, category_ids=numbers).logits, expected, atol=0.02, rtol=0.05)
        torch.testing.assert_close(half.route(ids, mask)[1], sure, atol=0.05, rtol=0.05)


def test_what_a_reward_model_does_not_do_is_said_in_plain_words(tmp_path: Any) -> None:
    model, (ids, mask) = build_reward(), build_batch()
    before = model(ids, mask).logits
    with pytest.raises(UserError, match="writes no text"):
        model.generate(ids, max_new_tokens=2)
    with model.disable_experts():
        assert model.generate(ids, attention_mask=mask, max_new_tokens=2).shape == (4, 14)
    with pytest.raises(ConfigError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ConfigError, match="has one adapter"):
        model.add_adapter("other", TEMPLATE)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has one adapter"):
        model.load_adapter(tmp_path, "other")
    assert torch.equal(model(ids, mask).logits, before)


# -- files -------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path: Any) -> None:
    model = build_reward("1:", base="category", threshold=0.25)
    with torch.no_grad():
        model.parts.temperature.fill_(1.7)
    model.save_pretrained(tmp_path / "saved")
    loaded = RewardModel.from_pretrained(tmp_path / "saved", backbone=build_backbone())
    again = moelora.from_pretrained(tmp_path / "saved", backbone=build_backbone())
    assert isinstance(again, RewardModel)
    assert loaded.reward == model.reward and list(loaded.reward.categories) == list(model.reward.categories)
    for name, tensor in model.adapter_tensors().items():
        assert torch.equal(loaded.adapter_tensors()[name], tensor), name
    assert any(name.startswith("reward.heads.letters/clean") for name in model.adapter_tensors())
    loaded.tokenizer = model.tokenizer
    assert loaded.score(PROMPTS, RESPONSES) == model.score(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": "dmoerm"}, "categories: expected a mapping, found 'dmoerm'"),
        ({"categories": ["a"]}, "categories: expected a mapping"),
        ({"categories": {"a/b": ["c"]}}, "'a/b' cannot be a name"),
        ({"categories": 7}, "categories: expected a mapping, found 7"),
        ({"threshold": "much"}, "threshold"),
        ({"threshold": -1}, "threshold"),
        ({"unheard": 1}, "unknown key 'unheard'"),
        ({"base": "category"}, "make 9 views, which are not those"),
        ({"categories": {}, "base": "none"}, "leaves no expert"),
        ({"categories": {f"c{number}": ["a"] for number in range(10_000)}}, "make 10002 views, which are not those"),
        ({"aggregator": "linear"}, r"aggregators\.sums\.weights\.weight: expected \[1, 2\], but it is not there"),
    ],
)
def test_a_damaged_section_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Any) -> None:
    build_reward().save_pretrained(tmp_path)
    path = tmp_path / "moelora_config.json"
    content = json.loads(path.read_text())
    content["reward"].update(change)
    path.write_text(json.dumps(content))
    manifest.write(tmp_path)
    backbone = build_backbone()
    with pytest.raises(CheckpointError, match=message) as caught:
        RewardModel.from_pretrained(tmp_path, backbone=backbone)
    assert str(tmp_path) in str(caught.value) and "restore it" in str(caught.value)
    assert not hasattr(backbone, "reward")


def test_converted_it_is_still_a_reward_model(tmp_path: Any) -> None:
    model, (ids, mask) = build_reward(), build_batch()
    model.save_pretrained(tmp_path / "saved")
    assert not checkpoints.convert(tmp_path / "saved", tmp_path / "copy", to="native").lost
    loaded = RewardModel.from_pretrained(tmp_path / "copy", backbone=build_backbone())
    assert rewards(loaded, ids, mask, [0, 1, -1, 1]).equal(rewards(model, ids, mask, [0, 1, -1, 1]))


def test_a_mixture_is_no_reward_model(tmp_path: Any) -> None:
    moelora.attach(build_backbone(), {"sites": [{"target": "q_proj", "experts": {"num_experts": 1}}]}).save_pretrained(
        tmp_path / "mixture"
    )
    backbone = build_backbone()
    with pytest.raises(CheckpointError, match="no reward model"):
        RewardModel.from_pretrained(tmp_path / "mixture", backbone=backbone)


def test_unloaded_the_backbone_is_itself_again() -> None:
    plain, model = build_backbone(), build_reward()
    backbone = model.unload()
    assert set(backbone.state_dict()) == set(plain.state_dict()) and not hasattr(backbone, "reward")


def test_an_answer_whose_first_token_is_one_with_the_header_is_found() -> None:
    """The last token of the header is another one there; how many come before the answer is the same."""
    model = build_reward()
    write = model.tokenizer.apply_chat_template
    ids = [
        i
        for r in ("one", "two")
        for i in write([{"role": "user", "content": r}], add_generation_prompt=True)["input_ids"]
    ]
    start = len(ids)
    for last in (ids[-1], 9):
        tokens = torch.tensor([[*ids[:-1], last, 30, 31, 32]])
        assert model.prompt_lengths(tokens, torch.ones_like(tokens)).tolist() == [start]
    bare = torch.tensor([[30, 31, 32]])
    assert model.prompt_lengths(bare, torch.ones_like(bare)).tolist() == [3]


def test_info_tells_a_reward_model(tmp_path: Any) -> None:
    from typer.testing import CliRunner

    from moelora.cli.app import app

    build_reward().save_pretrained(tmp_path / "saved")
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "saved")])
    assert "reward model: sums (right, short); letters (right, clean, short); base shared" in shown.output, shown.output
    build_reward(categories={}).save_pretrained(tmp_path / "single")
    assert "without categories" in CliRunner().invoke(app, ["info", str(tmp_path / "single")]).output
