"""An adapter of the size that one has on Llama-2-7B: how many numbers it has, and what memory loading it takes.

By default a part of the layers is loaded, which takes seconds; ``MOELORA_SCALE_LAYERS=32`` loads all of them, 814 MB.
Measured with that, of the process, Python and libraries (361 MB) included: at most 1.37 GB from .bin, 1.23 GB from
.safetensors, of which 1.13 GB are not pages of files. Mapping the files and leaving them mapped took 2.04 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scale import backbone, tensors
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora.checkpoints import pickled
from moelora.checkpoints.reading import open_tensors
from moelora.errors import CheckpointError

LAYERS = int(os.environ.get("MOELORA_SCALE_LAYERS", "12"))
SCRIPT = Path(__file__).parent / "scale.py"
PER_LAYER = 8 * 4096 + 4 * 16 * (4096 + 4096) + 3 * 8 * 16 * (4096 + 11008)
LORAMOE = Path(__file__).parents[1] / "fixtures" / "loramoe_tiny"

needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells these figures")


def run(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(moelora.__file__).parents[1])}
    command = [sys.executable, str(SCRIPT), *arguments, str(LAYERS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    run("write", str(folder))
    return folder


@needs_linux
@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_loading_takes_less_than_twice_the_adapters_size(form: str, adapter: Path) -> None:
    found: dict[str, Any] = json.loads(run("load", str(adapter / form)).splitlines()[-1])
    assert found["parameters"] == LAYERS * PER_LAYER and found["adapter"] == 4 * LAYERS * PER_LAYER
    assert found["devices"] == ["cpu"]
    file = open_tensors(next((adapter / form).glob("adapter_model.*")))
    for which, total in zip("AB", found["sums"], strict=True):
        keys = [f"mixlora.layers.{LAYERS - 1}.mlp.down_proj.experts.{e}.lora_{which}.weight" for e in range(8)]
        assert total == pytest.approx(sum(value.double().sum().item() for value in file.read(keys).values()), rel=1e-12)
    # The whole process once the adapter outweighs the libraries; what it takes more than before in any case.
    assert found["peak"] - found["before"] < 2 * found["adapter"]
    if LAYERS == 32:
        assert found["anonymous"] < found["peak"] < 2 * found["adapter"]


def test_mixlora_has_203_million_parameters_on_llama_2_7b() -> None:
    assert sum(value.numel() for value in tensors(1).values()) == PER_LAYER == 6_356_992
    frozen = sum(parameter.numel() for parameter in backbone(32).parameters())
    assert (frozen, 32 * PER_LAYER) == (6_738_415_616, 203_423_744)
    assert round(100 * 32 * PER_LAYER / (frozen + 32 * PER_LAYER), 1) == 2.9


def test_on_a_backbone_without_numbers_the_adapter_has_its_own() -> None:
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig.from_pretrained(LORAMOE / "backbone"))
    plain = LlamaForCausalLM.from_pretrained(LORAMOE / "backbone", dtype=torch.float32)
    ours, theirs = (moelora.from_pretrained(LORAMOE / "loramoe_n8_noblc", model) for model in (empty, plain))
    values, wanted = ours.adapter_state(), theirs.adapter_state()
    assert values.keys() == wanted.keys() and all(torch.equal(values[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_what_is_read_is_no_view_of_the_file(name: str, tmp_path: Path) -> None:
    values = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
    (torch.save if name.endswith("bin") else save_file)(values, tmp_path / name)
    file = open_tensors(tmp_path / name)
    file.read(["a"])["a"].zero_()
    assert torch.equal(file.read(["a"])["a"], values["a"]) and torch.equal(file.load(["a"])["a"], values["a"])


def test_a_pickle_is_mapped_anew_and_refused_if_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "_MAX_MAPPED_BYTES", 20)
    maps = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: maps.append(1) or load(*args, **kwargs))
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.ones(4), "b": torch.zeros(4)}, path)
    file = open_tensors(path)
    for count in (1, 1, 2, 2, 3):  # 16 bytes each: after every second the file is let go
        assert torch.equal(file.read(["a"])["a"], torch.ones(4)) and len(maps) == count
    assert len(maps) == 3
    file.read(["b"])
    torch.save({"a": torch.full((4,), 7.0), "b": torch.zeros(4)}, tmp_path / "other")
    os.replace(tmp_path / "other", path)
    with pytest.raises(CheckpointError, match="was replaced while it was being read"):
        file.read(["a"])


def test_a_safetensors_file_is_read_as_it_was_when_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.ones(4)}, path)
    file = open_tensors(path)
    save_file({"a": torch.zeros(4)}, tmp_path / "other")
    os.replace(tmp_path / "other", path)
    assert torch.equal(file.read(["a"])["a"], torch.ones(4)) and torch.equal(file.load(["a"])["a"], torch.ones(4))
