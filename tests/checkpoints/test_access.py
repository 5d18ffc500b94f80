"""Finding a checkpoint on disk and on the hub, describing and converting it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from moelora import checkpoints
from moelora.checkpoints import access
from moelora.errors import CheckpointError, ConfigError


def test_layouts_are_listed_and_described() -> None:
    assert {"mixlora", "native"} <= set(checkpoints.names())
    for name in checkpoints.names():
        assert len((checkpoints.LAYOUTS.get(name).__doc__ or "").splitlines()) > 10


def as_snapshot(folder: Path, cache: Path) -> Path:
    """The way the hub's cache lays out a download: links into a folder of blobs."""
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for index, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, cache / "blobs" / str(index))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(index)))
    return snapshot


@pytest.mark.parametrize("layout", ["native", "mixlora"])
def test_hub_snapshot(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Only the files of known layouts are asked for, and links into the cache are followed."""
    folder: Path = request.getfixturevalue(layout)
    asked: dict[str, Any] = {}

    def download(repo_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(as_snapshot(folder, tmp_path / "cache"))

    monkeypatch.setattr(access, "snapshot_download", download)
    stored = checkpoints.read("owner/name", revision="v1", token="t")
    assert stored.layout == layout and stored.tensors(stored.declared())
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("owner/name", "v1", "t")
    assert set(asked["allow_patterns"]) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.bin",
        "adapter_model.safetensors",
        "manifest.json",
        "moelora.safetensors",
        "moelora_config.json",
    }


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


def test_not_on_the_hub_either(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="check the name, the network"):
        checkpoints.read("moelora/none", cache_dir=tmp_path, local_files_only=True)


def test_a_file_in_place_of_a_folder(native: Path) -> None:
    with pytest.raises(CheckpointError, match=r"moelora\.safetensors.*give its folder"):
        checkpoints.read(native / "moelora.safetensors")


def test_a_run_in_place_of_a_checkpoint(native: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    native.rename(run / "checkpoint-7")
    with pytest.raises(CheckpointError, match=r"the newest whole one is .*checkpoint-7"):
        checkpoints.read(run)


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"known layout \(.*mixlora: adapter_config\.json.*found config\.json"):
        checkpoints.read(tmp_path)


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
