"""Training a reward model: what each phase moves, what its loss is, and that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reward.reward_made import CATEGORIES, TEMPLATE, build_backbone, build_reward
from reward_runs import rankings, reward_trainer
from torch.nn.functional import logsigmoid

from moelora.config import Recipe, load_recipe
from moelora.data.preferences import Comparison, Ranking, write_rankings
from moelora.errors import ConfigError, DataError, TrainingError
from moelora.reward.calibration import fit_temperature
from moelora.reward.model import RewardModel
from moelora.reward.moving import only
from moelora.trainers import TimeBudget
from moelora.trainers.reward import RewardRun
from moelora.trainers.reward_config import RewardTrainerConfig
from moelora.trainers.reward_phases import part_of

Tensors = dict[str, torch.Tensor]


def tensors(model: RewardModel) -> Tensors:
    """The adapter's tensors, those of banks expert by expert."""
    found: Tensors = {}
    for name, tensor in model.adapter_tensors().items():
        if name.endswith(("lora_A", "lora_B")):
            axis = 0 if name.endswith("lora_A") else 1
            for expert, part in enumerate(tensor.detach().split(2, dim=axis)):
                found[f"{name}[{expert}]"] = part.clone()
        else:
            found[name] = tensor.detach().clone()
    return found


def moved(before: Tensors, after: Tensors) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# -- what moves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["shared", "category", "none"])
@pytest.mark.parametrize("phase", ["base", "capability", "aggregate", "category"])
def test_a_phase_moves_its_own_and_nothing_else(phase: str, base: str, tmp_path: Path) -> None:
    model = build_reward("1:", base=base)
    frozen = {n: p.clone() for n, p in model.backbone.named_parameters() if "lora" not in n and "reward" not in n}
    runner = reward_trainer(tmp_path, model, phase, per_device_train_batch_size=16)
    before = tensors(model)  # after what a phase begins with
    runner.train()
    found = moved(before, tensors(model))
    views = {view.name: view for view in model.reward.views}
    names, modules = runner.phase.moves
    own = {views[name].own for name in names} - {None}
    expected = {n for n in before if "lora" in n and int(n.split("[")[1][:-1]) in own}
    expected |= {n for n in before for m in modules if n.startswith(f"reward.{m}.")}
    # Rankings do not see the bias of a head or of an aggregator: it cancels.
    unseen = {n for n in expected if n.endswith(".bias") and ("heads" in n or "second" in n)}
    assert found | unseen == expected | unseen and found, found ^ expected
    for name, value in model.backbone.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name


def test_what_moves_when_it_should_not_is_an_error() -> None:
    model = build_reward()
    optimizer = torch.optim.AdamW([p for p in model.parameters()], lr=0.1, weight_decay=0.5)
    with pytest.raises(TrainingError, match=r"expert \d"), only(model, ["general"], ["heads.general"]):
        model(torch.tensor([[5, 6]]), view_ids=torch.tensor([[0]])).logits.sum().backward()
        optimizer.step()
    assert all(p.requires_grad for n, p in model.adapter_tensors().items() if "lora" in n)


