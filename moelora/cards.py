"""The zoo: what the model cards say of each method, and the index that is made from them."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .config import Recipe, card_names, cards_folder
from .config_files import read_mapping
from .errors import ConfigError
from .registry import ROUTERS, closest
from .schema import Closed

INDEX = "index.md"


class Paper(Closed):
    """Where a method was published."""

    title: str
    url: str


class Code(Closed):
    """The authors' code, at the commit that was read; all ``None`` where none is published."""

    url: str | None = None
    commit: str | None = None
    license: str | None = None


class Card(Closed):
    """The contents of ``model_cards/NAME.yaml``.

    Attributes:
        title: what the method calls itself. summary: one line. paper, code: provenance.
        recipe: a recipe as for :func:`~moelora.load_recipe`.
    """

    title: str
    summary: str
    paper: Paper | None = None
    code: Code | None = None
    recipe: dict[str, Any]


def load_card(name: str) -> Card:
    """The card of that name.

    Raises:
        ConfigError: no such card, or one that does not hold together.
    """
    return Card.parse(read_mapping(_path(name, ".yaml")), where=f"{name}.yaml")


def card_page(name: str) -> str:
    """The text of the card, in Markdown.

    Raises:
        ConfigError: no such card.
    """
    return _path(name, ".md").read_text(encoding="utf-8")


def matching(pattern: str = "*") -> list[str]:
    """Names of the cards that match a pattern with ``*`` and ``?``, sorted."""
    return [name for name in card_names() if fnmatch(name, pattern)]


def kinds(recipe: Recipe) -> tuple[list[str], list[str]]:
    """The expert kinds and the router kinds of a recipe, each once, in its order."""
    sites = recipe.mixture.sites
    experts = dict.fromkeys(site.experts.kind for site in sites)
    routers = dict.fromkeys(site.router.kind for site in sites if site.router is not None)
    return list(experts), list(routers)


def index() -> str:
    """The text of ``model_cards/index.md``: a table of all cards and a table of all routers, made from the cards."""
    lines = [
        "# The zoo",
        "",
        "Made from the cards by `python scripts/index.py`: change those. A card is a recipe (`moelora train NAME`) and",
        "a page: the equation, what is published, what is our own reading, the options, the cost, what we measured.",
        "",
        "| card | experts | router | in short | paper | code |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in card_names():
        card = load_card(name)
        experts, routers = kinds(Recipe.parse(card.recipe))
        paper = "" if card.paper is None else f"[{_arxiv(card.paper.url)}]({card.paper.url})"
        code = (
            ""
            if card.code is None or card.code.url is None
            else f"[{card.code.license or 'no licence'}]({card.code.url})"
        )
        lines.append(
            f"| [{name}]({name}.md) | {_code(experts)} | {_code(routers) or 'always on'} | {card.summary} "
            f"| {paper} | {code} |"
        )
    lines += ["", "Routers by name, aliases included:", ""]
    for name in ROUTERS.names():
        aliases = ROUTERS.aliases(name)
        also = f" (also {_code(aliases)})" if aliases else ""
        lines.append(f"- [`{name}`]({name}.md){also}")
    return "\n".join(lines) + "\n"


def _code(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _arxiv(url: str) -> str:
    return f"arXiv {url.rpartition('/')[2]}" if "arxiv.org" in url else "paper"


def _path(name: str, suffix: str) -> Path:
    names = card_names()
    if name not in names:
        raise ConfigError(f"no model card {name!r}: cards are {', '.join(names)}{closest(name, names)}")
    return cards_folder() / f"{name}{suffix}"
