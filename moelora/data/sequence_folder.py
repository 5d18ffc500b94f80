"""A user's own sequence: a folder with a folder of JSONL files for each task."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..config import SequenceData
from ..errors import ConfigError, DataError
from ..registry import closest
from ..schema import Closed
from ..sequence_config import TaskMetric
from .sequence_files import find, read_rows
from .sequence_tasks import SEQUENCES, SPLITS, Orders, SequenceReader, Task, check_orders, make_task

FORM = "a folder with NAME/train.jsonl, NAME/val.jsonl and NAME/test.jsonl for each task"


class FolderTask(Closed):
    """What ``sequence.yaml`` says of one task.

    Attributes:
        metric: ``None`` means that of the whole sequence.
        classes: the words of the labels, where an answer is one of few.
        epochs: over the training examples; ``None`` leaves it to the trainer.
        max_new_tokens: of an answer that a model writes; ``None`` leaves it to the trainer.
    """

    metric: TaskMetric | None = None
    classes: tuple[str, ...] = ()
    epochs: Annotated[int, Field(gt=0)] | None = None
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None


class FolderConfig(Closed):
    """``sequence.yaml``, which may be missing.

    Attributes:
        version: ``None`` makes one of the content of the files.
        metric: of every task that has none of its own.
        tasks: by name. A folder that is not named here is a task too.
        orders: names of tasks by the name of the order, the default first; without any, ``a`` is the alphabetical one.
    """

    version: str | None = None
    metric: TaskMetric = "accuracy"
    tasks: dict[str, FolderTask] = Field(default_factory=dict)
    orders: dict[str, tuple[str, ...]] = Field(default_factory=dict)


@SEQUENCES.register("folder")
class Folder(SequenceReader):
    """Tasks in the folder ``data.path``: ``NAME/train.jsonl``, ``NAME/val.jsonl`` and ``NAME/test.jsonl`` for each.

    A row is ``{"prompt": ..., "answer": ...}``. ``sequence.yaml`` beside the folders may say more, see
    :class:`FolderConfig`.
    """

    def __init__(self, config: SequenceData) -> None:
        super().__init__(config)
        if config.path is None:
            raise ConfigError(f"data.path: sequence 'folder' needs {FORM}")
        self.root = Path(config.path).expanduser()
        if not self.root.is_dir():
            raise DataError(f"data.path: {config.path} is no folder; it should be {FORM}")
        self.names = sorted(
            path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        if not self.names:
            raise DataError(f"data.path: {config.path} has no folders in it; it should be {FORM}")
        file = self.root / "sequence.yaml"
        self.described = FolderConfig.load(file) if file.is_file() else FolderConfig()
        unknown = next((name for name in self.described.tasks if name not in self.names), None)
        if unknown is not None:
            raise DataError(
                f"{file}: there is no folder for the task {unknown!r}: folders are {', '.join(self.names)}"
                f"{closest(unknown, self.names)}"
            )
        self.files = {
            name: {split: find(config, f"{name}/{split}.jsonl", FORM) for split in SPLITS} for name in self.names
        }
        self.version = self.described.version or self._digest()

    def orders(self) -> Orders:
        orders = self.described.orders or {"a": tuple(self.names)}
        check_orders(self.config.path or "", orders, self.names)
        return orders

    def task(self, name: str) -> Task:
        described = self.described.tasks.get(name, FolderTask())
        splits = {split: read_rows(self.config, file, name) for split, file in self.files[name].items()}
        return make_task(
            self.config,
            name,
            **splits,
            metric=described.metric or self.described.metric,
            classes=described.classes,
            epochs=described.epochs,
            max_new_tokens=described.max_new_tokens,
        )

    def _digest(self) -> str:
        """Of all names and files, twelve hexadecimal digits."""
        digest = hashlib.sha256()
        for name, splits in self.files.items():
            for split, file in splits.items():
                digest.update(f"{name}/{split}:".encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()[:12]
