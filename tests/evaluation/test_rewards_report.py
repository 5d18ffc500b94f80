"""Reports of reward models: numbers, tables, a page; and ``moelora eval`` of real (tiny) reward models."""

from __future__ import annotations

import csv
import json
import logging
import math
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moelora.cli.app import main
from moelora.data.preferences import write_rankings
from moelora.data.ranking import Ranking, comparisons
from moelora.evaluation.reward_ensembles import RewardEnsemble
from moelora.evaluation.reward_report import render, report, write
from moelora.evaluation.rewards import score_rankings
from moelora.reward.model import RewardModel
from moelora.reward.scoring import Reward

pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning")]

CATEGORIES = {"sums": ["right", "short"], "letters": ["right", "clean"]}
SITES = {"sites": [{"target": ["q_proj", "v_proj"], "experts": {"num_experts": 1, "r": 2, "alpha": 4}}]}


def made(prompts: int = 12, responses: int = 5) -> list[Ranking]:
    """Rankings by length: the longer answer is better, under ``short`` the other way round."""
    rng = random.Random(0)
    found = []
    for number in range(prompts):
        category = ("sums", "letters")[number % 2]
        texts = tuple("".join(rng.choices("abc ", k=rng.randint(1, 12))) for _ in range(responses))
        scores = [float(len(text)) for text in texts]
        found.append(
            Ranking(
                ({"role": "user", "content": f"{category} {number}?"},),
                texts,
                comparisons(scores=scores),
                category,
                {"short" if category == "sums" else "clean": comparisons(scores)},
                tuple(scores),
            )
        )
    return found


def scored(rankings: list[Ranking], noise: float, category: str | None = None) -> list[list[Reward]]:
    rng = random.Random(str(noise))
    rows = []
    for ranking in rankings:
        name = category or str(ranking.category)
        rows.append(
            [
                Reward(len(text) + rng.gauss(0, noise), name, name, 0.8, {"short": -float(len(text)), "clean": 1.0})
                for text in ranking.responses
            ]
        )
    return rows


def test_a_report_compares_all_models_with_the_first(tmp_path: Path) -> None:
    rankings = made()
    everything = {"good": scored(rankings, 1.0), "<b>noisy</b>": scored(rankings, 20.0, "sums")}
    reports = report(rankings, everything, best_of=4)
    good, noisy = reports.values()
    assert good.differences is None and good.router is not None and good.router.accuracy.mean == 1.0
    assert noisy.differences is not None and noisy.differences["overall"].high < 0
    assert noisy.differences["overall"].difference == pytest.approx(
        noisy.rewards.overall.mean - good.rewards.overall.mean
    )
    assert noisy.router is not None and noisy.router.accuracy.mean == 0.5
    own = good.rewards.capabilities["sums/short"].own
    assert own is not None and own.mean == 1.0 and good.rewards.capabilities["sums/short"].total.mean < 0.5
    assert report(rankings, everything, given_categories=True)["good"].router is None
    path = write(reports, rankings, everything, tmp_path / "deep" / "out")
    metrics = json.loads((path.parent / "metrics.json").read_text())
    assert metrics["good"]["accuracy"]["overall"]["mean"] == good.rewards.overall.mean
    assert metrics["<b>noisy</b>"]["difference"]["overall"]["high"] < 0
    rows = list(csv.DictReader((path.parent / "accuracy.csv").open()))
    assert {row["of"] for row in rows} == {
        "overall",
        "category sums",
        "category letters",
        "capability sums/short, own score",
        "capability sums/short, reward",
        "capability letters/clean, own score",
        "capability letters/clean, reward",
    }
    points = list(csv.DictReader((path.parent / "best_of_n.csv").open()))
    assert len(points) == (2 * 6 + 1) * 4
    chosen = next(p for p in points if (p["model"], p["n"], p["curve"]) == ("good", "4", "gold"))
    assert good.best_of is not None and float(chosen["mean"]) == good.best_of.gold.mean[3]
    assert float(chosen["kl"]) == pytest.approx(math.log(4) - 0.75)
    gap = metrics["<b>noisy</b>"]["best_of_n"]["gold_difference"]
    assert "gold_difference" not in metrics["good"]["best_of_n"] and gap["mean"][0] == pytest.approx(0)
    assert noisy.best_of is not None and gap["mean"][3] == pytest.approx(
        noisy.best_of.gold.mean[3] - good.best_of.gold.mean[3]
    )
    lines = [json.loads(line) for line in (path.parent / "rewards.jsonl").read_text().splitlines()]
    assert [line["rewards"]["good"] for line in lines] == [[r.reward for r in row] for row in everything["good"]]


