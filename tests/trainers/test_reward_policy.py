"""The study that optimises a policy against a reward model, on a tiny backbone."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from byte_tokenizer import make_byte_tokenizer
from reward.reward_made import TEMPLATE, build_backbone

import moelora
from moelora.config import load_recipe
from moelora.data.ranking_set import ResponseFormat
from moelora.trainers.reward import RewardRun

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")
pytest.importorskip("plotly")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # TRL's

STUDY = Path(__file__).parents[2] / "scripts" / "studies" / "reward_policy.py"
LETTERS = {"tasks": {"spell_backward": {"max_word_len": 4}}, "capabilities": ["likeness", "brevity"]}


@pytest.fixture(scope="module")
def study() -> Any:
    spec = importlib.util.spec_from_file_location("reward_policy", STUDY)
    assert spec is not None and spec.loader is not None
    sys.modules["reward_policy"] = module = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that ``moelora train`` made, of ten layers, since the policy's experts are in so many."""
    folder = tmp_path_factory.mktemp("reward")
    build_backbone(10).save_pretrained(folder / "backbone")
    make_byte_tokenizer().save_pretrained(folder / "backbone")
    recipe = load_recipe(
        {
            "backbone": {"name": str(folder / "backbone"), "quantization": None},
            "mixture": TEMPLATE,
            "data": {
                "kind": "sampled_preferences",
                "categories": {"letters": LETTERS},
                "train_size": 3,
                "test_size": 2,
                "max_new_tokens": 6,
            },
            "trainer": {"kind": "reward", "args": {"max_steps": 1, "save_strategy": "no"}},
            "output_dir": str(folder / "run"),
        }
    )
    return RewardRun.run(recipe)


@pytest.fixture(scope="module")
def output(study: Any, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    study.main(reward, folder, steps=3, every=2, questions=2, test_size=2, learning_rate=3e-2)
    return folder


def table(output: Path) -> list[dict[str, float]]:
    with (output / "policy.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_it_begins_at_the_backbone_and_leaves_it(output: Path) -> None:
    rows = table(output)
    assert [row["step"] for row in rows] == [0, 2, 3]
    assert rows[0]["kl"] == rows[0]["proxy_gain"] == rows[0]["gold_gain"] == 0
    assert all(row["kl"] > 1e-3 for row in rows[1:])
    assert all(row["proxy_low"] <= row["proxy_gain"] <= row["proxy_high"] for row in rows)
    assert "reward model (proxy)" in (output / "policy.html").read_text()


def test_its_numbers_are_those_of_what_it_saved(study: Any, reward: Path, output: Path) -> None:
    again = study.Study.of(reward, output, 6, 2)
    again.policy = moelora.from_pretrained(output / "policy", backbone=build_backbone(10))
    again.policy.tokenizer = make_byte_tokenizer()
    answers, last = again.sampler(3).judged("test"), table(output)[-1]
    assert last["gold"] == pytest.approx(np.mean([ranking.scores for ranking in answers]))
    told = [each.reward for r in answers for each in again.reward.score([r.prompt] * 4, r.responses)]
    assert last["proxy"] == pytest.approx(np.mean(told), abs=1e-6)
    assert last["kl"] == pytest.approx(alone(again.policy, answers), rel=1e-4)


@torch.no_grad()
def alone(policy: Any, answers: Any) -> float:
    """The divergence text by text and token by token."""
    total, texts = 0.0, 0
    start = build_backbone(10).eval()
    for ranking in answers:
        before, responses = ResponseFormat(policy.tokenizer)(ranking.prompt, ranking.responses)
        for after in responses:
            texts += 1
            for place in range(after.index(policy.tokenizer.eos_token_id) + 1):
                ids = torch.tensor([before + after[:place]])
                now, then = (model(input_ids=ids).logits[0, -1].log_softmax(-1) for model in (policy, start))
                total += float(torch.nn.functional.kl_div(then, now, log_target=True, reduction="sum"))
    return total / texts


def test_other_folders_are_refused(study: Any, reward: Path, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"has no recipe\.yaml"):
        study.Study.of(tmp_path, tmp_path, 1, 1)
    recipe = load_recipe(reward / "recipe.yaml").to_dict()
    recipe["data"] = {"kind": "preferences", "path": "rankings.jsonl"}
    (tmp_path / "recipe.yaml").write_text(load_recipe(recipe).to_yaml())
    with pytest.raises(typer.BadParameter, match="did not learn from sampled_preferences"):
        study.Study.of(tmp_path, tmp_path, 1, 1)
