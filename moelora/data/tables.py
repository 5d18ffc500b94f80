"""Examples in a user's own tables: files and hub data sets, whole or as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import datasets

from ..config import DatasetData
from ..data_config import TableData
from ..errors import DataError
from ..registry import closest
from .example import Example, Message, Question, Splits, fresh, last_answer, mix
from .options import read_options

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
FORM = 'a conversation is a list of {"role": ..., "content": ...}'


class RowReader:
    """Rows of one table as examples.

    Args:
        where: the file or hub id, for errors. task: of every row, where no column says it.

    Raises:
        DataError: a column is missing.
    """

    def __init__(self, config: DatasetData, present: Sequence[str], where: str, task: str | None = None) -> None:
        self.config, self.columns, self.where = config, config.columns, where
        self.task = task or (Path(config.path).stem if Path(config.path).suffix else config.path)
        self._check_columns(present)

    def __call__(self, row: Mapping[str, Any], number: int) -> Example:
        """The example of a row.

        Args:
            number: of the row, from 1, for errors.

        Raises:
            DataError: a cell is empty or does not hold what it should.
        """
        columns, place = self.columns, f"{self.where}: row {number}"
        task = self.task if columns.task is None else str(row[columns.task])
        system = self.config.system if columns.system is None else row[columns.system]
        more: dict[str, Any] = {"task_type": self._task_type(row, place)}
        if columns.messages is not None:
            messages = read_messages(row[columns.messages], f"{place}: column {columns.messages!r}")
            last = last_answer(messages)
            prompt, answer = _text(messages[last - 1]) if last else "", _text(messages[last])
            more |= {"messages": messages, "last_turn_only": self.config.loss_turns == "last"}
            return Example(prompt, answer, task, system, **more)
        prompt, answer = (self._cell(row, name, place) for name in (columns.prompt, columns.answer))
        if columns.options is not None:
            more["choices"], answer = read_options(row[columns.options], row[columns.answer], place)
        return Example(prompt, answer, task, system, **more)

    def _cell(self, row: Mapping[str, Any], column: str, place: str) -> str:
        value = row[column]
        text = "" if value is None else str(value).strip()
        if not text:
            raise DataError(f"{place}: column {column!r} is empty; fill or remove the row")
        return text

    def _task_type(self, row: Mapping[str, Any], place: str) -> int | None:
        column = self.columns.task_type
        if column is None:
            return self.config.task_type
        value = row[column]
        text = str(value).strip()
        if isinstance(value, bool) or text not in ("0", "1", "0.0", "1.0"):
            raise DataError(f"{place}: column {column!r} is {value!r}; the type of a task is 0 or 1")
        return int(float(text))

    def _check_columns(self, present: Sequence[str]) -> None:
        wanted = self.columns.to_dict()
        if self.columns.messages is not None:
            del wanted["prompt"], wanted["answer"]
        for key, column in wanted.items():
            if column is not None and column not in present:
                hint = closest(column, list(present))
                if "messages" in present and key in ("prompt", "answer"):
                    hint = "; for conversations set data.columns: {messages: messages}"
                raise DataError(
                    f"{self.where}: data.columns.{key} is {column!r}, but the columns are {', '.join(present)}{hint}"
                )


def read_messages(cell: Any, place: str) -> tuple[Message, ...]:
    """The turns of a conversation in a cell, as :func:`read_turns`, with something to learn.

    Raises:
        DataError: it is no conversation, or the assistant says nothing in it.
    """
    messages = read_turns(cell, place)
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise DataError(f"{place}: no turn is the assistant's, so there is nothing to learn; the roles are {roles}")
    return messages


def read_turns(cell: Any, place: str) -> tuple[Message, ...]:
    """Turns in a cell: a list of mappings, or that list as JSON text.

    Raises:
        DataError: it is neither.
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            cell = None
    if not isinstance(cell, Sequence) or isinstance(cell, str) or not cell:
        raise DataError(f"{place}: {FORM}, or that list as JSON text; this is {_short(cell)}")
    messages: list[Message] = []
    for number, turn in enumerate(cell, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise DataError(f"{place}: turn {number} is {_short(turn)}; {FORM}")
        # Tables fill in what only other rows have with None.
        messages.append({key: value for key, value in turn.items() if value is not None})
        if not set(messages[-1]) - {"role"}:
            raise DataError(f"{place}: turn {number} has no content; {FORM}")
    return tuple(messages)


def _text(message: Message) -> str:
    content = message.get("content", "")
    return content.strip() if isinstance(content, str) else json.dumps(content)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else f"{shown[:77]}..."


def read(config: DatasetData, task: str | None = None) -> Splits:
    """The examples of a table; those to train on are left out where they are streamed.

    Raises:
        DataError: as :func:`~moelora.data.load_examples`.
    """
    held_out = config.test_path is not None or config.test_split is not None
    test, first, seen = list[Example](), 0, set[Question]()
    if held_out:
        path = config.test_path or config.path
        table = open_table(config, path, config.test_split or "train")
        test, first = fresh(_rows(table, config, path, task), seen)
        test.sort(key=lambda example: example.task)
    if config.streaming:
        return Splits([], test, first)
    table = open_table(config, config.path, config.split)
    train, second = fresh(mix(_rows(table, config, config.path, task), config.seed), seen)
    if not held_out:
        count = round(len(train) * config.test_fraction)
        if config.test_fraction and not count and len(train) > 1:
            count = 1
        test, train = sorted(train[:count], key=lambda example: example.task), train[count:]
    if not train:
        raise DataError(f"{config.path}: no example is left to train on ({first + second} were left out as duplicates)")
    return Splits(train[: config.limit], test, first + second)


def open_table(config: TableData, path: str, split: str, streaming: bool = False) -> Any:
    """A file, several files (glob), or a split of a hub data set, as a data set of ``datasets``.

    Raises:
        DataError: it cannot be read.
    """
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
            return datasets.load_dataset(BUILDERS[suffix], data_files=files, split="train", streaming=streaming)
        return datasets.load_dataset(path, config.name, split=split, streaming=streaming)
    except DataError:
        raise
    except READING as error:
        raise unreadable(path, error) from error


READING = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)


def unreadable(path: str, error: Exception) -> DataError:
    """The error of a table that ``datasets`` cannot read."""
    cause = error.__cause__ or error
    return DataError(
        f"data.path: {path} cannot be read: {' '.join(str(cause).split())}; it must be a readable file "
        f"({', '.join(BUILDERS)}) or the id of a hub data set that is public or that you may read"
    )


def _rows(table: datasets.Dataset, config: DatasetData, where: str, task: str | None) -> Iterator[Example]:
    reader = RowReader(config, table.column_names, where, task)
    if not len(table):
        raise DataError(f"{where}: there are no rows")
    return (reader(row, number) for number, row in enumerate(table, start=1))
