"""How right answers are, by the metric of a task.

A metric takes the answers and their examples and gives a score from 0 to 1 for each. The names are those that a task or
a ``sequence.yaml`` may say (:data:`~moelora.sequence_config.TaskMetric`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from ..data.example import Example
from ..errors import DataError
from ..sequence_config import TaskMetric
from .scoring import normalized, score_answers

Metric = Callable[[Sequence[str], Sequence[Example]], list[float]]

LITERAL = re.compile(r"<(?P<kind>STR|NUM|CHAR)_LIT(?::(?P<text>.*?))?>", re.DOTALL)
PUNCTUATION = str.maketrans("", "", string.punctuation)
LONGEST = 4  # n-grams of SARI


def accuracy(answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """1 for the right text; case, quotation marks around it, closing punctuation and white space do not matter."""
    return _matches(answers, examples, normalized)


def exact(answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """1 for the very same text; white space around it does not matter. TRACE's accuracy."""
    return _matches(answers, examples, str.strip)


def exact_match(answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """1 for the same words; case and all punctuation do not matter. As SuperNI and O-LoRA evaluate.

    A text of nothing but punctuation has no words, and is never right.
    """
    return _matches(answers, examples, lambda text: " ".join(text.lower().translate(PUNCTUATION).split()))


def first_character(answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """1 if an answer begins with the right letter, whatever follows; TRACE's accuracy of ScienceQA."""
    return _matches(answers, examples, lambda text: text.strip()[:1])


def rouge_l(answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """The F-measure of ROUGE-L, with stems, by ``rouge-score``; the best over ``metadata["references"]`` if any.

    SuperNI, O-LoRA and SAPT use the same library with the same options. It knows letters a to z and digits alone, so
    text in another script scores 0. TRACE uses the package ``rouge``, which splits at white space, does not stem, and
    counts a word once; its numbers differ from these.

    Raises:
        DataError: the package is missing.
    """
    scorer = _library("rouge_score.rouge_scorer", "rouge-score", "rouge_l").RougeScorer(["rougeL"], use_stemmer=True)
    return [
        max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in _references(example))
        for answer, example in zip(answers, examples, strict=True)
    ]


def edit_similarity(answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """``1 - d / (m + n)``, d the insertions and deletions between texts of m and n characters, by ``rapidfuzz``.

    As TRACE scores Py150: the placeholders of literals are spelt out before (``<STR_LIT:a>`` is ``a``, ``<NUM_LIT>`` is
    0, ``<STR_LIT>`` and ``<CHAR_LIT>`` are nothing), and nothing is never similar. Its ``fuzzywuzzy`` computes the same
    and rounds to whole percent.

    Raises:
        DataError: the package is missing.
    """
    ratio = _library("rapidfuzz.fuzz", "rapidfuzz", "edit_similarity").ratio
    pairs = [
        (_literals(answer.strip()), _literals(example.answer.strip()))
        for answer, example in zip(answers, examples, strict=True)
    ]
    return [float(ratio(one, other)) / 100 if one and other else 0.0 for one, other in pairs]


def sari(answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """SARI (Xu et al. 2016, "Optimizing Statistical Machine Translation for Text Simplification", section 4).

    The source is the prompt, as in TRACE, with its instruction; the references are ``metadata["references"]``, or else
    the answer. For n-grams of each length 1 to 4, with counts of source S and answer C times the number of references,
    and R summed over them:

    - keep: F1 of S∧C against S∧R; precision is the mean over n-grams of ``(S∧C∧R) / (S∧C)``, recall is
      ``sum (S∧C∧R) / sum (S∧R)``;
    - delete: the mean over n-grams of ``(S-C-R) / (S-C)``, precision alone;
    - add: F1 of the n-grams in C but not S, against those in R but not S, each once.

    The score is the mean of the three, each the mean of its four lengths. Two conventions are those of tensor2tensor,
    which ``evaluate`` took over and TRACE uses: 0/0 is 1, and the recall of keep is no mean of ratios. Texts are put
    into lower case and split as ``sacrebleu`` does (13a). Where a word comes more than once, the reference itself may
    have less than 1.

    Raises:
        DataError: the package is missing.
    """
    tokenize = _library("sacrebleu.tokenizers.tokenizer_13a", "sacrebleu", "sari").Tokenizer13a()

    def words(text: str) -> list[str]:
        return str(tokenize(text.lower())).split(" ")

    return [
        _sari(words(example.prompt), words(answer), [words(reference) for reference in _references(example)])
        for answer, example in zip(answers, examples, strict=True)
    ]


def gym_score(answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """What the scorer of a procedural task gives, which may give part marks.

    Raises:
        DataError: the package is missing.
    """
    return score_answers(examples, answers).items


TASK_METRICS: Mapping[TaskMetric | str, Metric] = {
    "accuracy": accuracy,
    "exact": exact,
    "exact_match": exact_match,
    "first_character": first_character,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "sari": sari,
    "gym_score": gym_score,
}


def _matches(answers: Sequence[str], examples: Sequence[Example], form: Callable[[str], str]) -> list[float]:
    pairs = [(form(answer), form(example.answer)) for answer, example in zip(answers, examples, strict=True)]
    return [float(answer == right and answer != "") for answer, right in pairs]


def _references(example: Example) -> Sequence[str]:
    return example.metadata.get("references") or [example.answer]


def _literals(code: str) -> str:
    def spelt(match: re.Match[str]) -> str:
        text = match["text"]
        return text if text is not None else "0" if match["kind"] == "NUM" else ""

    return LITERAL.sub(spelt, code)


def _sari(source: Sequence[str], answer: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    parts = []
    for length in range(1, LONGEST + 1):
        grams = [Counter(_grams(reference, length)) for reference in references]
        wanted = sum(grams, Counter[tuple[str, ...]]())
        before, after = (_times(_grams(text, length), len(references)) for text in (source, answer))
        parts.append((_keep(before, after, wanted) + _delete(before, after, wanted) + _add(before, after, wanted)) / 3)
    return sum(parts) / len(parts)


def _grams(words: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(length)), strict=False)


def _times(grams: Iterable[tuple[str, ...]], factor: int) -> Counter[tuple[str, ...]]:
    return Counter({gram: count * factor for gram, count in Counter(grams).items()})


Grams = Counter[tuple[str, ...]]


def _keep(before: Grams, after: Grams, wanted: Grams) -> float:
    kept, should = before & after, before & wanted
    good = kept & wanted
    precision = sum(good[gram] / count for gram, count in kept.items()) / len(kept) if kept else 1.0
    return _f1(precision, good.total() / should.total() if should else 1.0)


def _delete(before: Grams, after: Grams, wanted: Grams) -> float:
    deleted = before - after
    good = deleted - wanted
    return sum(good[gram] / count for gram, count in deleted.items()) / len(deleted) if deleted else 1.0


def _add(before: Grams, after: Grams, wanted: Grams) -> float:
    added, should = set(after) - set(before), set(wanted) - set(before)
    good = len(added & should)
    return _f1(good / len(added) if added else 1.0, good / len(should) if should else 1.0)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _library(module: str, package: str, metric: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(
            f"the metric {metric} needs the package {package} ({error}): pip install 'moelora[eval]'"
        ) from error
