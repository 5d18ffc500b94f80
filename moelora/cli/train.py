"""``moelora train``: run a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Overrides, stdout


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml or .json file, or a model card's name.")],
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on from this checkpoint folder, or from the run's newest whole one: `latest`."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, print it with every default, and stop.")
    ] = False,
) -> None:
    """Train a mixture as a recipe says.

    Example: `moelora train mixlora 'data={kind: dataset, path: my.jsonl}' trainer.args.learning_rate=1e-3`
    """
    from ..config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if dry_run:
        typer.echo(loaded.to_yaml(), nl=False)
        return
    from ..registry import TRAINERS

    trainer = TRAINERS.create(loaded.trainer.kind)
    path = trainer.run(loaded, resume=True if resume == "latest" else resume or False)
    stdout().print(f"saved to {path}", highlight=False)
