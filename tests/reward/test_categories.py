"""Categories of tasks and their points: the ready ones, and those of a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moelora.errors import ConfigError
from moelora.reward.categories import Category, load_categories

pytestmark = pytest.mark.smoke


def test_the_five_of_the_paper_are_there() -> None:
    found = load_categories("dmoerm")
    assert {name: len(category.capabilities) for name, category in found.items()} == {
        "roleplay": 6,
        "chitchat": 5,
        "subjective_qa": 5,
        "objective_qa": 6,
        "text_creation": 5,
    }
    for category in found.values():
        assert category.description
        assert all(category.capabilities.values())
        assert len(set(category.capabilities.values())) == len(category.capabilities)


def test_names_alone_are_enough(tmp_path: Path) -> None:
    expected = {
        "sums": Category(capabilities={"correctness": "", "depth": ""}),
        "talk": Category(description="Small talk.", capabilities={"humour": "It is funny."}),
        "more": Category(capabilities={"b": "B", "a": "A"}),
    }
    given: dict[str, Any] = {
        "sums": ["correctness", "depth"],
        "talk": {"description": "Small talk.", "capabilities": {"humour": "It is funny."}},
        "more": {"b": "B", "a": "A"},
    }
    assert load_categories(given) == expected
    assert list(load_categories(given)["more"].capabilities) == ["b", "a"]
    path = tmp_path / "mine.yaml"
    path.write_text(
        "sums: [correctness, depth]\ntalk: {description: Small talk., capabilities: {humour: It is funny.}}\n"
        "more: {b: B, a: A}\n"
    )
    assert load_categories(path) == load_categories(str(path)) == expected
    assert load_categories(expected) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dmorm", "'dmorm': neither one of the ready ones .* did you mean 'dmoerm'"),
        ("missing.yaml", "missing.yaml"),
        ({}, "there is no category"),
        ({"sums": []}, "category 'sums': capabilities: Dictionary should have at least 1 item"),
        ({"sums": ["a", "a"]}, "the capability 'a' is given twice"),
        ({"sums": ["a", 3]}, "expected names of capabilities, got 3"),
        ({"sums": ["a.b"]}, r"'a\.b' cannot be a name"),
        ({"sums": None}, "category 'sums': capabilities"),
        ({"two words": ["a"]}, "'two words' cannot be a name"),
        ({7: ["a"]}, "7 cannot be a name"),
        ({"general": ["a"]}, "cannot be named 'general': the mixture has an expert of that name"),
        ({"sums": {"capabilities": ["a"], "descripton": "x"}}, "unknown key 'descripton'.*did you mean 'description'"),
    ],
)
def test_what_cannot_be_used_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_categories(given)
