"""PEFT's layout of Arrow, on what PEFT saved (tests/fixtures/peft_arrow_tiny_llama) and against PEFT itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model
from peft_saves import altered, backbone, config, peft_saved, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError
from moelora.routers.arrow import ArrowRouter, top_right_singular

# PEFT asks transformers by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROOT = Path(__file__).parents[1] / "fixtures" / "peft_arrow_tiny_llama"
IO = load_file(ROOT / "io.safetensors")
INPUTS = {"input_ids": IO["input_ids"], "attention_mask": IO["attention_mask"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "top1_T1": {"top_k": 1},
    "top2_T1": {"top_k": 2},
    "top3_T05": {"top_k": 3, "router_temperature": 0.5},
    "top2_gks": {"top_k": 2, "use_gks": True, "gks_adapter_names": ["gks_0", "gks_1"]},
}
TASKS = [f"task_{index}" for index in range(4)]


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    result: Tensor = model(**INPUTS).logits
    return result


def saved(folder: Path, **options: Any) -> Path:
    """The fixture as PEFT saves all adapters of such a model, with other values in its arrow_config."""
    shutil.copytree(ROOT / "saved_router", folder)
    for name in TASKS:
        shutil.copytree(ROOT / name, folder / name)
    for index in (0, 1):
        shutil.copytree(ROOT / f"gen_{index}", folder / f"gks_{index}")
    return reconfigured(folder, **options)


def reconfigured(folder: Path, **options: Any) -> Path:
    path = folder / "arrow_router" / "adapter_config.json"
    values = json.loads(path.read_text())
    values["arrow_config"].update(options)
    path.write_text(json.dumps(values))
    return folder


def router_of(model: moelora.MoELoRAModel, site: str) -> ArrowRouter:
    router = model.containers()[site].router
    assert isinstance(router, ArrowRouter)
    return router


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("through", ["", "native", "peft_arrow"])
def test_logits_and_prototypes_are_those_that_peft_gave(name: str, through: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", **OPTIONS[name])
    if through:
        checkpoints.convert(folder, tmp_path / through, to=through)
        folder = tmp_path / through
    model = moelora.from_pretrained(folder, backbone())
    assert (logits(model) - IO[f"{name}.logits"]).abs().max() <= 1e-6
    for site in model.containers():
        theirs = IO[f"{name}.proto.base_model.model.{site}"]
        assert (router_of(model, site).prototypes - theirs).abs().max() <= 1e-5
    router = model.mixture.sites[0].router
    assert (router.method, router.n_iter, router.seed) == ("power", 15, 42)


@pytest.mark.parametrize("place", ["saved_router", "saved_router/arrow_router"])
def test_the_router_alone_finds_its_adapters_in_the_folders_around_it(place: str) -> None:
    model = moelora.from_pretrained(ROOT / place, backbone())
    assert (logits(model) - IO["top2_T1.logits"]).abs().max() <= 1e-6
    assert model.mixture.sites[0].experts.names == TASKS


@pytest.mark.parametrize("name", ["top2_T1", "top2_gks"])
def test_native_keeps_every_bit(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", **OPTIONS[name])
    stored = checkpoints.read(folder)
    expected = stored.tensors(stored.declared())
    checkpoints.convert(folder, tmp_path / "native", to="native")
    kept = load_file(tmp_path / "native" / "moelora.safetensors")
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[key], expected[key]) for key in expected)
    if name == "top2_T1":
        site = stored.sites()[0][0]
        pairs = [tensors(folder / task)[f"base_model.model.{site}.lora_A.weight"] for task in TASKS]
        assert torch.equal(kept[f"{site}.lora_A"], torch.cat(pairs))


def test_without_a_seed_prototypes_are_the_exact_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = moelora.from_pretrained(saved(tmp_path / "saved", rng_seed=None), backbone())
    assert model.mixture.sites[0].router.method == "exact"
    assert "no rng_seed: prototypes are the exact singular vectors here" in caplog.text
    for site, container in model.containers().items():
        for index in range(4):
            A, B = (
                container.experts.lora_A[4 * index : 4 * index + 4],
                container.experts.lora_B[:, 4 * index : 4 * index + 4],
            )
            assert torch.equal(router_of(model, site).prototypes[index], top_right_singular(A, B))


def test_scales_are_each_adapters_own(tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    kinds = [{"lora_alpha": 8}, {"use_rslora": True, "lora_alpha": 3}, {"alpha_pattern": {"0.self_attn.q_proj": 2}}]
    for index, options in enumerate(kinds):
        peft_saved(backbone(), tmp_path / f"task_{index}", **{"r": 4, "target_modules": targets, **options})
    made = create_arrow_model(
        backbone(),
        [str(tmp_path / f"task_{index}") for index in range(3)],
        ArrowConfig(top_k=2, rng_seed=7),
    ).eval()
    made.save_pretrained(str(tmp_path / "all"))
    model = moelora.from_pretrained(tmp_path / "all", backbone())
    assert (logits(model) - logits(made)).abs().max() <= 1e-5
    assert model.mixture.sites[0].experts.scaling == ["lora", "rslora", "lora"]


def test_peft_saves_task_adapters_twice_subtracted_after_a_forward(tmp_path: Path) -> None:
    """The quirk of the layout's description: what PEFT holds in memory is not what its files mean."""
    paths = [[str(ROOT / name) for name in names] for names in (TASKS, ["gen_0", "gen_1"])]
    made = create_arrow_model(backbone(), paths[0], ArrowConfig(top_k=2, rng_seed=42, use_gks=True), paths[1]).eval()
    made.save_pretrained(str(tmp_path / "before"))
    expected = logits(made)
    made.save_pretrained(str(tmp_path / "after"))
    assert (logits(moelora.from_pretrained(tmp_path / "before", backbone())) - expected).abs().max() <= 1e-6
    after = tmp_path / "after"
    assert (logits(moelora.from_pretrained(after, backbone())) - expected).abs().max() > 1e-2
    reconfigured(after, use_gks=False)
    assert (logits(moelora.from_pretrained(after, backbone())) - expected).abs().max() <= 1e-6


