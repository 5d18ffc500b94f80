"""Controllers step once per optimizer step, whatever it is made of; what is frozen stays out of the optimizer.

Shapes: R ranks, K picks.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from controller_runs import RATE, RUN, biases, build_model, two_ranks
from tiny_runs import assert_identical, build_rows, build_trainer, outcome
from torch import Tensor

import moelora
from moelora.data import Collator
from moelora.routers.flylora import FlyLoRARouter

ROWS = build_rows(24)


def by_hand(rows_per_step: int, batch: int, steps: int) -> dict[str, Tensor]:
    """The biases after so many steps, from plain forwards of the rows of each, without a trainer."""
    model = build_model().train()
    bias = biases(model)
    for step in range(steps):
        counts = {name: torch.zeros_like(value) for name, value in bias.items()}
        for start in range(step * rows_per_step, (step + 1) * rows_per_step, batch):
            inputs = Collator(0)(ROWS[start : start + batch])
            with torch.no_grad(), moelora.trace(model) as tape:
                model(**inputs)
            for name in counts:
                indices_BSK = tape[name.removesuffix(".router.bias")][0].indices
                for ids_SK, real_S in zip(indices_BSK, inputs["attention_mask"].bool(), strict=True):
                    for rank in ids_SK[real_S].flatten().tolist():
                        counts[name][rank] += 1
        for name, value in bias.items():
            value += RATE * (counts[name].mean() - counts[name]).sign()
            model.adapter_tensors()[name].copy_(value)
    return bias


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_biases_are_those_of_one_move_per_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool, accumulation: int
) -> None:
    model = build_model()
    router, heard = model.containers()["model.layers.0.mlp.up_proj"].router, []
    assert isinstance(router, FlyLoRARouter)
    move = router.on_step_end
    monkeypatch.setattr(router, "on_step_end", lambda load: (heard.append(load.sum().item()), move(load)))
    options = {**RUN, "activation_checkpointing": checkpointing, "gradient_accumulation_steps": accumulation}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ROWS[:4]}
    build_trainer(tmp_path, model, ROWS, learning_rate=0.0, **options).train()
    size = 2 * accumulation
    tokens = [sum(len(row["input_ids"]) for row in ROWS[step * size : (step + 1) * size]) for step in range(3)]
    assert heard == [3 * count for count in tokens]  # doubled counts would move the bias alike
    wanted = by_hand(size, batch=2, steps=3)
    assert any(value.abs().max() > 2 * RATE for value in wanted.values())
    assert_identical(biases(model), wanted)


def test_two_ranks_move_the_biases_by_the_counts_of_both(tmp_path: Path, processes: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [processes.Process(target=two_ranks, args=(rank, 2, port, tmp_path, ROWS)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    wanted = by_hand(rows_per_step=8, batch=2, steps=3)
    for rank in range(2):
        assert_identical(torch.load(tmp_path / f"biases-{rank}.pt"), wanted)
    assert any(not torch.equal(wanted[name], value) for name, value in by_hand(4, 2, 3).items())


def test_frozen_projections_stay_out_of_the_optimizer_and_as_they_are(tmp_path: Path) -> None:
    model = build_model()
    before = {name: t.clone() for name, t in model.adapter_tensors().items()}
    trainer = build_trainer(tmp_path, model, ROWS, weight_decay=0.5, learning_rate=0.1, **RUN)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, tensor in model.adapter_tensors().items():
        frozen = name.endswith("lora_A") and "v_proj" not in name
        assert (id(tensor) in held) == (not frozen and not name.endswith("router.bias")), name
        assert torch.equal(tensor, before[name]) == frozen, name


def test_biases_are_in_the_checkpoint_and_a_resumed_run_goes_on_with_them(tmp_path: Path) -> None:
    options = {**RUN, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = build_trainer(tmp_path / "whole", build_model(), ROWS, **options)
    whole.train()
    resumed = build_trainer(tmp_path / "resumed", build_model(), ROWS, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_identical(outcome(resumed), outcome(whole))
    assert any(value.any() for value in biases(whole.model).values())
    saved = moelora.checkpoints.read(tmp_path / "whole" / "checkpoint-2").file.headers
    assert set(biases(whole.model)) <= set(saved)


def test_a_new_task_trains_with_a_new_trainer(tmp_path: Path) -> None:
    site = {"target": "q_proj", "experts": {"kind": "rank1", "r": 4}, "router": {"kind": "moram", "top_k": 4}}
    model = moelora.attach(build_model().unload(), {"sites": [site]})
    build_trainer(tmp_path / "one", model, ROWS, **RUN).train()
    model.begin_task()
    old = {name: t.clone() for name, t in model.adapter_tensors().items() if ".old_" in name}
    trainer = build_trainer(tmp_path / "two", model, ROWS, weight_decay=0.5, **RUN)
    trainer.train()
    assert old and all(torch.equal(model.adapter_tensors()[name], value) for name, value in old.items())
    assert all(t.any() for name, t in model.adapter_tensors().items() if name.endswith(".lora_B"))
    line = next(line for line in trainer.state.log_history if "load/entropy" in line)
    assert line["load/dead_experts"] <= 2 * 8  # two layers of eight atoms


def test_a_router_that_sites_share_moves_once_by_what_all_of_them_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = {"kind": "smora", "top_k": 3, "bias_rate": RATE, "share": "parent"}
    site = {"target": ["q_proj", "k_proj", "o_proj"], "experts": {"num_experts": 1, "r": 8}, "router": router}
    model = moelora.attach(build_model().unload(), {"sites": [site]})
    shared, heard = model.containers()["model.layers.0.self_attn.q_proj"].router, []
    monkeypatch.setattr(shared, "on_step_end", heard.append)
    with moelora.trace(model) as tape:
        build_trainer(tmp_path, model, ROWS, learning_rate=0.0, **{**RUN, "max_steps": 1}).train()
    chosen = [record for name in tape if name.startswith("model.layers.0.") for record in tape[name]]
    assert len(chosen) == 3 * 2 and len(heard) == 1  # sites, micro-batches
    assert torch.equal(heard[0], torch.stack([record.counts() for record in chosen]).sum(0))
