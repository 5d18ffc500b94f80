"""Runs over a sequence of tasks: what each leaves, kills anywhere, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_runs import CLASSES, LORA, SITES, TARGETS, TASKS, die, recipe, run, tensors, write_sequence

import moelora
from moelora import checkpoints
from moelora.config import load_recipe
from moelora.data.sequences import read_sequence
from moelora.errors import CheckpointError, ConfigError
from moelora.evaluation.scoring import generate_answers
from moelora.trainers.continual_config import ContinualConfig
from moelora.trainers.continual_scores import Answering


def scores(folder: Path, stage: int) -> dict[str, Any]:
    tasks: dict[str, Any] = json.loads((folder / f"stage-{stage}" / "scores.json").read_text())["tasks"]
    return tasks


def matrix(folder: Path) -> list[list[float | None]]:
    rows: list[list[float | None]] = json.loads((folder / "R.json").read_text())["scores"]
    return rows


def logs(folder: Path) -> list[dict[str, Any]]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    clock = ("runtime", "per_second", "preparation_time")
    return [{k: v for k, v in line.items() if not k.endswith(clock)} for line in lines if "train_loss" not in line]


@pytest.fixture(scope="module")
def whole(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe that was run without interruption."""
    values = recipe(tmp_path_factory.mktemp("whole"), backbone_folder)
    run(values)
    return values


# -- what a run leaves -----------------------------------------------------------------------------------------------


def test_each_task_adds_to_the_history_and_is_asked_about_all(whole):
    folder = Path(whole["output_dir"])
    rows = matrix(folder)
    assert len(rows) == 4 and all(len(row) == 3 for row in rows)
    for stage in range(4):
        found = scores(folder, stage)
        assert list(found) == list(TASKS)
        assert rows[stage] == [found[task]["score"] for task in TASKS]
        assert all(len(task["items"]) == 4 and task["score"] == sum(task["items"]) / 4 for task in found.values())
    final = tensors(folder)
    for stage in (1, 2, 3):
        left = tensors(folder / f"stage-{stage}")
        for name, value in left.items():
            if name.endswith(".lora_A"):
                old = final.get(name.replace("lora_A", "old_lora_A"))
                assert old is not None and old.shape[0] == 4
                everything = torch.cat([old, final[name]])
                assert torch.equal(everything[2 * stage - 2 : 2 * stage], value)
    assert checkpoints.describe(folder).mixture.sites[0].experts.num_experts == 3
    assert load_recipe(folder / "recipe.yaml") == load_recipe(whole)
    for name in ("R.csv", "metrics.json", "continual.html", "all_results.json"):
        assert (folder / name).stat().st_size > 0
    growth = json.loads((folder / "metrics.json").read_text())["growth"]
    assert growth["parameters"] == [448, 896, 1344] and growth["trained"] == [448] * 3


def test_the_final_model_answers_as_the_last_row_says(whole, backbone_folder):
    backbone, tokenizer = moelora.load_backbone(str(backbone_folder), quantization=None)
    model = moelora.from_pretrained(whole["output_dir"], backbone=backbone)
    task = read_sequence(load_recipe(whole).data).ordered()[1]
    from moelora.evaluation.labels import score_options

    asked = score_options(model, tokenizer, task.test)
    assert asked.total.items == scores(Path(whole["output_dir"]), 3)["copy"]["items"]


def test_a_task_with_classes_is_answered_with_one_of_them(backbone_folder, tmp_path):
    """And a model that has learnt one answer by heart gives it, to the tasks with classes as to that without."""
    values = recipe(tmp_path, backbone_folder, "sequential")
    for task in TASKS:
        path = tmp_path / "data" / task / "train.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({**row, "answer": CLASSES[0]}) for row in rows))
    site = {"target": [*TARGETS, "o_proj", "gate_proj", "up_proj", "down_proj"], "experts": {**LORA, "r": 16}}
    values["mixture"] = {"sites": [site]}
    values["trainer"]["args"] |= {"max_steps": 40, "learning_rate": 3e-2, "save_strategy": "no"}
    folder = run(values)
    right = [0.5, 0.5, 0.5]  # the test answers alternate
    assert matrix(folder)[-1] == right
    assert matrix(folder)[0][0] == 0.0


