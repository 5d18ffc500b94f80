"""The configuration of ``sft``, its optimizer, and a whole run from a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.config import Recipe, load_recipe
from moelora.errors import ConfigError
from moelora.trainers import SFTTrainer
from moelora.trainers.optimizer import GroupOptions

SITES = [{"target": "mlp", "experts": {"num_experts": 2, "r": 2}, "router": "topk"}]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"learning_rat": 1.0}, ["learning_rat", "TrainingArguments", "did you mean 'learning_rate'"]),
        ({"learning_rate": "fast"}, ["learning_rate is 'fast'", "number"]),
        ({"max_steps": 1.5}, ["max_steps is 1.5", "integer"]),
        ({"output_dir": "here"}, ["'output_dir' does not belong here", "use output_dir"]),
        ({"label_smoothing_factor": 0.1}, ["auxiliary losses"]),
    ],
)
def test_wrong_arguments_are_explained(args, words):
    with pytest.raises(ConfigError) as error:
        Recipe.parse({"mixture": {"sites": SITES}, "trainer": {"kind": "sft", "args": args}})
    assert all(word in str(error.value) for word in ["trainer", *words])


def test_what_the_trainer_refuses_is_a_configuration_error(tmp_path):
    config = Recipe.parse({"mixture": {"sites": SITES}, "trainer": {"args": {"optim": "adamw_of_mine"}}}).trainer
    with pytest.raises(ConfigError, match="adamw_of_mine"):
        config.training_arguments(tmp_path, 0)


def test_recipes_round_trip_with_their_trainer():
    recipe = load_recipe({"mixture": {"sites": SITES}}, ["trainer.args.max_steps=7", "trainer.step_balance=true"])
    assert recipe.trainer.kind == "sft" and recipe.trainer.step_balance
    assert Recipe.parse(json.loads(recipe.to_json())) == recipe
    assert "sft" in moelora.trainers.names()


def test_the_optimizer_holds_the_adapter_and_nothing_else(make_model, make_trainer):
    model = make_model()
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    groups = GroupOptions(router_learning_rate=0.5)
    trainer = make_trainer(model, groups=groups, weight_decay=0.1, lr_scheduler_type="constant")
    trainer.train()
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.adapter_tensors().values()} and len(held) == len(
        model.adapter_tensors()
    )
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in model.adapter_tensors().items():
        assert rates[id(parameter)] == (0.5 if ".router." in name else 1e-2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in model.state_dict().items():
        assert torch.equal(value, frozen[name]) != (name in trained), name


def test_a_trainable_parameter_outside_the_adapter_is_refused(make_model, make_trainer):
    model = make_model()
    model.backbone.lm_head.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        make_trainer(model).train()


@pytest.fixture
def recipe(tmp_path: Path, byte_tokenizer: Any) -> dict[str, Any]:
    """A backbone and questions in files, as a user has them."""
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "backbone")
    byte_tokenizer.save_pretrained(tmp_path / "backbone")
    lines = [{"prompt": f"say {n}", "answer": str(n), "task": f"t{n % 2}"} for n in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "backbone": {"name": str(tmp_path / "backbone"), "quantization": None},
        "mixture": {"sites": SITES},
        "data": {
            "kind": "dataset",
            "path": str(tmp_path / "data.jsonl"),
            "test_fraction": 0.2,
            "columns": {"task": "task"},
        },
        "trainer": {"args": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}},
        "max_length": 128,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.mark.smoke
def test_a_recipe_is_trained_saved_and_resumed(recipe, tmp_path):
    trainer = moelora.trainers.get("sft")
    folder = trainer.run(load_recipe(recipe))
    assert folder == tmp_path / "run"
    model = moelora.from_pretrained(folder, backbone=recipe["backbone"]["name"])
    assert load_recipe(folder / "recipe.yaml") == load_recipe(recipe)
    results = json.loads((folder / "all_results.json").read_text())
    assert results["eval_task_loss"] > 0 and results["train_loss"] > 0
    for path in (folder, folder / "checkpoint-2", folder / "checkpoint-4"):
        checkpoints.verify(path)
    trainer.run(load_recipe(recipe, [f"output_dir={tmp_path}/again", "trainer.args.max_steps=2"]))
    trainer.run(load_recipe(recipe, [f"output_dir={tmp_path}/again"]), resume=True)
    again = moelora.from_pretrained(tmp_path / "again", backbone=recipe["backbone"]["name"])
    for name, value in model.adapter_tensors().items():
        assert value.shape == again.adapter_tensors()[name].shape


def test_a_recipe_without_data_says_so(recipe):
    del recipe["data"]
    with pytest.raises(ConfigError, match="names no data to train on"):
        moelora.trainers.get("sft").run(load_recipe(recipe))


def test_the_trainer_pads_by_itself(recipe, byte_tokenizer, tmp_path):
    """Fifteen lines of Python, as in the README, without a collator."""
    from transformers import TrainingArguments

    backbone, tokenizer = moelora.load_backbone(recipe["backbone"]["name"], quantization=None)
    model = moelora.attach(backbone, recipe["mixture"])
    rows = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [8, 9, 10, 11])]
    args = TrainingArguments(
        output_dir=str(tmp_path / "own"),
        max_steps=1,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    assert (tmp_path / "own" / "checkpoint-1" / "tokenizer.json").is_file()
