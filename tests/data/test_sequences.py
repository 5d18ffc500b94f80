"""Task sequences: what is read, what is the same for a seed, and what is refused before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moelora.config import Recipe, SequenceData
from moelora.data import SEQUENCES, Example, Task, TaskSequence, load_examples, read_sequence
from moelora.data.sequence_gym import TASKS as GYM_TASKS
from moelora.data.sequence_tasks import apart, hold_out
from moelora.errors import ConfigError, DataError

TINY: dict[str, Any] = {"name": "reasoning-gym-8", "train_size": 6, "val_size": 6, "test_size": 8}


def examples(*texts: str, task: str = "t", answer: str = "yes") -> tuple[Example, ...]:
    return tuple(Example(text, answer, task) for text in texts)


def task(**options: Any) -> Task:
    given = {"train": examples("a"), "val": examples("b"), "test": examples("c"), "metric": "accuracy"}
    return Task("t", **{**given, **options})


def write_tasks(root: Path, tasks: Mapping[str, Mapping[str, list[tuple[str, str]]]]) -> Path:
    for name, splits in tasks.items():
        for split, rows in splits.items():
            file = root / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows]
            file.write_text("\n".join(lines))
    return root


def colours(offset: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Ten questions to learn, four each to validate and to test, with two labels."""
    rows = [(f"question {offset + number}", "red" if number % 2 else "blue") for number in range(18)]
    return {"train": rows[:10], "val": rows[10:14], "test": rows[14:]}


@pytest.fixture(scope="module")
def gym() -> TaskSequence:
    return read_sequence(SequenceData(**TINY))


# ---- reasoning-gym-8


def test_eight_tasks_in_three_orders_of_all_of_them(gym: TaskSequence) -> None:
    assert len(gym.tasks) == 8
    assert set(gym.orders) == {"a", "b", "c"}
    assert len(set(gym.orders.values())) == 3
    for order, names in gym.orders.items():
        assert sorted(names) == sorted(GYM_TASKS)
        assert [task.name for task in gym.ordered(order)] == list(names)
    assert gym.ordered() == gym.ordered("a")
    assert "reasoning-gym 0." in gym.version


def test_sizes_scores_and_classes(gym: TaskSequence) -> None:
    for task in gym.tasks:
        assert [len(part) for part in task.splits.values()] == [6, 6, 8]
        assert task.metric == "gym_score"
        assert all(example.choices == task.classes for example in task.train)
    classes = {task.name: task.classes for task in gym.tasks}
    assert classes["syllogism"] == ("Yes", "No")
    assert classes["gcd"] == ()


def test_the_seed_changes_the_training_examples_alone(gym: TaskSequence) -> None:
    for other, same_train in ((TINY, True), ({**TINY, "seed": 1}, False)):
        again = SEQUENCES.create("reasoning-gym-8", SequenceData(**other)).task("gcd")
        before = next(task for task in gym.tasks if task.name == "gcd")
        assert (again.train == before.train) is same_train
        assert again.val == before.val
        assert again.test == before.test


def test_the_seed_of_the_test_questions_is_refused() -> None:
    from moelora.data.sequence_gym import TEST_SEED

    with pytest.raises(ConfigError, match="training and test examples would coincide"):
        read_sequence(SequenceData(**{**TINY, "seed": TEST_SEED}))


# ---- configuration


def test_an_unknown_sequence_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown task sequence 'trase'.*text-cl, trace; did you mean 'trace'"):
        read_sequence(SequenceData(name="trase"))


def test_an_unknown_order_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'text-cl' has no order '7': orders are 1, 2, 3, 4, 5, 6, five-1"):
        read_sequence(SequenceData(name="text-cl", order="7", path="."))


@pytest.mark.parametrize("name", ["trace", "text-cl", "superni", "folder"])
def test_a_sequence_in_files_needs_a_path(name: str) -> None:
    with pytest.raises(ConfigError, match=f"data.path: sequence '{name}'"):
        read_sequence(SequenceData(name=name))


