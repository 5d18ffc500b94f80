"""The rankings of a recipe, wherever they come from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..backbone import load_backbone
from ..config import PreferenceData, Recipe, SampledPreferenceData
from ..errors import ConfigError
from .preferences import Ranking, read_rankings
from .sampled import Sampler


def read_all(recipe: Recipe) -> tuple[list[Ranking], list[Ranking]]:
    """The rankings to train on and those to test on.

    Raises:
        ConfigError: the recipe's data are none of rankings.
        DataError: see :func:`~moelora.data.preferences.read_rankings` and :class:`~moelora.data.sampled.Sampler`.
    """
    if isinstance(recipe.data, PreferenceData):
        return read_rankings(recipe.data)
    if isinstance(recipe.data, SampledPreferenceData):
        load = partial(load_backbone, recipe.backbone)
        return Sampler(recipe.data, recipe.backbone, load, Path(recipe.output_dir)).read()
    kind = "none" if recipe.data is None else f"of kind {recipe.data.kind!r}"
    raise ConfigError(
        f"trainer {recipe.trainer.kind!r} learns from rankings of responses, and the recipe's data are {kind}: set "
        "data: {kind: preferences, path: ...}"
    )
