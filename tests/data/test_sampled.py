"""Rankings of answers that a model samples: what is kept, what is ranked, and that nothing is sampled twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from moelora.config import BackboneConfig, SampledPreferenceData, load_recipe
from moelora.data import load_examples
from moelora.data.chat import ChatFormat, stop_ids
from moelora.data.example import Example
from moelora.data.properties import PROPERTIES, Answer
from moelora.data.ranking import comparisons
from moelora.data.rankings import read_all
from moelora.data.sampled import Sampler, _text
from moelora.errors import ConfigError, DataError

pytest.importorskip("reasoning_gym")

GROUPS: dict[str, Any] = {
    "arithmetic": {"tasks": ["chain_sum"], "capabilities": ["correctness", "brevity", "form"]},
    "letters": {"tasks": {"spell_backward": {"max_word_len": 4}}, "capabilities": ["likeness", "fluency"]},
}
OPTIONS: dict[str, Any] = {
    "categories": GROUPS,
    "train_size": 3,
    "test_size": 2,
    "batch_size": 4,
    "max_new_tokens": 5,
    "temperatures": (0.7, 1.0, 2.0),
}


class Counted:
    """A tiny random Llama that counts how often it generates, and can be killed."""

    def __init__(self, model: LlamaForCausalLM, after: int = 1000) -> None:
        self.model, self.after, self.calls = model, after, 0
        self.device, self.generation_config = model.device, model.generation_config

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def generate(self, **inputs: Any) -> Any:
        if self.calls == self.after:
            raise KeyboardInterrupt
        self.calls += 1
        return self.model.generate(**inputs)


@dataclass
class Load:
    """What a sampler loads its model with."""

    model: Counted
    tokenizer: PreTrainedTokenizerFast

    def __call__(self) -> Any:
        return self.model, self.tokenizer


@pytest.fixture(scope="module")
def llama(backbone_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(backbone_folder).eval()


def sampler(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, *, after: int = 1000, **options: Any
) -> Sampler:
    config = SampledPreferenceData.parse({**OPTIONS, **options})
    return Sampler(config, BackboneConfig(), Load(Counted(llama, after), tokenizer), folder)


def calls(made: Sampler) -> int:
    return made.load.model.calls  # type: ignore[attr-defined]


def texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_goes_on_and_ends_as_any_other(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = sampler(llama, byte_tokenizer, tmp_path / "whole")
    rankings = whole.part("train")
    assert calls(whole) == 2  # six questions in fours
    cut = sampler(llama, byte_tokenizer, tmp_path / "cut", after=1)
    with pytest.raises(KeyboardInterrupt):
        cut.part("train")
    torch.manual_seed(7)  # the state of the process is no part of it
    resumed = sampler(llama, byte_tokenizer, tmp_path / "cut")
    assert resumed.part("train") == rankings
    assert calls(resumed) == 1
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")
    again = sampler(llama, byte_tokenizer, tmp_path / "cut", property_weight=0.5)
    again.part("train")  # judging anew samples nothing
    assert calls(again) == 0


def test_other_settings_are_sampled_into_another_file(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for options in ({}, {"temperatures": (0.7, 1.0)}, {"seed": 5}, {"max_new_tokens": 6}):
        sampler(llama, byte_tokenizer, tmp_path, **options).part("test")
    assert len(texts(tmp_path)) == 4


def test_sampling_leaves_the_random_state_alone(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    sampler(llama, byte_tokenizer, tmp_path).part("test")
    assert torch.equal(before, torch.get_rng_state())


def test_cold_answers_are_the_greedy_ones_of_each_question_alone(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Reading the prompts once, and padding, change nothing; each answer has its own temperature."""
    made = sampler(llama, byte_tokenizer, tmp_path, temperatures=(1e-6, 5.0, 1e-6), top_p=1.0)
    chat = ChatFormat(byte_tokenizer)
    prompts = [chat.prompt_ids(Example(text, "", "chain_sum")) for text in ("12 + 3 =", "Spell it backward", "7")]
    stops = stop_ids(llama, byte_tokenizer, chat)
    found = made._answers(llama, byte_tokenizer, prompts, stops, 0)
    for prompt, answers in zip(prompts, found, strict=True):
        greedy = llama.generate(
            torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]
        )
        assert answers[0] == answers[2] == _text(byte_tokenizer, greedy[0, len(prompt) :].tolist(), stops)
    assert any(answers[0] != answers[1] for answers in found)


