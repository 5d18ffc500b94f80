"""What several verbs share: options, output, loading a model, and the data of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..config import Closed, DataConfig, apply_overrides, load_recipe, read_mapping
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..data import Splits
    from ..mixture import MoELoRAModel

RECIPE_FILE = "recipe.yaml"

Checkpoint = Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint: a folder or a hub id.")]
Backbone = Annotated[
    str | None,
    typer.Option(help="Backbone to load it on: a hub id, a folder, a .gguf file, or `auto` for the one that it names."),
]
Quantization = Annotated[
    str | None, typer.Option(help="Storage of the backbone: nf4, int8, bf16, fp16 or fp32. By default as in training.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help=f"Recipe file or model card whose data to use; by default {RECIPE_FILE} in the checkpoint's folder.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else there.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as `data.test_size=100`."),
]


def stdout() -> Console:
    """The console of results."""
    return Console()


def stderr() -> Console:
    """The console of progress and errors."""
    return Console(stderr=True)


def print_json(value: Any) -> None:
    """Print plain values as indented JSON, without colours or wrapping."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print rows of text under column names, the first column to the left and the others to the right."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    stdout().print(table)


def load_model(path: str, backbone: str | None, quantization: str | None) -> MoELoRAModel:
    """The mixture at ``path`` with its tokenizer, in evaluation mode.

    Raises:
        UserError: the checkpoint or the backbone cannot be loaded.
    """
    from ..mixture import from_pretrained

    return from_pretrained(path, backbone=backbone, quantization=quantization)


class Questions(Closed):
    """The part of a recipe that says what to ask."""

    data: DataConfig | None = None
    max_length: int = 512


def read_questions(path: str, recipe: str | None, overrides: list[str] | None) -> Questions:
    """The data section that belongs to a checkpoint, or that the user names instead; ``data`` is never ``None``.

    Raises:
        ConfigError: there is none, or it does not hold together.
    """
    beside = Path(path) / RECIPE_FILE
    if recipe is not None:
        values, where = load_recipe(recipe).to_dict(), recipe
    elif beside.is_file():
        values, where = read_mapping(beside), str(beside)
    else:
        values, where = {}, path
    chosen = {name: values[name] for name in Questions.model_fields if name in values}
    questions = Questions.parse(apply_overrides(chosen, overrides or ()), where=where)
    if questions.data is None:
        raise ConfigError(
            f"{where}: there is no {RECIPE_FILE} that says which data to use: name a recipe with --recipe, or write "
            "'data={kind: dataset, path: train.jsonl, test_path: test.jsonl}' after the checkpoint"
        )
    return questions


def load_questions(questions: Questions) -> Splits:
    """Training and test examples.

    Raises:
        DataError: the data cannot be read, or holds no test examples.
    """
    from ..data import load_examples
    from ..errors import DataError

    assert questions.data is not None
    splits = load_examples(questions.data)
    if not splits.test:
        raise DataError("the data has no test examples: set data.test_path, or data.test_fraction above 0")
    return splits
