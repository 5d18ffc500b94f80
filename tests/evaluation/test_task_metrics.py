"""Metrics of single tasks, on values that were computed by hand or are documented by their authors."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import get_args

import pytest

from moelora.data import Example
from moelora.data.gym import gym_dataset
from moelora.errors import DataError
from moelora.evaluation.task_metrics import TASK_METRICS
from moelora.sequence_config import TaskMetric


def score(metric: str, answer: str, right: str, prompt: str = "", references: list[str] | None = None) -> float:
    example = Example(prompt, right, "task", metadata={} if references is None else {"references": references})
    (value,) = TASK_METRICS[metric]([answer], [example])
    return value


def test_every_name_that_a_file_may_say_is_a_metric() -> None:
    assert set(TASK_METRICS) == set(get_args(TaskMetric))


@pytest.mark.parametrize(
    ("metric", "answer", "right", "expected"),
    [
        ("accuracy", '"Yes."', "yes", 1.0),
        ("accuracy", "Society  Culture", "Society & Culture", 0.0),
        ("exact", " A\n", "A", 1.0),
        ("exact", "a", "A", 0.0),
        ("exact", "", "", 0.0),
        ("exact_match", "society, culture.", "Society & Culture", 1.0),
        ("exact_match", "the World", "World", 0.0),  # articles count, other than in SQuAD
        ("exact_match", "!", "?", 0.0),
        ("first_character", " B\nbecause", "B\nA clause is", 1.0),
        ("first_character", "", "B", 0.0),
        ("first_character", "b", "B", 0.0),
    ],
)
def test_right_or_wrong(metric: str, answer: str, right: str, expected: float) -> None:
    assert score(metric, answer, right) == expected


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # "the cat ... mat": four of the answer's five words, and of the right text's six, in this order.
    value = score("rouge_l", "the cat on the rug", "the cat sat on the mat")
    assert value == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert score("rouge_l", "running", "runs") == 1.0  # stems
    assert score("rouge_l", "", "a cat") == 0.0


def test_rouge_l_takes_the_best_reference() -> None:
    assert score("rouge_l", "a dog", "a cat", references=["a cat", "a dog"]) == 1.0
    assert score("rouge_l", "a dog", "a cat") == 0.5


def test_edit_similarity_counts_insertions_and_deletions() -> None:
    # "kitten" to "sitting": k, e out and s, i, g in; 13 characters in both.
    assert score("edit_similarity", "kitten", "sitting") == pytest.approx(1 - 5 / 13)
    assert score("edit_similarity", "", "x") == 0.0


def test_edit_similarity_spells_out_literals_of_py150() -> None:
    assert score("edit_similarity", "f ( 0 , a , '' )", "f ( <NUM_LIT> , <STR_LIT:a> , '<STR_LIT>' )") == 1.0
    assert score("edit_similarity", "<CHAR_LIT>", "x") == 0.0


SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


def test_sari_is_the_documented_value_of_the_metric_that_trace_uses() -> None:
    """The example in the documentation of ``evaluate``'s sari."""
    value = score("sari", "About 95 you now get in .", "", SOURCE, REFERENCES)
    assert value == pytest.approx(0.26953601953601954)


def test_sari_by_hand() -> None:
    """Source "a b", answer "a c", one reference "a d".

    Unigrams: keep a, 1; delete b, which the reference lacks, 1; add c where d is wanted, 0. Bigrams: nothing is kept
    nor should be, 0/0 = 1; "a b" is rightly deleted, 1; "a c" for "a d", 0. Longer ones: nothing anywhere, 1 each.
    """
    assert score("sari", "a c", "a d", "a b") == pytest.approx((2 / 3 + 2 / 3 + 1 + 1) / 4)


def test_sari_by_hand_with_partial_credit() -> None:
    """Source "a a b", answer "a b", reference "a": unigrams keep precision (1/1 + 0/1) / 2 and recall 1; the one "a"
    that was deleted is in the reference, so deletion is 0; nothing is added, 1.

    Bigrams: source "a a", "a b", answer "a b", reference none: precision 0 and recall 0/0 = 1 give keep 0, "a a" is
    rightly deleted, 1, and nothing added, 1. Trigrams: "a a b" is rightly deleted, all else 1.
    """
    keep = 2 * 0.5 * 1 / 1.5
    assert score("sari", "a b", "a", "a a b") == pytest.approx(((keep + 0 + 1) / 3 + 2 / 3 + 1 + 1) / 4)


def test_sari_splits_punctuation_and_ignores_case() -> None:
    assert score("sari", "A cat.", "a cat .", "The cat.") == score("sari", "a cat .", "a cat .", "the cat .")


def test_the_scorer_of_a_procedural_task() -> None:
    entry = gym_dataset("leg_counting", {}, 1, 0)[0]
    example = Example(entry["question"], entry["answer"], "leg_counting", metadata=entry["metadata"])
    answers = [example.answer, "no idea"]
    right, wrong = TASK_METRICS["gym_score"](answers, [example, example])
    assert right == 1.0
    assert wrong < 0.5


@pytest.mark.parametrize("metric", sorted(TASK_METRICS))
def test_as_many_scores_as_answers_and_no_other_number_of_them(metric: str) -> None:
    entry = gym_dataset("leg_counting", {}, 1, 0)[0]
    example = replace(Example(entry["question"], entry["answer"], "leg_counting"), metadata=entry["metadata"])
    assert TASK_METRICS[metric]([example.answer] * 3, [example] * 3) == [1.0] * 3 or metric == "sari"
    with pytest.raises(ValueError, match="zip"):
        TASK_METRICS[metric](["1"], [example] * 2)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.fuzz", None)
    with pytest.raises(DataError, match=r"edit_similarity needs the package rapidfuzz.*moelora\[eval\]"):
        score("edit_similarity", "a", "a")
