"""The data section of a recipe, from configuration to what a trainer takes; usable from Python by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..config import DatasetData, MixtureData, Recipe
from ..errors import ConfigError, DataError
from .chat import TokenizedSet, tokenize
from .example import Example, task_names
from .examples import examples_only, load_examples, streamed
from .packing import PackedSet, packed
from .streaming import SourceReader, StreamedSet, StreamOptions

TrainingSet = TokenizedSet | PackedSet | StreamedSet


class Sets(NamedTuple):
    """What is trained on, and what is evaluated on, if anything; both have the same tasks."""

    train: TrainingSet
    test: TokenizedSet | None


@dataclass(frozen=True)
class RecipeData:
    """The data of a recipe, read but not yet tokenised.

    Attributes:
        train, test: the examples; those to train on are left out where they are streamed.
        tasks: name of each task id: the tasks of the training examples, in alphabetical order.
        sources: what is streamed, by name.
    """

    recipe: Recipe
    train: list[Example]
    test: list[Example]
    tasks: list[str]
    sources: dict[str, DatasetData]

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, rows: int = 0) -> Sets:
        """The examples as token ids; packed where the recipe says so, but for the test examples.

        Args:
            rows: of a stream, which has no end, how many training will take: steps times rows of a step.

        Raises:
            DataError: see :func:`~moelora.data.tokenize`.
        """
        length = self.recipe.max_length
        train: TrainingSet
        if self.sources:
            train = StreamedSet(self._readers(), tokenizer, self._stream_options(), rows)
        else:
            train = tokenize(self.train, tokenizer, length, self.tasks)
            train = packed(train, length) if self.recipe.packing else train
        return Sets(train, tokenize(self.test, tokenizer, length, train.tasks) if self.test else None)

    def _readers(self) -> dict[str, SourceReader]:
        skip = frozenset(example.question for example in self.test)
        return {name: SourceReader(source, name, skip) for name, source in self.sources.items()}

    def _stream_options(self) -> StreamOptions:
        data, length, packing = self.recipe.data, self.recipe.max_length, self.recipe.packing
        assert isinstance(data, DatasetData | MixtureData)
        weights = data.weights if isinstance(data, MixtureData) else None
        return StreamOptions(data.shuffle_buffer, data.seed, length, weights, packing)


def read_data(recipe: Recipe, max_steps: int = -1) -> RecipeData:
    """Read the data of a recipe, and see that they and its mixture go together; no weight is needed for it.

    Args:
        max_steps: optimizer steps of the training, if it is they that end it; of a stream nothing else can.

    Raises:
        ConfigError: there are no data, or none with answers; a router needs what they do not give, or cannot train on
            packed rows; a stream without a number of steps.
        DataError: see :func:`~moelora.data.load_examples`.
    """
    if recipe.data is None:
        raise ConfigError("data: this recipe names no data to train on; add data: {kind: dataset, path: my.jsonl}")
    examples_only(recipe.data)
    check_routers(recipe)
    sources = streamed(recipe.data)
    if sources and max_steps <= 0:
        raise ConfigError(
            "data.streaming: a stream has no end, so training needs to be told when to stop: set trainer.args.max_steps"
        )
    train, test, _ = load_examples(recipe.data)
    tasks = task_names(train)
    if sources:
        readers = [SourceReader(source, name) for name, source in sources.items()]
        tasks = sorted({task for reader in readers for task in reader.task_names})
        for example in test:
            if example.task not in tasks:
                raise DataError(
                    f"the test examples have the task {example.task!r}, which is not among those of the stream, "
                    f"{', '.join(tasks)}: list it in data.tasks"
                )
    return RecipeData(recipe, train, test, tasks, sources)


def check_routers(recipe: Recipe) -> None:
    """See that the data give each router what it needs to be trained, and that none minds packing.

    Raises:
        ConfigError: not so; the message names the router and what to set.
    """
    assert recipe.data is not None
    # task_ids every row has; modalities and requests are no matter of text.
    given = {"task_ids"} | ({"task_types"} if recipe.data.has_task_types else set())
    for number, site in enumerate(recipe.mixture.sites):
        if site.router is None:
            continue
        where = f"mixture.sites.{number}.router: router {site.router.kind!r}"
        for field, otherwise in site.router.needs().items():
            if field not in given:
                raise ConfigError(
                    f"{where} needs {field}, which the data do not give: {REMEDIES[field]}, or {otherwise}"
                )
        reason = site.router.refuses_packing() if recipe.packing else None
        if reason is not None:
            raise ConfigError(f"{where} cannot train with packing: {reason}; or set packing to false")


REMEDIES = {
    "task_types": (
        "name a column of 0 and 1 with data.columns.task_type, give all rows one with data.task_type, or give those of "
        "reasoning-gym tasks with data.task_types (in a mixture of data sets each source gives its own)"
    ),
    "modality_mask": "train on batches of your own, with moelora.trainers.SFTTrainer",
    "request_ids": "train on batches of your own, with moelora.trainers.SFTTrainer",
}
