"""A reward model in TRL: RewardTrainer trains it, and GRPO and RLOO are given its rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from byte_tokenizer import make_byte_tokenizer
from datasets import Dataset
from reward.reward_made import CATEGORIES, TEMPLATE, build_backbone, build_batch, build_reward
from tiny_runs import assert_identical

import moelora
from moelora.reward.losses import Comparisons, ranking_loss
from moelora.reward.model import RewardModel

trl = pytest.importorskip("trl")
# TRL uses the older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")

ARGS: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "disable_tqdm": True,
}
SUMS = [("2 + 3?", "5", "seven"), ("1 + 1?", "2", "I do not know"), ("4 + 4?", "8", "44"), ("3 + 0?", "3", "0")]


def tokenizer() -> Any:
    made = make_byte_tokenizer()
    made.pad_token = "<|endoftext|>"
    return made


def say(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs() -> Dataset:
    """Preference data as TRL's documentation has it."""
    return Dataset.from_list(
        [
            {"prompt": say("user", question), "chosen": say("assistant", good), "rejected": say("assistant", bad)}
            for question, good, bad in SUMS
        ]
    )


def questions() -> Dataset:
    return Dataset.from_list([{"prompt": say("user", question), "category": "sums"} for question, _, _ in SUMS])


def reward_trainer(folder: Path, model: RewardModel, compute_metrics: Any = None, **options: Any) -> Any:
    return trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(str(folder), **{**ARGS, **options}),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        compute_metrics=compute_metrics,
    )


