"""The report's words, figures and safety, on planted statistics."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from moelora.analysis import RoutingStats, SiteStats, figures, report
from moelora.analysis.findings import findings, specialists

pytestmark = pytest.mark.smoke
Rows = list[list[float]]


def site(layer: int, rows: Rows, *, entropy: float = 0.6, margin: float = 0.3, kind: str = "mlp") -> SiteStats:
    return SiteStats.parse(
        {
            "name": f"model.layers.{layer}.{kind}",
            "layer": layer,
            "selections": rows,
            "tokens": [int(sum(row) // 2) for row in rows],
            "entropy": entropy,
            "margin": margin,
        }
    )


def stats(*sites: SiteStats, tasks: tuple[str, ...] = ("sums", "words")) -> RoutingStats:
    return RoutingStats(model="tiny", data="two tasks", tasks=tasks, sites=sites)


EVEN: Rows = [[500.0] * 4, [500.0] * 4]


def texts(measured: RoutingStats, level: str) -> str:
    return " ".join(finding.text for finding in findings(measured) if finding.level == level)


def test_nothing_to_say_against_an_even_load() -> None:
    measured = stats(site(0, EVEN), site(1, EVEN))
    assert texts(measured, "warning") == ""
    assert "No dead experts: each of the 8" in texts(measured, "good")
    assert "routed much alike: at most 0 %" in texts(measured, "note")


def test_dead_experts_are_named() -> None:
    dead = [[0.0, 700.0, 10.0, 700.0], [0.0, 700.0, 10.0, 700.0]]
    text = texts(stats(site(0, EVEN), site(7, dead)), "warning")
    assert "2 of 8 experts are dead" in text
    assert "layer 7: experts 0 (never chosen) and 2" in text


def test_a_dead_expert_among_several_kinds_of_site() -> None:
    dead = [[0.0, 500.0], [0.0, 500.0]]
    text = texts(stats(site(3, EVEN), site(3, dead, kind="self_attn.q_proj")), "warning")
    assert "1 of 6 experts is dead" in text
    assert "layer 3 self_attn.q_proj: expert 0 (never chosen)" in text


def test_collapse_is_named() -> None:
    measured = stats(site(0, EVEN), site(1, [[990.0, 1000.0, 10.0, 10.0]] * 2))
    assert "Collapse in 1 of 2 sites" in texts(measured, "warning")
    assert "layer 1 (expert 1, 2.0 × a fair share)" in texts(measured, "warning")


def test_every_expert_for_every_token_is_no_collapse() -> None:
    every = SiteStats.parse({**site(0, EVEN).to_dict(), "selections": [[500.0, 500.0]] * 2, "tokens": [500, 500]})
    assert "Collapse" not in texts(stats(every), "warning")


def test_undecided_and_certain_routers() -> None:
    undecided = [site(layer, EVEN, entropy=0.99) for layer in (0, 1, 2, 5)]
    assert "layers 0–2, 5" in texts(stats(*undecided, site(6, EVEN)), "note")
    certain = [site(layer, EVEN, margin=0.995) for layer in range(3)]
    assert "At 3 of 4 sites the router is practically certain" in texts(stats(*certain, site(3, EVEN)), "warning")


def test_tasks_with_experts_of_their_own() -> None:
    own = [[1000.0, 800.0, 100.0, 100.0], [100.0, 100.0, 1000.0, 800.0]]
    measured = stats(site(0, EVEN), site(4, own))
    text = texts(measured, "good")
    assert "most of all in layer 4, where 40 %" in text
    assert "favours expert" in text
    best = specialists(measured)[0]
    assert (best.task, best.expert, best.site.layer, best.own) == ("sums", 0, 4, 2.0)


def test_few_tokens_are_pointed_out() -> None:
    assert "sums (2), words (2)" in texts(stats(site(0, [[1.0] * 4, [1.0] * 4])), "note")


def test_the_page_is_the_same_every_time_and_holds_no_address_to_load_from() -> None:
    measured = stats(site(0, EVEN), site(1, EVEN))
    page = report.render(measured)
    assert page == report.render(RoutingStats.parse(json.loads(measured.to_json())))
    ours = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)  # plotly's own code
    assert "default-src 'none'" in ours
    assert not re.search(r"https?://|src=|href=|@import|url\(", ours)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs), attrs


def test_hostile_text_stays_text() -> None:
    evil = "</script><img src=x onerror=alert(1)><b>"
    name = f"model.layers.0.{evil}"
    bad = SiteStats.parse({**site(0, EVEN).to_dict(), "name": name, "layer": None})
    other = SiteStats.parse({**site(1, EVEN).to_dict(), "name": "plain"})
    measured = RoutingStats(model=evil, data=evil, tasks=(evil, "words"), sites=(bad, other))
    plain = RoutingStats(model="m", data="d", tasks=("t", "words"), sites=(other, other))
    page, harmless = report.render(measured), report.render(plain)
    assert evil not in page
    found, expected = _Tags(), _Tags()
    found.feed(page)
    expected.feed(harmless)
    assert found.names.count("script") == expected.names.count("script")
    assert found.names.count("img") == expected.names.count("img") == 0


def test_the_load_figure_shows_ratios_and_crosses_out_the_dead() -> None:
    figure = figures.load(stats(site(0, [[0.0, 1000.0, 500.0, 500.0]] * 2), site(1, EVEN)))
    (heatmap,) = figure.data
    assert [row[0] for row in heatmap.z] == [0.0, 2.0, 1.0, 1.0]
    assert [row[0] for row in heatmap.text] == ["✕", "2.0", "1.0", "1.0"]
    white = [place for place, colour in heatmap.colorscale if colour == "#fbfbfb"]
    assert white == [1.0 / heatmap.zmax]


def test_the_task_figure_starts_where_tasks_differ_most() -> None:
    own = [[900.0, 100.0], [100.0, 900.0]]
    figure = figures.tasks(stats(site(0, EVEN), site(1, own), site(2, EVEN)))
    assert [trace.visible for trace in figure.data] == [False, True, False]
    assert figure.layout.sliders[0].active == 1
    assert [list(row) for row in figure.data[1].z] == [[1.8, 0.2], [0.2, 1.8]]


def test_sites_with_other_numbers_of_experts_share_a_page() -> None:
    measured = stats(site(0, EVEN), site(0, [[500.0, 500.0]] * 2, kind="self_attn.q_proj"))
    figure = figures.load(measured)
    assert [len(trace.y) for trace in figure.data] == [4, 2]
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["mlp", "self_attn.q_proj"]
    assert "4 experts" in report.render(measured)


def test_two_towers_with_the_same_layers_are_kept_apart() -> None:
    towers = [
        SiteStats.parse({**site(0, EVEN).to_dict(), "name": f"{tower}.layers.0.mlp"}) for tower in ("text", "vision")
    ]
    assert list(stats(*towers).groups) == ["text.layers.*.mlp", "vision.layers.*.mlp"]
    assert len(figures.load(stats(*towers)).data) == 2


def test_long_task_names_that_begin_alike_stay_apart() -> None:
    names = ("a" * 50 + "1", "a" * 50 + "2")
    (heatmap,) = figures.tasks(stats(site(0, EVEN), tasks=names)).data
    assert list(heatmap.y) == list(names)


def test_a_task_without_tokens_is_a_blank_row() -> None:
    measured = stats(site(0, [[500.0] * 4, [0.0] * 4]))
    (heatmap,) = figures.tasks(measured).data
    assert list(heatmap.z[1]) == [None] * 4
    assert "Few tokens for words (0)" in texts(measured, "note")
