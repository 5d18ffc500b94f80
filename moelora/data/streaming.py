"""Training examples that are read, mixed, shuffled, tokenised and packed while training goes on.

A stream is an endless list of rows, in an order that depends on the data, their configuration and the seed alone: not
on the number of processes, nor on how often a run was stopped. Examples are read in the order of the files into blocks
of ``shuffle_buffer``; each block is shuffled as a whole and given out before the next is read, and at the end the
source starts over. (A rolling buffer would mix a little further, but what it holds would have to be part of every
checkpoint; the buffer of ``datasets`` is lost in one.) So where a stream stands is said by where the sources stood when
a block began, and by the number of the row: a few numbers, and to go on from there is to read one block again.

:class:`StreamedSet` offers this list by index, to be read forwards. The Trainer and accelerate treat it as any other
data set: they give each process its batches, and skip what a resumed run has seen without reading it. Every process
reads the whole stream, though, so that all agree on what is left out as too long.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import Closed, DatasetData
from ..errors import CheckpointError, DataError
from .chat import Row, RowMaker
from .example import Example, Question
from .mixing import shares
from .packing import join, pack
from .tables import READING, RowReader, open_table, unreadable

logger = logging.getLogger(__name__)

# How many beginnings of blocks are remembered: loaders read ahead, and a checkpoint is of what was trained on.
REMEMBERED = 16
Count = Annotated[int, Field(ge=0)]


class SourceState(Closed):
    """Where one source stands: passes made, rows read of this one, and what ``datasets`` needs to go on."""

    passes: Count
    row: Count
    position: dict[str, Any]


class StreamState(Closed):
    """Where a stream stood when a block began: its number, that of its first row, and the sources by name."""

    block: Count
    first: Count
    sources: dict[str, SourceState]


class SourceReader:
    """The examples of one streamed table, pass after pass.

    Args:
        skip: questions that are left out, those of the test examples.

    Attributes:
        passes: how often the source has ended.
    """

    def __init__(self, config: DatasetData, name: str, skip: Collection[Question] = frozenset()) -> None:
        self.config, self.where = config, config.path
        table = open_table(config, config.path, config.split, streaming=True)
        self._table = table if config.limit is None else table.take(config.limit)
        self._skip = skip
        self._start = copy.deepcopy(self._table.state_dict())
        columns = table.column_names
        if columns is None:  # not every builder knows them before it has read a row
            columns = list(next(iter(table), {}))
            self._table.load_state_dict(copy.deepcopy(self._start))
        self._read = RowReader(config, columns, self.where, name or None)
        self._rows: Iterator[Mapping[str, Any]] = iter(self._table)
        # Where it was told to go on, until a row is read: before that the table tells where it stood earlier.
        self._waits_at: dict[str, Any] | None = self._start
        self.passes, self._row = 0, 0

    @property
    def task_names(self) -> list[str]:
        """Every task that the source may have."""
        return [self._read.task] if self.config.tasks is None else self.config.tasks

    def next(self) -> Example | None:
        """The next example; ``None`` where a pass ends, after which the next begins.

        Raises:
            DataError: the source cannot be read, is empty, or has a bad row.
        """
        while True:
            try:
                row = next(self._rows, None)
            except READING as error:
                raise unreadable(self.where, error) from error
            if row is None:
                if not self._row:
                    raise DataError(f"{self.where}: there are no rows")
                self._go_to(self._start)
                self.passes, self._row = self.passes + 1, 0
                return None
            self._row, self._waits_at = self._row + 1, None
            example = self._read(row, self._row)
            if example.question not in self._skip:
                return example

    def state(self) -> SourceState:
        """Where the source stands."""
        position = self._table.state_dict() if self._waits_at is None else self._waits_at
        return SourceState(passes=self.passes, row=self._row, position=copy.deepcopy(position))

    def load_state(self, state: SourceState) -> None:
        """Go where the source stood."""
        self._go_to(state.position)
        self.passes, self._row = state.passes, state.row

    def _go_to(self, position: dict[str, Any]) -> None:
        self._table.load_state_dict(copy.deepcopy(position))
        self._rows, self._waits_at = iter(self._table), position


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is put together.

    Attributes:
        buffer: examples of a block. seed: of the order within blocks, and of the choice of sources.
        weights: of the sources, by name; ``None`` where there is one.
        max_length: of a row, in tokens. packing: put several examples into one.
    """

    buffer: int
    seed: int
    max_length: int
    weights: Mapping[str, float] | None = None
    packing: bool = False


