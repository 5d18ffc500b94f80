"""Where a run of several stages is: a folder for each stage, and a file that says which one comes next."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from .. import checkpoints, files
from ..config_files import read_mapping
from ..errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

STATE = "stages.json"


class Stages:
    """The folders of a run whose stages have these names, such as ``["hard", "soft"]``. Stages count from 1."""

    def __init__(self, run_dir: str | Path, names: Sequence[str]) -> None:
        self.run_dir = Path(run_dir)
        self.names = list(names)

    def folder(self, number: int) -> Path:
        """Of a stage: its checkpoints and, when it is over, its mixture."""
        return self.run_dir / f"stage-{number}"

    def start(self, resume: bool | str) -> tuple[int, Path | None]:
        """The stage to go on with, one more than there are when all are over, and the checkpoint to resume from.

        Args:
            resume: whether to go on at all; a text is the path of a checkpoint of the stage that the run is in.

        Raises:
            ConfigError: a fresh run in a folder that holds another, or a checkpoint of another stage.
            CheckpointError: there is nothing to go on with, a file is damaged, or the run has other stages.
        """
        if not resume:
            self._refuse_earlier()
            return 1, None
        number = self._read()
        if resume is True:
            newest = checkpoints.latest(self.folder(number)) if self.folder(number).is_dir() else None
            if newest is None and number <= len(self.names):
                logger.info("stage %d starts from its beginning: it has no checkpoint yet", number)
            return number, newest if number <= len(self.names) else None
        if Path(resume).resolve().parent != self.folder(number).resolve():
            raise ConfigError(
                f"{resume} is no checkpoint of stage {number}, in which this run is: name one below "
                f"{self.folder(number)}, or resume from the latest"
            )
        return number, Path(resume)

    def finish(self, number: int) -> None:
        """Write down that a stage is over and its mixture lies in its folder; in one piece."""
        files.replace_text(self.run_dir / STATE, json.dumps({"next_stage": number + 1, "stages": self.names}) + "\n")

    def _refuse_earlier(self) -> None:
        found = [path for path in self.run_dir.glob("stage-*/checkpoint-*") if path.is_dir()]
        if (self.run_dir / STATE).exists() or found:
            raise ConfigError(
                f"{self.run_dir} holds a run of stages already: go on with --resume latest, set another output_dir, or "
                "remove the folder"
            )

    def _read(self) -> int:
        """The stage that comes next; the first one where none is over yet."""
        path = self.run_dir / STATE
        if not path.exists():
            if not self.folder(1).is_dir():
                raise CheckpointError(f"{self.run_dir}: no run of stages to resume; start without resume")
            return 1
        state = read_mapping(path)
        number, names = state.get("next_stage"), state.get("stages")
        if names != self.names:
            raise CheckpointError(
                f"{path}: this run has the stages {names}, but the recipe has {self.names}: resume with the recipe "
                "that it was started with, or choose another output_dir"
            )
        if not isinstance(number, int) or not 1 <= number <= len(self.names) + 1:
            raise CheckpointError(f"{path}: next_stage is {number!r}, expected 1 to {len(self.names) + 1}")
        return number
