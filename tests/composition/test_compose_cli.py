"""``moelora compose`` in the process that the user would start: what it writes, says, and refuses."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compose_cases import LORA, by_hand, files_digest
from safetensors.torch import load_file
from skills import ANSWERS, examples

import moelora
from moelora import checkpoints
from moelora.cli.app import main
from moelora.composition.adapter import Adapter, read_adapter
from moelora.composition.general import subtract_general
from moelora.composition.weights import mean_loss
from moelora.composition.writing import write_peft
from moelora.data import Collator, tokenize

NAMES = list(ANSWERS)
ARGS = ["trainer.args.disable_tqdm=true", "trainer.args.use_cpu=true", "max_length=64"]


@pytest.fixture(autouse=True, scope="module")
def _process_as_before() -> Iterator[None]:
    logger = logging.getLogger("moelora")
    before = logger.handlers, logger.level, logger.propagate
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOMP_SPINCOUNT", "20000")
        yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": e.prompt, "answer": e.answer, "skill": e.task} for e in examples(*NAMES, count=7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert run("compose", *words, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def load(folder: Path, backbone: Path) -> moelora.MoELoRAModel:
    return moelora.from_pretrained(folder, backbone=str(backbone))


def loss(model: moelora.MoELoRAModel, *tasks: str) -> float:
    tokens = tokenize(examples(*tasks, count=6), model.tokenizer, 64, NAMES)
    batch = Collator(model.tokenizer.pad_token_id, with_task_ids=True)([tokens[i] for i in range(len(tokens))])
    return mean_loss(model, [batch])


def test_arrow_is_ready_at_once(
    skilled: list[Path], skill_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [files_digest(folder) for folder in skilled]
    out = tmp_path / "out"
    assert run("compose", *skilled, "--backbone", "auto", "-o", out, "router.top_k=1") == 0
    assert capsys.readouterr().out == f"wrote {out}: 2 adapters (apples, pears), router arrow at 6 linears\n"
    assert [files_digest(folder) for folder in skilled] == before
    checkpoints.verify(out)
    model = load(out, skill_backbone)
    [site] = model.mixture.sites
    assert (site.router.kind, site.router.top_k, site.experts.names) == ("arrow", 1, NAMES)
    same = moelora.compose(skilled, "arrow", "auto", top_k=1)
    for name, value in model.adapter_tensors().items():
        assert torch.equal(value, same.adapter_tensors()[name]) and value.any(), name


def test_the_card_names_the_adapters_and_how_to_make_it_again(
    skilled: list[Path], skill_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [*skilled, "--general", skilled[0], "--names", "a,b", "--backbone", skill_backbone, "--seed", "3"]
    assert run("compose", *words, "-o", out, "router.top_k=1") == 0
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "moelora" and {"composition", "arrow"} <= set(front["tags"])
    rank, modules = "4", "2 × q_proj, 2 × v_proj, 2 × down_proj"
    for index, (name, folder) in enumerate(zip("ab", skilled, strict=True)):
        assert re.search(rf"\| {index} \| {name} \| `{folder}` \| {rank} \| 8 \| [^|]*\| `{skill_backbone}`", text), (
            text
        )
    assert all(part in text for part in modules.split(", "))
    assert "taken off each of them (GenKnowSub, exact)" in text
    assert "top_k: 1" in text
    python = re.search(r"## Make it again\n\n```python\n(.*?)```", text, re.S)
    command = re.search(r"## Command\n\n```sh\n(.*?)\n```", text, re.S)
    assert python is not None and command is not None
    space: dict[str, Any] = {"moelora": moelora}
    exec(python[1], space)
    assert "--general" in command[1] and "--subtract" not in command[1], "what is as by default is not said"
    again = tmp_path / "again"
    rerun = shlex.split(command[1].replace(str(out), str(again)))
    assert rerun[:2] == ["moelora", "compose"] and run(*rerun[1:]) == 0
    first, second = load_file(out / "moelora.safetensors"), load_file(again / "moelora.safetensors")
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
    assert all(space["model"].adapter_tensors()[key].equal(first[key]) for key in first)


@pytest.mark.parametrize("router", ["meteora", "xlora", "topk", "phatgoose", "task"])
def test_gates_are_trained_on_a_mixed_set(
    router: str,
    skilled: list[Path],
    skill_backbone: Path,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    words = [*skilled, "--backbone", "auto", "-o", out, "--router", router, "--data", table, "--task-column", "skill"]
    found = as_json(capsys, *words, "--steps", "20", "--learning-rate", "0.03", *ARGS)
    assert found["router"]["kind"] == router and found["sites"] == 6
    assert [adapter["name"] for adapter in found["adapters"]] == NAMES
    assert [adapter["source"] for adapter in found["adapters"]] == [str(folder) for folder in skilled]
    assert found["training"]["steps"] == 20 and found["training"]["tasks"] == NAMES
    assert found["training"]["parameters"] == found["trainable_parameters"] > 0
    model = load(out, skill_backbone)
    listed = {path.name for path in out.iterdir()}
    assert listed == {"README.md", "manifest.json", "moelora.safetensors", "moelora_config.json"}
    for part in ("## Training", "max_steps: 20", "learning_rate: 0.03"):
        assert part in (out / "README.md").read_text()
    torch.manual_seed(0)
    fresh = moelora.compose(skilled, router, "auto")
    if router != "phatgoose":  # whose gates are trained apart from each other, not for their mix
        assert loss(model, *NAMES) < 0.8 * loss(fresh, *NAMES)
    for name, value in model.adapter_tensors().items():
        assert torch.equal(value, fresh.adapter_tensors()[name]) == (".router." not in name), name


def test_learned_weights_are_those_of_cat_trained_as_its_card_says(
    skilled: list[Path], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*skilled, "--backbone", "auto", "-o", tmp_path / "out", "--weights", "learned", "--data", table]
    found = as_json(capsys, *words, *ARGS)
    assert found["router"]["kind"] == "static" and found["router"]["weights"] == "learned"
    # The card of CAT says one epoch in batches of 10; one of the 14 examples is held out.
    assert found["training"]["steps"] == 2 and found["training"]["examples"] == 13


def test_the_router_task_has_a_place_for_every_task_of_the_data(
    skilled: list[Path], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with table.open("a") as file:
        file.write(json.dumps({"prompt": "figs 1", "answer": "fff", "skill": "figs"}) + "\n")
    words = [*skilled, "--backbone", "auto", "-o", tmp_path / "out", "--router", "task", "--data", table, "--steps", 1]
    found = as_json(capsys, *words, "--task-column", "skill", *ARGS)
    assert found["router"]["num_tasks"] == 3 and found["training"]["tasks"] == [*NAMES, "figs"]


def test_checkpoints_are_kept_where_they_are_asked_for(
    skilled: list[Path], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [*skilled, "--backbone", "auto", "-o", out, "--weights", "learned", "--data", table, "--steps", "2"]
    as_json(capsys, *words, *ARGS, "trainer.args.save_strategy=steps", "trainer.args.save_steps=1")
    assert checkpoints.latest(out) == out / "checkpoint-2"
    checkpoints.verify(out)


def test_weights_are_searched(
    skilled: list[Path], skill_backbone: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    only = table.with_name("pears.jsonl")
    only.write_text("".join(line + "\n" for line in table.read_text().splitlines() if "pears" in line))
    words = [*skilled, "--backbone", "auto", "-o", out, "--search", "--data", only, "max_length=64"]
    found = as_json(capsys, *words, "search.evaluations=24", "search.shots=4")
    assert found["search"]["weights"]["pears"] > 0.5 > found["search"]["weights"]["apples"]
    assert len(found["search"]["history"]) == 24 and found["search"]["examples"] == 4
    model = load(out, skill_backbone)
    router = model.mixture.sites[0].router
    assert router.weights == list(found["search"]["weights"].values()) and router.mix == "factors"
    with model.disable_experts():
        bare = loss(model, "pears")
    assert loss(model, "pears") < 0.3 * bare
    text = (out / "README.md").read_text()
    assert "## Search" in text and "evaluations: 24" in text
    assert "uniform" not in text.split("## Router")[1].split("## Search")[0], "the card has the weights that were found"


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_one_lora_is_written_for_peft(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["plain_r4_a8", "alllinear_r2_a4"]
    out = tmp_path / "one"
    words = [*(LORA / name for name in names), "--weights", "0.5,2", "--merge", method, "-o", out]
    found = as_json(capsys, *words, *(["merge.rank=3"] if method == "svd" else []))
    assert found["weights"] == [0.5, 2.0] and found["method"] == method
    assert found["distance"] < 1e-6 if method == "cat" else 0.05 < found["distance"] < 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and sorted(found["ranks"]) == ([2, 6] if method == "cat" else [2, 3])
    merged, parts = read_adapter(out), [by_hand(LORA / name) for name in names]
    for module, factors in merged.factors.items():
        terms = [(w, a.factors[module]) for w, a in zip((0.5, 2.0), parts, strict=True) if module in a.factors]
        wanted = sum(w * f.scale * f.B @ f.A for w, f in terms)
        off = (factors.scale * factors.B @ factors.A - wanted).norm() / wanted.norm()
        assert off < 1e-5 if method == "cat" else off < 0.9


def test_general_knowledge_can_be_taken_off_before_merging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["plain_r4_a8", "rslora_r4_a8", "plain_r4_a8_second"]
    first, second, common = (LORA / name for name in names)
    out = tmp_path / "one"
    as_json(capsys, first, second, "--general", common, "--merge", "cat", "--weights", "uniform", "-o", out)
    found = read_adapter(out)
    parts = subtract_general([by_hand(first), by_hand(second)], [by_hand(common)])
    for module, factors in found.factors.items():
        wanted = sum(p.factors[module].B @ p.factors[module].A for p in parts) / 2
        assert torch.allclose(factors.scale * factors.B @ factors.A, wanted, atol=1e-5)


def test_the_command_says_what_is_missing_in_an_adapter(
    skilled: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = read_adapter(skilled[1], "half")
    kept = {module: factors for module, factors in half.factors.items() if "q_proj" in module}
    write_peft(Adapter("half", kept, half.backbone, half.architecture), tmp_path / "half")
    assert run("compose", skilled[0], tmp_path / "half", "--backbone", "auto", "-o", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert said.count("'half' has nothing at 4 of 6 sites (2 x v_proj, 2 x down_proj)") == 1


def test_an_untrained_router_is_said_to_be_one_unless_it_is_trained(
    skilled: list[Path], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compose", *skilled, "--backbone", "auto", "--router", "topk"]
    assert run(*words, "-o", tmp_path / "a") == 0
    assert "parameters that nothing has trained yet" in capsys.readouterr().err
    assert run(*words, "-o", tmp_path / "b", "--data", table, "--steps", "1", *ARGS) == 0
    assert "nothing has trained" not in capsys.readouterr().err


def test_the_seed_decides_how_a_router_starts(
    skilled: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        as_json(capsys, *skilled, "--backbone", "auto", "--router", "topk", "-o", tmp_path / name, "--seed", seed)
    first, same, other = (load_file(tmp_path / name / "moelora.safetensors") for name in "abc")
    key = next(key for key in first if key.endswith("router.weight"))
    assert first[key].equal(same[key]) and not first[key].equal(other[key])


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["LORA", "-o", "OUT"], "expected two adapters or more, found 'apples'"),
        (["LORA", "LORA", "-o", "OUT"], "2 adapters are named 'apples'"),
        (["LORA", "LORA", "--names", "a,b", "-o", "OUT"], "'a' and 'b' are the same, number for number"),
        (["LORA", "nowhere/at/all", "-o", "OUT"], "nowhere/at/all: no such folder"),
        (["LORA", "OTHER", "-o", "OUT"], "pass backbone='auto'"),
        (["LORA", "OTHER", "-o", "TAKEN"], "expected a new or empty folder, found files in it"),
        (["LORA", "OTHER", "-o", "OUT", "--weights", "1,two"], "--weights '1,two': expected numbers"),
        (["LORA", "OTHER", "-o", "OUT", "--weights", "1", "--backbone", "auto"], "lists 1 weights for 2 experts"),
        (["LORA", "OTHER", "-o", "OUT", "--weights", "1,1", "--router", "arrow"], "router 'static', not 'arrow'"),
        (["LORA", "OTHER", "-o", "OUT", "--search"], "needs a few examples: name them with --data"),
        (["LORA", "OTHER", "-o", "OUT", "--steps", "5"], "nothing is trained: name examples with --data"),
        (["LORA", "OTHER", "-o", "OUT", "--learning-rate", "0"], "nothing is trained: name examples with --data"),
        (["LORA", "OTHER", "-o", "OUT", "--router", "arow"], "unknown router 'arow'"),
        (["LORA", "OTHER", "-o", "OUT", "router.topk=1", "--backbone", "auto"], "unknown key 'topk'"),
        (["LORA", "OTHER", "-o", "OUT", "ruoter.top_k=1"], "unknown key 'ruoter'"),
        (["LORA", "OTHER", "-o", "OUT", "--subtract", "roughly"], "subtract"),
        (["LORA", "OTHER", "-o", "OUT", "--merge", "svd", "--router", "arrow"], "router belongs to a mixture"),
        (["LORA", "OTHER", "-o", "OUT", "--merge", "swd"], "swd"),
        (["LORA", "OTHER", "-o", "OUT", "merge.rank=2"], "merge has options but no method"),
        (
            ["LORA", "OTHER", "-o", "OUT", "--data", "nowhere.jsonl", "--weights", "learned"],
            "nowhere.jsonl: no such file",
        ),
    ],
)
def test_a_mistake_is_one_paragraph_and_writes_nothing(
    words: list[str], message: str, skilled: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    names = {"LORA": skilled[0], "OTHER": skilled[1], "OUT": tmp_path / "out", "TAKEN": tmp_path / "taken"}
    assert run("compose", *[names.get(word, word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert f"error: {''}" in captured.err and message in captured.err
    assert not (tmp_path / "out").exists()


def test_data_for_a_router_that_learns_nothing_is_refused(
    skilled: list[Path], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compose", *skilled, "--backbone", "auto", "-o", tmp_path / "out", "--data", table) == 2
    assert "router 'arrow' has no parameters here, so there is nothing to train" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
