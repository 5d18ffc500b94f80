"""What a plan says against what is: counts of real models, bytes of real quantised weights, steps of a real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, CLIPModel

import moelora
from moelora.cli.launch_files import shipped
from moelora.clip import small_config
from moelora.config import Recipe, card_names, load_recipe
from moelora.errors import ConfigError, UserError
from moelora.planning import plan
from moelora.shapes import read_shape, sketch_backbone, storage_bytes
from moelora.sharing import read_sharing

PUBLISHED = Path(__file__).parents[1] / "scripts" / "published"


def recipe(folder: Path, **changes: Any) -> Recipe:
    sites = [
        {
            "target": "mlp",
            "experts": {"num_experts": 4, "r": 4, "alpha": 8},
            "router": {"kind": "topk", "top_k": 2},
        }
    ]
    backbone = {"name": str(folder), "quantization": "fp32"}
    return Recipe.parse({"backbone": backbone, "mixture": {"sites": sites}, **changes})


def seven(*overrides: str, name: str = "mixlora") -> Recipe:
    return load_recipe(PUBLISHED / f"{name}.yaml", overrides)


LLAMA = PUBLISHED / "shapes" / "llama-2-7b.json"


@pytest.fixture(scope="module")
def mixlora() -> Any:
    return plan(seven(), backbone_config=LLAMA)


def bytes_of(planned: Any, name: str) -> tuple[str, int]:
    piece = next(piece for piece in planned.memory if piece.name == name)
    return piece.place, piece.bytes


# -- parameters -------------------------------------------------------------------------------------------------------


def test_mixlora_on_llama_2_7b_has_the_known_number_of_parameters(mixlora: Any) -> None:
    assert sum(mixlora.trained.values()) == 203_423_744
    assert mixlora.trained["routers"] == 32 * 8 * 4096
    assert mixlora.frozen == {"backbone": 6_738_415_616}


def test_loramoe_on_llama_2_7b_has_the_published_share() -> None:
    trained = sum(plan(seven(name="loramoe"), backbone_config=LLAMA).trained.values())
    assert trained == 51_314_688  # 51.3 M, 0.76 %


@pytest.mark.parametrize("card", card_names())
def test_every_card_is_planned_as_it_is_built(card: str, tiny_llama: Any, tmp_path: Path) -> None:
    """On a tiny backbone: the counts of a plan are those of the model."""
    given = load_recipe(card, ["data=null", f"backbone.name={tmp_path}", "backbone.quantization=fp32"]).to_dict()
    tiny = tiny_llama
    if given["trainer"]["kind"] == "clip":
        tiny = CLIPModel(small_config()).requires_grad_(False)
    tiny.config.save_pretrained(tmp_path)
    for site in given["mixture"]["sites"]:
        site["layers"] = None  # those of a card may not be among two
    sites = given["mixture"]["sites"]
    given["mixture"]["sites"] = sites[:1] if len({str(site["target"]) for site in sites}) < len(sites) else sites
    read = Recipe.parse(given)
    planned = plan(read)
    built = read.trainer.attach(tiny, read.mixture)
    parameters = list(built.parameters())
    assert sum(planned.trained.values()) == sum(p.numel() for p in parameters if p.requires_grad)
    assert sum(planned.frozen.values()) == sum(p.numel() for p in parameters if not p.requires_grad)


def test_image_tasks_are_planned_over_both_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("MOELORA_CACHE", str(tmp_path))
    given = load_recipe("moram_clip", [f"trainer.args.deepspeed={shipped('deepspeed')['zero2'].read_text()}"])
    one, two = plan(given), plan(given, 2)
    assert not list(tmp_path.iterdir())  # the small model is not trained for it
    assert (two.data.examples, two.data.batch, two.data.steps) == (544, 64, None)
    assert 2 * bytes_of(two, "optimizer")[1] == bytes_of(one, "optimizer")[1] == 8 * one.trained["experts"]
    # 32 images of 17 tokens and 5 prompts of 16, in two layers of width 64 each.
    assert bytes_of(one, "activations")[1] == (32 * 17 + 5 * 16) * 2 * 4 * (10 * 64 + 4 * 128)
    absent = plan(load_recipe("moram_clip", ["data={kind: images, name: mtil, path: nowhere}"]))
    assert absent.data.examples is None and "nowhere" in absent.data.unknown[0]


def test_a_backbone_of_the_wrong_kind_is_not_planned(backbone_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a model of type 'llama', not a CLIP model"):
        plan(load_recipe("moram_clip", [f"backbone.name={backbone_folder}"]))
    CLIPModel(small_config()).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a causal language model"):
        plan(recipe(tmp_path))


def test_modules_that_are_trained_whole_are_counted_apart(backbone_folder: Path) -> None:
    given = recipe(backbone_folder)
    mixture = {**given.mixture.to_dict(), "modules_to_save": ["lm_head"]}
    planned = plan(recipe(backbone_folder, mixture=mixture))
    assert planned.trained["modules"] == 32 * AutoConfig.from_pretrained(backbone_folder).vocab_size


# -- the embedded default, and its NF4 --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf4", "int8", "fp32"])
def test_the_default_is_planned_as_it_is_stored(quantization: Any) -> None:
    """Of the real SmolLM2: parameters, and every byte of weights, scales and tables."""
    backbone = load_recipe("mixlora", [f"backbone.quantization={quantization}"]).backbone
    model, _ = moelora.load_backbone(backbone, tokenizer=False, local_files_only=True)
    planned = storage_bytes(sketch_backbone(backbone, read_shape(backbone), on_gpu=False), set())
    assert planned == sum(_real_bytes(module) for module in model.modules()) - _tied(model)


def _real_bytes(module: torch.nn.Module) -> int:
    total = sum(b.nbytes for b in module.buffers(recurse=False))
    for parameter in module.parameters(recurse=False):
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            second = state.state2
            total += sum(t.nbytes for t in (state.absmax, state.code, second.absmax, second.code, state.offset))
        if getattr(parameter, "SCB", None) is not None:
            total += parameter.SCB.nbytes
    return total


def _tied(model: Any) -> int:
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is embeddings
    return int(head.nbytes)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_without_deepspeed(mixlora: Any) -> None:
    trained = 203_423_744
    assert bytes_of(mixlora, "frozen weights") == ("device", pytest.approx(2 * 6_738_415_616, rel=1e-5))
    assert bytes_of(mixlora, "trained weights") == ("device", 4 * trained)
    assert bytes_of(mixlora, "gradients") == ("device", 4 * trained)
    assert bytes_of(mixlora, "optimizer") == ("device", 8 * trained)
    assert [piece.name for piece in mixlora.memory if piece.estimate] == ["activations"]


def test_nf4_takes_a_little_more_than_four_bits() -> None:
    planned = plan(seven("backbone.quantization=nf4"), backbone_config=LLAMA)
    linears = 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096
    rest = 2 * (2 * 32000 * 4096 + 65 * 4096)
    bits = 8 * (bytes_of(planned, "frozen weights")[1] - rest) / linears
    assert 4.127 < bits < 4.128


@pytest.mark.parametrize(
    ("name", "divided", "host"),
    [
        ("zero0", set(), set()),
        ("zero1", {"optimizer", "master weights"}, set()),
        ("zero2", {"optimizer", "master weights", "gradients"}, set()),
        ("zero2_offload", {"optimizer", "master weights", "gradients"}, {"optimizer", "master weights", "gradients"}),
        ("zero3", {"optimizer", "master weights", "gradients", "frozen weights", "trained weights"}, set()),
        (
            "zero3_offload",
            {"optimizer", "master weights", "gradients", "frozen weights", "trained weights"},
            {"optimizer", "master weights", "gradients", "frozen weights", "trained weights"},
        ),
    ],
)
def test_stages_divide_and_move_what_they_should(name: str, divided: set[str], host: set[str]) -> None:
    given = [
        f"trainer.args.deepspeed={shipped('deepspeed')[name]}",
        "mixture.sites.0.layers=[0]",
        "trainer.args.bf16=true",
    ]
    one, eight = (plan(seven(*given), world, LLAMA) for world in (1, 8))
    for piece in one.memory:
        if piece.name in ("activations", "gathered layers", "buckets"):
            continue
        place, size = bytes_of(eight, piece.name)
        assert size == pytest.approx(piece.bytes / (8 if piece.name in divided else 1), abs=1), piece.name
        assert place == ("host" if piece.name in host else "device"), piece.name


def test_half_precision_of_deepspeed_has_master_weights() -> None:
    args = {"deepspeed": str(shipped("deepspeed")["zero2"]), "bf16": True}
    assert read_sharing(args, 2).width == 2
    assert read_sharing({**args, "bf16": False}, 2).width == 4
    with pytest.raises(ConfigError, match="stage is 4"):
        read_sharing({"deepspeed": {"zero_optimization": {"stage": 4}}}, 2)


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(21)))
    return path


@pytest.mark.parametrize(("world", "accumulation", "epochs"), [(1, 1, 1), (1, 4, 2), (2, 1, 1), (2, 3, 1.5)])
def test_steps_are_those_of_the_trainer(
    backbone_folder: Path, rows: Path, world: int, accumulation: int, epochs: float
) -> None:
    """Against transformers' own reckoning, over the loader that accelerate cuts into shards."""
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "num_train_epochs": epochs}
    data = {"kind": "dataset", "path": str(rows), "test_fraction": 0.0}
    given = recipe(backbone_folder, data=data, trainer={"args": {**args, "use_cpu": True}})
    found = plan(given, world).data
    assert (found.examples, found.unknown) == (21, [])
    trainer = moelora.trainers.get("sft").prepare(given)  # type: ignore[attr-defined]
    assert found.tokens == trainer.train_dataset.num_tokens
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, DataLoader

    batches = BatchSampler(range(21), 2, drop_last=False)
    loader = DataLoader(range(21), batch_sampler=BatchSamplerShard(batches, world, 0))  # type: ignore[arg-type]
    assert found.steps == trainer.set_initial_training_values(trainer.args, loader)[-1]


