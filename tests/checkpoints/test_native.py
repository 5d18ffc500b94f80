"""The native layout: round trips, what is in the folder, what is kept, failures at every step of a save."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora import checkpoints, files
from moelora.errors import CheckpointError

MakeModel = Callable[[], moelora.MoELoRAModel]


def backbone_of(model: moelora.MoELoRAModel) -> LlamaForCausalLM:
    """The same random backbone, without experts."""
    torch.manual_seed(0)
    return LlamaForCausalLM(model.config)


@pytest.mark.smoke
def test_round_trip_is_exact(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    tokens = torch.arange(1, 9).view(1, 8)
    model.save_pretrained(tmp_path / "model")
    loaded = moelora.from_pretrained(tmp_path / "model", backbone=backbone_of(model))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert loaded.mixture == model.mixture


def test_what_is_in_the_folder(make_model: MakeModel, native: Path) -> None:
    model = make_model()
    assert sorted(path.name for path in native.iterdir()) == [
        "README.md",
        "manifest.json",
        "moelora.safetensors",
        "moelora_config.json",
    ]
    tensors = load_file(native / "moelora.safetensors")
    assert set(tensors) == set(model.adapter_tensors())
    config = json.loads((native / "moelora_config.json").read_text())
    assert config["format_version"] == 1 and config["moelora"] == moelora.__version__
    assert config["sites"][0] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert config["architecture"]["hidden_size"] == 32
    assert "| mlp | 2 | 4 × lora, r = 2 | topk |" in (native / "README.md").read_text()
    assert {path.stat().st_mode & stat.S_IROTH for path in (native, *native.iterdir())} == {stat.S_IROTH}


def test_saving_is_deterministic(make_model: MakeModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_model().save_pretrained(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_saving_into_the_working_folder(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained(".")
    make_model().save_pretrained("inner")
    checkpoints.verify(".")
    assert checkpoints.read("inner").layout == "native"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_on_disk(dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    for container in model.containers().values():
        container.experts.to(dtype)
    model.save_pretrained(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "moelora.safetensors")
    state = model.adapter_state()
    assert all(saved[name].dtype == value.dtype and torch.equal(saved[name], value) for name, value in state.items())
    loaded = moelora.from_pretrained(tmp_path / "model", backbone=backbone_of(model)).adapter_state()
    assert all(torch.equal(loaded[name], value.float()) for name, value in state.items())


def test_card(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "model", card="# mine\n")
    assert (tmp_path / "model" / "README.md").read_text() == "# mine\n"
    for card in (b"# mine\n", "# größer\n".encode("latin-1")):
        (tmp_path / "model" / "README.md").write_bytes(card)
        model.save_pretrained(tmp_path / "model")  # a card that is there is kept
        assert (tmp_path / "model" / "README.md").read_bytes() == card


def test_files_of_others_stay(make_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "events").write_text("x")
    (folder / "trainer_state.json").write_text("{}")
    model = make_model()
    model.save_pretrained(folder)
    model.save_pretrained(folder)
    assert (folder / "logs" / "events").read_text() == "x" and (folder / "trainer_state.json").read_text() == "{}"
    assert moelora.from_pretrained(folder, backbone=backbone_of(model)).mixture == model.mixture


def test_saving_into_a_committed_checkpoint_keeps_its_manifest_entries(make_model: MakeModel, tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-1"
    with files.staged(final) as staging:
        make_model().save_pretrained(staging)
        (staging / "optimizer.pt").write_bytes(b"state")
        checkpoints.commit(staging, final)
    make_model().save_pretrained(final)
    checkpoints.verify(final)
    (final / "optimizer.pt").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        checkpoints.verify(final)
    assert checkpoints.read(final).layout == "native"  # the adapter itself is whole


def test_a_model_that_diverged_is_not_saved(make_model: MakeModel, native: Path) -> None:
    before = {path.name: path.read_bytes() for path in native.iterdir()}
    model = make_model()
    name, parameter = next(iter(model.adapter_tensors().items()))
    with torch.no_grad():
        parameter.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="diverged") as caught:
        model.save_pretrained(native)
    assert f"{name} ({parameter.numel()} elements)" in str(caught.value)
    assert {path.name: path.read_bytes() for path in native.iterdir()} == before


def test_too_little_space(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 40_000)
    with pytest.raises(CheckpointError, match=r"need 1\.\d MB, have 0\.0 MB at .*free some space"):
        make_model().save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_file_is_in_the_way(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(CheckpointError, match="a checkpoint is a folder: choose another path"):
        make_model().save_pretrained(tmp_path / "model")


class Faults:
    """Makes the n-th call of any of the system's functions that saving uses fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
        self.error = error
        self.at = -1
        self.calls = 0
        for owner, name in [(os, "rename"), (os, "replace"), (os, "fsync"), (Path, "mkdir"), (Path, "write_text")]:
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name)))
        monkeypatch.setattr(checkpoints.native, "save_file", self.failing(checkpoints.native.save_file))

    def failing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise OSError(self.error, os.strerror(self.error), str(args[0]))
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("there", [False, True])
def test_failure_at_every_step(
    there: bool, error: int, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    old, new = make_model(), make_model()
    with torch.no_grad():
        for parameter in new.adapter_tensors().values():
            parameter.add_(1)

    def read() -> dict[str, Tensor]:
        stored = checkpoints.read(folder)
        return stored.tensors(stored.declared())

    def equal(values: dict[str, Tensor], model: moelora.MoELoRAModel) -> bool:
        return all(torch.equal(values[name], value) for name, value in model.adapter_state().items())

    faults = Faults(monkeypatch, error)
    failures = 0
    while True:
        if there:
            faults.at = -1
            old.save_pretrained(folder)
        faults.calls, faults.at = 0, failures + 1
        try:
            new.save_pretrained(folder)
        except CheckpointError as caught:
            failures += 1
            assert str(folder) in str(caught) and os.strerror(error) in str(caught)
        else:
            break
        faults.at = -1
        assert not list(tmp_path.rglob(f"{files.SAVING}*"))
        # Once the new files are whole the move goes on later; until then nothing has changed.
        moved = (folder / files.PENDING).exists()
        if folder.exists():
            values = read()
            assert equal(values, new) if moved else equal(values, old) or equal(values, new)
            assert not (folder / files.PENDING).exists()
            checkpoints.verify(folder)
        if not there and folder.exists():
            break  # the rename was done, only bringing it to disk failed
    assert failures >= 8
    assert equal(read(), new)


def test_a_regular_expression_is_not_run_when_loading(tiny_config: LlamaConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sites = [{"target": r"re:model\.layers\.\d+\.self_attn\.[qv]_proj", "experts": {"num_experts": 1, "r": 2}}]
    model = moelora.attach(LlamaForCausalLM(tiny_config), {"sites": sites})
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "moelora_config.json"
    values = json.loads(path.read_text())
    values["mixture"]["sites"][0]["target"] = ["re:(((a+)+)+)+$"]
    path.write_text(json.dumps(values))
    checkpoints.manifest.write(tmp_path / "model")
    loaded = moelora.from_pretrained(tmp_path / "model", backbone=LlamaForCausalLM(tiny_config))
    assert list(loaded.containers()) == list(model.containers())


def test_the_wrong_backbone_is_named_before_anything_is_attached(native: Path, tiny_config: LlamaConfig) -> None:
    tiny_config.num_hidden_layers, tiny_config.hidden_size = 3, 64
    with pytest.raises(CheckpointError) as caught:
        moelora.from_pretrained(native, backbone=LlamaForCausalLM(tiny_config))
    for part in ("hidden_size: expected 32, found 64", "num_hidden_layers: expected 2, found 3", "load it on"):
        assert part in str(caught.value)
