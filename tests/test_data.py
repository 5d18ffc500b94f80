"""Reading, generating, templating and padding of examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moelora.config import DatasetData, ReasoningGymData
from moelora.data import ChatFormat, Collator, Example, load_examples, mix, task_names, tokenize
from moelora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EXAMPLE = Example("Two and two?", "four", "sums")


def gym(**options: Any) -> ReasoningGymData:
    defaults: dict[str, Any] = {"tasks": {"letter_counting": {"max_words": 5}}, "train_size": 30, "test_size": 10}
    return ReasoningGymData(**{**defaults, **options})


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    import pandas as pd

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return str(path)


def rows(count: int, offset: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} plus one?", "answer": str(n + 1)} for n in range(offset, offset + count)]


class TestReasoningGym:
    def test_sizes_tasks_and_answers(self) -> None:
        train, test, _ = load_examples(gym(tasks=["letter_counting", "spell_backward"], system="Be brief."))
        assert len(train) == 60 and len(test) == 20
        assert task_names(train) == task_names(test) == ["letter_counting", "spell_backward"]
        assert {example.system for example in train} == {"Be brief."}
        for example in test:
            if example.task == "spell_backward":
                assert example.answer == example.prompt.rsplit(" ", 1)[1][::-1]

    def test_train_and_test_share_no_question_in_a_small_space(self) -> None:
        train, test, dropped = load_examples(
            gym(tasks={"gcd": {"min_value": 1, "max_value": 8}}, train_size=30, test_size=20)
        )
        questions = [example.prompt for example in train + test]
        assert len(set(questions)) == len(questions)
        assert dropped > 0

    def test_the_test_set_does_not_depend_on_the_training_size(self) -> None:
        assert load_examples(gym(train_size=5)).test == load_examples(gym(train_size=40)).test

    def test_same_seed_same_examples(self) -> None:
        assert load_examples(gym()) == load_examples(gym())
        assert load_examples(gym()).train != load_examples(gym(seed=7)).train

    def test_a_space_that_the_test_set_uses_up(self) -> None:
        with pytest.raises(
            DataError, match=r"data\.tasks\.gcd: no question is left to train on.*lower data\.test_size"
        ):
            load_examples(gym(tasks={"gcd": {"min_value": 1, "max_value": 2}}))

    def test_unknown_task_names_the_closest(self) -> None:
        with pytest.raises(DataError, match="no task 'leter_counting'; did you mean 'letter_counting'"):
            load_examples(gym(tasks=["leter_counting"]))

    @pytest.mark.parametrize("options", [{"max_wurds": 3}, {"min_words": 9, "max_words": 2}])
    def test_refused_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(DataError, match=r"data\.tasks\.letter_counting: reasoning-gym refuses the options"):
            load_examples(gym(tasks={"letter_counting": options}))

    def test_a_task_without_answers(self) -> None:
        with pytest.raises(DataError, match="gives no answers to learn from"):
            load_examples(gym(tasks=["propositional_logic"]))

    def test_equal_seeds_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="seed and test_seed are both 3"):
            ReasoningGymData.parse({"tasks": ["gcd"], "seed": 3, "test_seed": 3})


class TestDataset:
    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
    def test_every_format_gives_the_same(self, tmp_path: Path, ending: str) -> None:
        path = write(tmp_path / f"sums.{ending}", rows(40))
        train, test, dropped = load_examples(DatasetData(path=path, test_fraction=0.25))
        assert len(train) == 30 and len(test) == 10 and dropped == 0
        assert {(example.prompt, example.answer) for example in train + test} == {
            (row["prompt"], row["answer"]) for row in rows(40)
        }
        assert task_names(train) == ["sums"]

    def test_columns(self, tmp_path: Path) -> None:
        table = [{"q": f"{n}?", "a": n, "kind": f"k{n % 2}", "role": "Sum."} for n in range(8)]
        path = write(tmp_path / "x.jsonl", table)
        columns = {"prompt": "q", "answer": "a", "task": "kind", "system": "role"}
        train, test, _ = load_examples(DatasetData.parse({"path": path, "columns": columns, "test_fraction": 0}))
        assert not test and len(train) == 8
        example = next(example for example in train if example.prompt == "3?")
        assert (example.answer, example.task, example.system) == ("3", "k1", "Sum.")

    def test_own_test_file_wins_over_training(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.jsonl", rows(20))
        test_path = write(tmp_path / "test.jsonl", rows(10, offset=15))
        train, test, dropped = load_examples(DatasetData(path=path, test_path=test_path))
        assert len(test) == 10 and len(train) == 15 and dropped == 5

    def test_duplicates_never_straddle_the_split(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.jsonl", rows(20) * 3)
        train, test, dropped = load_examples(DatasetData(path=path, test_fraction=0.5))
        assert len(train) == len(test) == 10 and dropped == 40
        assert not {example.prompt for example in train} & {example.prompt for example in test}

    def test_limit_and_glob(self, tmp_path: Path) -> None:
        write(tmp_path / "a.jsonl", rows(10))
        write(tmp_path / "b.jsonl", rows(10, offset=10))
        assert len(load_examples(DatasetData(path=str(tmp_path / "*.jsonl"), test_fraction=0)).train) == 20
        assert len(load_examples(DatasetData(path=str(tmp_path / "*.jsonl"), test_fraction=0, limit=7)).train) == 7

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("none.jsonl", None, "no such file"),
            ("empty.jsonl", "", "the file is empty"),
            ("bad.jsonl", '{"prompt": "a"', "cannot be read"),
            (
                "x.jsonl",
                '{"prompt": "a", "reply": "b"}',
                r"data\.columns\.answer is 'answer', but the columns are prompt, reply",
            ),
            ("x.jsonl", '{"prompt": "a", "answer": ""}', "row 1: column 'answer' is empty"),
            ("x.jsonl", '{"prompt": null, "answer": "b"}', "row 1: column 'prompt' is empty"),
            ("head.csv", "prompt,answer\n", "there are no rows|cannot be read"),
            ("x.xlsx", "x", "known endings are .jsonl, .json, .csv, .parquet"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, text: str | None, message: str) -> None:
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=message):
            load_examples(DatasetData(path=str(path)))

    def test_a_file_has_no_splits(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.jsonl", rows(4))
        with pytest.raises(DataError, match="has no split 'test'; name test files with test_path"):
            load_examples(DatasetData(path=path, test_split="test"))

    def test_a_hub_id_that_cannot_be_reached(self) -> None:
        with pytest.raises(DataError, match=r"data\.path: nobody/nothing cannot be read"):
            load_examples(DatasetData(path="nobody/nothing"))


def test_mix_depends_on_the_seed_alone() -> None:
    examples = [Example(str(n), "a", "t") for n in range(50)]
    assert mix(examples, 1) == mix(examples, 1) != mix(examples, 2)
    assert sorted(mix(examples, 1), key=lambda example: int(example.prompt)) == examples


class TestChat:
    def test_question_and_answer_are_the_template(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        chat = ChatFormat(byte_tokenizer)
        example = Example("Two and two?", "four", "sums", system="Be brief.")
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and two?"}]
        asked = byte_tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert chat.prompt_ids(example) == asked
        turns.append({"role": "assistant", "content": "four"})
        whole = byte_tokenizer.apply_chat_template(turns)["input_ids"]
        assert chat.prompt_ids(example) + chat.answer_ids(example) == whole[:-1]  # all but the line break at the end
        assert chat.end_ids == [byte_tokenizer.eos_token_id]

    def test_a_template_without_system_turn(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        byte_tokenizer.chat_template = refusing + byte_tokenizer.chat_template
        text = byte_tokenizer.decode(ChatFormat(byte_tokenizer).prompt_ids(Example("Hi?", "yes", "t", system="Brief.")))
        assert text == "<|im_start|>user\nBrief.\n\nHi?<|im_end|>\n<|im_start|>assistant\n"

    def test_a_template_that_thinks_before_the_answer(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        byte_tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
            "{% if m['role'] == 'assistant' %}<think></think>\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        assert byte_tokenizer.decode(ChatFormat(byte_tokenizer).answer_ids(EXAMPLE)) == "four<|im_end|>"

    def test_without_a_template(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        byte_tokenizer.chat_template = None
        chat = ChatFormat(byte_tokenizer)
        ids = chat.prompt_ids(EXAMPLE) + chat.answer_ids(EXAMPLE)
        assert byte_tokenizer.decode(ids) == "Two and two? four<|im_end|>"

    def test_neither_template_nor_end(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        byte_tokenizer.chat_template = None
        byte_tokenizer.eos_token = None
        with pytest.raises(DataError, match="neither a chat template nor an end token"):
            ChatFormat(byte_tokenizer)


class TestTokenize:
    def test_loss_on_answer_and_end_only(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        [row] = tokenize([EXAMPLE], byte_tokenizer, 200).rows
        learnt = [token for token in row["labels"] if token != -100]
        assert byte_tokenizer.decode(learnt) == "four<|im_end|>"
        assert row["labels"][-len(learnt) :] == row["input_ids"][-len(learnt) :] == learnt

    def test_task_ids(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        examples = [Example("a", "b", task) for task in ("y", "x", "y")]
        made = tokenize(examples, byte_tokenizer, 200)
        assert made.tasks == ["x", "y"] and [row["task_ids"] for row in made.rows] == [1, 0, 1]
        again = tokenize(examples[:1], byte_tokenizer, 200, tasks=made.tasks)
        assert again[0]["task_ids"] == 1
        with pytest.raises(DataError, match="task 'y' is not among x, yy; did you mean 'yy'"):
            tokenize(examples, byte_tokenizer, 200, tasks=["x", "yy"])

    def test_too_long_is_left_out_and_counted(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        short, long = Example("a", "b", "t"), Example("a" * 100, "b", "t")
        made = tokenize([short, long], byte_tokenizer, 80)
        assert len(made) == 1 and made.dropped == 1 and made.num_tokens == len(made[0]["input_ids"])
        with pytest.raises(DataError, match=r"max_length is 80 tokens, but the shortest of 1 examples has \d+"):
            tokenize([long], byte_tokenizer, 80)

    def test_no_examples(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="no examples"):
            tokenize([], byte_tokenizer, 80)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: Any) -> None:
    batch = Collator(pad_token_id=9, padding_side=side, with_task_ids=True)(
        [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "task_ids": 4},
            {"input_ids": [5], "labels": [5], "task_ids": 0},
        ]
    )
    padded = [9, 9, 5] if side == "left" else [5, 9, 9]
    assert batch["input_ids"].tolist() == [[1, 2, 3], padded]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [int(token == 5) for token in padded]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [token if token == 5 else -100 for token in padded]]
    assert batch["task_ids"].tolist() == [4, 0]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_task_ids_only_if_wanted() -> None:
    assert "task_ids" not in Collator(0)([{"input_ids": [1], "labels": [1], "task_ids": 0}])


def test_logits_of_answers_alone_give_the_same_loss_and_gradients(tiny_config: Any) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny_config)
    rows = [
        {"input_ids": [5, 6, 7, 8, 9, 2], "labels": [-100, -100, -100, -100, 9, 2], "task_ids": 0},
        {"input_ids": [7, 4, 3, 2], "labels": [-100, 4, 3, 2], "task_ids": 0},
        {"input_ids": [9, 2], "labels": [-100, 2], "task_ids": 0},
    ]
    seen = []
    for collator in (Collator(0), Collator(0, answers_only=True)):
        model.zero_grad()
        output = model(**collator(rows))
        output.loss.backward()
        seen.append((output.loss.detach(), model.model.embed_tokens.weight.grad.clone(), output.logits.shape[1]))
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-6)
    assert torch.allclose(seen[0][1], seen[1][1], atol=1e-6)
    assert seen[0][2] == 6 and seen[1][2] == 4
