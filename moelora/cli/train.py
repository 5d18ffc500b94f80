"""``moelora train``: run a recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import AsJson, Overrides, print_json, print_lines, stdout

if TYPE_CHECKING:
    from ..config import Recipe

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml or .json file, or a model card's name.")]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|latest|auto",
        help="Go on from this checkpoint folder, or from the run's newest whole one: `latest`; `auto` starts afresh "
        "where there is none.",
    ),
]
Sequence = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Learn this sequence of tasks, one after another, with a recipe whose trainer is `continual`, or `clip` "
        "for images: sets `data`; overrides such as `data.order=b` come after it.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the recipe with every default, and what it will take: parameters, memory, steps. Loads no weights.",
    ),
]
BackboneShape = Annotated[
    Path | None,
    typer.Option(
        "--backbone-config",
        metavar="FILE",
        help="With --dry-run: take the backbone's shapes from this config.json, or from the folder where it lies.",
    ),
]


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Resume = None,
    sequence: Sequence = None,
    dry_run: DryRun = False,
    backbone_config: BackboneShape = None,
    as_json: AsJson = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Train a mixture as a recipe says.

    Example: `moelora train mixlora 'data={kind: dataset, path: my.jsonl}' trainer.args.learning_rate=1e-3`,
    or `moelora train moram --sequence reasoning-gym-8`
    """
    from ..config import load_recipe

    loaded = load_recipe(recipe, [*data_of(sequence), *(overrides or ())])
    if dry_run:
        dry_run_of(loaded, 1, backbone_config, as_json)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Before torch is imported, which reads it. DeepSpeed's launcher says the local rank in an argument, too.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("LOCAL_RANK", str(local_rank or 0))
    from ..registry import TRAINERS

    trainer = TRAINERS.create(loaded.trainer.kind)
    path = trainer.run(loaded, resume=_where(loaded, resume))
    if os.environ.get("RANK", "0") == "0":
        stdout().print(f"saved to {path}", highlight=False)


def data_of(sequence: str | None) -> list[str]:
    """The overrides that ``--sequence`` stands for; those of the user come after them."""
    from ..image_config import IMAGE_SEQUENCE_NAMES

    if sequence is None:
        return []
    kind = "images" if sequence in IMAGE_SEQUENCE_NAMES else "sequence"
    return [f"data={json.dumps({'kind': kind, 'name': sequence})}"]


def _where(loaded: Recipe, resume: str | None) -> str | bool:
    """What a trainer is told to resume from."""
    if resume == "auto":
        from ..checkpoints import latest

        return latest(loaded.output_dir) is not None
    return True if resume == "latest" else resume or False


def dry_run_of(loaded: Recipe, world: int, backbone_config: Path | None, as_json: bool) -> None:
    """Print a recipe with its defaults, and the plan of its training as comments, so that all of it is still a recipe.

    Args:
        world: how many processes.
    """
    from ..planning import plan

    planned = plan(loaded, world, backbone_config)
    if as_json:
        print_json({"recipe": loaded.to_dict(), "plan": planned.to_dict()})
        return
    typer.echo(loaded.to_yaml(), nl=False)
    print_lines(f"# {line}".rstrip() for line in planned.lines())
