"""The data section of a recipe: procedural tasks, a user's own tables, conversations and streams, mixtures of them,
and rankings of responses.

:mod:`moelora.config` has these classes too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from .image_config import ImageSequenceData as ImageSequenceData
from .sampled_config import SampledPreferenceData as SampledPreferenceData
from .sampled_config import SampledTasks as SampledTasks
from .schema import Closed
from .sequence_config import SequenceData as SequenceData

TaskType = Literal[0, 1]


class ReasoningGymData(Closed):
    """Procedurally generated tasks of the ``reasoning-gym`` package, each with its own scorer.

    Attributes:
        tasks: names of reasoning-gym data sets; per-task generator options may follow as a mapping.
        train_size: training examples per task.
        test_size: test examples per task.
        seed: seed of the training examples; test examples come from ``test_seed``, and training examples with the same
            question are left out.
        system: system message of every prompt; ``None`` leaves it to the backbone's chat template.
        task_types: the type of each task, 0 or 1, for routers that balance experts by it.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    train_size: Annotated[int, Field(gt=0)] = 500
    test_size: Annotated[int, Field(gt=0)] = 50
    seed: int = 0
    test_seed: int = 1_000_003
    system: str | None = None
    task_types: dict[str, TaskType] | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return {task: {} for task in value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        if self.seed == self.test_seed:
            raise ValueError(f"seed and test_seed are both {self.seed}: training and test examples would coincide")
        return self

    @model_validator(mode="after")
    def _types_of_all(self) -> Self:
        if self.task_types is not None and set(self.task_types) != set(self.tasks):
            raise ValueError(
                f"task_types is about {', '.join(sorted(self.task_types))}, but the tasks are "
                f"{', '.join(sorted(self.tasks))}: give each task its type"
            )
        return self

    @property
    def has_task_types(self) -> bool:
        """Whether every example has a type."""
        return self.task_types is not None


class ColumnsConfig(Closed):
    """Which columns of a user's data hold what; a text here that is no column is an error.

    Attributes:
        prompt, answer: of single questions; not looked at where there is ``messages``.
        task, system: optional. options: of multiple-choice questions, a list of texts for each; the answer may then be
            the index of the right one, its letter, or its text (see ``moelora/data/options.py``).
        messages: of conversations: a list of ``{role, content}``, or that list as JSON text (for CSV).
        task_type: 0 or 1, the type of each row's task, for routers that balance experts by it (LoRAMoE).
    """

    prompt: str = "prompt"
    answer: str = "answer"
    task: str | None = None
    system: str | None = None
    options: str | None = None
    messages: str | None = None
    task_type: str | None = None

    @model_validator(mode="after")
    def _of_conversations(self) -> Self:
        if self.messages is not None and self.options is not None:
            raise ValueError("messages holds conversations and options belong to single questions: drop one")
        return self


class TableData(Closed):
    """Tables that are read through ``datasets``: local JSONL, JSON, CSV or Parquet files, or a hub id.

    Attributes:
        path: the file (or glob) of training examples, or a hub id.
        test_path: the file of test examples; without it ``test_fraction`` of the training file is held out.
        name: configuration name of a hub data set.
        split: split to train on; test_split: split to evaluate on (hub ids).
        limit: at most this many training examples.
        seed: of the choice of what is held out.
    """

    kind: str
    path: str
    test_path: str | None = None
    name: str | None = None
    split: str = "train"
    test_split: str | None = None
    test_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    limit: Annotated[int, Field(gt=0)] | None = None
    seed: int = 0


class DatasetData(TableData):
    """A user's own data: questions and answers, or conversations; see :class:`TableData` for the rest.

    Attributes:
        columns: the column mapping.
        system: system message of every prompt; ``columns.system`` gives one for each row instead. A conversation that
            begins with a system message of its own keeps that.
        task_type: the type of all rows; ``columns.task_type`` gives one for each row instead.
        loss_turns: of conversations: learn ``all`` of the assistant's turns, or the ``last``.
        streaming: read the training examples while training, for data that is too large to read before. They come in
            the order of the files, shuffled within every ``shuffle_buffer`` of them, and start over at the end;
            ``trainer.args.max_steps`` says when to stop. Nothing is held out: name test examples with ``test_path`` or
            ``test_split``.
        tasks: with ``streaming`` and ``columns.task``, the names that this column holds.
    """

    kind: Literal["dataset"] = "dataset"
    columns: ColumnsConfig = ColumnsConfig()
    system: str | None = None
    task_type: TaskType | None = None
    loss_turns: Literal["all", "last"] = "all"
    streaming: bool = False
    shuffle_buffer: Annotated[int, Field(gt=0)] = 1000
    tasks: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.task_type is not None and self.columns.task_type is not None:
            raise ValueError("task_type is the type of all rows and columns.task_type that of each: drop one")
        if self.loss_turns == "last" and self.columns.messages is None:
            raise ValueError("loss_turns is about conversations: name their column with columns.messages")
        needed = self.streaming and self.columns.task is not None
        if needed and self.tasks is None:
            raise ValueError("a stream is not read before training: list the names in columns.task as tasks")
        if self.tasks is not None and not needed:
            raise ValueError(
                "tasks names what columns.task of a stream holds: set streaming and columns.task, or drop it"
            )
        return self

    @property
    def has_task_types(self) -> bool:
        """Whether every example has a type."""
        return self.task_type is not None or self.columns.task_type is not None


Source = Annotated[ReasoningGymData | DatasetData, Field(discriminator="kind")]


class MixtureData(Closed):
    """Several data sets in one: an epoch takes from each a share of its examples.

    Source i with n_i training examples gets the share ``n_i^(1/T) / sum_j n_j^(1/T)``: with temperature T = 1 as it is
    large, and the larger T the more alike. An epoch is ``size`` examples, of which each source gives its share, rounded
    to whole ones; a source that is asked for more than it has starts over, each time in another order, and of one that
    is asked for less a part is left out. The plan depends on the seed alone, and every epoch has the same examples: to
    see all of a large source, make ``size`` larger and train for one epoch. Test examples are those of all sources.

    Attributes:
        sources: the data sets by name. The name is the task of a ``dataset`` without ``columns.task``.
        temperature: T. weights: the shares themselves, up to a factor, instead.
        size: examples of an epoch; ``None`` means as many as the sources have together.
        shuffle_buffer: of streams, of which all sources or none are: how many examples are shuffled together. Then
            each example comes from a source drawn by ``weights``, and a source that ends starts over.
    """

    kind: Literal["mixture"] = "mixture"
    sources: Annotated[dict[str, Source], Field(min_length=1)]
    temperature: Annotated[float, Field(gt=0)] = 1.0
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    size: Annotated[int, Field(gt=0)] | None = None
    seed: int = 0
    shuffle_buffer: Annotated[int, Field(gt=0)] = 1000

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.weights is not None and set(self.weights) != set(self.sources):
            raise ValueError(
                f"weights is about {', '.join(sorted(self.weights))}, but the sources are "
                f"{', '.join(sorted(self.sources))}: give each source its weight"
            )
        if self.weights is not None and self.temperature != 1:
            raise ValueError(
                f"weights are the shares themselves, so temperature {self.temperature:g} has no part: drop one"
            )
        streams = [
            name for name, source in self.sources.items() if isinstance(source, DatasetData) and source.streaming
        ]
        if streams and len(streams) < len(self.sources):
            raise ValueError(f"of the sources only {', '.join(streams)} are streamed: stream all of them or none")
        if streams and self.weights is None and len(streams) > 1:
            raise ValueError("how many examples a stream has is not known: give each source its share with weights")
        if streams and self.size is not None:
            raise ValueError("size is of an epoch, and streams have none: drop it")
        return self

    @property
    def streaming(self) -> bool:
        """Whether the sources are streams."""
        return any(isinstance(source, DatasetData) and source.streaming for source in self.sources.values())

    @property
    def has_task_types(self) -> bool:
        """Whether every example has a type."""
        return all(source.has_task_types for source in self.sources.values())


class PreferenceColumns(Closed):
    """Which columns of preference data hold what: rows of one of three layouts.

    ``None`` means the column of that very name, if there is one (``answers`` and ``margin`` have to be named); a text
    here that is no column is an error. The layout follows from what is named, else from what is there, in this order:
    ``responses`` (K responses in a row), ``chosen`` and ``rejected``, ``response`` (one in a row; rows of the same
    prompt become one ranking). A cell that holds a list or a mapping may hold it as JSON text (for CSV).

    Attributes:
        prompt: a text, a list of ``{role, content}``, or, with ``answers``, a list of what the user says. Pairs need
            none where ``chosen`` and ``rejected`` are whole conversations, as messages or as a text with
            ``\\n\\nHuman:`` and ``\\n\\nAssistant:``: the turns before the last one are the prompt then.
        answers: what the assistant answered to each of these but the last.
        responses: a list of texts. chosen, rejected: a text, a list of texts, or a conversation. response: a text.
        ranks: of the responses, smaller is better, null where nothing is known; or ``{pairs, ties, margins}``, see
            :func:`~moelora.data.preferences.to_rows`. scores: of the responses, larger is better; gold scores, which
            rank the responses where ``ranks`` does not. With ``response`` both are one number in a row.
        margin: of chosen over rejected.
        category: of the task.
        capabilities: a column with a mapping from capabilities to ranks; or for each capability a column of scores.
    """

    prompt: str | None = None
    answers: str | None = None
    responses: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    response: str | None = None
    ranks: str | None = None
    scores: str | None = None
    margin: str | None = None
    category: str | None = None
    capabilities: str | Annotated[dict[str, str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        pairs = "chosen" if self.chosen is not None else "rejected" if self.rejected is not None else None
        layouts = [name for name in ("responses", pairs, "response") if name and getattr(self, name) is not None]
        if len(layouts) > 1:
            raise ValueError(f"{' and '.join(layouts)} belong to different layouts of a row: name one")
        for field in ("ranks", "scores"):
            if pairs and getattr(self, field) is not None:
                raise ValueError(f"{field} is of responses, and {pairs} says by itself which is better: drop one")
        if self.margin is not None and layouts and not pairs:
            raise ValueError(f"margin is of chosen over rejected, not of {layouts[0]}: drop it")
        if self.answers is not None and self.prompt is None:
            raise ValueError("answers is of what the user said before: name that column with prompt")
        return self


class PreferenceData(TableData):
    """Which responses are better, for reward models; see :class:`TableData` for the rest.

    Held out are whole prompts, the same share of each category, whatever the order of the rows.

    Attributes:
        columns: the column mapping.
        score_margin: by how much the better reward should be above, for each unit of the gap between the scores.
    """

    kind: Literal["preferences"] = "preferences"
    columns: PreferenceColumns = PreferenceColumns()
    score_margin: Annotated[float, Field(ge=0.0)] = 0.0

    @property
    def has_task_types(self) -> bool:
        """Rankings have none."""
        return False


DataConfig = Annotated[
    ReasoningGymData
    | DatasetData
    | MixtureData
    | PreferenceData
    | SampledPreferenceData
    | ImageSequenceData
    | SequenceData,
    Field(discriminator="kind"),
]
