"""What the tools behind ``report_to`` are given: read back from the files that they wrote.

Shapes: E experts, K picks.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import build_model, build_rows, build_trainer

import moelora
from moelora.data import Collator
from moelora.routing import RoutingRecord
from moelora.trainers.alarm import CollapseAlarm
from moelora.trainers.meter import MOST_GROUPS, LoadMeter

EXPECTED = {
    "task_loss",
    "aux/load_balance",
    "aux/router_z",
    *(f"load/{name}" for name in ("cv", "entropy", "max_utilization", "dead_experts", "ess", "margin")),
    "lr/experts",
    "lr/routers",
}


def run(folder: Path, tool: str, **options: Any) -> list[dict[str, float]]:
    """A short training that reports to one tool; the Trainer's own log of it."""
    trainer = build_trainer(folder, build_model(), report_to=[tool], run_name="tiny", **options)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def join(children: list[Any]) -> None:
    for child in children:
        child.start()
    for child in children:
        child.join(200)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0] * len(children)


def test_tensorboard_gets_every_scalar_of_every_step(tmp_path: Path) -> None:
    log = run(tmp_path, "tensorboard", lr_scheduler_type="linear")
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert {tag.removeprefix("train/") for tag in events.Tags()["scalars"]} >= EXPECTED
    for name in EXPECTED:
        written = events.Scalars(f"train/{name}")
        assert [event.step for event in written] == [1, 2, 3, 4]
        assert [event.value for event in written] == pytest.approx([line[name] for line in log], rel=1e-6)
    for line in log:  # of the step that was made, not of the next
        assert line["lr/experts"] == line["lr/routers"] == line["learning_rate"]
        assert 1 <= line["load/ess"] <= 2 and 0 <= line["load/margin"] <= 1


def test_wandb_writes_its_folder_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path / "wandb"), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "wandb").mkdir()
    try:
        run(tmp_path / "run", "wandb", max_steps=2)
    finally:
        wandb.finish()
    (file,) = (tmp_path / "wandb").rglob("*.wandb")
    content = file.read_bytes()
    assert {name for name in EXPECTED if f"train/{name}".encode() in content} == EXPECTED


def with_trackio(folder: Path) -> None:
    """In a process of its own, since trackio reads where to write when it is first imported."""
    torch.set_num_threads(1)
    os.environ.update(TRACKIO_DIR=str(folder / "trackio"), HF_HUB_OFFLINE="1")
    run(folder / "run", "trackio", max_steps=2)


def test_trackio_writes_its_database_without_a_network(tmp_path: Path, processes: Any) -> None:
    pytest.importorskip("trackio")
    join([processes.Process(target=with_trackio, args=(tmp_path,))])
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    assert {key.removeprefix("train/") for key in rows[0]} >= EXPECTED
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == [1, 2]


