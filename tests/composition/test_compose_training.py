"""Routers trained over finished adapters: what they learn, what stays as it was, and what the task ids are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from skills import ANSWERS, QUIET, examples, splits
from torch import Tensor

import moelora
from moelora.composition.training import Trained, default_trainer, train_router
from moelora.composition.weights import mean_loss
from moelora.data import Collator, Splits, tokenize
from moelora.errors import ConfigError, DataError
from moelora.trainers.sft import SFTConfig

NAMES = list(ANSWERS)


def composed(skilled: list[Path], backbone: Path, router: str, **options: Any) -> moelora.MoELoRAModel:
    torch.manual_seed(0)
    return moelora.compose(skilled, router, str(backbone), quantization="fp32", **options)


def trainer(router: str, steps: int = 3, **args: Any) -> SFTConfig:
    return default_trainer(router, **{"max_steps": steps, "learning_rate": 1e-2, **QUIET, **args})


def state(model: moelora.MoELoRAModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.adapter_tensors().items()}


def loss(model: moelora.MoELoRAModel, task: str, **fields: Any) -> float:
    tokens = tokenize(examples(task, count=4), model.tokenizer, 64)
    batch = Collator(model.tokenizer.pad_token_id)([tokens[i] for i in range(len(tokens))])
    ids = {name: torch.full((len(tokens),), value) for name, value in fields.items()}
    return mean_loss(model, [{**batch, **ids}])


def test_the_adapters_know_their_own_task(skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone, "mask", by="task")
    for index, task in enumerate(NAMES):
        assert loss(model, task, task_ids=index) < 0.2
        assert loss(model, task, task_ids=1 - index) > 1


TRAINABLE = [
    "adamole",
    "lora_mixer",
    "meteora",
    "mola",
    "phatgoose",
    "static",
    "switch",
    "task",
    "topk",
    "topp",
    "xlora",
]


@pytest.mark.parametrize("router", TRAINABLE)
def test_the_router_alone_is_trained(router: str, skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone, router)
    before = state(model)
    backbone = {name: value.clone() for name, value in model.state_dict().items() if ".router." not in name}
    result = train_router(model, splits(*NAMES), trainer(router), max_length=64)
    moved = {name for name, value in model.adapter_tensors().items() if not torch.equal(value, before[name])}
    assert moved and all(".router." in name for name in moved)
    assert all(torch.equal(value, backbone[name]) for name, value in model.state_dict().items() if name in backbone)
    trained = sum(p.numel() for name, p in model.adapter_tensors().items() if ".router." in name and p.requires_grad)
    assert result == Trained(trained, 3, 48, NAMES, result.metrics)
    assert result.metrics["train_loss"] > 0 and result.metrics["eval_task_loss"] > 0
    assert not model.training


def test_meteora_learns_which_adapter_a_task_belongs_to(skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone, "meteora")
    before = [loss(model, task) for task in NAMES]
    train_router(model, splits(*NAMES), trainer("meteora", 60), max_length=64)
    tokens = tokenize(examples(*NAMES, count=3), model.tokenizer, 64, NAMES)
    batch = Collator(model.tokenizer.pad_token_id, with_task_ids=True)([tokens[i] for i in range(len(tokens))])
    with moelora.trace(model) as tape, torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    right = [
        (record.logits.argmax(-1) == batch["task_ids"].unsqueeze(1))[batch["labels"] != -100].float().mean()
        for name in model.containers()
        for record in tape[name]
        if "layers.1" in name
    ]
    assert torch.stack(right).mean() > 0.9
    assert all(loss(model, task) < old for task, old in zip(NAMES, before, strict=True))


def test_the_gate_of_phatgoose_is_trained_on_its_own_task(skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone, "phatgoose")
    train_router(model, splits(NAMES[1]), trainer("phatgoose", 3), max_length=64)
    gates = [container.router.weight for container in model.containers().values()]
    assert all(not gate[0].any() and gate[1].all() for gate in gates)
    with moelora.trace(model) as tape, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert all(record.weights.shape[-1] == 2 for name in model.containers() for record in tape[name]), "composing"


def test_the_router_task_learns_the_adapter_of_each_task(skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone, "task", embedding_dim=8)
    train_router(model, splits(*NAMES), trainer("task", 40, learning_rate=0.1), max_length=64)
    router = next(iter(model.containers().values())).router
    table = router._table()
    assert table[0, 0] > 0.8 and table[1, 1] > 0.8
    for index, task in enumerate(NAMES):
        assert loss(model, task, task_ids=index) < loss(model, task, task_ids=1 - index)


def test_trained_cat_is_one_concatenated_lora(skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone, "static")
    train_router(model, splits(*NAMES), trainer("static", 5, learning_rate=0.1), max_length=64)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = model(ids).logits
    updates = {}
    for name, container in model.containers().items():
        weights = container.router.logits.softmax(0)
        ranks = list(container.site.ranks)
        A = container.experts.lora_A
        B = torch.cat(
            [
                w * s * part
                for w, s, part in zip(
                    weights, container.site.scales, container.experts.lora_B.split(ranks, 1), strict=True
                )
            ],
            dim=1,
        )
        assert A.shape[0] == B.shape[1] == 8
        updates[name] = (B @ A).detach()
    assert len({tuple(c.router.logits.tolist()) for c in model.containers().values()}) == len(updates), "one each"
    plain = {name: container.base.weight.clone() for name, container in model.containers().items()}
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert (merged(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, update in updates.items():
        assert torch.allclose(merged.get_submodule(name).weight, plain[name] + update, atol=1e-6)


# -- task ids ----------------------------------------------------------------------------------------------------------


def test_task_ids_are_the_adapters_first_and_others_are_none_of_them(
    skilled: list[Path], skill_backbone: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = composed(skilled, skill_backbone, "meteora", names=["pears", "figs"])
    seen: list[Any] = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **k: (seen.append(k["task_ids"]), forward(self, **k))[1])
    args = trainer("meteora", 2, train_sampling_strategy="sequential", per_device_train_batch_size=4)
    with caplog.at_level(logging.WARNING, "moelora"):
        result = train_router(model, Splits(examples("apples", "pears", "figs"), [], 0), args, max_length=64)
    assert result.tasks == ["pears", "figs", "apples"]
    assert "eval_task_loss" not in result.metrics and not model.training, "also without test examples"
    assert torch.cat(seen).tolist() == [-1, 0, 1, -1, 0, 1, -1, 0]
    assert "no adapter is named as the tasks ['apples']" in caplog.text


def test_a_router_with_tasks_of_its_own_gets_an_id_for_each(skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone, "task", num_tasks=3)
    result = train_router(model, splits("apples", "figs"), trainer("task"), max_length=64)
    assert result.tasks == ["apples", "pears", "figs"]


def test_tasks_without_an_adapter_are_refused_where_they_must_have_one(
    skilled: list[Path], skill_backbone: Path
) -> None:
    model = composed(skilled, skill_backbone, "phatgoose")
    with pytest.raises(DataError, match="the tasks are figs, the adapters apples, pears"):
        train_router(model, splits("figs"), trainer("phatgoose"), max_length=64)


# -- what cannot be trained, and what must not change ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        ("arrow", {}, "router 'arrow' has no parameters here, so there is nothing to train"),
        ("static", {"weights": "uniform"}, "router 'static' has no parameters here"),
        ("remix", {}, "moelora.policy trains"),
    ],
)
def test_a_router_that_is_not_trained_this_way_is_refused(
    router: str, options: dict[str, Any], message: str, skilled: list[Path], skill_backbone: Path
) -> None:
    model = composed(skilled, skill_backbone, router, **options)
    with pytest.raises(ConfigError, match=message):
        train_router(model, splits(*NAMES), trainer(router), max_length=64)


def test_a_model_without_a_tokenizer_is_refused(skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone, "topk")
    model.tokenizer = None
    with pytest.raises(ConfigError, match=r"set model\.tokenizer"):
        train_router(model, splits(*NAMES), trainer("topk"), max_length=64)


def test_training_that_changes_an_adapter_is_an_error_of_ours(skilled: list[Path], skill_backbone: Path) -> None:
    model = composed(skilled, skill_backbone, "topk")
    next(iter(model.containers().values())).experts.lora_B.requires_grad_(True)
    with pytest.raises(AssertionError, match="training changed the adapters"):
        train_router(model, splits(*NAMES), trainer("topk"), max_length=64)


def test_the_trainer_of_a_method_is_that_of_its_card() -> None:
    assert default_trainer("phatgoose").args == {
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 500,
    }
    meteora = default_trainer("meteora", max_steps=7, learning_rate=0.5).args
    assert (meteora["max_steps"], meteora["learning_rate"], meteora["lr_scheduler_type"]) == (7, 0.5, "cosine")
    assert "num_train_epochs" not in meteora
    assert default_trainer("no_card_of_that_name").args == {"save_strategy": "no"}