def test_worked_examples_are_shown_to_the_model_and_never_the_question_itself(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tasks = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    group = {"all": {"tasks": tasks, "capabilities": ["form"]}}
    made = sampler(llama, byte_tokenizer, tmp_path, categories=group, worked_examples=2, train_size=40)
    for question in made.questions("train"):
        *shown, asked, last = made._asked(question).messages
        assert len(shown) == 4
        assert all(message["content"] for message in shown)
        assert (asked["content"], last["content"]) == (question.prompt, "")
        assert asked not in shown
    for ranking in made.part("test"):
        assert [message["role"] for message in ranking.prompt] == ["system", "user"]


def test_rankings_follow_from_the_properties(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train, test = sampler(llama, byte_tokenizer, tmp_path).read()
    assert not {ranking.key for ranking in train} & {ranking.key for ranking in test}
    assert {ranking.category for ranking in train} == set(GROUPS)
    for ranking in train + test:
        assert ranking.category is not None
        assert ranking.scores is not None
        assert len(ranking.responses) == 3
        assert list(ranking.capabilities) == GROUPS[ranking.category]["capabilities"]
        assert ranking.comparisons == comparisons(scores=ranking.scores)
        assert any(not each.tie for each in ranking.comparisons)
        assert ranking.prompt[0] == {"role": "system", "content": "Answer briefly."}


def test_questions_without_a_better_answer_are_left_out(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    alike = sampler(llama, byte_tokenizer, tmp_path, temperatures=(1e-6, 1e-6))
    with pytest.raises(DataError, match="to each of 4 questions all answers are as good"):
        alike.part("test")
    judged = alike.judged("test")
    assert [ranking.prompt[-1]["content"] for ranking in judged] == [each.prompt for each in alike.questions("test")]
    assert all(len(set(ranking.scores or ())) == 1 for ranking in judged)


def test_a_file_that_does_not_fit_is_refused(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sampler(llama, byte_tokenizer, tmp_path).part("test")
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)))
    with pytest.raises(DataError, match="answers are to other questions"):
        sampler(llama, byte_tokenizer, tmp_path).part("test")
    path.write_text(lines[0][:-4])
    with pytest.raises(DataError, match="delete it to sample anew"):
        sampler(llama, byte_tokenizer, tmp_path).part("test")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"categories": {"a": {"tasks": ["gcd"], "capabilities": ["brevty"]}}}, "Did you mean 'brevity'|brevity"),
        ({"categories": {name: {"tasks": ["gcd"], "capabilities": ["form"]} for name in "ab"}}, "belongs to one"),
        ({"test_seed": 0}, "would coincide"),
        ({"temperatures": [1.0]}, "temperatures"),
    ],
)
def test_impossible_configurations(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SampledPreferenceData.parse({**OPTIONS, **options})


def test_a_recipe_samples_with_its_own_backbone(backbone_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        {
            "backbone": {"name": str(backbone_folder), "quantization": None},
            "mixture": {"sites": [{"target": "q_proj", "experts": {"kind": "lora", "num_experts": 1}}]},
            "data": {"kind": "sampled_preferences", **OPTIONS},
            "trainer": {"kind": "reward", "categories": {"arithmetic": ["form"], "letters": ["fluency"]}},
            "output_dir": str(tmp_path),
        }
    )
    train, test = read_all(recipe)
    assert train
    assert test
    assert {path.name.split("-")[1] for path in tmp_path.iterdir()} == {"train", "test"}
    assert read_all(recipe) == (train, test)


def test_rankings_are_no_examples() -> None:
    with pytest.raises(ConfigError, match="sampled_preferences says which responses are better"):
        load_examples(SampledPreferenceData.parse(OPTIONS))


def value(name: str, text: str, right: str, *, ended: bool = True, prompt: str = "What is 2 + 3?") -> float:
    example = Example(prompt, right, "task")
    return PROPERTIES[name].measure(Answer(text, ended, example, lambda each: float(each == right)))


@pytest.mark.parametrize(
    ("name", "text", "right", "wanted"),
    [
        ("correctness", "5", "5", 1),
        ("correctness", "The answer is **5**.", "5", 1),
        ("correctness", "2 + 3 = 5", "5", 1),
        ("correctness", "5 is what I think, or 6", "5", 0),
        ("correctness", 'Backward it is "nus".', "nus", 1),
        ("correctness", "Yes, since it follows.", "Yes", 1),
        ("correctness", "", "5", 0),
        ("closeness", "it is 5", "5", 1),
        ("closeness", "it is 6", "5", 1 / 2),
        ("closeness", "it is 1,003", "1000", 1 / 3),
        ("closeness", "five", "5", 0),
        ("likeness", "nus", "nus", 1),
        ("likeness", "xyz", "nus", 0),
        ("likeness", "", "nus", 0),
        ("brevity", "5", "5", 1),
        ("brevity", "5 or 6 maybe", "5", 1 / 12),
        ("brevity", "", "5", 0),
        ("form", "5", "5", 1),
        ("form", "five", "5", 2 / 3),
        ("form", "so\nmany\nlines", "5", 1 / 3),
        ("fluency", "a plain line of words", "5", 1),
        ("fluency", "on and on and on and on", "5", 1 / 3),
        ("fluency", "", "5", 0),
        ("grounding", "2 + 3 what", "5", 1),
        ("grounding", "2 apples", "5", 1 / 2),
        ("grounding", "?", "5", 0),
    ],
)
def test_properties(name: str, text: str, right: str, wanted: float) -> None:
    assert value(name, text, right) == pytest.approx(wanted)


def test_an_answer_that_was_cut_off_has_less_form() -> None:
    assert value("form", "5", "5", ended=False) == pytest.approx(2 / 3)
