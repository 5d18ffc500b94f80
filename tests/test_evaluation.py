"""Scoring of answers: generation, scorers, intervals, comparison."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from moelora.config import ReasoningGymData
from moelora.data import ChatFormat, Example, load_examples
from moelora.errors import DataError
from moelora.evaluation import compare, generate_answers, majority, score, score_answers
from moelora.evaluation.scoring import normalized, wilson

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = [Example("How many legs has a cat?" * (n % 3 + 1) + str(n), "four", f"task{n % 2}") for n in range(7)]


@pytest.fixture
def model(tiny_config: Any, byte_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from transformers import LlamaForCausalLM

    byte_tokenizer.pad_token = byte_tokenizer.eos_token
    tiny_config.vocab_size = len(byte_tokenizer)
    tiny_config.max_position_embeddings = 512
    return LlamaForCausalLM(tiny_config)


def by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, example: Example, count: int) -> str:
    """Greedy decoding of one question without padding, cache, or ``generate``."""
    ids = ChatFormat(tokenizer).prompt_ids(example)
    made: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + made])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()


def test_batched_answers_are_those_of_a_plain_loop(
    model: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    # Large weights make confident, varied answers, far from ties that padding could tip.
    for parameter in model.parameters():
        parameter.data.mul_(8)
    answers = generate_answers(model, byte_tokenizer, EXAMPLES, max_new_tokens=6, batch_size=3)
    assert answers == [by_hand(model.eval(), byte_tokenizer, example, 6) for example in EXAMPLES]
    assert any(answers)


class TaughtModel(nn.Module):
    """Answers every question with the same bytes, as a ``generate`` of transformers would return them."""

    device = torch.device("cpu")

    def __init__(self, answer: list[int]) -> None:
        super().__init__()
        self.answer = answer
        self.dropout = nn.Dropout()
        self.modes: list[bool] = []

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.modes.append(self.training or self.dropout.training or torch.is_grad_enabled())
        answers = torch.tensor(self.answer)[: options["max_new_tokens"]].expand(len(input_ids), -1)
        return torch.cat([input_ids, answers], dim=1)


def test_the_end_of_an_answer_is_respected(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = byte_tokenizer(" four<|im_end|>and more")["input_ids"]
    report = score(TaughtModel(ids), byte_tokenizer, EXAMPLES, max_new_tokens=50, batch_size=2)
    assert report.answers == ["four"] * 7 and report.mean == 1.0
    assert {name: task.count for name, task in report.tasks.items()} == {"task0": 4, "task1": 3}


def test_eval_mode_meanwhile_and_progress(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = TaughtModel(byte_tokenizer("no")["input_ids"]).train()
    model.dropout.eval()
    seen: list[tuple[int, int]] = []
    report = score(
        model, byte_tokenizer, EXAMPLES, batch_size=3, progress=lambda done, total: seen.append((done, total))
    )
    assert model.modes == [False] * 3 and model.training and not model.dropout.training
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert report.mean == 0.0


def test_no_examples(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no examples to answer"):
        score(TaughtModel([]), byte_tokenizer, [])


def test_a_task_scores_itself() -> None:
    tasks = {"letter_counting": {}, "spell_backward": {"min_word_len": 4, "max_word_len": 4}}
    _, test, _ = load_examples(ReasoningGymData(tasks=tasks, train_size=2, test_size=5))
    right = score_answers(test, [example.answer for example in test])
    assert right.mean == 1.0 and set(right.tasks) == set(tasks)
    partly = score_answers(test, [f"{example.answer[:-1]}?" for example in test])
    assert 0 < partly.tasks["spell_backward"].mean < 1  # that scorer gives marks for each letter
    assert score_answers(test, [""] * 10).mean == 0.0


@pytest.mark.parametrize("task", ["number_filtering", "word_sequence_reversal", "needle_haystack", "syllogism", "gcd"])
def test_scorers_of_tasks_bear_any_answer(task: str) -> None:
    _, test, _ = load_examples(ReasoningGymData(tasks=[task], train_size=1, test_size=1))
    for answer in ("", "[", "['", "[1, 'a']", "{}", "null", "-", "1/0", ", ,", "Yes\nNo", "\u2203", "9" * 40):
        assert 0 <= score_answers(test, [answer]).mean <= 1


def test_text_is_compared_without_case_space_and_outer_punctuation() -> None:
    assert normalized("  The Cat\n sat. ") == normalized('"the cat  sat"')
    assert normalized("-3.5") != normalized("35")
    examples = [Example("?", "New York", "t"), Example("?!", "four", "t")]
    assert score_answers(examples, ["new  york.", "fourteen"]).items == [1.0, 0.0]


def test_numbers_keep_their_sign() -> None:
    examples = [Example(str(n), answer, "t") for n, answer in enumerate(["-4", ".5", "-4"])]
    assert score_answers(examples, ["4", "5", "'-4'."]).items == [0.0, 0.0, 1.0]


def test_each_task_counts_the_same() -> None:
    examples = [Example(str(n), "yes", "large" if n else "small") for n in range(5)]
    report = score_answers(examples, ["yes", "no", "no", "no", "no"])
    assert report.mean == 0.5
    assert report.to_dict()["tasks"]["large"] == {
        "mean": 0.0,
        "low": 0.0,
        "high": pytest.approx(0.4899, abs=1e-4),
        "count": 4,
    }


@pytest.mark.parametrize(
    ("mean", "count", "low", "high"),
    # From the closed form, computed by statsmodels.stats.proportion.proportion_confint(method="wilson").
    [(0.5, 50, 0.36645, 0.63355), (0.0, 20, 0.0, 0.16113), (1.0, 10, 0.72247, 1.0), (0.3, 10, 0.10779, 0.60323)],
)
def test_wilson(mean: float, count: int, low: float, high: float) -> None:
    assert wilson(mean, count) == pytest.approx((low, high), abs=2e-5)


def test_compare_pairs_the_questions() -> None:
    examples = [Example(str(n), "yes", "ab"[n % 2]) for n in range(60)]
    rng = random.Random(0)
    answers = [rng.choice(["yes", "no"]) for _ in examples]
    base = score_answers(examples, answers)
    same = compare(examples, base, base)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    better = score_answers(examples, ["yes" if n % 3 == 0 else answer for n, answer in enumerate(answers)])
    gain = compare(examples, better, base)
    assert gain.difference == pytest.approx(better.mean - base.mean)
    assert 0 < gain.low < gain.difference < gain.high and gain == compare(examples, better, base)


def test_majority_answers_what_is_most_frequent_in_training() -> None:
    train = [Example(str(n), answer, "t") for n, answer in enumerate(["a", "b", "b"])]
    test = [Example(f"test {n}", answer, "t") for n, answer in enumerate(["b", "a", "b", "b"])]
    assert majority(train, test).mean == 0.75
    with pytest.raises(DataError, match="task 'u' has no training examples"):
        majority(train, [Example("q", "a", "u")])
