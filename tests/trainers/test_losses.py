"""Task and auxiliary losses: what is trained and what is logged, under accumulation, checkpointing, autocast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from moelora.data import Collator
from moelora.errors import ConfigError
from moelora.trainers.meter import LoadMeter

COEF = 0.1


def step_logs(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def one_step(make_trainer: Any, model: Any, gradients: Any, size: int, accumulation: int, **options: Any) -> Any:
    trainer = make_trainer(
        model,
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        callbacks=[gradients],
        **options,
    )
    trainer.train()
    return trainer


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= tolerance, name


@pytest.mark.smoke
def test_training_lowers_the_loss_and_logs_every_part(make_model, make_trainer):
    trainer = make_trainer(make_model(), max_steps=12, gradient_accumulation_steps=2, logging_steps=3)
    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 4
    assert logs[-1]["task_loss"] < logs[0]["task_loss"]
    for line in logs:
        assert line["loss"] == pytest.approx(line["task_loss"] + COEF * line["aux/load_balance"], abs=1e-5)
        assert 1 <= line["load/max_utilization"] <= 4
        assert 0 < line["load/entropy"] <= 1
        assert line["load/dead_experts"] >= 0
    assert len(logs[0]) <= 16


def test_logged_parts_are_the_share_weighted_means_of_the_micro_batches(make_model, make_trainer, gradients, rows):
    """The published behaviour: each micro-batch balances itself."""
    trainer = one_step(make_trainer, make_model(), gradients, 2, 3)
    model = make_model().train()
    batches = [Collator(0)(rows[i : i + 2]) for i in (0, 2, 4)]
    labelled = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    outputs = [model(**batch) for batch in batches]
    shares = [count / sum(labelled) for count in labelled]
    assert len(set(shares)) > 1
    aux = sum(share * out.aux_losses["load_balance"] for share, out in zip(shares, outputs, strict=True))
    task = sum(share * out.task_loss for share, out in zip(shares, outputs, strict=True))
    (line,) = step_logs(trainer)
    assert line["aux/load_balance"] == pytest.approx(aux.item(), abs=1e-5)
    assert line["task_loss"] == pytest.approx(task.item(), abs=1e-5)
    (task + COEF * aux).backward()
    expected = {name: p.grad for name, p in model.adapter_tensors().items()}
    assert_same(gradients.steps[0], expected)


@pytest.mark.parametrize("kind", [{"kind": "topk"}, {"kind": "switch", "expert_capacity": 2, "z_loss_coef": 0.05}])
def test_step_balance_makes_accumulation_equal_to_one_large_batch(make_model, make_trainer, gradients, rows, kind):
    router = {**kind, "aux_loss_coef": COEF, "jitter": 0.0}
    router_only = {key: value for key, value in router.items() if key != "top_k"}

    def fresh() -> Any:
        return _with_router(make_model, router_only)

    model = fresh().train()
    out = model(**Collator(0)(rows[:4]))
    out.loss.backward()
    expected = {name: p.grad for name, p in model.adapter_tensors().items()}
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        gradients.steps.clear()
        trainer = one_step(make_trainer, fresh(), gradients, size, accumulation, step_balance=True)
        assert_same(gradients.steps[0], expected)
        (line,) = step_logs(trainer)
        for name, value in out.aux_losses.items():
            assert line[f"aux/{name}"] == pytest.approx(value.item(), abs=1e-5)
        assert line["loss"] == pytest.approx(out.loss.item(), abs=1e-5)


def _with_router(make_model: Any, router: dict[str, Any]) -> Any:
    import moelora

    model = make_model()
    if router["kind"] == "topk":
        return make_model(router=router)
    backbone = model.unload()
    torch.manual_seed(3)
    site = {"target": "mlp", "experts": {"num_experts": 4, "r": 2}, "router": {**router, "init_std": 0.5}}
    model = moelora.attach(backbone, {"sites": [site]})
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.2)
    return model


def test_step_balance_measures_exactly_what_the_step_then_routes(make_model, make_trainer):
    """Dropout and jitter draw the same numbers in the measuring pass and in the real one."""
    seen: list[tuple[Any, Any]] = []

    class Compare(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((trainer._step_load.share, trainer._step_load_meter.share()))

    model = make_model(dropout=0.5, router={"jitter": 0.3})
    trainer = make_trainer(model, gradient_accumulation_steps=2, step_balance=True, callbacks=[Compare()])
    trainer.train()
    assert len(seen) == 4
    for measured, routed in seen:
        assert torch.equal(measured[0], routed[0])


def test_step_balance_leaves_the_random_state_alone(make_model, make_trainer):
    """Without a balance loss it must not change training at all."""
    results = []
    for step_balance in (False, True):
        model = make_model(dropout=0.3, router={"aux_loss_coef": 0.0})
        make_trainer(model, gradient_accumulation_steps=2, step_balance=step_balance).train()
        results.append({name: value.detach().clone() for name, value in model.adapter_tensors().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("step_balance", [False, True])
def test_gradient_checkpointing_changes_nothing(make_model, make_trainer, gradients, step_balance):
    logs = []
    for checkpointing in (False, True):
        trainer = one_step(
            make_trainer,
            make_model(dropout=0.2),
            gradients,
            2,
            2,
            activation_checkpointing=checkpointing,
            step_balance=step_balance,
        )
        logs.append(step_logs(trainer)[0])
    assert_same(gradients.steps[1], gradients.steps[0], 1e-7)
    keys = [key for key in logs[0] if key.startswith(("aux/", "load/", "task_loss", "loss"))]
    assert [logs[0][key] for key in keys] == pytest.approx([logs[1][key] for key in keys], abs=1e-6)


def test_reentrant_checkpointing_is_refused(make_model, make_trainer):
    trainer = make_trainer(
        make_model(), activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}
    )
    with pytest.raises(ConfigError, match="use_reentrant"):
        trainer.train()


def test_auxiliary_losses_survive_bf16_autocast(make_model, make_trainer):
    trainer = make_trainer(make_model(), bf16=True)
    trainer.train()
    for line in step_logs(trainer):
        assert line["aux/load_balance"] > 0
        assert line["loss"] == pytest.approx(line["task_loss"] + COEF * line["aux/load_balance"], abs=1e-6)
    assert all(p.dtype == torch.float32 for p in trainer.model.adapter_tensors().values())


def test_controllers_hear_each_real_token_once_per_step(make_model, make_trainer, rows):
    heard: dict[str, list[torch.Tensor]] = {}
    model = make_model()
    for name, container in model.containers().items():
        if container.router is not None:
            container.router.on_step_end = lambda load, name=name: heard.setdefault(name, []).append(load)
    trainer = make_trainer(
        model,
        max_steps=3,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        train_sampling_strategy="sequential",
        eval_dataset=rows[:3],
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.0,
    )
    trainer.train()
    assert all(len(loads) == 3 for loads in heard.values()) and len(heard) == 2
    for step in range(3):
        real = sum(len(row["input_ids"]) for row in rows[4 * step : 4 * step + 4])
        meter = LoadMeter(model)
        with model.slot.using(listener=meter), torch.no_grad():
            model(**Collator(0)(rows[4 * step : 4 * step + 4]))
        for name, loads in heard.items():
            assert loads[step].sum() == 2 * real  # two experts per token, padding in none
            assert torch.equal(loads[step], meter.counts[name])


def test_evaluation_reports_parts_and_predicts_logits_only(make_model, make_trainer, rows):
    seen = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["shape"] = prediction.predictions.shape
        return {"rows": float(len(prediction.predictions))}

    trainer = make_trainer(make_model(), eval_dataset=rows[:4], compute_metrics=metrics, per_device_eval_batch_size=4)
    result = trainer.evaluate()
    longest = max(len(row["input_ids"]) for row in rows[:4])
    assert seen["shape"] == (4, longest, 64)
    assert result["eval_rows"] == 4
    expected = result["eval_task_loss"] + COEF * result["eval_aux/load_balance"]
    assert result["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_mixture_without_routers_trains_too(make_trainer, tiny_llama):
    import moelora

    model = moelora.attach(tiny_llama, {"sites": [{"target": "q_proj", "experts": {"num_experts": 1, "r": 2}}]})
    trainer = make_trainer(model, step_balance=True)
    trainer.train()
    assert all(line["loss"] == pytest.approx(line["task_loss"]) for line in step_logs(trainer))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_backbone_whose_loss_takes_no_token_count(make_model, make_trainer, gradients, monkeypatch, accumulation):
    """Then the Trainer averages micro-batches, and so does the auxiliary part."""
    model = make_model()
    monkeypatch.setattr(type(model), "accepts_loss_kwargs", False)
    trainer = one_step(make_trainer, model, gradients, 2, accumulation, step_balance=True)
    (line,) = step_logs(trainer)
    assert line["loss"] == pytest.approx(line["task_loss"] + COEF * line["aux/load_balance"], abs=1e-5)
    assert 1.5 < line["aux/load_balance"] < 3


def test_what_would_lose_the_auxiliary_losses_is_refused(make_model, make_trainer, tiny_llama, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"label_smoothing_factor=0\.1"):
        make_trainer(make_model(), label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        make_trainer(tiny_llama)
