"""Rankings as token ids: what is written, which responses a row has, and batches of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moelora.data import RankingCollator, RankingSet, ResponseFormat
from moelora.data.preferences import Comparison, Ranking, comparisons
from moelora.errors import DataError
from moelora.reward.losses import Comparisons, ranking_loss

if TYPE_CHECKING:
    from moelora.data.ranking_set import RankingRow

PROMPT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "And one?"},
)
OTHER = ({"role": "user", "content": "Hi"},)
RANKINGS = [
    Ranking(
        PROMPT,
        ("five", "6", "it is five", "no", "5"),
        (*comparisons([1, 3, 1, None, None]), Comparison(4, 3, margin=0.5)),
        "sums",
        {"brevity": comparisons([2, None, 3, None, 1]), "tone": comparisons([None, 2, None, 1, None])},
    ),
    Ranking(OTHER, ("alone",), category="chat"),
    Ranking(OTHER, ("Hello!", "What?"), (Comparison(0, 1),), "chat"),
    Ranking(OTHER, ("Hm", "Oh"), capabilities={"tone": (Comparison(1, 0),)}),
]


@pytest.fixture
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return byte_tokenizer


def written(tokenizer: Any, prompt: Any, response: str) -> str:
    turns = [*prompt, {"role": "assistant", "content": response}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def joining(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with a token for two line breaks, as real vocabularies have."""
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["model"]["vocab"]["ĊĊ"] = len(raw["model"]["vocab"])
    raw["model"]["merges"] = [["Ċ", "Ċ"]]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), eos_token="<|im_end|>")
    made.chat_template = tokenizer.chat_template
    return made


class TestResponseFormat:
    def test_is_the_chat_template(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """History and system message and all; the last token is the newline that this template puts last."""
        prompt, answers = ResponseFormat(tokenizer)(PROMPT, ["five", ""])
        for text, ids in zip(["five", ""], answers, strict=True):
            assert tokenizer.decode(prompt + ids) == written(tokenizer, PROMPT, text)
        assert str(tokenizer.decode(prompt)).endswith("And one?<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(answers[0]) == "five<|im_end|>\n"
        assert ResponseFormat(tokenizer)(PROMPT, []) == (prompt, [])

    def test_the_response_changes_no_token_of_the_prompt(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Tokenised as one, the break that ends the prompt and those that begin a response share a token."""
        joins = joining(tokenizer)
        together = joins(written(joins, OTHER, "\n\nfive"), add_special_tokens=False)["input_ids"]
        prompt, (plain, broken) = ResponseFormat(joins)(OTHER, ["five", "\n\nfive"])
        generated = joins.apply_chat_template(list(OTHER), add_generation_prompt=True)["input_ids"]
        assert prompt == generated
        assert together[: len(prompt)] != prompt, "otherwise this test tests nothing"
        assert joins.decode(prompt + broken) == joins.decode(together)
        assert broken[2:] == plain

    def test_a_generation_prompt_that_answers_do_not_have(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Templates of thinking models may ask for a thought that they leave out of a given answer."""
        template = str(tokenizer.chat_template)
        tokenizer.chat_template = template.replace("assistant\n{% endif", "assistant\n<think>{% endif")
        prompt, (answer,) = ResponseFormat(tokenizer)(OTHER, ["five"])
        assert tokenizer.decode(prompt) == "<|im_start|>user\nHi<|im_end|>\n"
        assert tokenizer.decode(answer) == "<|im_start|>assistant\nfive<|im_end|>\n"

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (None, "has none: set one"),
            (
                "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
                "writes each turn by itself",
            ),
            ("{{ raise_exception('no system turns') }}", "refuses the conversation: no system turns"),
        ],
    )
    def test_refuses(self, tokenizer: PreTrainedTokenizerFast, template: Any, message: str) -> None:
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=message):
            RankingSet(RANKINGS, tokenizer, 999)


def texts(tokenizer: Any, row: RankingRow) -> list[str]:
    return [str(tokenizer.decode(ids[row.prompt_length :])).removesuffix("<|im_end|>\n") for ids in row.input_ids]


def told(tokenizer: Any, row: RankingRow) -> set[Any]:
    said = texts(tokenizer, row)
    return {
        frozenset((said[c.winner], said[c.loser])) if c.tie else (said[c.winner], said[c.loser])
        for c in row.comparisons
    }