def test_joint_training_fills_the_last_row_alone_in_as_many_steps(backbone_folder, tmp_path):
    folder = run(recipe(tmp_path, backbone_folder, "joint"))
    rows = matrix(folder)
    assert rows[1] == rows[2] == [None] * 3 and None not in rows[0] + rows[3]
    assert json.loads((folder / "stage-1" / "trainer_state.json").read_text())["global_step"] == 9


@pytest.mark.parametrize("method", sorted(set(SITES) - {"moram", "joint", "sequential"}))
def test_every_method_runs_through_a_sequence(backbone_folder, tmp_path, method):
    values = recipe(tmp_path, backbone_folder, method)
    values["data"]["order"] = "b"
    values["trainer"]["args"] |= {"max_steps": 1, "save_strategy": "no"}
    folder = run(values)
    assert json.loads((folder / "R.json").read_text())["tasks"] == list(TASKS[::-1])
    assert all(None not in row for row in matrix(folder))
    experts = checkpoints.describe(folder).mixture.sites[0].experts
    assert experts.num_experts == {"replay": 1, "loramoe": 2}.get(method, 3)


def test_length_and_rate_may_be_each_tasks_own(backbone_folder, tmp_path):
    values = recipe(tmp_path, backbone_folder, "sequential")
    values["trainer"]["per_task"] = {"copy": {"num_train_epochs": 2, "learning_rate": 5e-3}}
    config = load_recipe(values).trainer
    add, copy, _ = read_sequence(load_recipe(values).data).ordered()
    common, own = config.arguments_of([add], tmp_path, 0), config.arguments_of([copy], tmp_path, 0)
    assert (common.max_steps, common.learning_rate) == (3, 1e-2)
    assert (own.max_steps, own.num_train_epochs, own.learning_rate) == (-1, 2, 5e-3)


def test_published_epochs_hold_where_nothing_else_is_said(tmp_path):
    write_sequence(tmp_path)
    (tmp_path / "sequence.yaml").write_text("tasks: {add: {epochs: 3}}")
    add, copy, _ = read_sequence(load_recipe(recipe_of(tmp_path)).data).ordered()
    bare = ContinualConfig.parse({"method": "sequential"})
    assert bare.arguments_of([add], tmp_path, 0).num_train_epochs == 3
    assert bare.arguments_of([copy], tmp_path, 0).num_train_epochs == 1
    said = ContinualConfig.parse({"method": "sequential", "args": {"max_steps": 5}})
    assert said.arguments_of([add], tmp_path, 0).max_steps == 5


@pytest.mark.parametrize(("said", "published", "length"), [(None, 3, 3), (5, 3, 5), (5, None, 5), (None, None, 16)])
def test_an_answer_is_as_long_as_the_recipe_says_or_was_published(backbone_folder, tmp_path, said, published, length):
    write_sequence(tmp_path)
    task = read_sequence(load_recipe(recipe_of(tmp_path)).data).ordered()[0]
    model, tokenizer = moelora.load_backbone(str(backbone_folder), quantization=None)
    answers = generate_answers(model, tokenizer, task.test, max_new_tokens=length)
    wanted = tuple(dataclasses.replace(e, answer=answer) for e, answer in zip(task.test, answers, strict=True))
    asked = dataclasses.replace(task, test=wanted, metric="exact", max_new_tokens=published)
    config = ContinualConfig.parse({"method": "sequential", **({"max_new_tokens": said} if said else {})})
    assert Answering(config.max_new_tokens, 4).score(model, tokenizer, asked) == [1.0] * 4
    assert 0.0 in Answering(length + 1, 4).score(model, tokenizer, asked)  # a token more is another answer


def recipe_of(path: Path) -> dict[str, Any]:
    return {
        "mixture": {"sites": [{"target": TARGETS, **SITES["sequential"]}]},
        "data": {"kind": "sequence", "name": "folder", "path": str(path)},
        "trainer": {"kind": "continual", "method": "sequential"},
    }


