"""TRL's trainers train a mixture as it is: auxiliary losses count, and what they save is a mixture."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import make_byte_tokenizer
from datasets import Dataset
from tiny_runs import Gradients, assert_identical
from transformers import LlamaConfig, LlamaForCausalLM

import moelora

trl = pytest.importorskip("trl")

ARGS = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_grad_norm": 0.0,
    "disable_tqdm": True,
}
COEF = 0.1
SITE = {
    "target": "mlp",
    "experts": {"num_experts": 4, "r": 2},
    "router": {"kind": "topk", "top_k": 2, "init_std": 0.5, "aux_loss_coef": COEF},
}
WORDS = ["red", "green", "blue", "brown", "black"]


def model() -> moelora.MoELoRAModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(make_byte_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    mixture = moelora.attach(LlamaForCausalLM(config), {"sites": [SITE]})
    with torch.no_grad():
        for name, tensor in mixture.adapter_tensors().items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.2)
    return mixture


def tokenizer() -> Any:
    made = make_byte_tokenizer()
    made.pad_token = "<|endoftext|>"
    return made


def sft(folder: Path, mixture: Any, **options: Any) -> Any:
    rows = [{"prompt": f"say {word}", "completion": f" {word}"} for word in WORDS]
    args = trl.SFTConfig(str(folder), **{**ARGS, "shuffle_dataset": False, **options})
    return trl.SFTTrainer(mixture, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())


def dpo(folder: Path, mixture: Any, **options: Any) -> Any:
    rows = [{"prompt": f"say {word}", "chosen": f" {word}", "rejected": " no"} for word in WORDS]
    args = trl.DPOConfig(str(folder), **{**ARGS, **options})
    reference = copy.deepcopy(mixture).eval()
    return trl.DPOTrainer(
        mixture, reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )


def grpo(folder: Path, mixture: Any, **options: Any) -> Any:
    def variety(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    rows = Dataset.from_list([{"prompt": f"say {word}"} for word in WORDS])
    args = trl.GRPOConfig(str(folder), **{**ARGS, "num_generations": 2, "max_completion_length": 6, **options})
    return trl.GRPOTrainer(mixture, reward_funcs=variety, args=args, train_dataset=rows, processing_class=tokenizer())


def run(make: Any, folder: Path, **options: Any) -> Any:
    mixture = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, of what it deprecates and does not find
        trainer = make(folder, mixture, **options)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
    return trainer, gradients.steps


def test_gradients_of_sft_are_those_of_the_model_itself(tmp_path: Path) -> None:
    trainer, (got,) = run(sft, tmp_path, gradient_accumulation_steps=2, train_sampling_strategy="sequential")
    mixture = model().train()
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in pair]) for pair in ([0, 1], [2, 3])]
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        output = mixture(**batch, num_items_in_batch=items)
        (output.task_loss + COEF * output.aux_losses["load_balance"] / len(batches)).backward()
    for name, parameter in mixture.adapter_tensors().items():
        assert torch.allclose(got[name], parameter.grad, atol=1e-6), name


@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_auxiliary_losses_are_a_part_of_the_loss(tmp_path: Path, make: Any) -> None:
    with_aux, with_gradients = run(make, tmp_path / "with")
    without, without_gradients = run(make, tmp_path / "without", router_aux_loss_coef=0.0)
    one, other = with_aux.state.log_history[0], without.state.log_history[0]
    assert one["aux_loss"] > 0 and "aux_loss" not in other
    assert one["loss"] == pytest.approx(other["loss"] + one["aux_loss"], abs=1e-5)
    routers = [name for name in with_gradients[0] if ".router." in name]
    assert any(not torch.equal(with_gradients[0][name], without_gradients[0][name]) for name in routers)


@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_what_is_saved_is_the_trained_mixture(tmp_path: Path, make: Any) -> None:
    trainer, _ = run(make, tmp_path, learning_rate=1e-2, save_strategy="steps", save_steps=1)
    start = model()
    backbone = start.unload()
    again = moelora.from_pretrained(tmp_path / "checkpoint-1", backbone=backbone)
    trained = {name: tensor.detach() for name, tensor in trainer.model.adapter_tensors().items()}
    assert_identical({name: tensor.detach() for name, tensor in again.adapter_tensors().items()}, trained)
    before = model().adapter_tensors()
    assert all(not torch.equal(trained[name], before[name]) for name in trained if name.endswith("lora_B"))


def test_taking_the_experts_off_leaves_the_configuration_as_it_was(tmp_path: Path) -> None:
    mixture = model()
    assert mixture.config.router_aux_loss_coef == 1.0
    assert not hasattr(mixture.unload().config, "router_aux_loss_coef")
