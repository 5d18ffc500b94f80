"""``moelora schema``: the JSON schema of a recipe."""

from __future__ import annotations

from .common import print_json


def schema() -> None:
    """Print the JSON schema of a recipe, for editors and other programs.

    Example: `moelora schema > recipe.schema.json`
    """
    from ..config import Recipe

    print_json(Recipe.model_json_schema())
