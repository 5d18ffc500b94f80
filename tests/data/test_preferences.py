"""Preference data: layouts of common sets, what is refused, splits by prompt, and the way there and back."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import pytest

from moelora.config import PreferenceColumns, PreferenceData
from moelora.data import read_rankings
from moelora.data.preferences import Comparison, Ranking, comparisons, prompt_key
from moelora.errors import DataError

ASKED = ({"role": "user", "content": "Two and two?"},)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, rows: list[dict[str, Any]] | None = None, **columns: Any) -> list[Ranking]:
    if rows is not None:
        write(path, rows)
    config = PreferenceData(path=str(path), test_fraction=0.0, columns=PreferenceColumns.parse(columns))
    train, test = read_rankings(config)
    assert not test
    return train


def pairs(found: tuple[Comparison, ...]) -> set[Any]:
    """(winner, loser), and a set of the two for a tie."""
    return {frozenset((c.winner, c.loser)) if c.tie else (c.winner, c.loser) for c in found}


class TestComparisons:
    @pytest.mark.smoke
    def test_all_pairs_and_no_other(self) -> None:
        """The released code was off by one in this loop when it evaluated."""
        rng = random.Random(0)
        for count in range(1, 8):
            ranks = [rng.choice([1, 2, 3, 4.5, None]) for _ in range(count)]
            known = [(i, j) for i, j in combinations(range(count), 2) if ranks[i] is not None and ranks[j] is not None]
            expected: set[Any] = set()
            for i, j in known:
                order = {i, j} if ranks[i] == ranks[j] else (i, j) if ranks[i] < ranks[j] else (j, i)  # type: ignore[operator]
                expected.add(frozenset(order) if isinstance(order, set) else order)
            found = comparisons(ranks)
            assert pairs(found) == expected
            assert len(found) == len(known)
            assert pairs(comparisons(scores=[None if rank is None else -rank for rank in ranks])) == expected

    def test_margins_are_the_gaps_of_the_scores(self) -> None:
        found = comparisons(scores=[0.25, 1.0, 0.25, None], margin=2.0)
        assert found == (
            Comparison(1, 0, margin=1.5),
            Comparison(0, 2, tie=True),
            Comparison(1, 2, margin=1.5),
        )
        assert comparisons([1, 2, 3], scores=[5.0, 4.0, None], margin=1.0) == (
            Comparison(0, 1, margin=1.0),
            Comparison(0, 2),
            Comparison(1, 2),
        )

    def test_ranks_decide_and_no_margin_is_negative(self) -> None:
        assert comparisons([1, 2], scores=[0.0, 1.0], margin=1.0) == (Comparison(0, 1, margin=0.0),)

    @pytest.mark.parametrize("bad", ["1", True, float("nan"), [1]])
    def test_entries_are_numbers(self, bad: Any) -> None:
        with pytest.raises(DataError, match=r"entry 1 is .*; a finite number or null is wanted"):
            comparisons([1, bad])

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ({"responses": ()}, "there are no responses"),
            ({"prompt": ()}, "has to end with what the user says"),
            ({"prompt": (*ASKED, {"role": "assistant", "content": "4"})}, "has to end with what the user says"),
            ({"prompt": ({"role": "user", "content": " "},)}, "may not be empty"),
            ({"prompt": ({"role": "user", "content": [{"type": "image"}]},)}, "message 1 of the prompt"),
            ({"responses": ("4", None)}, "response 1 is None; a text is wanted"),
            ({"scores": (1.0,)}, "1 scores for 2 responses"),
            ({"comparisons": (Comparison(0, 2),)}, "responses 0 and 2 are compared, but there are 2"),
            ({"comparisons": (Comparison(1, 1),)}, "response 1 is compared with itself"),
            ({"comparisons": (Comparison(0, 1), Comparison(1, 0))}, "twice: say once which is better"),
            ({"comparisons": (Comparison(0, 1, margin=-1.0),)}, "margin of -1.0; it has to be 0 or more"),
            ({"comparisons": (Comparison(0, 1, tie=True, margin=1.0),)}, "as a tie with a margin"),
            ({"capabilities": {"form": (Comparison(0, 7),)}}, "capability 'form': responses 0 and 7"),
        ],
    )
    def test_what_a_ranking_refuses(self, parts: dict[str, Any], message: str) -> None:
        given = {"prompt": ASKED, "responses": ("4", "5"), "where": "x.jsonl: row 3"} | parts
        with pytest.raises(DataError, match=rf"^x\.jsonl: row 3: .*{message}"):
            Ranking(**given)

    def test_what_says_the_same_is_equal(self) -> None:
        one = Ranking(ASKED, ("a", "b", "c"), (Comparison(2, 1, tie=True), Comparison(1, 0)), where="here")
        other = Ranking(ASKED, ("a", "b", "c"), (Comparison(1, 0), Comparison(1, 2, tie=True)), capabilities={"x": ()})
        assert one == other
        assert one.key == prompt_key(({"role": "user", "content": " Two  and\ntwo? "},)) != prompt_key(ASKED * 2)
        assert one.key == "17e0fc97a115c210", "splits go by keys, so these may never change"


ROWS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and two?"}],
        "responses": ["4", "5", "four", "[4]"],
        "ranks": [1, 3, 1, None],
        "scores": [1.0, 0.0, 1.0, 0.5],
        "category": "sums",
        "capabilities": {"brevity": [1, 1, 2, None], "tone": None},
    },
    {
        "prompt": [{"role": "user", "content": "And one?"}],
        "responses": ["1", "2"],
        "ranks": [2, 1],
        "scores": [0.0, None],
        "category": None,
        "capabilities": {"brevity": None, "tone": [1, 2]},
    },
]


class TestLayouts:
    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
    def test_our_own(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"rankings{suffix}"
        if suffix == ".json":
            path.write_text(json.dumps(ROWS))
        elif suffix == ".parquet":
            datasets.Dataset.from_list(ROWS).to_parquet(str(path))
        elif suffix == ".csv":
            cells = [{k: v if v is None or isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in ROWS]
            datasets.Dataset.from_list(cells).to_csv(str(path))
        else:
            write(path, ROWS)
        first, second = read(path)
        assert first.prompt == tuple(ROWS[0]["prompt"])
        assert first.responses == ("4", "5", "four", "[4]")
        assert pairs(first.comparisons) == {(0, 1), (2, 1), frozenset((0, 2))}
        assert first.scores == (1.0, 0.0, 1.0, 0.5)
        assert first.category == "sums"
        assert {name: pairs(found) for name, found in first.capabilities.items()} == {
            "brevity": {frozenset((0, 1)), (0, 2), (1, 2)}
        }
        assert first.where == f"{path}: row 1"
        assert pairs(second.comparisons) == {(1, 0)}
        assert (second.scores, second.category) == (None, None), "scores are of all responses, or there are none"
        assert set(second.capabilities) == {"tone"}

    def test_scores_rank_where_nothing_else_does(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.jsonl", [{"prompt": "Two?", "responses": ["2", "3", "two"], "scores": [1, 0, 0.5]}])
        config = PreferenceData(path=str(path), test_fraction=0, score_margin=0.5)
        (ranking,), _ = read_rankings(config)
        assert pairs(ranking.comparisons) == {(0, 1), (0, 2), (2, 1)}
        assert sorted(c.margin for c in ranking.comparisons) == [0.25, 0.25, 0.5]

    @pytest.mark.smoke
    def test_pairs_of_texts(self, tmp_path: Path) -> None:
        """RewardBench: a category column by name; a text that is also JSON stays a text."""
        rows = [
            {"prompt": "A list?", "chosen": "[1, 2]", "rejected": '{"a": 1}', "subset": "code", "chosen_model": "m"},
            {"prompt": "[3]", "chosen": "yes", "rejected": "no", "subset": "chat", "chosen_model": "m"},
            {"prompt": "Go on", "chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "z", "subset": "chat"},
        ]
        first, second, third = read(tmp_path / "rb.jsonl", rows, category="subset")
        assert (first.responses, first.category) == (("[1, 2]", '{"a": 1}'), "code")
        assert pairs(first.comparisons) == {(0, 1)}
        assert second.prompt == ({"role": "user", "content": "[3]"},)
        assert third.responses[0] == "\n\nHuman: x\n\nAssistant: y", "there is a prompt, so this is the response"

    def test_several_of_each_side(self, tmp_path: Path) -> None:
        """RewardBench 2."""
        rows = [{"prompt": "One?", "chosen": ["1", "one"], "rejected": ["2", "3", "4"], "m": 0.5}]
        (ranking,) = read(tmp_path / "rb2.jsonl", rows, margin="m")
        assert ranking.responses == ("1", "one", "2", "3", "4")
        assert pairs(ranking.comparisons) == {(good, bad) for good in (0, 1) for bad in (2, 3, 4)}
        assert {c.margin for c in ranking.comparisons} == {0.5}

    def test_conversations_as_text(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Anthropic's hh-rlhf: what comes before the last turn is the prompt, all of it."""
        start = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A joke?\n\nHuman: Quick!\n\nAssistant:"
        rows = [
            {"chosen": f"{start} Knock knock.", "rejected": f"{start} No.\n\nReally no."},
            {"chosen": f"{start} Same.", "rejected": f"{start} Same."},
            {"chosen": f"{start} One.\n\nHuman: More\n\nAssistant: Two.", "rejected": f"{start} No."},
            {"chosen": f"{start} Well.", "rejected": f"{start}"},
        ]
        (ranking,) = read(tmp_path / "hh.jsonl", rows)
        assert ranking.prompt == (
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "A joke?\n\nQuick!"},
        )
        assert ranking.responses == ("Knock knock.", "No.\n\nReally no.")
        told = caplog.text
        assert "1 rows left out, the first of them row 2: a chosen and a rejected response are the same" in told
        assert "row 3: the two conversations part before their last turn" in told
        assert "row 4: a conversation does not end with what the assistant says" in told
        prompted = [{"prompt": start, "chosen": " A pun.", "rejected": " No."}]
        assert read(tmp_path / "split.jsonl", prompted)[0].prompt == ranking.prompt

    def test_conversations_as_messages(self, tmp_path: Path) -> None:
        """UltraFeedback, binarised: the conversations repeat the prompt; and TRL's form, where they do not."""
        before = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        good, bad = ([{"role": "assistant", "content": text}] for text in ("Hello!", "What?"))
        rows = [{"prompt": "Hi", "prompt_id": "7", "chosen": before + good, "rejected": before + bad}]
        (whole,) = read(tmp_path / "uf.jsonl", rows)
        (apart,) = read(tmp_path / "trl.jsonl", [{"prompt": before, "chosen": good, "rejected": bad}])
        (bare,) = read(tmp_path / "bare.jsonl", [{"chosen": before + good, "rejected": before + bad}])
        assert whole == apart == bare
        assert whole.prompt == tuple(before)
        assert whole.responses == ("Hello!", "What?")

    def test_one_response_in_a_row(self, tmp_path: Path) -> None:
        """HelpSteer: attributes become capabilities; rows of one prompt need not be neighbours."""
        rows = [
            {"prompt": "Hi", "response": "Hello", "helpfulness": 3, "correctness": 4, "verbosity": 1},
            {"prompt": "Bye", "response": "See you", "helpfulness": 2, "correctness": 2, "verbosity": 0},
            {"prompt": "Hi", "response": "What?", "helpfulness": 1, "correctness": 4, "verbosity": None},
            {"prompt": "Hi", "response": "Good day", "helpfulness": 4, "correctness": 0, "verbosity": 3},
        ]
        columns = {"scores": "helpfulness", "capabilities": {"right": "correctness", "length": "verbosity"}}
        hi, bye = read(tmp_path / "hs.jsonl", rows, **columns)
        assert hi.responses == ("Hello", "What?", "Good day")
        assert hi.where.endswith("row 1 and row 3 and row 4")
        assert hi.scores == (3.0, 1.0, 4.0)
        assert pairs(hi.comparisons) == {(0, 1), (2, 0), (2, 1)}
        assert pairs(hi.capabilities["right"]) == {frozenset((0, 1)), (0, 2), (1, 2)}
        assert pairs(hi.capabilities["length"]) == {(2, 0)}
        assert (bye.responses, bye.comparisons, bye.capabilities) == (("See you",), (), {})

    def test_rows_of_the_authors(self, tmp_path: Path) -> None:
        """mtmc-rlhf; the released code drops the earlier turns, and all but the first 20 lines when it tests."""
        rows = [
            {
                "label": number % 5,
                "src": ["Who was first?", "When?", f"Why {number}?"],
                "tgt": ["Ada.", "In 1843."],
                "response": ["Because.", "For fun.", "No idea.", "Numbers."],
                "rank": [2, 1, 4, 2],
            }
            for number in range(45)
        ]
        columns = {"prompt": "src", "answers": "tgt", "responses": "response", "ranks": "rank", "category": "label"}
        found = read(tmp_path / "mtmc.jsonl", rows, **columns)
        assert len(found) == 45
        assert [ranking.category for ranking in found[:6]] == ["0", "1", "2", "3", "4", "0"]
        assert [(turn["role"], turn["content"]) for turn in found[44].prompt] == [
            ("user", "Who was first?"),
            ("assistant", "Ada."),
            ("user", "When?"),
            ("assistant", "In 1843."),
            ("user", "Why 44?"),
        ]
        assert pairs(found[44].comparisons) == {(0, 2), (1, 0), (1, 2), (1, 3), (3, 2), frozenset((0, 3))}

    @pytest.mark.parametrize(
        ("row", "columns", "message"),
        [
            ({"prompt": "a", "text": "b"}, {}, "has to name responses, or chosen and rejected, or response"),
            ({"prompt": "a", "chosen": "b"}, {}, "has to name responses, or chosen and rejected, or response"),
            ({"question": "a", "responses": ["b"]}, {}, "data.columns.prompt has to name the column of prompts"),
            ({"prompt": "a", "responses": ["b"]}, {"ranks": "rnks"}, "data.columns.ranks is 'rnks', but the columns"),
            (
                {"prompt": "a", "response": "b", "tone": 1},
                {"capabilities": {"t": "tune"}},
                "data.columns.capabilities.t is 'tune', .*tone",
            ),
            (
                {"prompt": "a", "chosen": "b", "rejected": "c", "r": [1]},
                {"ranks": "r"},
                "data.columns.ranks means nothing in rows with chosen and rejected",
            ),
            ({"prompt": "a", "responses": "b"}, {}, "row 1: column 'responses' is 'b'; a list of texts is wanted"),
            ({"prompt": "a", "responses": ["b", None]}, {}, "row 1: column 'responses' .*a list of texts is wanted"),
            ({"prompt": "a", "responses": ["b"], "ranks": [1, 2]}, {}, "column 'ranks' has 2 entries for 1 responses"),
            ({"prompt": "a", "responses": ["b"], "scores": ["x"]}, {}, "column 'scores': entry 0 is 'x'"),
            ({"prompt": "a", "responses": ["b"], "scores": 3}, {}, "column 'scores' is 3; a list with a number"),
            ({"prompt": "", "responses": ["b"]}, {}, "row 1: the prompt has to end .* may not be empty"),
            ({"prompt": 7, "responses": ["b"]}, {}, "row 1: column 'prompt': a conversation is a list of"),
            ({"prompt": "a", "responses": ["b"], "capabilities": [1]}, {}, "column 'capabilities' is .1.; a mapping"),
            (
                {"prompt": "a", "responses": ["b", "c"], "ranks": {"pairs": [[0, 5]]}},
                {},
                "row 1: responses 0 and 5 are compared, but there are 2",
            ),
            (
                {"prompt": "a", "responses": ["b", "c"], "capabilities": {"t": {"pairs": [[0]]}}},
                {},
                "column 'capabilities': 't' is .*; wanted are pairs",
            ),
            ({"chosen": "b", "rejected": "c"}, {}, "row 1: column 'chosen' is no conversation: name"),
            (
                {"prompt": "a", "chosen": "b", "rejected": "c", "m": -1},
                {"margin": "m"},
                "column 'm' is -1; a margin is a number, 0 or more",
            ),
            (
                {"prompt": ["a", "b"], "old": [], "responses": ["c"]},
                {"prompt": "prompt", "answers": "old"},
                "holds 2 questions and column 'old' 0 answers",
            ),
            ({"prompt": "a", "chosen": "b", "rejected": "b"}, {}, "every row was left out: a chosen and a rejected"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, row: dict[str, Any], columns: Any, message: str) -> None:
        with pytest.raises(DataError, match=rf"x\.jsonl: .*{message}"):
            read(tmp_path / "x.jsonl", [row], **columns)


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff"])
def test_halves_of_characters_are_refused(text: str) -> None:
    prompt = ({"role": "user", "content": "a"},)
    with pytest.raises(DataError, match=r"row 7: .*surrogate"):
        Ranking(prompt=prompt, responses=("b", text), where="row 7")
    with pytest.raises(DataError, match="surrogate"):
        Ranking(prompt=({"role": "user", "content": text},), responses=("b",))


def test_endless_scores_are_refused() -> None:
    with pytest.raises(DataError, match="finite"):
        comparisons(scores=[1.0, float("inf")])