def test_the_aggregators_phase_gives_experts_no_gradient(tmp_path: Path) -> None:
    model = build_reward()
    runner = reward_trainer(tmp_path, model, "aggregate")
    batch = runner.phase.collate([runner.train_dataset[i] for i in range(3)])
    loss, _ = runner.phase.loss(model, batch)
    loss.backward()
    with_gradient = {n for n, p in model.adapter_tensors().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient and all(name.startswith("reward.aggregators") for name in with_gradient)


def test_capability_heads_begin_as_copies_of_the_base_head(tmp_path: Path) -> None:
    model = build_reward(base="category")
    reward_trainer(tmp_path, model, "capability")
    heads: Any = model.parts.heads
    for category, points in CATEGORIES.items():
        for point in points:
            assert torch.equal(heads[f"{category}/{point}"].weight, heads[category].weight)


# -- what is learnt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["base", "capability"])
def test_the_loss_is_that_of_scores_one_by_one(phase: str, tmp_path: Path) -> None:
    """By hand: each response alone, under its view, in a loop over rankings and pairs."""
    model = build_reward("1:", base="category")
    runner = reward_trainer(tmp_path, model, phase, label_smoothing=0.1, center_coef=0.01)
    rows = [runner.train_dataset[i] for i in range(5)]
    loss, _ = runner.phase.loss(model, runner.phase.collate(rows))
    numbers = model.reward.numbers

    def by_hand(row: Any, view: int) -> torch.Tensor:
        scores = [model(torch.tensor([ids]), view_ids=torch.tensor([[view]])).logits[0, 0] for ids in row.input_ids]
        each = []
        for c in row.comparisons:
            above = scores[c.winner] - scores[c.loser]
            right = 0.5 if c.tie else 0.9
            centre = 0.01 * (scores[c.winner] + scores[c.loser]).square()
            each.append(-right * logsigmoid(above) - (1 - right) * logsigmoid(-above) + centre)
        return torch.stack(each).mean()

    parts = [by_hand(row, row.view_id) for row in rows]
    if phase == "base":
        parts += [by_hand(row, numbers["general"]) for row in rows]
    torch.testing.assert_close(loss, torch.stack(parts).mean(), atol=1e-6, rtol=1e-5)
    wanted = {"sums", "letters"} if phase == "base" else {f"{c}/{p}" for c, ps in CATEGORIES.items() for p in ps}
    assert {numbers[name] for name in wanted} == {row.view_id for row in runner.train_dataset.rows}


def test_stored_states_are_those_of_the_forward(tmp_path: Path) -> None:
    model = build_reward("1:")
    runner = reward_trainer(tmp_path, model, "aggregate", rankings=rankings(6))
    batch = runner.phase.collate([runner.train_dataset[i] for i in range(6)])
    with torch.no_grad():
        stored = model(states=batch["states"], category_ids=batch["category_ids"]).logits[:, 0]
    texts = [(r, place) for r in rankings(6) for place in range(3)]
    categories = [str(r.category) for r, _ in texts]
    found = model.score([r.prompt for r, _ in texts], [r.responses[p] for r, p in texts], categories=categories)
    torch.testing.assert_close(stored, torch.tensor([each.reward for each in found]), atol=1e-6, rtol=0)


def test_accumulation_is_one_step_of_the_whole(tmp_path: Path) -> None:
    found = []
    for accumulation in (1, 4):
        model = build_reward("1:")
        reward_trainer(
            tmp_path / str(accumulation),
            model,
            "base",
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
        ).train()
        found.append(tensors(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4)


def test_all_phases_learn(tmp_path: Path) -> None:
    model = build_reward("1:")
    for phase, steps in (("base", 30), ("capability", 40), ("aggregate", 40), ("category", 30)):
        runner = reward_trainer(
            tmp_path / phase, model, phase, eval_rankings=rankings(), max_steps=steps, learning_rate=0.02
        )
        runner.train()
        metrics = runner.evaluate()
        assert metrics["eval_accuracy"] == 1.0 or phase != "category"
        assert metrics["eval_accuracy"] > 0.85, (phase, metrics)
        assert any("accuracy" in line and "loss" in line for line in runner.state.log_history)


def test_a_single_reward_model_has_one_phase() -> None:
    assert RewardTrainerConfig.parse({}).phase_names == ["base"]
    names = {"categories": CATEGORIES}
    assert RewardTrainerConfig.parse(names).phase_names == ["base", "capability", "aggregate", "category"]
    assert RewardTrainerConfig.parse({**names, "aggregator": "mean"}).phase_names == ["base", "capability", "category"]
    assert "category" not in RewardTrainerConfig.parse({"categories": {"sums": ["right"]}}).phase_names


# -- parts of the data -------------------------------------------------------------------------------------------


def test_parts_of_the_rankings() -> None:
    everything = rankings(40)
    first, _ = part_of("base", everything, 0.6, 0)
    again, _ = part_of("capability", everything[::-1], 0.6, 0)
    second, _ = part_of("aggregate", everything, 0.6, 0)
    learnt, held_out = part_of("category", everything, 0.6, 0)
    keys = {ranking.key for ranking in everything}
    assert {r.key for r in first} == {r.key for r in again}
    assert not {r.key for r in first} & {r.key for r in second} and {r.key for r in (*first, *second)} == keys
    assert (len(first), len(second), len(learnt), len(held_out)) == (24, 16, 32, 8)


def test_the_temperature_is_where_the_loss_is_least() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 3, generator=generator) * 2
    labels = torch.distributions.Categorical(logits=logits / 3.0).sample()
    found = fit_temperature(logits, labels)
    targets = torch.nn.functional.one_hot(labels, 3) * (400 / 402) + (1 - torch.nn.functional.one_hot(labels, 3)) / 804
    targets[torch.arange(400), labels] = 401 / 402

    def loss(temperature: float) -> float:
        return -(targets.double() * (logits.double() / temperature).log_softmax(-1)).sum(-1).mean().item()

    assert loss(found) < min(loss(found * 0.99), loss(found * 1.01)) and 2.0 < found < 4.5


def test_a_few_prompts_that_are_all_right_are_no_certainty() -> None:
    for count in (3, 300):
        temperature = fit_temperature(torch.eye(3).repeat(count // 3, 1), torch.arange(3).repeat(count // 3))
        confidence = float((torch.eye(3)[0] / temperature).softmax(0)[0])
        assert confidence == pytest.approx((count + 1) / (count + 2), abs=1e-4)


def test_the_temperature_is_fitted_to_prompts_held_out(tmp_path: Path) -> None:
    model = build_reward()
    runner = reward_trainer(tmp_path, model, "category", rankings=rankings(16), held_out=rankings(24)[16:])
    runner.train()
    metrics = runner.finish()
    assert metrics["category_temperature"] == pytest.approx(float(model.parts.temperature)) != 1.0


def test_evaluation_goes_along_with_training(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_rankings": rankings(4)}
    runner = reward_trainer(tmp_path, build_reward("1:"), "base", **options)
    runner.train()
    assert sum("eval_accuracy" in line for line in runner.state.log_history) == runner.state.global_step


def test_a_phase_that_the_test_rankings_say_nothing_of_is_trained_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unlabelled = [replace(ranking, capabilities={}) for ranking in rankings(4)]
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_rankings": unlabelled}
    runner = reward_trainer(tmp_path, build_reward("1:"), "capability", **options)
    assert "the phase capability is not evaluated" in caplog.text
    assert runner.train().global_step == 3
    with pytest.raises(DataError, match="nothing to learn"):
        reward_trainer(tmp_path, build_reward("1:"), "capability", rankings=unlabelled)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("capability", "no comparison is by the capability letters/clean, whose expert then learns nothing"),
        ("aggregate", "no ranking is of the category letters, whose aggregator then learns nothing"),
        ("category", "no prompt is of the category letters, whose class then learns nothing"),
    ],
)
def test_what_learns_nothing_is_told(
    phase: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sums = [ranking for ranking in rankings() if ranking.category == "sums"]
    reward_trainer(tmp_path, build_reward("1:"), phase, rankings=rankings(), eval_rankings=sums)
    assert not caplog.text  # what is only evaluated need not have all
    reward_trainer(tmp_path, build_reward("1:"), phase, rankings=sums)
    assert message in caplog.text


# -- recipes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    backbone = build_backbone()
    backbone.save_pretrained(tmp_path / "backbone")
    build_reward().tokenizer.save_pretrained(tmp_path / "backbone")
    write_rankings(tmp_path / "train.jsonl", rankings(20))
    write_rankings(tmp_path / "test.jsonl", rankings(26)[20:])

    def made(folder: str, **options: Any) -> Recipe:
        args = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
        return Recipe.parse(
            {
                "backbone": {"name": str(tmp_path / "backbone"), "quantization": None},
                "mixture": TEMPLATE,
                "data": {
                    "kind": "preferences",
                    "path": str(tmp_path / "train.jsonl"),
                    "test_path": str(tmp_path / "test.jsonl"),
                    "columns": {"category": "category", "capabilities": "capabilities"},
                },
                "trainer": {
                    "kind": "reward",
                    "categories": CATEGORIES,
                    "args": {**args, "learning_rate": 0.01, "disable_tqdm": True},
                    "phases": {"aggregate": {"max_steps": 6}},
                    "collapse_alarm": False,
                    **options,
                },
                "output_dir": str(tmp_path / folder),
            }
        )

    return made


def test_a_recipe_runs_all_phases_and_resumes_exactly(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = RewardRun.run(recipe("whole"))
    model = RewardModel.from_pretrained(whole, backbone=str(tmp_path / "backbone"))
    assert json.loads((whole / "stages.json").read_text())["next_stage"] == 5
    assert "eval_accuracy" in json.loads((whole / "all_results.json").read_text())
    assert model.tokenizer is not None and model.score(["1 and 1"], ["2"])[0].category in ("sums", "letters", "general")
    original = RewardRun.prepare_stage.__func__  # type: ignore[attr-defined]
    for number in (1, 2, 3):  # stopped in the middle of each phase
        config = recipe(f"cut-{number}")

        def stopping(cls: Any, recipe: Recipe, content: Any, stage: int, cut: int = number) -> Any:
            made = original(cls, recipe, content, stage)
            if stage == cut:
                made.add_callback(_StopAt(3))
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RewardRun, "prepare_stage", classmethod(stopping))
            with pytest.raises(KeyboardInterrupt):
                RewardRun.run(config)
        resumed = RewardModel.from_pretrained(RewardRun.run(config, resume=True), backbone=str(tmp_path / "backbone"))
        assert not moved(tensors(model), tensors(resumed))


class _StopAt(TimeBudget):
    """Ends the process, so to speak, in the middle of a phase."""

    def __init__(self, step: int) -> None:
        super().__init__(1e9)
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_other_data_and_other_trainers_are_refused(recipe: Callable[..., Recipe]) -> None:
    values = recipe("refused").to_dict()
    values["data"] = {"kind": "reasoning_gym", "tasks": ["basic_arithmetic"]}
    with pytest.raises(ConfigError, match="kind: preferences"):
        RewardRun.run(Recipe.parse(values))
    values = recipe("refused").to_dict()
    values["trainer"] = {"kind": "sft"}
    from moelora.trainers.sft import SFT

    with pytest.raises(ConfigError, match="reward"):
        SFT.run(Recipe.parse(values))


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ({"prose": ["clear"]}, "are prose, but the rankings are of letters, sums"),
        ({"sums": ["clear"]}, "no ranking compares its responses by a capability of its category, such as 'clear'"),
    ],
)
def test_categories_without_rankings_end_the_run_before_it_trains(
    recipe: Callable[..., Recipe], categories: dict[str, list[str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardRun.run(recipe("refused", categories=categories))
    assert not (tmp_path / "refused").exists()


def test_categories_of_sampled_rankings_are_compared_before_any_is_sampled(tmp_path: Path) -> None:
    given = load_recipe("dmoerm", ["trainer.categories={prose: [clear]}", f"output_dir={tmp_path / 'refused'}"])
    with pytest.raises(ConfigError, match="are prose, but the rankings are of arithmetic, counting, letters, reading"):
        RewardRun.run(given)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": {"weight_decay": 0.1}}, "would decay"),
        ({"phases": {"capability": {"weight_decay": 0.1}}}, "would decay"),
        ({"phases": {"capabilty": {}}}, "phases"),
        ({"phases": {"base": {"learning_rat": 1}}}, "learning_rat"),
        ({"first_share": 1.0}, "first_share"),
        ({"categories": "dmoerms"}, "did you mean"),
    ],
)
def test_options_that_do_not_hold(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardTrainerConfig.parse({"kind": "reward", **options})
    assert RewardTrainerConfig.parse({"phases": {"aggregate": {"weight_decay": 0.1}}})


def test_arguments_that_do_not_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'aggregate'"):
        reward_trainer(tmp_path, build_reward(), "aggregat")
    with pytest.raises(ConfigError, match="weight_decay"):
        reward_trainer(tmp_path, build_reward(), "base", weight_decay=0.1)
    with pytest.raises(DataError, match="nothing to learn"):
        reward_trainer(
            tmp_path, build_reward(), "capability", rankings=[replace(r, category="other") for r in rankings(2)]
        )
    plain = Ranking(prompt=({"role": "user", "content": "a"},), responses=("b", "c"), comparisons=(Comparison(0, 1),))
    with pytest.raises(DataError, match=r"columns\.category"):
        reward_trainer(tmp_path, build_reward(), "aggregate", rankings=[plain])