# -- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "resume"),
    [
        ("0 answers 2", True),
        ("1 step 2", True),
        ("2 step 0", True),
        ("2 step 2", "stage-2/checkpoint-1"),
        ("2 answers 0", True),
        ("2 answers 2", True),
        ("2 over", True),
        ("3 over", True),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(whole, processes, backbone_folder, tmp_path, point, resume):
    values = recipe(tmp_path, backbone_folder)
    child = processes.Process(target=die, args=(point, values))
    child.start()
    child.join(200)
    assert child.exitcode == -9
    folder = run(values, resume=resume if resume is True else str(tmp_path / "run" / resume))
    expected = Path(whole["output_dir"])
    for name in ("stage-1", "stage-2", "stage-3", "."):
        other = tensors(expected / name)
        for key, value in tensors(folder / name).items():
            assert torch.equal(value, other[key]), (name, key)
    for stage in range(4):
        assert scores(folder, stage) == scores(expected, stage)
        assert stage == 0 or logs(folder / f"stage-{stage}") == logs(expected / f"stage-{stage}")
    for name in ("R.json", "R.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert json.loads((folder / "stages.json").read_text())["next_stage"] == 4


def test_what_cannot_be_resumed_is_explained(whole, backbone_folder, tmp_path):
    folder = Path(whole["output_dir"])
    with pytest.raises(ConfigError, match=r"holds a run of stages already: go on with --resume latest"):
        run(whole)
    other = recipe(folder.parent, backbone_folder, "per_task")
    with pytest.raises(
        CheckpointError, match=r"has the stages \['folder 1, moram: add', .* the recipe has \['folder 1, per_"
    ):
        run(other, resume=True)
    with pytest.raises(CheckpointError, match=r"has the stages .* but the recipe has \['folder 1, moram: swap'"):
        run({**whole, "data": {**whole["data"], "order": "b"}}, resume=True)
    with pytest.raises(CheckpointError, match="no run of stages to resume"):
        run(recipe(tmp_path, backbone_folder), resume=True)
    assert run(whole, resume=True) == folder  # over already


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"order": "c"}}, r"has no order 'c': orders are a, b"),
        (
            {"trainer": {"method": "joint", "per_task": {"add": {}}}},
            r"learns all tasks at once, so per_task has no part",
        ),
        ({"trainer": {"per_task": {"ad": {}}}}, r"per_task names the task 'ad', .* did you mean 'add'"),
        ({"trainer": {"per_task": {"add": {"rate": 1}}}}, r"'rate' is not a field"),
        ({"trainer": {"method": "ewc"}}, r"unknown continual-learning method 'ewc': known are flylora, joint"),
        ({"trainer": {"method": {"kind": "replay", "budget": 1}}}, r"budget is 1"),
        ({"trainer": {"method": "o_lora"}}, r"'o_lora' needs router.kind 'static', but mixture.sites.0 has 'moram'"),
        (
            {"data": {"kind": "reasoning_gym", "tasks": ["chain_sum"]}},
            r"the data are of kind 'reasoning_gym': set data",
        ),
    ],
)
def test_what_does_not_hold_together_is_refused_before_anything_is_loaded(tmp_path, changes, says):
    values = recipe(tmp_path, tmp_path / "no-backbone")
    data = changes.get("data", {})
    values["data"] = data if "kind" in data else {**values["data"], **data}
    values["trainer"] |= changes.get("trainer", {})
    with pytest.raises(ConfigError, match=says):
        run(values)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", [["train"], ["launch", "--cpu", "--num-processes", "2"]])
def test_the_command_line_sets_the_sequence(verb, tmp_path, capsys):
    from moelora.cli.app import main

    path = tmp_path / "recipe.yaml"
    values = recipe_of(tmp_path)
    path.write_text(json.dumps({**values, "data": {"kind": "reasoning_gym", "tasks": ["chain_sum"]}}))
    with pytest.raises(SystemExit) as ended:
        main([*verb, str(path), "--sequence", "reasoning-gym-8", "data.order=b", "--dry-run"])
    assert not ended.value.code
    import yaml

    printed = yaml.safe_load(capsys.readouterr().out)["data"]
    assert (printed["kind"], printed["name"], printed["order"]) == ("sequence", "reasoning-gym-8", "b")