def test_other_trainers_refuse_a_sequence() -> None:
    data = SequenceData(name="trace", path="mirror")
    with pytest.raises(ConfigError, match=r"data.kind: sequence .* trainer: \{kind: continual\}"):
        load_examples(data)
    sites = [{"target": "mlp", "experts": {"num_experts": 1}}]
    recipe = Recipe.parse(
        {"mixture": {"sites": sites}, "data": {"kind": "sequence", "name": "trace", "path": "mirror"}}
    )
    assert recipe.data == data
    assert not data.has_task_types


def test_types_of_tasks_are_those_of_the_order(tmp_path: Path) -> None:
    root = write_tasks(tmp_path, {"one": colours(), "two": colours(100)})
    sequence = read_sequence(SequenceData(name="folder", path=str(root), task_types={"one": 0, "two": 1}))
    assert [task.train[0].task_type for task in sequence.tasks] == [0, 1]
    with pytest.raises(ConfigError, match="task_types is about one, but the tasks are one, two"):
        read_sequence(SequenceData(name="folder", path=str(root), task_types={"one": 0}))


# ---- consistency


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "acuracy"}, "unknown metric 'acuracy'.*did you mean 'accuracy'"),
        ({"metric": "sari", "classes": ("yes", "no")}, "metric 'sari' compares texts, but the answers are the labels"),
        ({"metric": "gym_score"}, "'gym_score' is of tasks of reasoning-gym"),
        ({"val": ()}, "split 'val' has no examples"),
        ({"val": examples("b", task="other")}, "split 'val' has an example of the task 'other'"),
        ({"test": examples("a", "d")}, "1 questions are in 'train' and in 'test', such as 'a'"),
        ({"val": examples("  a ")}, "in 'train' and in 'val'"),
        (
            {"classes": ("no", "maybe")},
            "split 'train' has the answer 'yes', which is none of the classes 'no', 'maybe'",
        ),
        ({"classes": ("yes", "yes")}, "class 'yes' is there twice"),
        ({"classes": ("yes",)}, "the only class"),
    ],
)
def test_an_inconsistent_task_is_refused(options: dict[str, Any], message: str) -> None:
    task()  # by itself it is fine
    with pytest.raises(DataError, match=f"task 't': .*{message}"):
        task(**options)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ({"a": ("t", "u")}, "order 'a' has the unknown task 'u'"),
        ({"a": ("t",), "b": ("t", "t")}, "order 'b' has the task 't' twice"),
        ({"a": ()}, "order 'a' has no tasks"),
        ({}, "no order"),
    ],
)
def test_an_inconsistent_order_is_refused(orders: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(DataError, match=f"sequence 's'.*{message}"):
        TaskSequence("s", "1", (task(),), orders)


def test_tasks_of_one_name_are_refused() -> None:
    with pytest.raises(DataError, match="two tasks have the name 't'"):
        TaskSequence("s", "1", (task(), task()), {"a": ("t",)})


def test_what_is_held_out_is_no_question_of_training() -> None:
    repeated = examples(*"abcdefghij", *"aaabbb")
    train, val = hold_out(repeated, 3)
    assert len({example.prompt for example in val}) == 3
    assert not {example.prompt for example in val} & {example.prompt for example in train}
    assert len(train) + len(val) == len(repeated)
    assert len(hold_out(examples(*"abcdefghij"), None)[1]) == 1


def test_released_splits_are_put_apart(caplog: pytest.LogCaptureFixture) -> None:
    kept = apart("FOMC", {"test": examples("a", "b"), "val": examples("b", "c"), "train": examples("a", "c", "d", "d")})
    assert {split: [example.prompt for example in part] for split, part in kept.items()} == {
        "test": ["a", "b"],
        "val": ["c"],
        "train": ["d", "d"],
    }
    assert "FOMC: 2 examples of 'train' left out" in caplog.text


# ---- a user's folder


def test_a_folder_of_tasks(tmp_path: Path) -> None:
    root = write_tasks(tmp_path, {"one": colours(), "two": colours(100)})
    (root / ".git").mkdir()  # no task
    sequence = read_sequence(SequenceData(name="folder", path=str(root), system="Be brief.", train_size=4, test_size=2))
    assert sequence.orders == {"a": ("one", "two")}
    first = sequence.tasks[0]
    assert (first.metric, first.classes, first.epochs) == ("accuracy", (), None)
    assert [len(part) for part in first.splits.values()] == [4, 4, 2]
    assert first.train[0].system == "Be brief."
    assert sequence.version == read_sequence(SequenceData(name="folder", path=str(root), seed=3)).version
    write_tasks(root, {"two": {"val": [("other", "red")]}})
    assert read_sequence(SequenceData(name="folder", path=str(root))).version != sequence.version


def test_what_sequence_yaml_says(tmp_path: Path) -> None:
    root = write_tasks(tmp_path, {"one": colours(), "two": colours(100)})
    (root / "sequence.yaml").write_text(
        "version: mine\nmetric: rouge_l\norders: {there: [one, two], back: [two, one], half: [two]}\n"
        "tasks: {one: {metric: exact, classes: [red, blue], epochs: 3, max_new_tokens: 5}}\n"
    )
    sequence = read_sequence(SequenceData(name="folder", path=str(root), order="back"))
    assert sequence.version == "mine"
    two, one = sequence.ordered("back")
    assert (one.metric, one.classes, one.epochs, one.max_new_tokens) == ("exact", ("red", "blue"), 3, 5)
    assert one.test[0].choices == ("red", "blue")
    assert (two.metric, two.epochs, two.max_new_tokens) == ("rouge_l", None, None)
    half = read_sequence(SequenceData(name="folder", path=str(root), order="half"))
    assert ([task.name for task in half.tasks], half.orders) == (["two"], {"half": ("two",)})


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("tasks: {three: {}}", "no folder for the task 'three'"),
        ("orders: {a: [one, three]}", "order 'a' has the unknown task 'three'"),
        ("orders: {a: [one], b: [one, one]}", "order 'b' has the task 'one' twice"),
        ("metric: bleu", "metric: .*'rouge_l'"),
        ("tasks: {one: {classes: [red, blue, green]}}", "task 'one': no answer is the class 'green'"),
        ("tasks: {one: {classes: [red, green]}}", "task 'one': .*'blue', which is none of the classes"),
        ("order: a", "unknown key 'order'.*did you mean 'orders'"),
    ],
)
def test_an_inconsistent_folder_is_refused(tmp_path: Path, yaml: str, message: str) -> None:
    root = write_tasks(tmp_path, {"one": colours(), "two": colours(100)})
    (root / "sequence.yaml").write_text(yaml)
    with pytest.raises((ConfigError, DataError), match=message):
        read_sequence(SequenceData(name="folder", path=str(root)))


def test_a_missing_split_or_folder_is_named(tmp_path: Path) -> None:
    root = write_tasks(tmp_path, {"one": colours(), "two": colours(100)})
    (root / "two" / "val.jsonl").unlink()
    with pytest.raises(DataError, match=r"two/val\.jsonl is missing"):
        read_sequence(SequenceData(name="folder", path=str(root)))
    with pytest.raises(DataError, match="is no folder"):
        read_sequence(SequenceData(name="folder", path=str(root / "three")))


def test_train_and_test_of_a_folder_must_not_overlap(tmp_path: Path) -> None:
    rows = colours()
    root = write_tasks(tmp_path, {"one": {**rows, "test": rows["test"] + rows["train"][:2]}})
    with pytest.raises(DataError, match="task 'one': 2 questions are in 'train' and in 'test'"):
        read_sequence(SequenceData(name="folder", path=str(root)))


def test_examples_keep_what_scores_them(gym: TaskSequence) -> None:
    """Labelling copies examples; it must not lose the metadata of a task's scorer, which do not count in equality."""
    example = gym.tasks[0].train[0]
    assert example.metadata["source_dataset"] == example.task
    assert replace(example).options == GYM_TASKS[example.task]