def test_peft_cannot_load_the_router_that_it_saved_itself() -> None:
    """Another quirk: its configuration forgets the names of the adapters, so only ``create_arrow_model`` remains."""
    read = LoraConfig.from_pretrained(str(ROOT / "saved_router" / "arrow_router"))
    assert config(ROOT / "saved_router" / "arrow_router")["arrow_config"]["task_adapter_names"] == TASKS
    assert read.arrow_config.task_adapter_names is None


def test_a_hub_repository_is_asked_for_the_adapters_that_its_router_names() -> None:
    layout = checkpoints.LAYOUTS.create("peft_arrow")
    names = layout.further_files(checkpoints.folder.Folder(ROOT / "saved_router"))
    assert "task_3/adapter_model.safetensors" in names
    assert not any(name.startswith("..") for name in names)


# -- writing ---------------------------------------------------------------------------------------------------------


ARROW = {"kind": "arrow", "top_k": 2, "method": "power", "seed": 5}


def mixture(experts: dict[str, Any] | None = None, router: dict[str, Any] | None = None) -> dict[str, Any]:
    site = {
        "target": ["q_proj", "v_proj", "down_proj"],
        "experts": {"kind": "frozen", "num_experts": 3, "r": 2, "alpha": 6, **(experts or {})},
        "router": ARROW if router is None else router,
    }
    return {"sites": [site]}


def filled(given: dict[str, Any], folder: Path) -> moelora.MoELoRAModel:
    """A mixture with random experts, saved in the native layout."""
    model = moelora.attach(backbone(), given).eval()
    with torch.no_grad():
        for container in model.containers().values():
            for parameter in container.experts.parameters():
                parameter.normal_(std=0.3)
    model.fit_routers()
    model.save_pretrained(folder)
    return model


