"""Properties of an answer that can be checked by looking at its text: what capability labels are made from.

Each is a number from 0 to 1, larger is better, and looks at something that the others do not, so that one answer may
win on one and lose on another. None needs a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

from .example import Example

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# What stands before an answer: "The result is 5", "Answer: no", "2 + 3 = 5".
LEAD = re.compile(r"(?:\bis|\bare|[:=])(?=[\s\"'`*])", re.IGNORECASE)
AROUND = " \t\n\"'`*"
PLAIN = re.compile(r"[A-Za-z0-9 .,;:!?'\"+=/()\[\]\n-]")
SHORT = 3  # of fewer words it makes no sense to say that they repeat


@dataclass(frozen=True)
class Answer:
    """One answer to one question.

    Attributes:
        text: without white space around. ended: the model ended it, it was not cut off. example: the question.
        score: what the task's own scorer gives to a text, 0 to 1.
    """

    text: str
    ended: bool
    example: Example
    score: Callable[[str], float]


@dataclass(frozen=True)
class Property:
    """A property's meaning in a line, and how it is measured."""

    description: str
    measure: Callable[[Answer], float]


def candidates(text: str) -> list[str]:
    """The text and what in it may be meant as the answer.

    That is how it begins ("Yes, because ..."), its last line, and in that what follows "is", ":" or "=", and the last
    number.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    first = re.split(r"[,.;:\n]", text, maxsplit=1)[0]
    found = [text, first, last, LEAD.split(last)[-1], *NUMBER.findall(last)[-1:]]
    stripped = [each.strip(AROUND) for each in found]
    return list(dict.fromkeys([*stripped, *(each.rstrip(AROUND + ".!") for each in stripped)]))


def correctness(answer: Answer) -> float:
    """The task's score of the answer found in the text, whatever is said around it; the best of the candidates."""
    return max(float(answer.score(each)) for each in candidates(answer.text))


def closeness(answer: Answer) -> float:
    """1 / (1 + log2(1 + distance)) from the right number to the last one given; 0 without one."""
    given, right = (_numbers(text) for text in (answer.text, answer.example.answer))
    return 1 / (1 + math.log2(1 + abs(given[-1] - right[-1]))) if given and right else 0.0


def likeness(answer: Answer) -> float:
    """How many letters of the right answer stand in the candidate most like it, in the right order (Ratcliff)."""
    right = answer.example.answer.lower()
    return max(SequenceMatcher(None, each.lower(), right, autojunk=False).ratio() for each in candidates(answer.text))


def brevity(answer: Answer) -> float:
    """1 up to the length of the right answer, then its share of the text."""
    return min(1.0, len(answer.example.answer) / max(len(answer.text), 1)) if answer.text else 0.0


def form(answer: Answer) -> float:
    """One answer, as asked: ended by the model, in one line, of the kind and word count that was wanted; a third each.

    The kind is a number, a list, or words; the word count may be twice the right one.
    """
    wanted = answer.example.answer
    alike = _kind(answer.text) == _kind(wanted) and 0 < len(answer.text.split()) <= 2 * len(wanted.split())
    return (answer.ended + (len(answer.text.splitlines()) == 1) + alike) / 3


def fluency(answer: Answer) -> float:
    """Readable and not repeating itself: the share of different word pairs, times that of plain characters."""
    words = answer.text.lower().split()
    if not words:
        return 0.0
    plain = len(PLAIN.findall(answer.text))
    pairs = list(pairwise(words))
    different = len(set(pairs)) / len(pairs) if len(words) > SHORT else 1.0
    return different * plain / len(answer.text)


def grounding(answer: Answer) -> float:
    """The share of the answer's words and numbers that the question has too, in any order."""
    asked, said = (re.findall(r"[a-z]+|\d+", text.lower()) for text in (answer.example.prompt, answer.text))
    known = set(asked)
    return sum(word in known for word in said) / len(said) if said else 0.0


PROPERTIES: dict[str, Property] = {
    "correctness": Property("The answer is right, whatever is said around it.", correctness),
    "closeness": Property("The number given is near to the right one.", closeness),
    "likeness": Property("The answer has the letters or words of the right one, in their order.", likeness),
    "brevity": Property("Nothing is said beyond the answer.", brevity),
    "form": Property("One complete answer of the kind that was asked for, in one line.", form),
    "fluency": Property("Readable words that do not repeat themselves.", fluency),
    "grounding": Property("What is said is taken from the question.", grounding),
}


def _numbers(text: str) -> list[float]:
    return [float(each.replace(",", "")) for each in NUMBER.findall(text)]


def _kind(text: str) -> str:
    text = text.strip(AROUND + ".!")
    if NUMBER.fullmatch(text):
        return "number"
    return "list" if "," in text or text.startswith("[") else "words"
