"""Prompts with known answers: from procedural tasks, or from a user's own tables; train and test never overlap."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from ..config import ColumnsConfig, DatasetData, ReasoningGymData
from ..errors import DataError
from ..registry import closest
from .options import read_options

logger = logging.getLogger(__name__)

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Small task spaces repeat themselves: how many candidates to draw for each example wanted.
DRAWS = 8


@dataclass(frozen=True)
class Example:
    """One question and its answer.

    Attributes:
        prompt, answer: what is asked, and the text to be learnt.
        task: the task's name; scores are given per task.
        system: system message; ``None`` leaves it to the backbone's chat template.
        metadata: what the task's own scorer needs (empty for a user's data, which is scored by exact match).
        options: generator options of the task, for its scorer.
        choices: what a multiple-choice question offers, ``answer`` among it; empty for other questions.
    """

    prompt: str
    answer: str
    task: str
    system: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    choices: tuple[str, ...] = ()


class Splits(NamedTuple):
    """Examples to train on and to test on.

    Attributes:
        train: shuffled across tasks. test: in the order of the tasks.
        dropped: how many candidates were left out because the same question was there already.
    """

    train: list[Example]
    test: list[Example]
    dropped: int


def load_examples(config: ReasoningGymData | DatasetData) -> Splits:
    """The examples that a configuration describes; the same configuration always gives the same ones.

    No question of the test examples occurs among the training examples, and none occurs twice.

    Raises:
        DataError: a file, column, task or package is missing; a cell is empty; or nothing is left to train on.
    """
    splits = _generate(config) if isinstance(config, ReasoningGymData) else _read(config)
    if splits.dropped:
        logger.info("%d examples left out: their questions were there already", splits.dropped)
    return splits


def task_names(examples: Iterable[Example]) -> list[str]:
    """The names of all tasks, each once, in alphabetical order; the index of a name is its ``task_id``."""
    return sorted({example.task for example in examples})


def mix(examples: Iterable[Example], seed: int) -> list[Example]:
    """All examples in one order that depends on the seed alone."""
    mixed = list(examples)
    random.Random(seed).shuffle(mixed)  # noqa: S311 - not for cryptography
    return mixed


def _question(example: Example) -> tuple[str | None, str]:
    return example.system, " ".join(example.prompt.split())


def _fresh(
    examples: Iterable[Example], seen: set[tuple[str | None, str]], wanted: int | None
) -> tuple[list[Example], int]:
    """The first ``wanted`` examples with a question not in ``seen`` (which grows), and how many were passed over."""
    kept: list[Example] = []
    dropped = 0
    for example in examples:
        question = _question(example)
        if question in seen:
            dropped += 1
            continue
        seen.add(question)
        kept.append(example)
        if len(kept) == wanted:
            break
    return kept, dropped


def _generate(config: ReasoningGymData) -> Splits:
    train: list[Example] = []
    test: list[Example] = []
    dropped = 0
    for task, options in config.tasks.items():
        # Test questions come first, so that they stay the same whatever the training size.
        seen: set[tuple[str | None, str]] = set()
        for size, seed, into in ((config.test_size, config.test_seed, test), (config.train_size, config.seed, train)):
            candidates = _candidates(task, options, size * DRAWS, seed, config.system)
            kept, passed = _fresh(candidates, seen, size)
            dropped += passed
            if not kept:
                raise DataError(
                    f"data.tasks.{task}: no question is left to train on, because the test examples hold every one of "
                    f"the {len(seen)} that were found; choose options that allow more, or lower data.test_size"
                )
            if len(kept) < size:
                logger.warning("%s has %d different questions where %d were asked for", task, len(kept), size)
            into += kept
    return Splits(mix(train, config.seed), test, dropped)


def gym_dataset(task: str, options: Mapping[str, Any], size: int = 1, seed: int = 0) -> Any:
    """A data set of ``reasoning_gym``, which also scores answers.

    Raises:
        DataError: the package is missing, the task unknown, or an option refused.
    """
    try:
        import_module("reasoning_gym")
        factory = import_module("reasoning_gym.factory")
    except ImportError as error:
        raise DataError(
            f"data of kind reasoning_gym needs the package reasoning-gym ({error}): pip install 'moelora[quickstart]'"
        ) from error
    names = sorted(factory.DATASETS)
    if task not in names:
        raise DataError(
            f"data.tasks: reasoning-gym has no task {task!r}{closest(task, names)}; it has {', '.join(names)}"
        )
    try:
        return factory.create_dataset(task, **{**options, "size": size, "seed": seed})
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"data.tasks.{task}: reasoning-gym refuses the options {dict(options)}: {error}") from error


def _candidates(task: str, options: Mapping[str, Any], size: int, seed: int, system: str | None) -> Iterable[Example]:
    source = gym_dataset(task, options, size, seed)
    for index in range(size):
        entry = source[index]
        if not str(entry["answer"] or "").strip():
            raise DataError(
                f"data.tasks.{task}: this task of reasoning-gym gives no answers to learn from; take another"
            )
        yield Example(str(entry["question"]).strip(), str(entry["answer"]), task, system, entry["metadata"], options)


def _read(config: DatasetData) -> Splits:
    where = config.path
    rows = _table(config, config.path, config.split)
    held_out = config.test_path is not None or config.test_split is not None
    train = mix(_rows(rows, config, where), config.seed)
    if held_out:
        test_rows = _table(config, config.test_path or config.path, config.test_split or "train")
        seen: set[tuple[str | None, str]] = set()
        test, first = _fresh(_rows(test_rows, config, config.test_path or where), seen, None)
        train, second = _fresh(train, seen, None)
        dropped = first + second
    else:
        unique, dropped = _fresh(train, set(), None)
        count = round(len(unique) * config.test_fraction)
        if config.test_fraction and not count and len(unique) > 1:
            count = 1
        test, train = unique[:count], unique[count:]
    if not train:
        raise DataError(f"{where}: no example is left to train on ({dropped} were left out as duplicates)")
    return Splits(train[: config.limit], sorted(test, key=lambda example: example.task), dropped)


def _table(config: DatasetData, path: str, split: str) -> datasets.Dataset:
    """A file, several files (glob), or a split of a hub data set."""
    files = sorted(glob(str(Path(path).expanduser())))
    suffix = Path(path).suffix.lower()
    try:
        if files or suffix in BUILDERS:
            if not files:
                raise DataError(f"data.path: {path}: no such file")
            if split != "train":
                raise DataError(f"data: {path} is a file and has no split {split!r}; name test files with test_path")
            if suffix not in BUILDERS or any(Path(file).is_dir() for file in files):
                raise DataError(f"data.path: {path}: known endings are {', '.join(BUILDERS)}; give files, not a folder")
            if not any(Path(file).stat().st_size for file in files):
                raise DataError(f"{path}: the file is empty; it should hold one example per row")
            return datasets.load_dataset(BUILDERS[suffix], data_files=files, split="train")
        return datasets.load_dataset(path, config.name, split=split)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"data.path: {path} cannot be read: {' '.join(str(cause).split())}; it must be a readable file "
            f"({', '.join(BUILDERS)}) or the id of a hub data set that is public or that you may read"
        ) from error


def _rows(table: datasets.Dataset, config: DatasetData, where: str) -> list[Example]:
    columns = config.columns
    _check_columns(columns, table.column_names, where)
    if not len(table):
        raise DataError(f"{where}: there are no rows")
    name = Path(config.path).stem if Path(config.path).suffix else config.path
    examples = []
    for number, row in enumerate(table, start=1):
        cells = {}
        for key in ("prompt", "answer"):
            value = row[getattr(columns, key)]
            cells[key] = "" if value is None else str(value).strip()
            if not cells[key]:
                raise DataError(
                    f"{where}: row {number}: column {getattr(columns, key)!r} is empty; fill or remove the row"
                )
        task = name if columns.task is None else str(row[columns.task])
        system = config.system if columns.system is None else row[columns.system]
        choices: tuple[str, ...] = ()
        if columns.options is not None:
            choices, cells["answer"] = read_options(row[columns.options], row[columns.answer], f"{where}: row {number}")
        examples.append(Example(cells["prompt"], cells["answer"], task, system, choices=choices))
    return examples


def _check_columns(columns: ColumnsConfig, present: Sequence[str], where: str) -> None:
    for key, column in columns.to_dict().items():
        if column is not None and column not in present:
            raise DataError(
                f"{where}: data.columns.{key} is {column!r}, but the columns are {', '.join(present)}"
                f"{closest(column, list(present))}"
            )
