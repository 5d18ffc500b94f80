"""ReMix's trainer: its gradient is the policy's, however a step is computed, cut up, distributed or resumed."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from remix_runs import AUX, SITES, one_step, ranks_of_remix, remix_model, remix_trainer
from tiny_runs import SITES as TOPK_SITES
from tiny_runs import Gradients, assert_identical, build_rows, outcome
from torch import Tensor

import moelora
from moelora.config import Recipe
from moelora.data import Collator
from moelora.errors import ConfigError, TrainingError
from moelora.policy import Objective, policy_loss
from moelora.routers import rloo

STATISTICS = ("surrogate", "advantage_std", "advantage_max", "log_prob", "loss_spread")


def near(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal to so much of the largest entry: float32, and terms of a router's gradient that cancel each other."""
    assert one.keys() == two.keys() and one
    for name, value in one.items():
        assert value.any(), name
        assert (value - two[name]).abs().max() <= tolerance * two[name].abs().max(), name


def seeds_of(trainer: Any, micro: int, rank: int = 0, ranks: int = 1, rows: int = 2) -> list[list[int]]:
    first = (micro * ranks + rank) * rows
    return [[trainer._seed(first + row, m) for row in range(rows)] for m in range(trainer.selections)]


def expected(folder: Path, shares: Any = None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The step of four micro-batches of two rows, from the policy's own loss, one after the other."""
    model = remix_model().train()
    trainer = remix_trainer(folder, model)
    rows = build_rows(8)
    batches = [Collator(0)(rows[start : start + 2]) for start in (0, 2, 4, 6)]
    counts = [rloo.example_targets(batch["labels"]) for batch in batches]
    total = sum(int(count.sum()) for count in counts)
    log = dict.fromkeys(["task_loss", "aux", "policy/surrogate", "policy/loss_spread"], 0.0)
    for micro, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        weights = count / total if shares is None else count * shares[micro]
        objective = Objective(weights=weights, aux_weight=weights.sum())
        found = policy_loss(model, batch, seeds_of(trainer, micro), objective)
        found.surrogate.backward()
        log["task_loss"] += float((found.losses * weights).sum(1).mean())
        log["aux"] += float(found.aux_losses["sites.1.load_balance"] * weights.sum())
        log["policy/surrogate"] += float(found.surrogate.detach())
        log["policy/loss_spread"] += float(found.spread) / 4
    return {name: tensor.grad for name, tensor in model.adapter_tensors().items()}, log


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return expected(tmp_path_factory.mktemp("wanted"))


@pytest.mark.parametrize("mode", ["looped", "lean"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_of_an_accumulated_step_is_the_policys(wanted, tmp_path, mode, checkpointed):
    gradients, log = wanted
    found = one_step(tmp_path, mode=mode, gradient_accumulation_steps=4, activation_checkpointing=checkpointed)
    near(found["grads"], gradients)
    line = found["log"]
    assert line["task_loss"] == pytest.approx(log["task_loss"], abs=1e-5)
    assert line["loss"] == pytest.approx(log["task_loss"] + AUX * log["aux"], abs=1e-5)
    assert line["aux/sites.1.load_balance"] == pytest.approx(log["aux"], abs=1e-5)
    for name in ("policy/surrogate", "policy/loss_spread"):
        assert line[name] == pytest.approx(log[name], abs=1e-4), name
    assert all(f"policy/{name}" in line for name in STATISTICS)
    assert line["policy/log_prob"] < 0 < line["policy/loss_spread"] < line["policy/advantage_max"]


def test_copies_in_one_batch_have_the_same_gradient(wanted, tmp_path):
    """The balance loss of the other site is of all copies then, so its own parameters are left out."""
    found = one_step(tmp_path, mode="batched", gradient_accumulation_steps=4)["grads"]
    assert found.keys() == wanted[0].keys()
    sampled = {name for name in found if "mlp" in name and "layers.1" in name}
    near({n: found[n] for n in sampled}, {n: wanted[0][n] for n in sampled})


@pytest.mark.parametrize("mode", ["looped", "batched", "lean"])
def test_dropout_leaves_the_modes_alike_and_checkpointing_without_effect(tmp_path, mode):
    """Copies have masks of their own; forwards one after the other have the same ones with and without a graph."""
    plain = one_step(tmp_path, mode=mode, dropout=0.3)
    near(
        one_step(tmp_path, mode=mode, dropout=0.3, activation_checkpointing=True)["grads"], plain["grads"], tolerance=0
    )
    if mode == "lean":
        looped = one_step(tmp_path, mode="looped", dropout=0.3)
        near(looped["grads"], plain["grads"])
        assert looped["log"]["load/sites.0.max_utilization"] == plain["log"]["load/sites.0.max_utilization"]


def test_a_step_cut_up_otherwise_draws_the_same(tmp_path):
    """Without the balance loss, which is of a micro-batch: one of four examples is four of one."""
    sites = [SITES[0]]
    steps = []
    for size, count in ((4, 1), (2, 2), (1, 4)):
        gradients = Gradients()
        remix_trainer(
            tmp_path,
            remix_model(sites=sites),
            build_rows(4),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            callbacks=[gradients],
        ).train()
        steps.append(gradients.steps[0])
    near(steps[1], steps[0])
    near(steps[2], steps[0])


def test_the_literal_form_compares_micro_batches(tmp_path):
    model = remix_model().train()
    trainer = remix_trainer(tmp_path, model)
    batch = Collator(0)(build_rows(8)[:2])
    weights = rloo.example_targets(batch["labels"]) / rloo.example_targets(batch["labels"]).sum()
    policy_loss(model, batch, seeds_of(trainer, 0), Objective(per_example=False, weights=weights)).surrogate.backward()
    literal = {name: tensor.grad for name, tensor in model.adapter_tensors().items()}
    near(one_step(tmp_path, per_example=False)["grads"], literal)
    other = one_step(tmp_path)["grads"]
    assert any(not torch.allclose(other[name], value, rtol=1e-3) for name, value in literal.items() if "router" in name)


def test_seeds_differ_by_step_example_rank_and_selection(tmp_path):
    trainer = remix_trainer(tmp_path, remix_model())
    seen = set()
    for step in range(3):
        trainer.state.global_step = step
        for done in range(2):
            trainer._done = done
            seen.update(seed for group in trainer.selection_seeds(2) for seed in group)
    assert len(seen) == 3 * 2 * 2 * 3
    assert trainer.selection_seeds(2) == seeds_of(trainer, 1)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    options = {
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 2,
        "train_sampling_strategy": "random",
        "mode": "lean",
    }
    whole = remix_trainer(tmp_path / "whole", remix_model(0.2), build_rows(10), **options)
    whole.train()
    resumed = remix_trainer(tmp_path / "resumed", remix_model(0.2), build_rows(10), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_identical(outcome(resumed), outcome(whole))


def test_training_lowers_the_loss_of_evaluation_and_moves_the_routers(tmp_path):
    model = remix_model(sites=[SITES[0]])
    before = {name: value.clone() for name, value in model.adapter_tensors().items()}
    rows = build_rows(4)
    options = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 0.05, "mode": "batched"}
    trainer = remix_trainer(tmp_path, model, rows, eval_dataset=rows, lr_scheduler_type="constant", **options)
    first = trainer.evaluate()["eval_task_loss"]
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_task_loss"] < first - 0.3
    assert last["eval_loss"] == pytest.approx(last["eval_task_loss"], abs=1e-5)
    assert all(not torch.equal(value, before[name]) for name, value in model.adapter_tensors().items())


def test_auxiliary_losses_warm_up(tmp_path):
    """In the first of two steps of warm-up half of the coefficient counts; the log has the loss itself."""
    whole, half = one_step(tmp_path)["log"], one_step(tmp_path, aux_warmup_steps=2)["log"]
    aux = whole["aux/sites.1.load_balance"]
    assert half["aux/sites.1.load_balance"] == pytest.approx(aux, abs=1e-6)
    assert whole["loss"] - half["loss"] == pytest.approx(AUX * aux / 2, abs=1e-5)


# -- two processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [processes.Process(target=ranks_of_remix, args=(rank, 2, port, folder)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mode", ["looped", "lean"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_processes_take_the_step_of_one(ranks, wanted, mode, checkpointed):
    for found in ranks:
        near(found[mode, checkpointed]["grads"], wanted[0])
        assert found[mode, checkpointed]["log"]["task_loss"] == pytest.approx(wanted[1]["task_loss"], abs=1e-5)
        assert found[mode, checkpointed]["log"]["policy/surrogate"] == pytest.approx(
            wanted[1]["policy/surrogate"], abs=1e-4
        )


def test_copies_are_alike_on_all_ranks(ranks, tmp_path):
    one = one_step(tmp_path, mode="batched", gradient_accumulation_steps=4)["grads"]
    for found in ranks:
        near(found["batched", False]["grads"], one)
        near(found["batched", True]["grads"], one)


def test_each_rank_may_average_over_its_own_tokens(ranks, tmp_path):
    counts = [
        sum(label != -100 for row in build_rows(8)[start : start + 2] for label in row["labels"][1:])
        for start in (0, 2, 4, 6)
    ]
    own = [counts[0] + counts[2], counts[1] + counts[3]]
    assert own[0] != own[1]
    gradients, log = expected(tmp_path, [1 / own[micro % 2] / 2 for micro in range(4)])
    for found in ranks:
        near(found["of ranks"]["grads"], gradients)
        assert found["of ranks"]["log"]["task_loss"] == pytest.approx(log["task_loss"], abs=1e-5)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"selections": 1}, ["selections is 1", "leave-one-out", "at least 2"]),
        ({"mode": "fast"}, ["mode", "looped"]),
        ({"step_balance": True}, ["step_balance", "leave it out"]),
        ({"selection": 4}, ["unknown key 'selection'", "did you mean 'selections'"]),
    ],
)
def test_wrong_options_are_explained(trainer, words):
    with pytest.raises(ConfigError) as error:
        Recipe.parse({"mixture": {"sites": SITES}, "trainer": {"kind": "remix", **trainer}})
    assert all(word in str(error.value) for word in words)


def test_a_recipe_without_a_router_that_samples_is_refused_before_the_backbone_is_loaded(tmp_path):
    recipe = Recipe.parse(
        {"backbone": {"name": "/nowhere"}, "mixture": {"sites": TOPK_SITES}, "trainer": {"kind": "remix"}}
    )
    with pytest.raises(ConfigError, match=r"the mixture has 'topk': use router kind remix, or trainer kind sft"):
        moelora.trainers.get("remix").run(recipe)


@pytest.mark.parametrize("options", [{"selections": 1}, {"step_balance": True}])
def test_the_trainer_by_itself_refuses_too(tmp_path, options):
    with pytest.raises(ConfigError):
        remix_trainer(tmp_path, remix_model(), **options)


def test_a_number_that_is_not_finite_stops_the_run(tmp_path, caplog):
    model = remix_model(sites=[{**SITES[0], "target": ["gate_proj", "up_proj"]}], share="parent")
    with torch.no_grad():
        model.containers()["model.layers.1.mlp.up_proj"].experts.lora_B.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: the loss of micro-batch 1 of 1 is nan.*layers\.1\.mlp\.up_proj"):
        remix_trainer(tmp_path, model).train()
    assert "leaves them as they are" not in caplog.text