class TestRankingSet:
    def test_overall(self, tokenizer: PreTrainedTokenizerFast) -> None:
        made = RankingSet(RANKINGS, tokenizer, 999, categories=["chat", "sums"])
        first, second = made[0], made[1]
        assert len(made) == 2, "what compares nothing overall is left out"
        assert texts(tokenizer, first) == ["five", "6", "it is five", "no", "5"]
        assert told(tokenizer, first) == {
            ("five", "6"), ("it is five", "6"), frozenset(("five", "it is five")), ("5", "no"),
        }  # fmt: skip
        assert sorted(c.margin for c in first.comparisons) == [0.0, 0.0, 0.0, 0.5]
        assert [(row.ranking, row.category_id, row.capability, row.view_id) for row in made.rows] == [
            (0, 1, None, None),
            (2, 0, None, None),
        ]
        assert texts(tokenizer, second) == ["Hello!", "What?"]

    @pytest.mark.smoke
    def test_by_capability(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Each has the responses that it compares and no other, and the number it was given."""
        views = {("sums", "brevity"): 3, ("sums", "tone"): 4, (None, "tone"): None}
        made = RankingSet(
            RANKINGS, tokenizer, 999, by_capability=True, view=lambda ranking, name: views[ranking.category, str(name)]
        )
        brevity, tone = made.rows
        assert (brevity.capability, brevity.view_id, tone.capability, tone.view_id) == ("brevity", 3, "tone", 4)
        assert texts(tokenizer, brevity) == ["five", "it is five", "5"]
        assert told(tokenizer, brevity) == {("five", "it is five"), ("5", "five"), ("5", "it is five")}
        assert told(tokenizer, tone) == {("no", "6")}
        assert brevity.category_id == -100
        everything = RankingSet(RANKINGS, tokenizer, 999, by_capability=True)
        assert [row.ranking for row in everything.rows] == [0, 0, 3]

    def test_too_long(self, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
        whole = RankingSet(RANKINGS, tokenizer, 999)
        longest = max(len(ids) for ids in whole[0].input_ids)
        made = RankingSet(RANKINGS, tokenizer, longest - 1)
        assert made.dropped == 1
        assert told(tokenizer, made[0]) == {("five", "6"), ("5", "no")}
        assert f"1 responses are longer than {longest - 1} tokens: left out" in caplog.text
        assert told(tokenizer, RankingSet(RANKINGS, tokenizer, longest)[0]) == told(tokenizer, whole[0])
        shortest = min(len(ids) for row in whole.rows for ids in row.input_ids)
        with pytest.raises(DataError, match=rf"max_length is 9 tokens.* 7 longer ones has {shortest}: raise it"):
            RankingSet(RANKINGS, tokenizer, 9)

    def test_refuses(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match=r"category 'sums' is not among chat, sum.*'sum'"):
            RankingSet(RANKINGS, tokenizer, 999, categories=["chat", "sum"])
        with pytest.raises(DataError, match="no ranking compares two responses overall"):
            RankingSet(RANKINGS[3:], tokenizer, 999)
        with pytest.raises(DataError, match="no ranking compares two responses by a capability"):
            RankingSet(RANKINGS[1:3], tokenizer, 999, by_capability=True)


class TestRankingCollator:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_batch(self, tokenizer: PreTrainedTokenizerFast, side: Any) -> None:
        made = RankingSet(RANKINGS, tokenizer, 999, categories=["chat", "sums"], view=lambda r, _: len(r.responses))
        batch = RankingCollator(3, side)(made.rows[::-1])
        longest = max(len(ids) for row in made.rows for ids in row.input_ids)
        assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
            "input_ids": ((7, longest), torch.int64),
            "attention_mask": ((7, longest), torch.int64),
            **{name: ((5,), torch.int64) for name in ("winners", "losers", "groups")},
            "ties": ((5,), torch.bool),
            "margins": ((5,), torch.float32),
            **{name: ((7,), torch.int64) for name in ("prompt_lengths", "category_ids", "view_ids")},
        }
        assert batch["view_ids"].tolist() == [2] * 2 + [5] * 5
        assert batch["category_ids"].tolist() == [0] * 2 + [1] * 5
        assert batch["groups"].tolist() == [0, 1, 1, 1, 1]
        assert batch["attention_mask"].sum() == sum(len(ids) for row in made.rows for ids in row.input_ids)
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 3).all()
        edge = batch["attention_mask"][:, 0 if side == "right" else -1]
        assert edge.all(), "the padding is on the other side"
        real = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        said = [
            str(tokenizer.decode(ids[n:])).split("<")[0] for ids, n in zip(real, batch["prompt_lengths"], strict=True)
        ]
        pairs = [
            (said[w], said[loser], tie, margin)
            for w, loser, tie, margin in zip(
                *(batch[name].tolist() for name in ("winners", "losers", "ties", "margins")), strict=True
            )
        ]
        assert pairs == [
            ("Hello!", "What?", False, 0.0),
            ("five", "6", False, 0.0),
            ("five", "it is five", True, 0.0),
            ("it is five", "6", False, 0.0),
            ("5", "no", False, 0.5),
        ]

    @pytest.mark.smoke
    def test_goes_into_the_loss(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Together two rankings cost the mean of what each costs alone, in whichever order they come."""
        made = RankingSet(RANKINGS, tokenizer, 999)
        collate = RankingCollator(3)
        assert "view_ids" not in collate(made.rows)

        def loss(rows: list[RankingRow]) -> torch.Tensor:
            batch = collate(rows)
            rewards = (batch["input_ids"] * batch["attention_mask"]).double().sin().sum(1)  # of the text alone
            return ranking_loss(rewards, Comparisons.of(batch))

        one, two = loss(made.rows[:1]), loss(made.rows[1:])
        assert one != two
        torch.testing.assert_close(loss(made.rows), (one + two) / 2)
        torch.testing.assert_close(loss(made.rows[::-1]), (one + two) / 2)
