"""``moelora zoo``: the methods that ship as model cards."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import AsJson, print_json, stdout

zoo = typer.Typer(
    no_args_is_help=True, help="List the methods of the zoo, and show one.\n\nExample: `moelora zoo show mixlora`"
)

Pattern = Annotated[str, typer.Argument(help="Names to list; `*` stands for anything, such as `x*`.")]
Name = Annotated[str, typer.Argument(help="The name of a card, as `moelora zoo list` prints it.")]


@zoo.command("list")
def list_cards(pattern: Pattern = "*", as_json: AsJson = False) -> None:
    """List the cards: name, experts, router, and what it is in a line.

    Example: `moelora zoo list 'mix*'`
    """
    from rich.table import Table

    from ..cards import kinds, load_card, matching
    from ..config import Recipe
    from ..errors import ConfigError

    names = matching(pattern)
    if not names:
        raise ConfigError(f"no model card matches {pattern!r}: `moelora zoo list` shows all")
    rows = {name: (load_card(name), *kinds(Recipe.parse(load_card(name).recipe))) for name in names}
    if as_json:
        print_json({n: {**card.to_dict(), "experts": e, "routers": r} for n, (card, e, r) in rows.items()})
        return
    table = Table(box=None, header_style="bold")
    for heading in ("card", "experts", "router", "in short"):
        table.add_column(heading, no_wrap=heading == "card")
    for name, (card, experts, routers) in rows.items():
        table.add_row(name, ", ".join(experts), ", ".join(routers) or "always on", card.summary)
    stdout().print(table)


@zoo.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show a card: its page, and the recipe that `moelora train NAME` follows.

    Example: `moelora zoo show mixlora`
    """
    from rich.markdown import Markdown

    from ..cards import card_page, load_card
    from ..config import load_recipe

    card = load_card(name)
    if as_json:
        print_json(card.to_dict())
        return
    recipe = load_recipe(name).to_yaml()
    stdout().print(Markdown(f"{card_page(name)}\n## Recipe\n\n```yaml\n{recipe}```\n"))
