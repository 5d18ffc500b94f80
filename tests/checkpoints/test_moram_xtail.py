"""The layout of MoRAM's vision code: CLIP with the layers that this code computed (tests/fixtures/moram_layer)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.checkpoints.pickled import PickleFile
from moelora.errors import CheckpointError

ROOT = Path(__file__).parents[1] / "fixtures" / "moram_layer"
META: dict[str, Any] = json.loads((ROOT / "config.json").read_text())
LAYER = load_file(ROOT / "moram_layer.safetensors")
TOWER = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
MODULES = {
    "visual.transformer.resblocks.0.attn.q_proj": "vision_model.encoder.layers.0.self_attn.q_proj",
    "visual.transformer.resblocks.1.mlp.c_fc": "vision_model.encoder.layers.1.mlp.fc1",
    "transformer.resblocks.0.mlp.c_proj": "text_model.encoder.layers.0.mlp.fc2",
    "transformer.resblocks.1.attn.out_proj": "text_model.encoder.layers.1.self_attn.out_proj",
}
RANK = 4


def clip() -> CLIPModel:
    torch.manual_seed(0)
    words = {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**TOWER, **words}, vision_config={**TOWER, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    return CLIPModel(config).eval()


def saved(path: Path, tasks: int = 3, **ranks: Any) -> dict[str, Tensor]:
    """What ``torch_save_lora`` writes: a state dict filtered by name, and the ranks of each module."""
    generator = torch.Generator().manual_seed(1)
    plain = clip()
    state: dict[str, Tensor] = {}
    for theirs, ours in MODULES.items():
        linear = plain.get_submodule(ours)
        assert isinstance(linear, nn.Linear)
        old = RANK * (tasks - 1)
        shapes = {"lora_A": (RANK, linear.in_features), "lora_B": (linear.out_features, RANK)}
        if old:
            shapes |= {"old_lora_A": (old, linear.in_features), "old_lora_B": (linear.out_features, old)}
        state |= {f"{theirs}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        if old:
            state[f"{theirs}.gate"] = torch.zeros(1, RANK)
    sizes = {name: {"rank": RANK, "old_rank": RANK * (tasks - 1)} for name in MODULES} | ranks
    path.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": state, "lora_ranks": sizes}, path)
    return state


def update(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Their formula in evaluation, word for word from the README of the fixtures."""
    z = x @ A.T
    s = z / z.norm(dim=-1, keepdim=True)
    values, indices = s.topk(RANK, dim=-1)
    w = torch.full_like(s, -torch.inf).scatter(-1, indices, values).div(0.01).softmax(-1)
    return (z * w * (s >= 0.2)) @ B.T


