"""Reports call the experts of a composition by the adapters that they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compose_cases import random_lora, tiny_backbone

import moelora
from moelora.analysis import RoutingRecorder, analyze
from moelora.analysis.findings import findings
from moelora.analysis.stats import RoutingStats, SiteStats
from moelora.errors import DataError

NAMES = ["mathematics", "<code>", "prose"]


def composed() -> moelora.MoELoRAModel:
    """Every token takes the first adapter."""
    adapters = [random_lora(f"lora{index}", index, {"q_proj": 2, "v_proj": 1}) for index in range(3)]
    names = [NAMES[0], "code", NAMES[2]]
    return moelora.compose(adapters, "mask", tiny_backbone(), names=names, by="task", table=[[0], [0]])


def test_the_routing_report_names_them(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    ids = torch.arange(3, 67).view(2, 32)
    stats = analyze(
        composed(), [{"input_ids": ids, "task_ids": torch.tensor([0, 1])}], task_names=["a", "b"], out=tmp_path
    )
    assert {site.experts for site in stats.sites} == {("mathematics", "code", "prose")}
    said = " ".join(finding.text for finding in findings(stats))
    assert "code (never chosen)" in said and "expert mathematics" in said
    assert "expert 0" not in said
    page = (tmp_path / "routing.html").read_text()
    assert all(name in page for name in ("mathematics", "prose"))
    assert json.loads((tmp_path / "routing.json").read_text())["sites"][0]["experts"] == [
        "mathematics",
        "code",
        "prose",
    ]
    assert RoutingStats.from_json(tmp_path / "routing.json") == stats


def test_experts_without_names_have_numbers() -> None:
    backbone = tiny_backbone()
    site = {"target": "q_proj", "experts": {"num_experts": 3, "r": 2}, "router": "topk"}
    model = moelora.attach(backbone, {"sites": [site]})
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(torch.arange(3, 9).unsqueeze(0))
    assert {site.experts for site in recorder.result().sites} == {()}
    assert recorder.result().sites[0].label(2) == "2"


def test_a_report_has_one_name_for_each_expert(tmp_path: Path) -> None:
    site = SiteStats(name="s", layer=0, selections=((1.0, 2.0),), tokens=(3,), entropy=0.5, margin=0.1, experts=("a",))
    path = tmp_path / "routing.json"
    path.write_text(json.dumps({"tasks": ["t"], "sites": [site.to_dict()]}))
    with pytest.raises(DataError, match="has 1 names for 2 experts"):
        RoutingStats.from_json(path)


def test_the_parameter_report_names_them() -> None:
    assert "3 x frozen experts (mathematics, code, prose), router mask" in composed().trainable_report()