WRITTEN: dict[str, dict[str, Any]] = {
    "lora": mixture(),
    "rslora and numbers": mixture(experts={"scaling": ["rslora", 0.7, "lora"], "alpha": [6, 1, 3]}),
    "trained experts": mixture(experts={"kind": "rslora"}, router={**ARROW, "temperature": 0.5}),
    "ranks by site": mixture(experts={"rank_pattern": {"v_proj": [3, 3, 3]}, "alpha_pattern": {"0.mlp.down_proj": 2}}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_stock_peft_makes_the_same_of_what_is_written(name: str, tmp_path: Path) -> None:
    model = filled(WRITTEN[name], tmp_path / "native")
    checkpoints.convert(tmp_path / "native", tmp_path / "arrow", to="peft_arrow")
    router = model.mixture.sites[0].router
    paths = [str(tmp_path / "arrow" / f"task_{index}") for index in range(3)]
    options = ArrowConfig(top_k=router.top_k, router_temperature=router.temperature, rng_seed=router.seed)
    assert (logits(create_arrow_model(backbone(), paths, options).eval()) - logits(model)).abs().max() <= 1e-5
    again = moelora.from_pretrained(tmp_path / "arrow", backbone())
    assert torch.equal(logits(again), logits(model))
    ours, theirs = again.adapter_tensors(), model.adapter_tensors()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "exact prototypes": (mixture(router={**ARROW, "method": "exact"}), "by 15 steps of power iteration from seed 5"),
    "more steps": (mixture(router={**ARROW, "n_iter": 60}), "those of this mixture are others"),
    "another router": (mixture(router={"kind": "topk", "top_k": 2}), "its router is arrow, found topk"),
    "mixed factors": (mixture(router={**ARROW, "mix": "factors"}), "found mix: factors"),
    "ragged ranks": (mixture(experts={"r": [2, 3, 2]}), r"one rank above 0, found \[2, 3\]"),
    "no rank": (mixture(experts={"rank_pattern": {"0.self_attn.q_proj": [0, 2, 2]}}), "one rank above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_arrow_of_peft_cannot_express_is_not_written(name: str, tmp_path: Path) -> None:
    given, message = REFUSED[name]
    filled(given, tmp_path / "native")
    with pytest.raises(CheckpointError, match=f"'peft_arrow' cannot express this mixture: .*{message}"):
        checkpoints.convert(tmp_path / "native", tmp_path / "arrow", to="peft_arrow")


# -- what is not read ------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.rmtree(folder / name)


def with_tensors(name: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = folder / name / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return write


def replaced(name: str, **options: Any) -> Callable[[Path], object]:
    """Another adapter in the place of one."""

    def make(folder: Path) -> None:
        shutil.rmtree(folder / name)
        targets = ["q_proj", "v_proj", "down_proj"]
        peft_saved(backbone(), folder / name, **{"r": 4, "lora_alpha": 8, "target_modules": targets, **options})

    return make


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter that is not there": (without("task_2"), "task_adapter_names: .*found 'task_2' and no adapter_config"),
    "half an adapter": (
        with_tensors("task_2", lambda found: found.pop(KEY.replace("_A", "_B"))),
        f"missing: {KEY.replace('_A', '_B')}",
    ),
    "a general adapter that is not there": (without("gks_1"), "gks_adapter_names: .*found 'gks_1'"),
    "no general adapter": (lambda folder: reconfigured(folder, gks_adapter_names=[]), "use_gks is true"),
    "magnitudes": (replaced("task_1", use_dora=True), "expected a plain LoRA adapter.*experts of kind dora"),
    "another rank": (replaced("task_1", r=3), "expected what 'task_0' has there, rank 4.*found rank 3"),
    "fewer linears": (replaced("task_1", target_modules=["q_proj", "v_proj"]), "rank 4, 64 to 32, found nothing"),
    "a linear more": (
        replaced("gks_1", target_modules=["q_proj", "v_proj", "down_proj", "up_proj"]),
        "up_proj: expected what 'task_0' has there, nothing, found rank 4",
    ),
    "placeholders for other adapters": (
        with_tensors("arrow_router", lambda found: found.pop(KEY)),
        "the router's placeholders are not at the linears",
    ),
    "a name that leads elsewhere": (
        lambda folder: reconfigured(folder, task_adapter_names=["../../etc"]),
        "task_adapter_names.0: ",
    ),
    "no names": (lambda folder: reconfigured(folder, task_adapter_names=[]), "task_adapter_names: "),
    "too many choices": (lambda folder: reconfigured(folder, top_k=5), "top_k"),
    "an unknown option": (lambda folder: reconfigured(folder, router_bias=0.5), "router_bias: 0.5"),
    "numbers that are not finite": (
        with_tensors("gks_0", lambda found: found[KEY].fill_(torch.inf)),
        f"not finite: task_0/{KEY}",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_or_belongs_to_other_adapters_is_refused(name: str, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    folder = saved(tmp_path / "saved", **OPTIONS["top2_gks"])
    change(folder)
    model = backbone()
    with pytest.raises(CheckpointError, match=message):
        moelora.from_pretrained(folder, model)
    assert torch.equal(logits(model), logits(backbone()))


def test_an_arrow_config_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    folder = altered(ROOT / "saved_router" / "arrow_router", tmp_path / "arrow_router", arrow_config=[1])
    with pytest.raises(CheckpointError, match="arrow_config: expected a mapping"):
        checkpoints.read(folder)
    assert config(folder)["arrow_config"] == [1]
