"""Files of a sequence: in a local folder, or in a data set of the hub that has the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ..config import ColumnsConfig, DatasetData, SequenceData
from ..errors import ConfigError, DataError
from .example import Example
from .tables import READING, RowReader, open_table


def find(config: SequenceData, relative: str, released: str) -> Path:
    """A file of the sequence; one of the hub is downloaded once.

    Args:
        relative: its path within the folder.
        released: what the folder is, for errors.

    Raises:
        ConfigError: no path is configured.
        DataError: the folder has no such file, or it cannot be downloaded.
    """
    if config.path is None:
        raise ConfigError(
            f"data.path: sequence {config.name!r} is read from files: name {released}, here or in a data set of the hub"
        )
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        file = folder / relative
        if not file.is_file():
            raise DataError(f"sequence {config.name!r}: {file} is missing; data.path should be {released}")
        return file
    try:
        return Path(hf_hub_download(config.path, relative, repo_type="dataset"))
    except READING as error:
        raise DataError(
            f"data.path: {config.path} is no folder here, and {relative} cannot be had from a data set of that "
            f"name on the hub: {' '.join(str(error).split())}; it should be {released}"
        ) from error


def read_rows(
    config: SequenceData, file: Path, task: str, prompt: str = "prompt", answer: str = "answer"
) -> list[Example]:
    """The rows of a JSON or JSONL file as examples of a task.

    White space around a prompt or an answer is left out.

    Args:
        prompt, answer: the columns.

    Raises:
        DataError: the file cannot be read or is empty, a column is missing, or a cell is empty.
    """
    columns = ColumnsConfig(prompt=prompt, answer=answer)
    data = DatasetData(path=str(file), columns=columns, system=config.system)
    table = open_table(data, str(file), "train")
    reader = RowReader(data, table.column_names, str(file), task)
    return [reader(row, number) for number, row in enumerate(table, start=1)]


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: this is no JSON: {error}") from error