def test_the_page_opens_offline_and_shows_names_as_they_are() -> None:
    rankings = made()
    names = {"a": scored(rankings, 1.0), "<script>alert(1)</script>": scored(rankings, 9.0)}
    page = render(report(rankings, names, best_of=3))
    body = page[page.index("<body>") :]
    assert "default-src 'none'" in page and "<script>alert(1)" not in page
    for name in ("accuracy", "reliability", "router0", "router1", "best_of_n", "over_optimisation"):
        assert f'id="{name}"' in body
    assert "best_of_n" not in render(report(rankings, names, given_categories=True)).split("<body>")[1]
    assert render(report(rankings, names, best_of=3)) == page


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, backbone_folder: Path) -> list[Path]:
    """Two reward models with categories and one without, with experts that do something."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("rewards")
    for number, categories in enumerate((CATEGORIES, CATEGORIES, {})):
        torch.manual_seed(0)
        backbone = LlamaForCausalLM.from_pretrained(backbone_folder)
        model = RewardModel.attach(backbone, {"categories": categories, "threshold": 0.0}, SITES)
        torch.manual_seed(number + 1)
        with torch.no_grad():
            for tensor in model.adapter_tensors().values():
                tensor.normal_(std=0.5)
        model.save_pretrained(folder / f"m{number}")
    return [folder / f"m{number}" for number in range(3)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    write_rankings(path, made(8, 4))
    return path


@pytest.fixture(autouse=True, scope="module")
def _process_as_before() -> Iterator[None]:
    logger = logging.getLogger("moelora")
    before = logger.handlers, logger.level, logger.propagate
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"GOMP_SPINCOUNT": "20000", "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}.items():
            patch.setenv(name, value)
        yield
    logger.handlers, logger.level, logger.propagate = before


class Run:
    """``moelora eval``: exit code, output and errors."""

    def __init__(self, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.backbone, self.capsys = backbone, capsys

    def __call__(self, *words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["eval", *map(str, words), "--backbone", str(self.backbone)])
        captured = self.capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    def json(self, *words: str | Path) -> dict[str, Any]:
        code, out, err = self(*words, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found


@pytest.fixture
def run(backbone_folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(backbone_folder, capsys)


def loaded(path: Path, backbone: Path) -> RewardModel:
    return RewardModel.from_pretrained(path, backbone=str(backbone))


def test_the_command_says_what_the_functions_say(
    run: Run, checkpoints: list[Path], data: Path, backbone_folder: Path
) -> None:
    found = run.json(checkpoints[0], "--preferences", data, "--best-of", "4", "--batch-size", "3")
    assert found["rankings"] == 8 and list(found["models"]) == ["m0"]
    rankings = made(8, 4)
    model = loaded(checkpoints[0], backbone_folder)
    expected = report(rankings, {"m0": score_rankings(model, rankings)}, best_of=4)["m0"].to_dict()
    told = found["models"]["m0"]
    assert told["accuracy"] == json.loads(json.dumps(expected["accuracy"]))
    assert told["router"] == json.loads(json.dumps(expected["router"]))
    assert told["best_of_n"]["gold"]["mean"] == pytest.approx(expected["best_of_n"]["gold"]["mean"])
    assert 0 < told["accuracy"]["overall"]["mean"] < 1 and "difference" not in told


def test_given_categories_are_those_that_answer(run: Run, checkpoints: list[Path], data: Path, tmp_path: Path) -> None:
    words = (checkpoints[0], "--preferences", data, "--ensemble", checkpoints[2], "--given-categories")
    found = run.json(*words, "-o", tmp_path)
    assert "router" not in found["models"]["m0"]
    lines = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    assert [line["routed"]["m0"] for line in lines] == [line["category"] for line in lines]
    # A reward model without categories is not asked for any.
    assert {line["routed"]["m2"] for line in lines} == {"general"}
    both = found["models"]["m0"]["accuracy"]["capabilities"]["sums/short"]
    assert both["own"] is not None and both["missing"] == 0


def test_ensembles_beside_their_members(
    run: Run, checkpoints: list[Path], data: Path, backbone_folder: Path, tmp_path: Path
) -> None:
    words = (checkpoints[2], "--preferences", data, "--ensemble", checkpoints[0], "--ensemble", checkpoints[1])
    found = run.json(*words, "--standardise", data, "-o", tmp_path / "out")
    names = ["m2", "m0", "m1", "mean of 2", "worst of 2", "uncertainty of 2"]
    assert list(found["models"]) == names
    assert all(("difference" in each) == (name != "m2") for name, each in found["models"].items())
    rankings = made(8, 4)
    ensemble = RewardEnsemble([loaded(path, backbone_folder) for path in checkpoints[:2]], "worst")
    ensemble.standardise(rankings)
    expected = [[each.reward for each in row] for row in score_rankings(ensemble, rankings)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "rewards.jsonl").read_text().splitlines()]
    assert [line["rewards"]["worst of 2"] for line in lines] == [pytest.approx(row, abs=1e-5) for row in expected]
    assert (tmp_path / "out" / "rewards.html").is_file() and not (tmp_path / "out" / "best_of_n.csv").exists()


def test_tables_for_people(run: Run, checkpoints: list[Path], data: Path, tmp_path: Path) -> None:
    words = (checkpoints[0], "--preferences", data, "--ensemble", checkpoints[1], "--best-of", "3", "-o", tmp_path)
    code, out, err = run(*words)
    assert code == 0, err
    for text in ("comparisons of 8 prompts", "- m0", "log loss", "fell back", "sums/short, own score", "at best"):
        assert text in out, out
    assert (
        "m1 - m0, gold score of the best of 3: " in out
        and "m1: the gold score is highest at n = " in out
        and f"wrote {tmp_path / 'rewards.html'}" in out
    )


def test_the_recipe_of_a_reward_model_says_what_was_held_out(
    run: Run, checkpoints: list[Path], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(checkpoints[0], folder)
    section = {"kind": "preferences", "path": str(data), "test_fraction": 0.25}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"data": section}))
    assert run.json(folder)["rankings"] == 2
    assert run.json(folder, "data.test_fraction=0.5")["rankings"] == 4
    assert run.json(folder, "data.test_fraction=0.5", "--limit", "1")["rankings"] == 2
    # What it was trained on is no test.
    code, _, err = run(folder, "data.test_fraction=0")
    assert code == 2 and "holds out no rankings" in " ".join(err.split()), err


def test_sampled_rankings_are_those_of_the_training(run: Run, checkpoints: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    import moelora
    from moelora.config import BackboneConfig, SampledPreferenceData
    from moelora.data.sampled import Sampler

    folder = tmp_path / "run"
    shutil.copytree(checkpoints[0], folder)
    group = {"tasks": ["chain_sum"], "capabilities": ["correctness", "brevity", "form"]}
    section = {
        "kind": "sampled_preferences",
        "categories": {"sums": group},
        "train_size": 2,
        "test_size": 4,
        "max_new_tokens": 5,
    }
    named = {"name": str(run.backbone), "quantization": None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"backbone": named, "data": section}))
    code, _, err = run(folder)
    assert code == 2 and "are not all here, in sampled-test-*.jsonl" in " ".join(err.split()), err
    backbone = BackboneConfig.parse(named)
    data = SampledPreferenceData.parse(section)
    rankings = Sampler(data, backbone, lambda: moelora.load_backbone(backbone), folder).part("test")
    found = run.json(folder, "--best-of", "4")
    assert found["rankings"] == len(rankings) > 0
    assert list(found["models"]["run"]["accuracy"]["categories"]) == ["sums"]


def test_subsets_are_averaged(run: Run, checkpoints: list[Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {n}", "chosen": "yes" * (n + 1), "rejected": "no", "subset": subset}
        for n, subset in enumerate(["mt-bench-easy"] * 4 + ["hep-go"] * 3)
    ]
    official, own = tmp_path / "official.jsonl", tmp_path / "own.jsonl"
    official.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own.write_text("".join(json.dumps({**row, "subset": f"my {row['subset']}"}) + "\n" for row in rows))
    bench = run.json(checkpoints[0], "--preferences", official)["models"]["m0"]
    assert set(bench["reward_bench"]["sections"]) == {"Chat", "Reasoning"} and "router" not in bench
    counts = {name: each["pairs"] for name, each in bench["reward_bench"]["subsets"].items()}
    assert counts == {"mt-bench-easy": 4, "hep-go": 3}
    mine = run.json(checkpoints[0], "--preferences", own)["models"]["m0"]["reward_bench"]
    assert set(mine["sections"]) == {"my mt-bench-easy", "my hep-go"}
    assert mine["score"]["mean"] == pytest.approx(bench["reward_bench"]["score"]["mean"])
    code, out, _ = run(checkpoints[0], "--preferences", official)
    assert code == 0 and "Reasoning" in out and "score" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preferences", "DATA", "--best-of", "9"], "best-of-9 needs rankings with gold scores and 9 responses"),
        (["--preferences", "DATA", "--standardise", "DATA"], "--standardise is for an ensemble"),
        (["--preferences", "DATA", "--baseline"], "--baseline has no meaning for a reward model"),
        (["--preferences", "DATA", "--score", "exact"], "--score exact has no meaning for a reward model"),
        (["--preferences", "DATA", "--recipe", "dmoerm"], "--recipe has no meaning with --preferences"),
        (["--preferences", "DATA", "--out", "DATA"], "is a file: name a folder"),
        (["--preferences", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--preferences", "DATA", "data.kind=reasoning_gym"], "command line"),
        (["--tasks", "arc_easy", "--best-of", "2"], "--best-of has no meaning with --tasks"),
    ],
)
def test_what_cannot_be_judged_is_said_before_a_model_is_loaded(
    run: Run, data: Path, words: list[str], message: str
) -> None:
    # There is no such checkpoint, and it would be said if it were looked for.
    code, _, err = run("no/such/checkpoint", *[str(data) if word == "DATA" else word for word in words])
    assert code == 2 and message in " ".join(err.split()), err


def test_options_of_reward_models_need_rankings(run: Run, checkpoints: list[Path], data: Path, tmp_path: Path) -> None:
    asked = tmp_path / "q.jsonl"
    asked.write_text(json.dumps({"prompt": "1 + 1", "answer": "2"}) + "\n")
    code, _, err = run(checkpoints[0], f"data={{kind: dataset, path: {asked}, test_path: {asked}}}", "--best-of", "2")
    assert code == 2 and "--best-of is for reward models" in " ".join(err.split()), err


def test_a_mixture_is_no_reward_model(run: Run, data: Path, backbone_folder: Path, tmp_path: Path) -> None:
    import moelora

    backbone, _ = moelora.load_backbone(str(backbone_folder), quantization=None)
    moelora.attach(backbone, SITES).save_pretrained(tmp_path / "mixture")
    code, _, err = run(tmp_path / "mixture", "--preferences", data)
    assert code == 2 and "a mixture, but no reward model" in " ".join(err.split()), err


def test_plotly_is_asked_for_only_where_figures_are_drawn(
    run: Run, checkpoints: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert run.json(checkpoints[0], "--preferences", data)["rankings"] == 8
    code, _, err = run(checkpoints[0], "--preferences", data, "-o", tmp_path / "out")
    assert code == 2 and "moelora[viz]" in err and not (tmp_path / "out").exists()
