"""The progress bar, its plain twin, and the clock."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from moelora.trainers import LiveProgress, TimeBudget
from moelora.trainers.live import load_bar


def test_load_bar_shows_fair_shares_at_half_height():
    assert load_bar(torch.tensor([5.0, 5.0, 5.0, 5.0])) == "▄▄▄▄"
    assert load_bar(torch.tensor([0.0, 1.0, 7.0, 4.0])) == "[red]×[/red]▁█▅"
    assert load_bar(torch.zeros(2)) == "[red]×[/red][red]×[/red]"


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_terminal_gets_a_bar_with_loss_and_load(make_model, make_trainer, disable_tqdm):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system=None)
    model = make_model()
    trainer = make_trainer(
        model,
        callbacks=[LiveProgress("mixture", console)],
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=disable_tqdm,
    )
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert not kinds & {ProgressCallback, PrinterCallback}
    trainer.train()
    shown = out.getvalue()
    last = trainer.state.log_history[-2]
    assert "mixture" in shown and "4/4" in shown
    assert f"loss {last['task_loss']:.3f}" in shown and f"load_balance {last['aux/load_balance']:.3f}" in shown
    assert "tokens/s" in shown and "load " in shown
    assert model.slot.listeners == []


def test_elsewhere_a_line_per_log(make_model, make_trainer):
    out = io.StringIO()
    trainer = make_trainer(
        make_model(), logging_steps=2, callbacks=[LiveProgress("mixture", Console(file=out, width=80))]
    )
    trainer.train()
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["mixture 2/4", "mixture 4/4"]
    assert all("loss " in line and "load_balance " in line for line in lines)


class Slow(TrainerCallback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds)


def test_a_budget_ends_training_in_time_with_a_checkpoint(make_model, make_trainer, tmp_path):
    budget = TimeBudget(minutes=1.5 / 60)
    options = {"max_steps": 1000, "save_strategy": "steps", "save_steps": 500, "logging_steps": 500}
    trainer = make_trainer(make_model(), callbacks=[Slow(0.2), budget], **options)
    began = time.monotonic()
    trainer.train()
    assert time.monotonic() - began < 20  # all steps would take 200
    steps = trainer.state.global_step
    assert 1 <= steps <= 7 and budget.stopped
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [steps]
    assert (tmp_path / "run" / f"checkpoint-{steps}").is_dir()

    again = TimeBudget(minutes=1.5 / 60)
    resumed = make_trainer(make_model(), callbacks=[Slow(0.2), again], **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step <= steps + 2  # what was used before the resume counts
    assert again.stopped and again.seconds_used >= budget.seconds_used


def test_a_budget_that_is_enough_changes_nothing(make_model, make_trainer):
    budget = TimeBudget(minutes=5)
    trainer = make_trainer(make_model(), callbacks=[budget])
    trainer.train()
    assert trainer.state.global_step == 4 and not budget.stopped


def test_a_budget_may_be_added_when_resuming(make_model, make_trainer):
    make_trainer(make_model(), max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(make_model(), save_strategy="steps", save_steps=2, callbacks=[TimeBudget(5)])
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
