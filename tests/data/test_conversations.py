"""Conversations: the tokens of the chat template, and loss on what the assistant says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moelora.config import DatasetData
from moelora.data import ChatFormat, Example, load_examples, tokenize
from moelora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TURNS = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "five"},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As templates of thinking models do: what was thought is written for the last turn alone.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(turns: list[dict[str, Any]] = TURNS, **more: Any) -> Example:
    return Example("And one?", "five", "t", messages=tuple(turns), **more)


def learnt(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label if label != -100 else tokenizer.pad_token_id for label in labels]))


@pytest.fixture
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    byte_tokenizer.pad_token = "<|unused|>"  # shows where there is no loss
    return byte_tokenizer


def spans(tokenizer: Any, example: Example) -> tuple[list[int], list[str]]:
    ids, labels = ChatFormat(tokenizer).tokens(example)
    return ids, [part for part in learnt(tokenizer, ids, labels).split("<|unused|>") if part]


@pytest.mark.parametrize("template", [None, MARKED], ids=["prefixes", "generation blocks"])
class TestLoss:
    @pytest.fixture(autouse=True)
    def _template(self, tokenizer: Any, template: str | None) -> None:
        if template is not None:
            tokenizer.chat_template = template

    def test_every_turn_of_the_assistant(self, tokenizer: Any) -> None:
        ids, parts = spans(tokenizer, conversation())
        assert ids == tokenizer.apply_chat_template(TURNS)["input_ids"]
        assert parts == ["four<|im_end|>", "five<|im_end|>"]

    def test_the_last_alone(self, tokenizer: Any) -> None:
        ids, parts = spans(tokenizer, conversation(last_turn_only=True))
        assert ids == tokenizer.apply_chat_template(TURNS)["input_ids"]
        assert parts == ["five<|im_end|>"]

    def test_one_turn_is_learnt_as_a_single_question_is(self, tokenizer: Any) -> None:
        whole, labels = ChatFormat(tokenizer).tokens(conversation(TURNS[:2]))
        ids, expected = ChatFormat(tokenizer).tokens(Example("Two and two?", "four", "t"))
        assert whole[: len(ids)] == ids and labels[: len(ids)] == expected
        assert tokenizer.decode(whole[len(ids) :]) == "\n" and set(labels[len(ids) :]) == {-100}

    def test_system_message_and_what_comes_after_the_last_answer(self, tokenizer: Any) -> None:
        turns = [*TURNS, {"role": "user", "content": "Thanks."}]
        ids, parts = spans(tokenizer, conversation(turns, system="Be brief."))
        opened = [{"role": "system", "content": "Be brief."}, *turns]
        assert ids == tokenizer.apply_chat_template(opened)["input_ids"]
        assert parts == ["four<|im_end|>", "five<|im_end|>"]
        assert spans(tokenizer, conversation(opened, system="Be long."))[0] == ids

    def test_several_turns_in_a_row(self, tokenizer: Any) -> None:
        turns = [TURNS[0], TURNS[1], TURNS[3], TURNS[0], TURNS[1]]
        ids, parts = spans(tokenizer, conversation(turns))
        assert ids == tokenizer.apply_chat_template(turns)["input_ids"]
        assert parts == ["four<|im_end|>", "five<|im_end|>", "four<|im_end|>"]

    def test_generation_starts_from_the_same_tokens(self, tokenizer: Any) -> None:
        chat = ChatFormat(tokenizer)
        prompt = chat.prompt_ids(conversation())
        ids, labels = chat.tokens(conversation(last_turn_only=True))
        assert ids[: len(prompt)] == prompt and set(labels[: len(prompt)]) == {-100}
        assert ids[len(prompt) :][: len(chat.answer_ids(conversation()))] == chat.answer_ids(conversation())


def test_the_embedded_backbones_own_template() -> None:
    from moelora import load_backbone

    _, tokenizer = load_backbone("smollm2-135m-instruct", quantization=None)
    assert tokenizer is not None
    ids, labels = ChatFormat(tokenizer).tokens(conversation())
    assert ids == tokenizer.apply_chat_template(TURNS)["input_ids"]
    assert tokenizer.decode([label for label in labels if label != -100]) == "four<|im_end|>five<|im_end|>"
    assert "You are a helpful AI assistant" in tokenizer.decode(ids)


class TestRefused:
    def test_a_template_that_rewrites_earlier_turns(self, tokenizer: Any) -> None:
        tokenizer.chat_template = FORGETFUL
        with pytest.raises(
            DataError, match=r"does not write turn 2 as it would be generated.*loss_turns: last needs it"
        ):
            ChatFormat(tokenizer).tokens(conversation())
        ids, parts = spans(tokenizer, conversation(last_turn_only=True))
        assert ids == tokenizer.apply_chat_template(TURNS)["input_ids"]
        assert parts == ["<think></think>five<|im_end|>"]

    def test_a_generation_prompt_that_no_answer_begins_with(self, tokenizer: Any) -> None:
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "assistant\n{% endif %}", "assistant\nWell, {% endif %}"
        )
        with pytest.raises(DataError, match="does not write turn 2 as it would be generated"):
            ChatFormat(tokenizer).tokens(conversation())

    def test_a_conversation_that_the_assistant_opens(self, tokenizer: Any) -> None:
        with pytest.raises(DataError, match=r"the conversation begins with the assistant, .*: begin with another turn"):
            ChatFormat(tokenizer).tokens(conversation([TURNS[1], *TURNS]))
        assert spans(tokenizer, conversation([TURNS[1], *TURNS], last_turn_only=True))[1] == ["five<|im_end|>"]
        tokenizer.chat_template = MARKED
        assert len(spans(tokenizer, conversation([TURNS[1], *TURNS]))[1]) == 3

    def test_blocks_that_mark_too_little(self, tokenizer: Any) -> None:
        tokenizer.chat_template = MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last")
        with pytest.raises(DataError, match=r"marks 1 parts as the assistant's .*, but 2 turns are"):
            ChatFormat(tokenizer).tokens(conversation())

    def test_a_template_that_refuses_the_turns(self, tokenizer: Any) -> None:
        refusing = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
        tokenizer.chat_template = refusing + tokenizer.chat_template
        with pytest.raises(
            DataError, match=r"the example that asks 'And one\?': the chat template refuses.*begin with"
        ):
            tokenize([conversation([TURNS[1], *TURNS])], tokenizer, 500)

    def test_no_template(self, tokenizer: Any) -> None:
        tokenizer.chat_template = None
        with pytest.raises(
            DataError, match="conversations are written by a chat template, and this tokenizer has none"
        ):
            tokenize([conversation()], tokenizer, 500)


class TestTable:
    def test_a_column_of_lists_and_one_of_json_text(self, tmp_path: Path) -> None:
        import pandas as pd

        more = [{"role": "system", "content": "Be brief."}, *TURNS[:2]]
        rows = [{"messages": TURNS, "kind": "sums"}, {"messages": more, "kind": "other"}]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        frame = pd.DataFrame([{**row, "messages": json.dumps(row["messages"])} for row in rows])
        frame.to_csv(tmp_path / "x.csv", index=False)
        frame = pd.DataFrame(rows)
        frame.to_parquet(tmp_path / "x.parquet")
        found = []
        for end in ("jsonl", "csv", "parquet"):
            columns = {"messages": "messages", "task": "kind"}
            config = DatasetData.parse({"path": str(tmp_path / f"x.{end}"), "columns": columns, "test_fraction": 0})
            found.append(sorted(load_examples(config).train, key=lambda example: example.task))
        assert found[0] == found[1] == found[2]
        first, second = found[0]
        assert first.messages == tuple(more) and (first.prompt, first.answer) == ("Two and two?", "four")
        assert second.messages == tuple(TURNS) and (second.prompt, second.answer) == ("And one?", "five")
        assert {first.task, second.task} == {"other", "sums"}

    def test_the_same_conversation_up_to_its_last_answer_never_straddles_the_split(self, tmp_path: Path) -> None:
        rows = [[*TURNS[:3], {"role": "assistant", "content": word}] for word in ("five", "5")] + [TURNS[:2]]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
        config = DatasetData.parse({"path": str(tmp_path / "x.jsonl"), "columns": {"messages": "messages"}})
        train, test, dropped = load_examples(config)
        assert len(train) + len(test) == 2 and dropped == 1

    @pytest.mark.parametrize(
        ("cell", "message"),
        [
            ("hello", "row 1: column 'messages': a conversation is a list of .* this is None"),
            ([], r"a conversation is a list of .*; this is \[\]"),
            ([{"from": "human", "value": "hi"}], "turn 1 is .*'from': 'human'"),
            ([{"role": "user", "content": "hi"}], "no turn is the assistant's, .*; the roles are user"),
            ([{"role": "user", "content": None}, TURNS[1]], "turn 1 has no content"),
        ],
    )
    def test_bad_cells(self, tmp_path: Path, cell: Any, message: str) -> None:
        (tmp_path / "x.jsonl").write_text(json.dumps({"messages": cell}) + "\n")
        config = DatasetData.parse({"path": str(tmp_path / "x.jsonl"), "columns": {"messages": "messages"}})
        with pytest.raises(DataError, match=message):
            load_examples(config)

    def test_a_column_that_is_not_named(self, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
        with pytest.raises(DataError, match=r"the columns are messages; for conversations set data.columns"):
            load_examples(DatasetData(path=str(tmp_path / "x.jsonl")))

    def test_last_turn_is_an_option_of_conversations(self, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
        values = {"path": str(tmp_path / "x.jsonl"), "loss_turns": "last", "test_fraction": 0}
        with pytest.raises(ConfigError, match=r"loss_turns is about conversations: name their column with columns"):
            DatasetData.parse(values)
        config = DatasetData.parse({**values, "columns": {"messages": "messages"}})
        assert load_examples(config).train[0].last_turn_only
