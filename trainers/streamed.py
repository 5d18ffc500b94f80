"""Train on a stream: in its order, and after a resume from the very next row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from ..checkpoints.reading import load_mapping
from ..data import StreamedSet

STREAM_FILE = "stream.json"


class StreamingTrainer(Trainer):
    """A Trainer that knows :class:`~moelora.data.StreamedSet`; with any other data set it is the Trainer.

    A checkpoint has ``stream.json``, from where the next row is read again with little effort. It is no more than a
    short cut: without it the stream is read from its beginning, to the same row.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, StreamedSet):
            return SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, StreamedSet) and self.args.should_save:
            state = self.train_dataset.state_at(self.state.global_step * self.rows_per_step)
            (Path(output_dir) / STREAM_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        result: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        source = kwargs.get("resume_from_checkpoint", args[3] if len(args) > 3 else None)
        if isinstance(self.train_dataset, StreamedSet) and source is not None:
            path = Path(source) / STREAM_FILE
            if path.is_file():
                self.train_dataset.load_state(load_mapping(path), str(path))
        return result

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over all processes."""
        args = self.args
        return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
