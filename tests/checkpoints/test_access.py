"""Finding a checkpoint on disk and on the hub, describing and converting it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError, ConfigError


def test_layouts_are_listed_and_described() -> None:
    assert {"mixlora", "native"} <= set(checkpoints.names())
    for name in checkpoints.names():
        assert len((checkpoints.LAYOUTS.get(name).__doc__ or "").splitlines()) > 10


def test_subfolder(native: Path) -> None:
    assert checkpoints.read(native.parent, subfolder="native").layout == "native"
    for subfolder in ("../native", "/..", "a/../..", "..\\x"):
        with pytest.raises(CheckpointError, match=r"without '\.\.'"):
            checkpoints.read(native, subfolder=subfolder)
    with pytest.raises(CheckpointError, match="found no folder"):
        checkpoints.read(native, subfolder="inner")


@pytest.mark.parametrize("path", ["./none", "/none", "~/none", "a/b/c", Path("none"), "not an id!"])
def test_no_such_folder(path: str | Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; expected the folder of a checkpoint, or a hub id"):
        checkpoints.read(path)


def test_a_file_in_place_of_a_folder(native: Path) -> None:
    with pytest.raises(CheckpointError, match=r"moelora\.safetensors.*give its folder"):
        checkpoints.read(native / "moelora.safetensors")


def test_a_run_in_place_of_a_checkpoint(native: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(native, run / "checkpoint-7")
    shutil.copytree(native, run / "checkpoint-12")
    (run / "checkpoint-12" / "moelora.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"several \(checkpoint-7, checkpoint-12\).*whole one is .*checkpoint-7$"):
        checkpoints.read(run)


def adapter(folder: Path, peft_type: str = "LORA", **tensors: torch.Tensor) -> Path:
    """What PEFT writes, or something that looks like it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type, "r": 2, "lora_alpha": 4}))
    if tensors:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_run_of_another_trainer(tmp_path: Path) -> None:
    for step in (100, 20):
        adapter(tmp_path / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match=r"found a run with several .*the newest is checkpoint-100$"):
        checkpoints.read(tmp_path)


def test_a_folder_of_adapters_in_place_of_one(tmp_path: Path) -> None:
    for name in ("maths", "code"):
        adapter(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a folder of 2 \(code, maths\): give one of them.*'moelora compose'"):
        checkpoints.read(tmp_path)


def test_an_adapter_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"known layout \(.*native.*peft_type 'LOHA', which is not read.*save_as_lora"
    ):
        checkpoints.read(adapter(tmp_path / "loha", "LOHA", x=torch.zeros(1)))


def test_an_adapter_with_tensors_of_other_names(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"tensors beside adapter_config\.json \(lora_Z, \.\.\.\) are named as in no"
    ):
        checkpoints.read(adapter(tmp_path / "odd", lora_Z=torch.zeros(1)))


def test_an_adapter_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors or .* beside adapter_config\.json, found neith"
    ):
        checkpoints.read(adapter(tmp_path / "half"))


def test_a_whole_model_in_place_of_a_mixture(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"found a whole model of type 'llama' \(.* GB in 1 files\) without one"):
        checkpoints.read(tmp_path)


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("{}")
    with pytest.raises(CheckpointError, match=r"in a known layout \(.*mixlora, .*native.*\), found notes\.txt"):
        checkpoints.read(tmp_path)


def test_files_of_two_layouts_are_told_apart_by_nobody(native: Path, mixlora: Path) -> None:
    shutil.copytree(mixlora, native, dirs_exist_ok=True)
    with pytest.raises(
        CheckpointError, match=r"of one layout, found those of 2: mixlora \(.*MIXLORA.*\) and native \("
    ):
        checkpoints.read(native)


def test_describe(native: Path, make_model: Any) -> None:
    model = make_model()
    found = checkpoints.describe(native)
    assert (found.layout, found.damage) == ("native", [])
    assert found.parameters == sum(p.numel() for p in model.adapter_tensors().values())
    assert found.dtypes == {"float32": found.parameters}
    assert [len(names) for names in found.sites] == [2, 4]
    assert found.bytes > 4 * found.parameters
    assert json.loads(json.dumps(found.to_dict()))["mixture"] == model.mixture.to_dict()
    (native / "README.md").write_text("edited")
    assert "README.md" in str(checkpoints.describe(native).damage)


def test_describe_a_published_checkpoint(fixtures: Path) -> None:
    found = checkpoints.describe(fixtures / "mixlora_legacy_gen0_w123")
    assert (found.layout, found.detail, found.damage) == ("mixlora", "generation 0", None)
    assert found.backbone.name == "tiny-llama" and found.architecture.hidden_act == "silu"
    assert found.sites[0] == ["model.layers.0.mlp", "model.layers.1.mlp"] and len(found.sites[1]) == 8


def test_convert_refuses_what_it_would_overwrite(native: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        checkpoints.convert(native, tmp_path / "full", to="native")
    (tmp_path / "empty").mkdir()
    checkpoints.convert(native, tmp_path / "empty", to="native")
    checkpoints.verify(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"unknown checkpoint layout 'pfet': known are .*mixlora, .*native"):
        checkpoints.convert(native, tmp_path / "other", to="pfet")


def test_converted_checkpoint_gives_the_same_logits(fixtures: Path, tmp_path: Path, reference_backbone: Any) -> None:
    checkpoints.convert(fixtures / "mixlora", tmp_path / "native", to="native")
    tokens = torch.arange(1, 9).view(1, 8)
    direct = moelora.from_pretrained(fixtures / "mixlora", backbone=reference_backbone)
    with torch.no_grad():
        expected = direct(input_ids=tokens).logits
    copy = type(reference_backbone).from_pretrained(fixtures / "backbone", dtype=torch.float32)
    converted = moelora.from_pretrained(tmp_path / "native", backbone=copy)
    with torch.no_grad():
        assert torch.equal(converted(input_ids=tokens).logits, expected)
