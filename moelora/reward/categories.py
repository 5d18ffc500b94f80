"""Categories of tasks, and of each the points on which replies are compared.

A category says which experts answer for a conversation; a capability is one point of it, such as "correctness", and
has an expert, and labels, of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ..config_files import read_mapping
from ..errors import ConfigError
from ..registry import closest
from ..schema import Closed

READY = {"dmoerm": Path(__file__).with_name("dmoerm.yaml")}
# Names of experts of the mixture that belong to no category.
RESERVED = ("general", "outer")
# They become names of modules and of keys in checkpoints: no dots, and no blanks for the command line's sake.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Category(Closed):
    """One kind of task.

    Attributes:
        description: what belongs to it, in a sentence; a judge is told it.
        capabilities: name of each point to a line that says what is meant, which a judge is told too. A list of names
            is read as points without such lines. The order is kept: aggregators depend on it.
    """

    description: str = ""
    capabilities: dict[str, str] = Field(min_length=1)

    @field_validator("capabilities", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
            return value
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"expected names of capabilities, got {name!r}")
            if list(value).count(name) > 1:
                raise ValueError(f"the capability {name!r} is given twice")
        return dict.fromkeys(value, "")

    @field_validator("capabilities")
    @classmethod
    def _usable_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            _check_name(name)
        return value


Categories = dict[str, Category]


def load_categories(source: str | Path | Mapping[str, Any]) -> Categories:
    """Categories by name, in the order in which they are given.

    Args:
        source: ``"dmoerm"`` for the five of DMoERM (arXiv 2403.01197) in our own words; else a YAML or JSON file, or a
            mapping, of name to ``{description, capabilities}``, or to the capabilities alone: a list of names, or a
            mapping of name to description.

    Raises:
        ConfigError: no such file, no category in it, a name that cannot be used, or a category that does not hold
            together.
    """
    if isinstance(source, Mapping):
        given, where = dict(source), "categories"
    else:
        path = READY.get(str(source), Path(source))
        if path.suffix not in (".yaml", ".yml", ".json"):
            near = closest(str(source), list(READY))
            raise ConfigError(
                f"categories {str(source)!r}: neither one of the ready ones ({', '.join(READY)}) nor a .yaml or .json "
                f"file{near}"
            )
        given, where = read_mapping(path), str(source)
    if not given:
        raise ConfigError(f"{where}: there is no category: give at least one, with its capabilities")
    return {name: _category(name, value, where) for name, value in given.items()}


def _category(name: Any, value: Any, where: str) -> Category:
    try:
        _check_name(name)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if name in RESERVED:
        raise ConfigError(f"{where}: a category cannot be named {name!r}: the mixture has an expert of that name")
    if not isinstance(value, Category) and not (isinstance(value, Mapping) and "capabilities" in value):
        value = {"capabilities": value}
    return Category.parse(value, where=f"{where}: category {name!r}")


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be a name: use letters, digits, '_' and '-', a letter or digit first")
