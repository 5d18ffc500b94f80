"""The released sequences TRACE, text classification and SuperNI, from small files of their form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from moelora.config import SequenceData
from moelora.data import SEQUENCES, read_sequence
from moelora.errors import DataError


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_trace(root: Path) -> None:
    for number, name in enumerate(SEQUENCES.create("trace", SequenceData(name="trace")).orders()["a"]):
        answers = ["A", "B", "C"] if name in ("C-STANCE", "FOMC") else ["A\nbecause", "12", "Ein Satz"]
        for split, size in (("train", 9), ("eval", 3), ("test", 6)):
            rows = [{"prompt": f"{number} {split} {at}\n", "answer": answers[at % 3]} for at in range(size)]
            write(root / name / f"{split}.json", rows)


def test_trace(tmp_path: Path) -> None:
    write_trace(tmp_path)
    sequence = read_sequence(SequenceData(name="trace", path=str(tmp_path)))
    assert {task.name: (task.metric, task.epochs, len(task.classes)) for task in sequence.ordered("a")} == {
        "C-STANCE": ("exact", 2, 3),
        "FOMC": ("exact", 1, 3),
        "MeetingBank": ("rouge_l", 3, 0),
        "Py150": ("edit_similarity", 2, 0),
        "ScienceQA": ("first_character", 1, 0),
        "NumGLUE-cm": ("exact", 2, 0),
        "NumGLUE-ds": ("exact", 2, 0),
        "20Minuten": ("sari", 3, 0),
    }
    assert {task.max_new_tokens for task in sequence.tasks} == {512}
    assert [len(part) for part in sequence.tasks[0].splits.values()] == [9, 3, 6]
    assert sequence.tasks[0].test[0].prompt == "0 test 0"
    (tmp_path / "Py150" / "eval.json").unlink()
    with pytest.raises(
        DataError, match=r"Py150/eval\.json is missing; data.path should be the folder of a TRACE release"
    ):
        read_sequence(SequenceData(name="trace", path=str(tmp_path)))


def test_files_of_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files as the hub's client keeps them, once they have been downloaded."""
    cached = tmp_path / "datasets--someone--trace"
    revision = "0" * 40
    write_trace(cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert len(read_sequence(SequenceData(name="trace", path="someone/trace")).tasks) == 8
    with pytest.raises(DataError, match="nobody/trace is no folder here, and C-STANCE"):
        read_sequence(SequenceData(name="trace", path="nobody/trace"))


def write_text_cl(root: Path, folder: str, labels: list[str]) -> None:
    write(root / folder / "labels.json", labels)
    for split, size in (("train", 40), ("test", 8)):
        rows = [{"label": labels[at % len(labels)], "sentence": f"Text: {split} {at}\n"} for at in range(size)]
        write(root / folder / f"{split}.json", rows)


def test_text_classification(tmp_path: Path) -> None:
    for folder in ("SC/amazon", "TC/agnews", "TC/dbpedia", "TC/yahoo"):
        write_text_cl(tmp_path, folder, ["World", "Science or Technology"])
    sequence = read_sequence(SequenceData(name="text-cl", path=str(tmp_path), order="3"))
    assert [task.name for task in sequence.ordered("3")] == ["yahoo", "amazon", "agnews", "dbpedia"]
    assert set(sequence.orders) == {"1", "2", "3"}  # the others have tasks that were not read
    first = sequence.tasks[0]
    assert (first.metric, first.classes, first.max_new_tokens) == (
        "exact_match",
        ("World", "Science or Technology"),
        50,
    )
    assert [len(part) for part in first.splits.values()] == [36, 4, 8]
    assert first.test[0].prompt == (
        "What is the topic of the following paragraph? Choose one from the option.\n"
        "Option: World, Science or Technology \nText: test 0\nAnswer:"
    )
    with pytest.raises(DataError, match=r"NLI/MNLI/labels\.json is missing"):
        read_sequence(SequenceData(name="text-cl", path=str(tmp_path), order="4"))


def test_orders_of_text_classification() -> None:
    orders = SEQUENCES.create("text-cl", SequenceData(name="text-cl")).orders()
    assert {order: len(set(names)) for order, names in orders.items()} == {
        **dict.fromkeys("123", 4),
        **dict.fromkeys("456", 15),
        **{f"five-{number}": 5 for number in range(1, 5)},
    }
    assert all(len(names) == len(set(names)) for names in orders.values())


def test_rows_without_a_label_and_questions_that_bring_their_instruction(tmp_path: Path) -> None:
    write_text_cl(tmp_path, "NLI/MNLI", ["neutral", "-"])
    write(tmp_path / "NLI/MNLI/labels.json", ["neutral", "entailment"])
    reader = SEQUENCES.create("text-cl", SequenceData(name="text-cl", path=str(tmp_path)))
    with pytest.raises(DataError, match="no answer is the class 'entailment'"):  # but none is "-"
        reader.task("mnli")
    write_text_cl(tmp_path, "COPA/COPA", ["A", "B"])
    assert reader.task("copa").test[1].prompt == "Text: test 1\nAnswer:"
    write(tmp_path / "COPA/COPA/labels.json", {"A": 0})
    with pytest.raises(DataError, match=r"labels\.json: this should be a list"):
        reader.task("copa")


def superni(*instances: dict[str, Any]) -> dict[str, Any]:
    return {"Definition": ["Answer the question. "], "Instances": list(instances), "Source": ["x"]}


def test_superni(tmp_path: Path) -> None:
    reader = SEQUENCES.create("superni", SequenceData(name="superni", path=str(tmp_path), val_size=2))
    orders = reader.orders()
    assert [len(set(names)) for names in orders.values()] == [15, 15]
    assert sorted(orders["1"]) == sorted(orders["2"])
    name = orders["1"][0]
    assert name == "task1572_samsum_summary"
    train = [{"input": f"question {at}", "output": [f"answer {at}"]} for at in range(10)]
    write(tmp_path / name / "train.json", superni(*train, {"input": "empty", "output": [" "]}))
    test = [{"input": "What?", "output": ["this", "that "]}, {"input": "Why?", "output": "so"}]
    write(tmp_path / name / "test.json", superni(*test))
    task = reader.task(name)
    assert [len(part) for part in task.splits.values()] == [8, 2, 2]
    assert (task.metric, task.max_new_tokens) == ("rouge_l", 50)
    assert task.test[0].prompt == (
        "Definition: Answer the question.\n\nNow complete the following example -\nInput: What?\nOutput:"
    )
    assert (task.test[0].answer, task.test[0].metadata["references"]) == ("this", ["this", "that"])
    assert task.test[1].answer == "so"
    write(tmp_path / name / "test.json", superni({"input": "What?", "output": 3}))
    with pytest.raises(DataError, match=r"test\.json: instance 1: this should be"):
        reader.task(name)
    write(tmp_path / name / "test.json", test)
    with pytest.raises(DataError, match="one object with the lists Definition and Instances"):
        reader.task(name)
