"""Checkpoints on the hub, against a server of this machine that answers as the hub does."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, FakeHub, Repository, serve
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError

Open = Callable[..., checkpoints.Stored]


@pytest.fixture
def hub(native: Path, mixlora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a native checkpoint, MixLoRA's, and a whole model."""
    disable_progress_bars()
    nested = tmp_path / "nested"
    shutil.copytree(native, nested / "inner" / "a[1]")
    shutil.copytree(mixlora, nested / "mix")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(
        {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(100, 1000) for i in range(4)}, plain / "model.safetensors"
    )
    repositories = {
        "owner/native": Repository(native, ("main", "v1")),
        "owner/mixlora": Repository(mixlora),
        "owner/private": Repository(native, access="private"),
        "owner/gated": Repository(native, access="gated"),
        "owner/nested": Repository(nested),
        "owner/plain": Repository(plain),
        "owner/broken": Repository(native, status=503),
        "owner/forbidden": Repository(native, status=403),
        "owner/busy": Repository(native, status=429),
    }
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve(repositories) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield served
        huggingface_hub.close_session()


@pytest.fixture
def read(hub: FakeHub, tmp_path: Path) -> Open:
    def opened(repo_id: str, **options: Any) -> checkpoints.Stored:
        return checkpoints.read(repo_id, **{"cache_dir": tmp_path / "cache", **options})

    return opened


@pytest.mark.parametrize("layout", ["native", "mixlora"])
def test_a_checkpoint_is_fetched_and_read(layout: str, read: Open, request: pytest.FixtureRequest) -> None:
    stored = read(f"owner/{layout}")
    here = checkpoints.read(request.getfixturevalue(layout))
    assert stored.layout == layout
    found, wanted = (each.tensors(each.declared()) for each in (stored, here))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_only_files_of_layouts_are_fetched(hub: FakeHub, read: Open, native: Path) -> None:
    (native / "optimizer.pt").write_bytes(b"0" * 1000)
    (native / "inner").mkdir()
    (native / "inner" / "moelora.safetensors").write_bytes(b"0")
    read("owner/native")
    fetched = {name.rpartition("/")[2] for name in hub.sent}
    assert fetched == {"README.md", "manifest.json", "moelora.safetensors", "moelora_config.json"}


def test_revision_is_a_name_or_a_commit(hub: FakeHub, read: Open) -> None:
    commit = hub.repositories["owner/native"].commit
    assert read("owner/native", revision="v1").folder.name == commit
    assert read("owner/native", revision=commit).folder.name == commit


def test_subfolder_of_a_repository(read: Open) -> None:
    assert read("owner/nested", subfolder="mix").layout == "mixlora"
    stored = read("owner/nested", subfolder="inner/a[1]/")
    assert stored.layout == "native" and stored.folder.parts[-2:] == ("inner", "a[1]")
    assert stored.tensors(stored.declared())


