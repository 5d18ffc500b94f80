"""What several verbs share: options, output, loading a model, and the data of a recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..config import BackboneConfig, Closed, DataConfig, apply_overrides, load_recipe, read_mapping
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..data import Splits
    from ..mixture import MoELoRAModel

RECIPE_FILE = "recipe.yaml"
HUB = "Checkpoints on the hub"

Checkpoint = Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint: a folder or a hub id.")]
Backbone = Annotated[
    str | None,
    typer.Option(
        help="Backbone to load it on: a hub id, a folder, a .gguf file, or `auto` for the one that the checkpoint "
        "names. Without it a terminal asks before that one is loaded."
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the hub.", rich_help_panel=HUB)
]
Subfolder = Annotated[str | None, typer.Option(help="Folder of the checkpoint below PATH.", rich_help_panel=HUB)]
Token = Annotated[
    str | None,
    typer.Option(
        help="Token for private and gated repositories. Better set HF_TOKEN, or run `hf auth login`: other users see "
        "the words of a command.",
        rich_help_panel=HUB,
    ),
]
CacheDir = Annotated[Path | None, typer.Option(help="Where what is fetched from the hub is kept.", rich_help_panel=HUB)]
LocalFilesOnly = Annotated[
    bool, typer.Option("--local-files-only", help="Fetch nothing: take what is here already.", rich_help_panel=HUB)
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


def hub_options(
    revision: str | None, subfolder: str | None, token: str | None, cache_dir: Path | None, local_files_only: bool
) -> dict[str, Any]:
    """The options of a verb that takes a checkpoint, as keywords of :func:`moelora.from_pretrained`."""
    return {
        "revision": revision,
        "subfolder": subfolder,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they are, but for what would make a terminal do more than show them: files say what they like."""
    for line in lines:
        plain = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)
        stdout().print(plain, markup=False, highlight=False, soft_wrap=True)


def size_text(count: int) -> str:
    """``1.3 MB``, of a number of bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def load_model(
    path: str, backbone: str | None, quantization: str | None, hub: Mapping[str, Any] | None = None
) -> MoELoRAModel:
    """The mixture at ``path`` with its tokenizer, in evaluation mode.

    Args:
        backbone: ``None`` to ask on a terminal. hub: of :func:`hub_options`.

    Raises:
        UserError: the checkpoint or the backbone cannot be loaded, or nobody said that it may be.
    """
    from ..checkpoints import read
    from ..mixture import from_pretrained, put_on

    hub = dict(hub or {})
    if backbone is None:
        stored = read(path, **hub)
        if (own := stored.own_backbone(quantization, None, None)) is not None:
            model = put_on(own[0], stored)
            model.tokenizer = own[1]
            return model
        backbone = allowed_backbone(path, stored.backbone)
    return from_pretrained(path, backbone, quantization, **hub)


def allowed_backbone(path: str, named: BackboneConfig) -> str:
    """``auto``, where the user lets the checkpoint at ``path`` choose; for its own part it may choose the default only.

    Raises:
        ConfigError: the user does not, or there is no terminal to ask at.
    """
    from ..backbone import DEFAULT_BACKBONE
    from ..checkpoints.peft_files import UNKNOWN

    if named.name == UNKNOWN:
        raise ConfigError(f"{path} does not say which backbone it was trained on: name it with --backbone")
    if named.name == DEFAULT_BACKBONE:
        return "auto"
    what = "the folder" if Path(named.name).expanduser().exists() else "the repository"
    at = f" at {named.revision!r}" if named.revision else ""
    if sys.stdin.isatty() and _agrees(
        f"The checkpoint {path} names {what} {named.name!r}{at} as its backbone. Load it?"
    ):
        return "auto"
    raise ConfigError(
        f"{path} was trained on {named.name!r}; what a checkpoint names is loaded only when you say so: give "
        "--backbone auto, or --backbone with another hub id or folder of the same weights"
    )


def _agrees(question: str) -> bool:
    """Ask on standard error, since results go to standard output; anything but a yes is a no."""
    stderr().print(f"{question} [y/N] ", end="", markup=False, highlight=False, soft_wrap=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class Questions(Closed):
    """The part of a recipe that says what to ask."""

    data: DataConfig | None = None
    max_length: int = 512


def recipe_values(path: str, recipe: str | None, subfolder: str | None = None) -> tuple[dict[str, Any], str]:
    """What the recipe of a checkpoint holds, or the one that is named instead, and where that is from.

    Raises:
        ConfigError: it cannot be read.
    """
    beside = Path(path) / (subfolder or "") / RECIPE_FILE
    if recipe is not None:
        return load_recipe(recipe).to_dict(), recipe
    return (read_mapping(beside), str(beside)) if beside.is_file() else ({}, path)


def read_questions(
    path: str, recipe: str | None, overrides: list[str] | None, subfolder: str | None = None
) -> Questions:
    """The data section that belongs to a checkpoint, or that the user names instead; ``data`` is never ``None``.

    Raises:
        ConfigError: there is none, or it does not hold together.
    """
    values, where = recipe_values(path, recipe, subfolder)
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
