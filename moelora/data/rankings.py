"""The rankings of a recipe, wherever they come from."""

from __future__ import annotations

from ..config import PreferenceData, Recipe
from ..errors import ConfigError
from .preferences import Ranking, read_rankings


def read_all(recipe: Recipe) -> tuple[list[Ranking], list[Ranking]]:
    """The rankings to train on and those to test on.

    Raises:
        ConfigError: the recipe's data are none of rankings.
        DataError: see :func:`~moelora.data.preferences.read_rankings`.
    """
    if isinstance(recipe.data, PreferenceData):
        return read_rankings(recipe.data)
    kind = "none" if recipe.data is None else f"of kind {recipe.data.kind!r}"
    raise ConfigError(
        f"trainer {recipe.trainer.kind!r} learns from rankings of responses, and the recipe's data are {kind}: set "
        "data: {kind: preferences, path: ...}"
    )