def one_rank(rank: int, world: int, port: int, folder: Path) -> None:
    """One of several processes; each says what its alarm found."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    model = build_model(router={"top_k": 1})
    alarm = CollapseAlarm({"window": 2, "max_concentration": 0.0, "stop": True})
    out = folder / f"rank-{rank}"
    trainer = build_trainer(
        out, model, build_rows(64), per_device_train_batch_size=16, report_to=["tensorboard"], callbacks=[alarm]
    )
    trainer.train()
    found = [[finding.kind, finding.site, finding.text] for finding in alarm.found]
    result = {"found": found, "step": trainer.state.global_step, "load": trainer.state.log_history[0]["load/ess"]}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_only_the_first_rank_writes_and_all_decide_alike(tmp_path: Path, processes: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [processes.Process(target=one_rank, args=(rank, 2, port, tmp_path)) for rank in range(2)]
    join(children)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["found"] and first["step"] == 2
    assert list((tmp_path / "rank-0" / "runs").iterdir()) and (tmp_path / "rank-0" / "collapse" / "step-2").is_dir()
    assert not (tmp_path / "rank-1" / "runs").exists() and not (tmp_path / "rank-1" / "collapse").exists()


# -- the numbers themselves ------------------------------------------------------------------------------------------


def by_hand(record: RoutingRecord) -> tuple[list[float], list[float]]:
    """Support size and margin of each real token, in float64, one token at a time."""
    sizes, margins = [], []
    real = torch.ones(record.weights.shape[:-1], dtype=torch.bool) if record.mask is None else record.mask
    for weights, probs in zip(record.weights[real].tolist(), record.probs[real].tolist(), strict=True):
        squares = sum(weight**2 for weight in weights)
        sizes.append(sum(map(abs, weights)) ** 2 / squares if squares else 0.0)
        first, second = sorted(probs, reverse=True)[:2]
        margins.append(first - second)
    return sizes, margins


def heard(model: moelora.MoELoRAModel, batch: dict[str, Any]) -> tuple[LoadMeter, list[RoutingRecord]]:
    meter, records = LoadMeter(model, gates=True), []
    model.slot.listeners += [meter, lambda site, record: records.append(record)]
    with torch.no_grad():
        model(**batch)
    return meter, records


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "topk", "top_k": 2},
        {"kind": "softmax", "aux_loss_coef": 0.0},
        {"kind": "switch", "expert_capacity": 2},
        {"kind": "smora", "top_k": 3, "partition": 1},
    ],
    ids=lambda router: router["kind"],
)
def test_support_and_margin_are_means_over_real_tokens(router: dict[str, Any]) -> None:
    """Top-k, dense, with tokens that have no expert, and single ranks."""
    site = {"target": ["q_proj", "v_proj"], "experts": {"num_experts": 4, "r": 2}, "router": router}
    model = moelora.attach(build_model().unload(), {"sites": [site]}).train()
    batch = Collator(0)(build_rows(4))
    assert not batch["attention_mask"].all()
    meter, records = heard(model, batch)
    sizes, margins = zip(*map(by_hand, records), strict=True)
    found = meter.metrics()
    assert found["load/ess"] == pytest.approx(sum(map(sum, sizes)) / sum(map(len, sizes)), abs=1e-5)
    assert found["load/margin"] == pytest.approx(sum(map(sum, margins)) / sum(map(len, margins)), abs=1e-5)
    load = torch.stack([record.counts() for record in records])
    assert found["load/cv"] == pytest.approx((load.std(-1, correction=0) / load.mean(-1)).mean().item())


def test_weights_of_any_size_have_their_support() -> None:
    model = build_model()
    site = model.containers()["model.layers.0.mlp"].site
    for weights, size in ([[3.0, 3.0, 3.0, 3.0]], 4), ([[0.0, 5.0, 0.0, 0.0]], 1), ([[-1.0, 1.0, 0.0, 0.0]], 2):
        meter = LoadMeter(model, gates=True)
        meter(site, RoutingRecord(None, torch.tensor(weights), 4))
        (found,) = meter.sites().values()
        assert found.ess == pytest.approx(size)


def test_a_router_without_a_distribution_has_no_margin() -> None:
    site = {
        "target": "q_proj",
        "experts": {"kind": "sparse_projection", "r": 8},
        "router": {"kind": "flylora", "top_k": 3},
    }
    meter, _ = heard(moelora.attach(build_model().unload(), {"sites": [site]}), Collator(0)(build_rows(2)))
    found = meter.metrics()
    assert found["load/ess"] == pytest.approx(3) and "load/margin" not in found


def test_what_a_meter_counted_goes_on_exactly() -> None:
    model = build_model()
    meter, records = heard(model, Collator(0)(build_rows(4)))
    other = LoadMeter(model, gates=True)
    other.restore(json.loads(json.dumps(meter.state())), torch.device("cpu"))
    assert other.state() == meter.state()
    site = model.containers()["model.layers.0.mlp"].site
    for each in (meter, other):
        each(site, replace(records[0]))
    assert other.state() == meter.state() and other.metrics().keys() <= meter.metrics().keys()
    assert len(meter.state()) == 2


def test_the_number_of_keys_does_not_grow_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [
        {
            "target": f"layers.{layer}.self_attn.{name}",
            "experts": {"num_experts": 2, "r": 1},
            "router": {"kind": "topk"},
        }
        for layer in range(2)
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    batch = Collator(0)(build_rows(2))
    meter, _ = heard(moelora.attach(build_model().unload(), {"sites": sites}), batch)
    assert len(meter.metrics()) == 6 * 6 and "load/sites.5.margin" in meter.metrics()
    monkeypatch.setattr("moelora.trainers.meter.MOST_GROUPS", 5)
    assert set(meter.metrics()) == {name for name in EXPECTED if name.startswith("load/")}
    assert MOST_GROUPS * 6 <= 2000