def test_what_was_fetched_once_is_read_without_the_hub(
    hub: FakeHub, read: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    read("owner/native")
    asked = len(hub.asked)
    assert read("owner/native", local_files_only=True).layout == "native"
    assert len(hub.asked) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read("owner/native").layout == "native"
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids asking the hub"):
        read("owner/mixlora")


def test_a_cache_with_enough_files_is_enough(
    hub: FakeHub, read: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else fetched the adapter and not the card, which is a file of a layout too."""
    hub.repositories["owner/mixlora"].folder.joinpath("README.md").write_text("a card")
    huggingface_hub.snapshot_download(
        "owner/mixlora", cache_dir=tmp_path / "cache", allow_patterns=["adapter_*"], endpoint=hub.endpoint
    )
    with caplog.at_level(logging.WARNING, "moelora"):
        assert read("owner/mixlora", local_files_only=True).layout == "mixlora"
    assert "some of its files are not in the cache" in caplog.text and "README.md" in caplog.text


def test_token_opens_what_is_private_or_gated(hub: FakeHub, read: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("owner/private", token=TOKEN).layout == "native"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert read("owner/gated").layout == "native"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "missing": ("owner/none", {}, "there is no such repository, or it is private: check the name; .*HF_TOKEN"),
    "private": ("owner/private", {}, "there is no such repository, or it is private"),
    "gated": ("owner/gated", {}, "only those who asked: ask for access on huggingface.co/owner/gated"),
    "wrong token": ("owner/private", {"token": "hf_wrong"}, "the hub does not accept the token: make a new one"),
    "wrong revision": ("owner/native", {"revision": "v2"}, "no revision 'v2': give a branch, a tag or a commit"),
    "wrong folder": (
        "owner/nested",
        {"subfolder": "outer"},
        "no such folder in this repository; it has inner/a.1., mix",
    ),
    "not fetched": ("owner/native", {"local_files_only": True}, "local_files_only is set, and the cache does not have"),
    "forbidden": ("owner/forbidden", {}, "the token may not read it"),
    "too many requests": ("owner/busy", {}, "too many requests from here: wait some minutes"),
    "out of order": ("owner/broken", {}, r"the hub itself fails \(HTTP 503\): try again later"),
}


@pytest.mark.parametrize(("repo_id", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_says_why(repo_id: str, options: dict[str, Any], message: str, read: Open) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(repo_id, **options)
    assert str(caught.value).startswith(repo_id)
    assert len(str(caught.value).splitlines()) == 1
    assert "hf_wrong" not in str(caught.value)


def test_a_hub_that_nothing_answers_for(read: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="the hub cannot be reached: check the network"):
        read("owner/native")


def test_token_true_without_a_token(read: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="token is True, but this machine has none"):
        read("owner/native", token=True)


def test_a_whole_model_named_by_mistake_is_not_fetched(hub: FakeHub, read: Open) -> None:
    with pytest.raises(CheckpointError, match=r"found a whole model of type 'llama' \(0\.0016 GB in 1 files\)"):
        read("owner/plain")
    assert hub.sent["owner/plain/model.safetensors"] <= 100_001, "its headers alone"


@pytest.fixture
def whole(hub: FakeHub, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A repository whose ``model.safetensors`` holds MeteoRA's tensors among those of a backbone."""
    experts = {"kind": "lora", "num_experts": 3, "r": 4}
    site = {"target": "q_proj", "experts": experts, "router": {"kind": "meteora", "top_k": 2}}
    weights = {f"base_model.model.{name}": value.clone() for name, value in tiny_llama.state_dict().items()}
    moelora.attach(tiny_llama, {"sites": [site]}).save_pretrained(tmp_path / "mixture")
    folder = tmp_path / "whole"
    checkpoints.convert(tmp_path / "mixture", folder, to="meteora")
    adapter = load_file(folder / "model.safetensors")
    sites = {key.removesuffix(".lora_A.weight") for key in adapter if key.endswith(".lora_A.weight")}
    for site in sites:
        weights[f"{site}.base_layer.weight"] = weights.pop(f"{site}.weight")
    save_file({**adapter, **weights}, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"0" * 1000)
    hub.repositories["owner/whole"] = Repository(folder)
    return folder


def test_weights_of_a_whole_model_are_fetched_where_they_hold_a_mixture(
    whole: Path, hub: FakeHub, read: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "moelora"):
        stored = read("owner/whole")
    assert stored.layout == "meteora"
    assert stored.tensors(stored.declared())
    size = (whole / "model.safetensors").stat().st_size
    assert hub.sent["owner/whole/model.safetensors"] >= size
    assert not any(name.endswith(".bin") for name in hub.sent)
    assert f"owner/whole is of layout meteora: fetching {size / 1e6:.1f} MB" in caplog.text
    assert read("owner/whole", local_files_only=True).layout == "meteora"


def shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write every other tensor into one file, the rest into another."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for index in range(2):
        name = f"model-0000{index + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[index::2])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_looked_at_before_they_are_fetched(whole: Path, hub: FakeHub, read: Open) -> None:
    tensors = load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    shard(whole, tensors)
    stored = read("owner/whole")
    assert stored.layout == "meteora" and stored.tensors(stored.declared())
    shard(whole.parent / "sharded", {f"{index}.weight": torch.zeros(100, 1000) for index in range(4)})
    hub.repositories["owner/sharded"] = Repository(whole.parent / "sharded")
    with pytest.raises(CheckpointError, match=r"found a whole model \(0\.0016 GB in 2 files\)"):
        read("owner/sharded")
    sent = [count for name, count in hub.sent.items() if name.startswith("owner/sharded/model-")]
    assert len(sent) == 2 and max(sent) <= 100_001, "the headers of both"


@pytest.mark.parametrize("named", [True, False], ids=["named", "found by their folders"])
def test_adapters_in_folders_of_a_repository_come_with_it(
    named: bool, hub: FakeHub, read: Open, tmp_path: Path
) -> None:
    folder = tmp_path / "xlora"
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "xlora_standalone_tiny_llama", folder)
    if not named:
        path = folder / "depth1_layerwise" / "xlora_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "adapters"}))
    hub.repositories["owner/xlora"] = Repository(folder)
    here = checkpoints.read(folder / "depth1_layerwise")
    stored = read("owner/xlora", subfolder="depth1_layerwise")
    found, wanted = (each.tensors(each.declared()) for each in (stored, here))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {name.split("/")[2] for name in hub.sent} == {"depth1_layerwise"}, "nothing of the others"
    assert sum("/revision/" in path for path in hub.asked) == 1, "all of one commit, should main move on meanwhile"


def test_a_folder_of_several_names_them(read: Open) -> None:
    with pytest.raises(CheckpointError, match=r"found a folder of 1 \(mix\): give one of them \(subfolder\)"):
        read("owner/nested")


def test_the_adapters_that_an_arrow_router_names_come_with_it(hub: FakeHub, read: Open, tmp_path: Path) -> None:
    fixture = Path(__file__).parents[1] / "fixtures" / "peft_arrow_tiny_llama"
    folder = tmp_path / "arrow"
    shutil.copytree(fixture / "saved_router", folder)
    for name in ("task_0", "task_1", "task_2", "task_3", "gen_0"):
        shutil.copytree(fixture / name, folder / name)
    hub.repositories["owner/arrow"] = Repository(folder)
    stored, here = read("owner/arrow"), checkpoints.read(folder)
    found, wanted = (each.tensors(each.declared()) for each in (stored, here))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {name.split("/")[2] for name in hub.sent} == {"arrow_router", "task_0", "task_1", "task_2", "task_3"}