def test_what_is_not_known_is_said(backbone_folder: Path, tmp_path: Path) -> None:
    data = {"kind": "dataset", "path": str(tmp_path / "nowhere.jsonl")}
    found = plan(recipe(backbone_folder, data=data)).data
    assert (found.examples, found.steps) == (None, None)
    assert "nowhere.jsonl" in found.unknown[0]
    assert plan(recipe(backbone_folder, trainer={"args": {"max_steps": 7}})).data.steps == 7


# -- where shapes come from -------------------------------------------------------------------------------------------


def test_a_hub_model_that_is_not_here_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"meta-llama/Llama-2-7b-hf' cannot be had.*--backbone-config"):
        plan(seven())


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no such file; give a config\.json"):
        plan(seven(), backbone_config=Path("nowhere"))


def test_shapes_come_from_a_folder_too(backbone_folder: Path) -> None:
    assert read_shape(seven().backbone, backbone_folder).hidden_size == 32


def test_an_embedded_default_needs_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOELORA_CACHE", str(tmp_path))
    planned = plan(load_recipe("mixlora", ["data=null"]))
    assert planned.frozen["backbone"] == 134_515_008
    assert not list(tmp_path.iterdir())


# -- what is printed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.yaml")), ids=lambda path: path.stem)
def test_published_recipes_are_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moelora.cli.app import main

    shape = "llama-2-7b" if "Llama-2" in path.read_text() else "llama-3-8b"
    words = ["--dry-run", "--backbone-config", str(PUBLISHED / "shapes" / f"{shape}.json")]
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path), *words])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert Recipe.parse(yaml.safe_load(printed)) == load_recipe(path)
    assert "# parameters trained" in printed
    assert "# memory of each device" in printed


def test_json_has_recipe_and_plan(backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moelora.cli.app import main

    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(backbone_folder).to_yaml())
    with pytest.raises(SystemExit) as ended:
        main(["launch", str(path), "--num-processes", "4", "--dry-run", "--json"])
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["plan"]["world"] == 4
    assert printed["plan"]["totals"]["trained"] == sum(printed["plan"]["trained"].values())
    assert Recipe.parse(printed["recipe"]) == recipe(backbone_folder)
