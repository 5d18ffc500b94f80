"""Every method has a card that says what it is; the index and the command line show it; the how-to runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import moelora
from moelora import routers
from moelora.cards import INDEX, card_page, index, load_card, matching
from moelora.cli.app import app
from moelora.config import card_names, cards_folder
from moelora.errors import ConfigError
from moelora.registry import ROUTERS

SECTIONS = ["Equation", "Published", "Our reading", "Options", "Cost", "Measured"]
HOW_TO = Path(__file__).parent.parent / "routers" / "README.md"


@pytest.mark.parametrize("name", card_names())
def test_a_card_says_where_its_method_is_from(name: str) -> None:
    card = load_card(name)
    assert card.title and card.summary and "\n" not in card.summary
    assert card_page(name).startswith("# ")
    if card.paper is not None:
        assert card.paper.url.startswith("https://")


@pytest.mark.parametrize("kind", routers.names())
def test_every_router_has_a_page_with_all_of_its_options(kind: str) -> None:
    page = card_page(kind)
    found = re.findall(r"^## (.+)$", page, flags=re.MULTILINE)
    assert found == SECTIONS, f"{kind}.md has the sections {found}"
    options = page.split("## Options", 1)[1].split("\n## ", 1)[0]
    fields = [field for field in routers.get(kind).Config.model_fields if field != "kind"]
    missing = [field for field in fields if f"`{field}`" not in options]
    assert not missing, f"{kind}.md does not name the options {missing}"
    used = [site.router.kind for site in moelora.load_recipe(kind).mixture.sites if site.router is not None]
    assert kind in used, f"the recipe of {kind}.yaml does not use the router"


def test_the_index_is_up_to_date() -> None:
    text = (cards_folder() / INDEX).read_text(encoding="utf-8")
    assert text == index(), "run `python scripts/index.py`"
    for name in card_names():
        assert f"[{name}]({name}.md)" in text


def test_the_command_line_lists_and_shows_every_card() -> None:
    listed = CliRunner().invoke(app, ["zoo", "list", "--json"])
    assert listed.exit_code == 0
    for name in card_names():
        assert f'"{name}"' in listed.output
    shown = CliRunner().invoke(app, ["zoo", "show", "topk"])
    assert shown.exit_code == 0 and "Equation" in shown.output and "top_k: 2" in shown.output


def test_a_pattern_lists_a_part() -> None:
    assert matching("top*") == ["topk", "topp"]
    with pytest.raises(ConfigError, match="no model card matches 'zz'"):
        CliRunner().invoke(app, ["zoo", "list", "zz"], catch_exceptions=False)


def test_an_unknown_card_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no model card 'topkk'.*did you mean 'topk'"):
        load_card("topkk")


@pytest.mark.skipif(not HOW_TO.exists(), reason="the how-to lies in the checkout")
def test_the_how_to_is_forty_lines_that_run(tiny_llama: LlamaForCausalLM) -> None:
    blocks = re.findall(r"```python\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), flags=re.DOTALL)
    router, use = blocks
    assert sum(bool(line.strip()) for line in router.splitlines()) <= 40
    before = dict(ROUTERS._entries)
    names: dict[str, Any] = {"__name__": "how_to"}
    try:
        exec(compile(router, str(HOW_TO), "exec", dont_inherit=True), names)
        ids = torch.randint(3, 64, (2, 8))
        names.update(backbone=tiny_llama, input_ids=ids)
        exec(compile(use, str(HOW_TO), "exec", dont_inherit=True), names)
        weights = [p for p in names["model"].parameters() if p.requires_grad]
        assert all(p.grad is not None for p in weights)
        with moelora.trace(names["model"]) as tape:
            names["model"](ids)
        chosen = tape["model.layers.0.mlp"][0].indices
        assert all(int((chosen == expert).sum()) == 2 * 3 for expert in range(4))  # 8 tokens, 1.5 / 4 of them each
    finally:
        ROUTERS._entries = before