def hook(A: Tensor, B: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda module, inputs, output: output + update(inputs[0], A, B)


INPUTS = {
    "input_ids": torch.tensor([[1, 5, 6, 7, 2, 0], [1, 5, 9, 7, 8, 2]]),
    "pixel_values": torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin(),
}


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("layouts", [[], ["native"], ["moram_xtail"], ["native", "moram_xtail"]], ids="-".join)
def test_clip_computes_what_the_formula_says(tasks: int, layouts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    state = saved(folder / "aircraft.pth", tasks)
    for step, layout in enumerate(layouts):
        checkpoints.convert(folder, tmp_path / str(step), to=layout)
        folder = tmp_path / str(step)
    plain = clip()
    with torch.no_grad():
        untouched = plain(**INPUTS).logits_per_image
        for theirs, ours in MODULES.items():
            old = [state[f"{theirs}.old_lora_{m}"] for m in "AB"] if tasks > 1 else []
            new = [state[f"{theirs}.lora_{m}"] for m in "AB"]
            A, B = (torch.cat([*old[i : i + 1], new[i]], dim=i) for i in (0, 1))
            plain.get_submodule(ours).register_forward_hook(hook(A, B))
        expected = plain(**INPUTS).logits_per_image
        found = moelora.from_pretrained(folder, clip())(**INPUTS).logits_per_image
    assert (found - expected).abs().max() <= 1e-5
    assert (found - untouched).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["task1_train", "task3_train_k8"])
def test_layer_is_the_authors_own(case: str, tmp_path: Path) -> None:
    about, site = META[case], "vision_model.encoder.layers.1.mlp.fc1"
    theirs = "visual.transformer.resblocks.1.mlp.c_fc"
    rank, A, B = about["rank_per_task"], LAYER[f"{case}.A_bank"], LAYER[f"{case}.B_bank"]
    assert about["topk"] == rank
    state = {f"{theirs}.lora_A": A[-rank:], f"{theirs}.lora_B": B[:, -rank:]}
    if about["num_tasks"] > 1:
        state |= {f"{theirs}.old_lora_A": A[:-rank], f"{theirs}.old_lora_B": B[:, :-rank]}
    ranks = {theirs: {"rank": rank, "old_rank": len(A) - rank}}
    torch.save(
        {"state_dict": {key: value.clone() for key, value in state.items()}, "lora_ranks": ranks}, tmp_path / "x.pth"
    )
    stored = checkpoints.read(tmp_path)
    # The temperature is an argument of their program, which the file does not have.
    entry = stored.mixture.sites[0]
    router = entry.router.model_copy(update={"temperature": about["temperature"]})
    stored.mixture = stored.mixture.model_copy(update={"sites": [entry.model_copy(update={"router": router})]})
    model = moelora.mixture.put_on(clip(), stored).train()
    layer = model.containers()[site]
    with torch.no_grad():
        layer.base.weight.copy_(LAYER[f"{case}.W"])
        layer.base.bias.copy_(LAYER[f"{case}.bias"])
        assert (layer(LAYER[f"{case}.x"]) - LAYER[f"{case}.y"]).abs().max() <= 1e-5


@pytest.mark.parametrize("layouts", [["moram_xtail"], ["native", "moram_xtail"]], ids="-".join)
def test_written_again_it_is_the_same_bit_for_bit(layouts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    state = saved(folder / "sun397.pth")
    for step, layout in enumerate(layouts):
        checkpoints.convert(folder, tmp_path / str(step), to=layout)
        folder = tmp_path / str(step)
    written = torch.load(folder / "moram.pth", weights_only=True)
    assert written.keys() == {"state_dict", "lora_ranks"}
    assert written["lora_ranks"] == {name: {"rank": 4, "old_rank": 8} for name in MODULES}
    assert written["state_dict"].keys() == {key for key in state if not key.endswith(".gate")}
    assert all(torch.equal(value, state[key]) for key, value in written["state_dict"].items())


def test_scales_are_multiplied_into_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = {
        "target": list(MODULES.values()),
        "experts": {"kind": "rank1", "num_experts": 2, "r": RANK, "alpha": [8, 2]},
        "router": {"kind": "moram", "top_k": RANK, "temperature": 0.01, "threshold": 0.2},
    }
    model = moelora.attach(clip(), {"sites": [site]}).eval()
    with torch.no_grad():
        for value in model.adapter_tensors().values():
            value.normal_()
        model.save_pretrained(tmp_path / "native")
        expected = model(**INPUTS).logits_per_image
        checkpoints.convert(tmp_path / "native", tmp_path / "out", to="moram_xtail")
        found = moelora.from_pretrained(tmp_path / "out", clip())(**INPUTS).logits_per_image
    assert (found - expected).abs().max() <= 1e-5
    assert "no scale for old_lora_B" in caplog.text and "no scale for lora_B" in caplog.text


def test_random_states_of_a_run_are_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path / "dtd.pth")
    torch.save({"python": (1, (2, 3)), "cpu": torch.get_rng_state()}, tmp_path / "rng_state.pth")
    os.mkfifo(tmp_path / "a.pth")  # nor is a pipe waited for
    assert checkpoints.read(tmp_path).layout == "moram_xtail"
    (tmp_path / "dtd.pth").unlink()
    with pytest.raises(CheckpointError, match=r"known layout .*, found a\.pth, rng_state\.pth"):
        checkpoints.read(tmp_path)


def test_files_of_several_tasks_are_named(tmp_path: Path) -> None:
    for name in ("dtd", "mnist"):
        saved(tmp_path / f"{name}.pth")
    with pytest.raises(CheckpointError, match=r"one file of a task, found dtd\.pth, mnist\.pth: .*a folder of its own"):
        checkpoints.read(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another rank": (
        {"transformer.resblocks.0.mlp.c_proj": {"rank": 5, "old_rank": 8}},
        "c_proj/rank: expected 4, found 5",
    ),
    "a module without tensors": ({"transformer.resblocks.9.mlp.c_fc": {"rank": 4, "old_rank": 0}}, "no such module"),
    "text": ({"transformer.resblocks.0.mlp.c_proj": {"rank": "4", "old_rank": 8}}, "expected 4, found '4'"),
}


@pytest.mark.parametrize(("ranks", "message"), REFUSED.values(), ids=REFUSED)
def test_ranks_that_do_not_agree_with_the_tensors_are_refused(
    ranks: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "x.pth", 3, **ranks)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("visual.transformer.resblocks.0.attn.in_proj", r"x\.pth: .*in_proj: expected a linear of CLIP's attention or"),
        ("visual.conv1", "unexpected: state_dict/visual.conv1.lora_A"),
    ],
)
def test_a_module_that_is_not_theirs_is_refused(key: str, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "x.pth")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    content["state_dict"] |= {f"{key}.lora_A": torch.zeros(4, 24), f"{key}.lora_B": torch.zeros(24, 4)}
    content["lora_ranks"][key] = {"rank": 4, "old_rank": 0}
    if key == "visual.conv1":
        del content["lora_ranks"][key]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(tmp_path)


ODD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a dict in two places": lambda content: content | {"again": content["lora_ranks"]},
    "a dict too deep": lambda content: content | {"a": {"b": {"c": {"d": 1}}}},
    "a list": lambda content: content | {"a": [1]},
    "a fraction": lambda content: content | {"a": 0.5},
    "a number for a name": lambda content: content | {"a": {1: 2}},
    "a name with a slash": lambda content: content | {"a": {"b/c": 2}},
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_a_file_with_more_than_dicts_of_tensors_and_whole_numbers_is_not_opened(
    change: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    saved(tmp_path / "x.pth")
    torch.save(change(torch.load(tmp_path / "x.pth", weights_only=True)), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"expected a torch\.save file with dicts of tensors, found"):
        PickleFile(tmp_path / "x.pth", depth=3)
    with pytest.raises(CheckpointError, match="expected a checkpoint in a known layout"):
        checkpoints.read(tmp_path)


def test_sites_outside_clip_are_not_written(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    site = {"target": "q_proj", "experts": {"kind": "rank1", "num_experts": 2, "r": 4}, "router": {"kind": "moram"}}
    moelora.attach(tiny_llama, {"sites": [site]}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj: expected a linear of CLIP's"):
        checkpoints.convert(tmp_path / "native", tmp_path / "out", to="moram_xtail")
