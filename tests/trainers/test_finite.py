"""A step that would spoil the weights is not taken, and the message says where the number came from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from moelora.errors import TrainingError


class PoisonAt(TrainerCallback):
    """At the beginning of a step keep a copy of everything, then do something to the model."""

    def __init__(self, step: int, poison: Any) -> None:
        self.step, self.poison = step, poison
        self.before: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.poison(model)
            optimizer = kwargs["optimizer"]
            self.before = copy.deepcopy((optimizer.state_dict(), model.state_dict()))


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return bool(torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def stopped(make_trainer: Any, model: Any, poison: Any, **options: Any) -> tuple[str, Any]:
    callback = PoisonAt(3, poison)
    trainer = make_trainer(
        model, max_steps=6, gradient_accumulation_steps=2, callbacks=[callback], logging_nan_inf_filter=False, **options
    )
    with pytest.raises(TrainingError) as error:
        trainer.train()
    assert trainer.state.global_step == 2
    assert equal(callback.before, (trainer.optimizer.state_dict(), model.state_dict()))
    assert model.slot.listeners == []
    return str(error.value), trainer


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.1.mlp.up_proj.lora_B", "backbone.model.layers.1.mlp"),
        ("model.layers.0.mlp.router.weight", "backbone.model.layers.0.mlp"),
        ("model.layers.1.self_attn.q_proj.lora_A", "backbone.model.layers.1.self_attn.q_proj"),
    ],
)
@pytest.mark.parametrize("step_balance", [False, True])
def test_a_poisoned_adapter_is_named(make_model, make_trainer, name, module, step_balance):
    def poison(model: Any) -> None:
        with torch.no_grad():
            model.adapter_tensors()[name].view(-1)[3] = float("nan")

    message, _ = stopped(make_trainer, make_model(dropout=0.2), poison, step_balance=step_balance)
    assert "step 3" in message and "micro-batch 1 of 2 is nan" in message
    assert f"{module!r}" in message
    assert "lora" in message or "router.weight" in message
    assert "not finite themselves" in message


def test_a_frozen_layer_that_overflows_is_named_with_its_sequences(make_model, make_trainer):
    def poison(model: Any) -> None:
        def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output[:1], output[1:] * float("inf")])

        model.backbone.model.layers[1].post_attention_layernorm.register_forward_hook(spoil)

    message, _ = stopped(make_trainer, make_model(), poison)
    assert "'backbone.model.layers.1.post_attention_layernorm'" in message
    assert "in sequences [1] of the batch" in message


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_named(make_model, make_trainer, max_grad_norm):
    name = "model.layers.0.mlp.down_proj.lora_A"

    def poison(model: Any) -> None:
        model.adapter_tensors()[name].register_hook(lambda gradient: gradient * float("inf"))

    message, _ = stopped(make_trainer, make_model(), poison, max_grad_norm=max_grad_norm)
    assert "norm of the gradient" in message
    assert "down_proj.lora_A" in message
    assert "backward pass" in message


def test_a_step_without_any_label_says_so(make_model, make_trainer, rows):
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    with pytest.raises(TrainingError, match="does any token of the step have a label"):
        make_trainer(make_model(), rows).train()
