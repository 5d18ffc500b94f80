"""Preference data in a recipe: what is held out, what is written and read back, and who refuses it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moelora.config import PreferenceColumns, PreferenceData, Recipe
from moelora.data import load_examples, read_data, read_rankings, write_rankings
from moelora.data.preferences import Comparison, Ranking, split, to_rows
from moelora.errors import ConfigError, DataError


def ranking(number: int, category: str | None = None, responses: tuple[str, ...] = ("a", "b"), **more: Any) -> Ranking:
    prompt = ({"role": "user", "content": f"Question {number}?"},)
    return Ranking(prompt, responses, (Comparison(0, 1),), category, **more)


@pytest.fixture
def many() -> list[Ranking]:
    """A hundred prompts of one category, ten of another, one of a third and ten of none; each prompt twice."""
    sizes = {"big": 100, "small": 10, "single": 1, None: 10}
    names = [name for name, size in sizes.items() for _ in range(size)]
    return [
        ranking(number, name, responses) for number, name in enumerate(names) for responses in (("a", "b"), ("c", "d"))
    ]


class TestSplit:
    @pytest.mark.smoke
    def test_by_prompt_and_category(self, many: list[Ranking]) -> None:
        train, test = split(many, 0.3, seed=0)
        assert not {r.key for r in train} & {r.key for r in test}
        assert Counter(r.category for r in test) == {"big": 60, "small": 6, None: 6}, "the share is that held out"
        assert Counter(r.category for r in train) == {"big": 140, "small": 14, "single": 2, None: 14}

    def test_order_of_rows_means_nothing(self, many: list[Ranking]) -> None:
        def held_out(rankings: list[Ranking], seed: int) -> set[str]:
            return {r.key for r in split(rankings, 0.3, seed)[1]}

        mixed = many.copy()
        random.Random(1).shuffle(mixed)
        assert held_out(many, 0) == held_out(mixed, 0) != held_out(many, 1)
        train, test = split(mixed, 0.3, seed=0)
        assert [r for r in mixed if r in train] == train, "each part keeps the order given"
        assert len(train) + len(test) == len(many)

    def test_ends(self, many: list[Ranking]) -> None:
        assert split(many, 0.0, 0) == (many, [])
        assert Counter(r.category for r in split(many, 0.001, 0)[1]) == {"big": 2, "small": 2, None: 2}
        assert Counter(r.category for r in split(many, 0.999, 0)[0]) == {"big": 2, "small": 2, "single": 2, None: 2}

    def test_a_prompt_of_two_categories(self) -> None:
        both = [ranking(n, name) for n in range(20) for name in ("b", "a")]
        train, test = split(both, 0.5, 0)
        assert len(train) == len(test) == 20
        names = [("a", "b"), ("b", "a"), ("a",)]
        mixed = [ranking(n, name) for n in range(30) for name in names[n % 3]]
        assert {r.key for r in split(mixed, 0.3, 0)[1]} == {r.key for r in split(mixed[::-1], 0.3, 0)[1]}


class TestReading:
    def test_held_out(self, tmp_path: Path, many: list[Ranking]) -> None:
        write_rankings(tmp_path / "all.jsonl", many)
        config = PreferenceData(path=str(tmp_path / "all.jsonl"), test_fraction=0.3, seed=5)
        train, test = read_rankings(config)
        assert (train, test) == split(many, 0.3, 5)
        limited, same = read_rankings(config.model_copy(update={"limit": 7}))
        assert same == test
        assert len(limited) == 7
        assert [r for r in train if r in limited] == limited

    def test_a_file_of_its_own(self, tmp_path: Path, many: list[Ranking], caplog: pytest.LogCaptureFixture) -> None:
        write_rankings(tmp_path / "train.jsonl", many)
        write_rankings(tmp_path / "test.jsonl", [*many[:6], ranking(1000)])
        config = PreferenceData(path=str(tmp_path / "train.jsonl"), test_path=str(tmp_path / "test.jsonl"))
        with caplog.at_level("INFO"):
            train, test = read_rankings(config)
        assert (train, test) == (many[6:], [*many[:6], ranking(1000)])
        assert "6 rankings left out: their prompts are tested" in caplog.text
        same = config.model_copy(update={"test_path": config.path})
        with pytest.raises(DataError, match=r"no ranking is left to train on, 242 are held out"):
            read_rankings(same)

    @pytest.mark.parametrize("plain", [True, False])
    def test_there_and_back(self, tmp_path: Path, plain: bool) -> None:
        rankings = [
            ranking(0),
            Ranking(
                ({"role": "user", "content": "Hi\n\tü"},),
                ("a", "", "[1]", "d"),
                (Comparison(2, 0), Comparison(1, 2), Comparison(1, 0)),
                "chat",
                {"form": (Comparison(3, 1, tie=True), Comparison(2, 3), Comparison(2, 1))},
                (0.5, 1.0, 0.1, -2.0),
            ),
            Ranking(({"role": "user", "content": "Alone"},), ("a",)),
        ]
        if not plain:
            cycle = tuple(Comparison(n, (n + 1) % 3) for n in range(3))
            rankings.append(ranking(1, "loop", ("a", "b", "c"), capabilities={"form": cycle}))
            rankings.append(Ranking(rankings[0].prompt, ("a", "b"), (Comparison(1, 0, margin=0.25),)))
            rankings.append(Ranking(rankings[0].prompt, ("a", "b", "c"), (Comparison(1, 0), Comparison(2, 0))))
        assert isinstance(to_rows(rankings)[0]["ranks"], list) == plain
        write_rankings(tmp_path / "x.jsonl", rankings)
        assert read_rankings(PreferenceData(path=str(tmp_path / "x.jsonl"), test_fraction=0))[0] == rankings

    def test_missing_and_empty(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such file"):
            read_rankings(PreferenceData(path=str(tmp_path / "nowhere.jsonl")))
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(DataError, match="the file is empty"):
            read_rankings(PreferenceData(path=str(tmp_path / "empty.jsonl")))


RECIPE = {
    "mixture": {"sites": [{"target": "q_proj", "experts": {"kind": "lora", "num_experts": 1, "r": 2}}]},
    "data": {"kind": "preferences", "path": "x.jsonl", "columns": {"capabilities": {"tone": "politeness"}}},
}


class TestRecipe:
    def test_is_read_and_written(self) -> None:
        recipe = Recipe.parse(RECIPE)
        assert isinstance(recipe.data, PreferenceData)
        assert recipe.data.columns.capabilities == {"tone": "politeness"}
        assert Recipe.parse(recipe.to_dict()) == recipe

    @pytest.mark.smoke
    def test_other_trainers_name_the_one_that_takes_it(self) -> None:
        recipe = Recipe.parse(RECIPE)
        assert recipe.trainer.kind == "sft"
        assert recipe.data is not None
        with pytest.raises(ConfigError, match=r"kind: reward\} takes it \(moelora train dmoerm\)"):
            read_data(recipe)
        with pytest.raises(ConfigError, match=r"kind: reward\} takes it"):
            load_examples(recipe.data)
        router = {"kind": "softmax", "aux_loss_coef": 0.1}
        sites = [{"target": "mlp", "experts": {"kind": "lora", "num_experts": 2, "r": 2}, "router": router}]
        typed = Recipe.parse(RECIPE | {"mixture": {"sites": sites}})
        with pytest.raises(ConfigError, match=r"kind: reward\} takes it"):  # and not that the router needs types
            read_data(typed)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"chosen": "a", "responses": "b"}, "responses and chosen belong to different layouts"),
            ({"response": "a", "rejected": "b"}, "rejected and response belong to different layouts"),
            ({"chosen": "a", "ranks": "b"}, "ranks is of responses, and chosen says by itself"),
            ({"responses": "a", "margin": "b"}, "margin is of chosen over rejected, not of responses"),
            ({"answers": "a"}, "name that column with prompt"),
            ({"capabilities": {}}, "at least 1 item"),
            ({"chosn": "a"}, "unknown key 'chosn'.*chosen"),
        ],
    )
    def test_columns_that_do_not_agree(self, columns: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            PreferenceColumns.parse(columns)