def tensors(model: RewardModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.adapter_tensors().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def scores(model: RewardModel) -> list[float]:
    return [each.reward for each in model.score([q for q, _, _ in SUMS], [good for _, good, _ in SUMS])]


# -- RewardTrainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [None, 0.3])
def test_the_loss_is_that_of_rankings_of_two(tmp_path: Path, center: float | None) -> None:
    trainer = reward_trainer(tmp_path, build_reward(categories={}), center_rewards_coefficient=center)
    batch = trainer.data_collator([{**trainer.train_dataset[i], "margin": 0.1 * i} for i in range(4)])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    own = Comparisons(
        winners=torch.arange(4),
        losers=torch.arange(4, 8),
        ties=torch.zeros(4, dtype=torch.bool),
        margins=batch["margin"],
        groups=torch.arange(4),
    )
    rewards = trainer.model(batch["input_ids"], batch["attention_mask"]).logits
    assert (loss - ranking_loss(rewards, own, center_coef=center or 0.0)).abs().item() <= 1e-6
    question, good, bad = SUMS[0]
    found = trainer.model.score([question, question], [good, bad])
    assert [each.reward for each in found] == pytest.approx(rewards[[0, 4], 0].tolist(), abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_single_reward_model_is_trained_and_saved(tmp_path: Path, checkpointing: bool) -> None:
    model = build_reward(categories={})
    before = tensors(model)
    backbone = {name: p.clone() for name, p in model.backbone.named_parameters() if not p.requires_grad}
    trainer = reward_trainer(
        tmp_path, model, gradient_checkpointing=checkpointing, save_strategy="steps", save_steps=2, max_steps=2
    )
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert len(losses) == 2 and all("accuracy" in each for each in trainer.state.log_history[:2])
    # The bias is in no difference of two rewards, and the temperature is of a classifier.
    assert moved(before, tensors(model)) == set(before) - {"reward.heads.general.bias", "reward.temperature"}
    assert_identical({n: p for n, p in model.backbone.named_parameters() if n in backbone}, backbone)
    again = RewardModel.from_pretrained(tmp_path / "checkpoint-2", backbone=build_backbone())
    again.tokenizer = tokenizer()
    assert_identical(tensors(again), tensors(model))
    assert scores(again) == scores(model)


def test_evaluation_predicts_rewards_alone(tmp_path: Path) -> None:
    shapes = []

    def look(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"spread": float(prediction.predictions.std())}

    trainer = reward_trainer(tmp_path, build_reward(categories=CATEGORIES), look, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(pairs())
    assert shapes == [(8, 1)] and metrics["eval_spread"] > 0 and 0 <= metrics["eval_accuracy"] <= 1


def test_with_categories_what_the_classifier_chose_learns_and_the_classifier_does_not(tmp_path: Path) -> None:
    model = build_reward(categories=CATEGORIES, threshold=0.0)
    asked = {
        each.category for each in model.score([q for q, _, _ in SUMS] * 2, [a for _, g, b in SUMS for a in (g, b)])
    }
    before = tensors(model)
    reward_trainer(tmp_path, model, per_device_train_batch_size=4).train()
    after = tensors(model)
    (chosen,) = asked
    others = set(CATEGORIES) - asked
    expected = {name for name in before if f"aggregators.{chosen}." in name or name.endswith(("lora_A", "lora_B"))}
    untouched = [name for name in before if "outer" in name or any(f".{other}" in name for other in others)]
    assert expected <= moved(before, after) and untouched and not moved(before, after) & set(untouched)
    experts = {view.name: view.own for view in model.reward.views}
    of_site = next(name for name in before if name.endswith("lora_B"))
    changed = (before[of_site] != after[of_site]).any(dim=0).view(-1, 2).any(dim=1).tolist()
    wanted = {experts["general"], *(experts[view] for view in model.reward.capability_views(chosen))}
    assert {expert for expert, yes in enumerate(changed) if yes} == wanted


# -- GRPO and RLOO -------------------------------------------------------------------------------------------------


def recording(base: type[Any]) -> type[Any]:
    """The trainer, which also keeps what it was told of each completion."""

    class Recording(base):  # type: ignore[misc]
        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
            found = super()._calculate_rewards(inputs, prompts, completions, ids)
            vars(self).setdefault("told", []).append((inputs, prompts, completions, found))
            return found

    return Recording


def mixture() -> moelora.MoELoRAModel:
    site = {"target": "mlp", "experts": {"num_experts": 4, "r": 2}, "router": {"kind": "topk", "top_k": 2}}
    return moelora.attach(build_backbone(2), {"sites": [site]})


POLICIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "grpo": ("GRPO", mixture),
    "rloo": ("RLOO", lambda: build_backbone(2)),
}


def optimise(kind: str, folder: Path, rewards: RewardModel, **options: Any) -> Any:
    """Two steps of a policy against the model itself and against its function."""
    name, policy = POLICIES[kind]
    args = getattr(trl, f"{name}Config")(
        str(folder), **{**ARGS, "num_generations": 2, "max_completion_length": 6, "beta": 0.0, **options}
    )
    trainer = recording(getattr(trl, f"{name}Trainer"))(
        policy(),
        reward_funcs=[rewards, rewards.reward_function()],
        args=args,
        train_dataset=questions(),
        processing_class=tokenizer(),
        reward_processing_classes=[tokenizer(), None],
    )
    return trainer


@pytest.mark.parametrize("kind", POLICIES)
def test_policies_are_given_what_the_model_says(tmp_path: Path, kind: str) -> None:
    model = build_reward()
    before = tensors(model)
    trainer = optimise(kind, tmp_path, model)
    model.train()  # as whoever trained it left it
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(p, start[name]) for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert not moved(before, tensors(model))
    assert len(trainer.told) == 2
    for inputs, prompts, completions, found in trainer.told:
        replies = [completion[-1]["content"] for completion in completions]
        told = torch.tensor([each.reward for each in model.score(prompts, replies)])
        known = [row["category"] for row in inputs]
        given = torch.tensor([each.reward for each in model.score(prompts, replies, categories=known)])
        assert (found[:, 0] - told).abs().max() <= 1e-6
        assert (found[:, 1] - given).abs().max() <= 1e-6
        assert len(set(told.tolist())) > 1


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    """A process has one precision, until accelerate forgets it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_accelerate_prepares_for_evaluation_is_still_a_reward_model(precision: str) -> None:
    model = build_reward(categories={})
    ids, mask = build_batch()
    before = model(ids, mask).logits.detach()
    prepared = Accelerator(mixed_precision=precision, cpu=True).prepare_model(model, evaluation_mode=True)
    with torch.inference_mode():
        after = prepared(input_ids=ids, attention_mask=mask).logits
    assert after.dtype == torch.float32
    assert (after - before).abs().max() <= (1e-6 if precision == "no" else 0.05)
    assert len(set(scores(prepared))) == len(SUMS)


def test_rewards_are_the_same_each_time_whatever_mode_the_model_was_left_in() -> None:
    site = {**TEMPLATE["sites"][0], "experts": {"num_experts": 1, "r": 2, "dropout": 0.5}}
    model = RewardModel.attach(build_backbone(), {"categories": CATEGORIES}, {"sites": [site]})
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith(("lora_B", "outer.weight")):
                tensor.normal_(std=0.5)
    model.tokenizer = tokenizer()
    ids, mask = build_batch()
    with torch.inference_mode():
        wanted = model.eval()(ids, mask).logits
        model.train()
        model.backbone.lm_head.eval()
        assert torch.equal(model(ids, mask).logits, wanted)
    assert model.training and not model.backbone.lm_head.training
    with torch.enable_grad():
        assert not torch.equal(model(ids, mask).logits, wanted), "dropout is for training"


def test_texts_without_roles_are_one_question_and_its_answer() -> None:
    model = build_reward()
    function = model.reward_function()
    told = function(prompts=[q for q, _, _ in SUMS], completions=[good for _, good, _ in SUMS], trainer_state=None)
    assert told == scores(model)
    with pytest.raises(moelora.errors.ConfigError, match="did you mean 'sums'"):
        function(prompts=["2 + 2?"], completions=["4"], category=["sum"])


def test_taking_the_experts_off_leaves_the_configuration_as_it_was() -> None:
    backbone = build_backbone()
    before = backbone.config.to_dict()
    model = RewardModel.attach(backbone, {"categories": CATEGORIES}, TEMPLATE)
    assert model.config.num_labels == 1
    assert model.unload().config.to_dict() == before