class StreamedSet(Dataset[Row]):
    """Rows of a stream by their number, read forwards; see the module.

    Args:
        sources: what is read, by name. length: how many rows the run will ask for.

    Attributes:
        tasks: name of each task id.

    Raises:
        DataError: a source cannot be read, or lacks a column.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceReader],
        tokenizer: PreTrainedTokenizerBase,
        options: StreamOptions,
        length: int,
    ) -> None:
        self._sources = dict(sources)
        self._options = options
        self._length = length
        self.tasks = sorted({task for source in sources.values() for task in source.task_names})
        self._make = RowMaker(tokenizer, options.max_length, self.tasks)
        self._shares = shares(dict.fromkeys(sources, 1), weights=options.weights)
        self._block, self._first, self._rows = 0, 0, list[Row]()
        self._warned = False
        self._start = self._state()
        self._begun: deque[StreamState] = deque(maxlen=REMEMBERED)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of a stream that is used for {self._length} rows")
        if index < self._first:
            self._go_to(self._state_before(index))
        while index >= self._first + len(self._rows):
            self._next_block()
        return self._rows[index - self._first]

    def state_at(self, row: int) -> dict[str, Any]:
        """From where row number ``row`` is read again with the least effort, in plain JSON types."""
        return self._state_before(row).to_dict()

    def load_state(self, state: Mapping[str, Any], where: str = "the state of the stream") -> None:
        """Go to where :meth:`state_at` tells.

        Raises:
            CheckpointError: the state is damaged, or of other data.
        """
        try:
            parsed = StreamState.parse(state, where)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if set(parsed.sources) != set(self._sources):
            raise CheckpointError(
                f"{where}: it is of the sources {', '.join(map(repr, parsed.sources))}, but the recipe has "
                f"{', '.join(map(repr, self._sources))}: resume with the recipe that the run began with"
            )
        for name, source in parsed.sources.items():
            if _shape(source.position) != _shape(self._start.sources[name].position):
                raise CheckpointError(f"{where}: source {name!r} is of another kind: resume with the recipe of the run")
        self._go_to(parsed)

    def _state_before(self, row: int) -> StreamState:
        return next((state for state in reversed(self._begun) if state.first <= row), self._start)

    def _state(self) -> StreamState:
        states = {name: source.state() for name, source in self._sources.items()}
        return StreamState(block=self._block, first=self._first + len(self._rows), sources=states)

    def _go_to(self, state: StreamState) -> None:
        for name, source in self._sources.items():
            source.load_state(state.sources[name])
        self._block, self._first, self._rows = state.block, state.first, []
        self._begun.clear()

    def _next_block(self) -> None:
        """Read on until there are rows.

        Raises:
            DataError: everything is too long.
        """
        self._begun.append(self._state())
        self._first += len(self._rows)
        self._rows = []
        passes = {name: source.passes for name, source in self._sources.items()}
        while not self._rows:
            random = np.random.default_rng([self._options.seed, self._block])
            examples = self._examples(random)
            self._rows = self._shuffled(examples, random)
            self._block += 1
            # The first pass that ends may have begun before this block.
            if not self._rows and all(source.passes > passes[name] + 1 for name, source in self._sources.items()):
                self._make.refuse_all_dropped()
                raise DataError("no example is left to train on: the test examples hold all of them")
        if self._make.dropped and not self._warned:
            self._warned = True
            logger.warning("streamed examples longer than %d tokens are left out", self._options.max_length)

    def _examples(self, random: np.random.Generator) -> list[Example]:
        """Those of the next block: of the only source, up to the end of a pass; else of sources drawn by weight."""
        names = list(self._sources)
        found: list[Example] = []
        if len(names) == 1:
            only = self._sources[names[0]]
            while len(found) < self._options.buffer and (example := only.next()) is not None:
                found.append(example)
            return found
        draws = random.choice(len(names), size=self._options.buffer, p=[self._shares[name] for name in names])
        for draw in draws.tolist():
            source = self._sources[names[draw]]
            example = source.next()
            if example is None:  # a source that ended has begun again
                example = source.next()
            if example is not None:
                found.append(example)
        return found

    def _shuffled(self, examples: Sequence[Example], random: np.random.Generator) -> list[Row]:
        order = random.permutation(len(examples)).tolist()
        rows = [row for index in order if (row := self._make(examples[index])) is not None]
        if not self._options.packing:
            return rows
        members = pack([len(row["input_ids"]) for row in rows], self._options.max_length)
        return [join([rows[member] for member in members[index]]) for index in random.permutation(len(members))]


def _shape(value: Any) -> Any:
    """What of a position is the same all along: its keys and kinds."""
    if isinstance(value, Mapping):
        return {key: _shape(part) for key, part in value.items() if key in ("type", "examples_iterable", "ex_iterable")}
    return value if isinstance(value, str) else None
