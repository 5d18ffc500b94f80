"""GGUF adapters: how llama.cpp's converter is run, and what is made of its answers.

Most tests run a stand-in for the converter. With the environment variable LLAMA_CPP, the folder of llama.cpp, the last
ones run the converter itself, which takes half a minute each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from export_cases import STATIC, TOPK, attached, site
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from moelora.composition import Gguf, export_experts, export_lora, read_adapter
from moelora.errors import ConfigError, UserError

LLAMA_CPP = os.environ.get("LLAMA_CPP")
# Writes its command line and then a file as the real one does, but for the names of tensors.
STAND_IN = """
import json, sys
from pathlib import Path
import gguf
from safetensors.numpy import load_file
given = dict(zip(sys.argv[1:-1:2], sys.argv[2:-1:2]))
folder = Path(sys.argv[-1])
config = json.loads((folder / "adapter_config.json").read_text())
Path("LOG").write_text(json.dumps({"argv": sys.argv[1:], "config": config}))
CHANGE
writer = gguf.GGUFWriter(given["--outfile"], "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
for key, value in load_file(folder / "adapter_model.safetensors").items():
    name = key.replace("base_model.model.", "").replace(".lora_A.weight", ".weight.lora_a")
    writer.add_tensor(name.replace(".lora_B.weight", ".weight.lora_b"), value)
for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
    step()
writer.close()
"""


@pytest.fixture(autouse=True)
def _no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)


def stand_in(folder: Path, change: str = "") -> Path:
    """A folder with a stand-in for the converter, which does ``change`` before it writes."""
    folder.mkdir(exist_ok=True)
    text = STAND_IN.replace("LOG", str(folder / "log.json")).replace("CHANGE", change)
    (folder / "convert_lora_to_gguf.py").write_text(text)
    return folder


def base(backbone: Any, folder: Path) -> Path:
    backbone.config.save_pretrained(folder)
    return folder


def tensors(path: Path) -> dict[str, np.ndarray]:
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def alpha(path: Path) -> float:
    return float(gguf.GGUFReader(path).get_field("adapter.lora.alpha").contents())


def test_the_converter_gets_a_peft_folder_and_the_backbones_configuration(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    llama = stand_in(tmp_path / "llama")
    config = base(tiny_llama, tmp_path / "base")
    model = attached(tiny_llama, site("q_proj", "lora", STATIC))
    done = export_lora(model, tmp_path / "out", gguf=Gguf(llama, base=config, outtype="f32"))
    assert done.form == "gguf" and done.adapters[0].file == "out.gguf" and done.adapters[0].exact
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "out.gguf"]
    argv = json.loads((llama / "log.json").read_text())["argv"]
    assert argv[1].endswith("out.gguf")
    assert [argv[0], *argv[2:6]] == ["--outfile", "--outtype", "f32", "--base", str(config)] and len(argv) == 7
    assert not Path(argv[6]).exists(), "the PEFT folder was for the converter alone"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'library_name: "gguf"' in card and "--lora out.gguf" in card and "up to rounding" in card


def test_each_expert_is_a_file_and_the_environment_names_the_converter(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP", str(stand_in(tmp_path / "llama")))
    model = attached(tiny_llama, site("q_proj", "lora", TOPK))
    names = ["a", "b", "c"]
    done = export_experts(model, tmp_path / "out", names=names, gguf=Gguf(base=base(tiny_llama, tmp_path / "base")))
    assert [each.file for each in done.adapters] == ["a.gguf", "b.gguf", "c.gguf"]
    found = tensors(tmp_path / "out" / "b.gguf")
    bank = model.containers()["model.layers.1.self_attn.q_proj"].experts
    assert np.array_equal(found["model.layers.1.self_attn.q_proj.weight.lora_a"], bank.lora_A[2:6].detach().numpy())


def test_a_backbone_that_is_a_name_is_left_to_the_converter(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    llama = stand_in(tmp_path / "llama")
    export_lora(attached(tiny_llama, site("q_proj")), tmp_path / "out", gguf=Gguf(llama))
    assert "--base" not in json.loads((llama / "log.json").read_text())["argv"]


def test_scales_that_differ_are_put_into_the_factors(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """llama.cpp has one alpha for the file and divides it by the rank of each tensor."""
    llama = stand_in(tmp_path / "llama")
    sites = [
        site("q_proj", {"kind": "lora", "alpha": 8.0}),
        site("v_proj", {"kind": "rslora", "alpha": 8.0}),
        site("o_proj", {"kind": "lora", "r": 2, "alpha": 8.0}),
        site("k_proj", {"kind": "frozen", "scaling": [-0.25]}),
    ]
    model = attached(tiny_llama, *sites)
    export_lora(model, tmp_path / "out", gguf=Gguf(llama))
    config = json.loads((llama / "log.json").read_text())["config"]
    assert config["alpha_pattern"] == {} and not config["use_rslora"] and config["lora_alpha"] == 8
    found, one = tensors(tmp_path / "out" / "out.gguf"), alpha(tmp_path / "out" / "out.gguf")
    for path, container in model.containers().items():
        A, B = (torch.from_numpy(found[f"{path}.weight.lora_{part}"].copy()) for part in "ab")
        assert torch.allclose(one / len(A) * B @ A, container.experts.delta(torch.ones(1), container.base), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sys.exit('this model is not supported')", r"ended with 1 and no file; it said:\nthis model is not supported"),
        ("sys.exit(0)", "ended with 0 and no file"),
        ("Path(given['--outfile']).write_text('GGUF'); sys.exit(0)", "which is no GGUF adapter"),
        ("load_file = lambda path, load=load_file: dict(list(load(path).items())[2:])", "which is not this adapter"),
        ("config['lora_alpha'] = 3", "alpha 3 where 32 was expected"),
    ],
)
def test_what_goes_wrong_in_the_converter_is_said_and_nothing_is_left(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, change: str, message: str
) -> None:
    llama = stand_in(tmp_path / "llama", change)
    with pytest.raises(UserError, match=message):
        export_lora(attached(tiny_llama, site("q_proj")), tmp_path / "out", gguf=Gguf(llama))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_what_is_missing_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"git clone https://github.com/ggml-org/llama.cpp"):
        export_lora(tmp_path / "nowhere", tmp_path / "out", gguf=Gguf())
    with pytest.raises(UserError, match=r"convert_lora_to_gguf.py: no such file"):
        export_experts(tmp_path / "nowhere", tmp_path / "out", gguf=Gguf(tmp_path))


def test_what_llama_cpp_cannot_hold_is_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    form = Gguf(stand_in(tmp_path / "llama"))
    model = attached(tiny_llama, site("q_proj", "dora"), modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"llama.cpp has no DoRA"):
        export_lora(model, tmp_path / "out", gguf=form)
    model = attached(model.unload(), site("q_proj"), modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="lm_head is saved whole"):
        export_lora(model, tmp_path / "out", gguf=form)
    model = attached(model.unload(), site("q_proj"))
    with pytest.raises(UserError, match=r"no config.json there; expected the folder of the backbone 'llama'"):
        export_lora(model, tmp_path / "out", gguf=Gguf(form.llama_cpp, base=tmp_path))


@pytest.mark.skipif(LLAMA_CPP is None, reason="LLAMA_CPP names no folder of llama.cpp")
@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_the_real_converter_keeps_the_adapter(tiny_config: Any, tmp_path: Path, outtype: Any) -> None:
    tiny_config.architectures = ["LlamaForCausalLM"]
    backbone = LlamaForCausalLM(tiny_config).eval()
    folder = base(backbone, tmp_path / "base")
    model = attached(
        backbone, site(["q_proj", "down_proj"], {"kind": "lora", "r": [32, 64, 32]}, STATIC), site("v_proj")
    )
    export_lora(model, tmp_path / "out", gguf=Gguf(LLAMA_CPP, base=folder, outtype=outtype))
    export_lora(model, tmp_path / "peft")
    found, one = tensors(tmp_path / "out" / "out.gguf"), alpha(tmp_path / "out" / "out.gguf")
    peft = read_adapter(tmp_path / "peft")
    assert len(found) == 2 * len(peft.factors)
    for path, factors in peft.factors.items():
        parts = path.split(".")
        name = f"blk.{parts[2]}.{ {'q_proj': 'attn_q', 'v_proj': 'attn_v', 'down_proj': 'ffn_down'}[parts[-1]] }.weight"
        A, B = (torch.from_numpy(np.array(found[f"{name}.lora_{part}"])) for part in "ab")
        update = one / len(A) * B @ A
        if parts[-1] == "q_proj":  # llama.cpp's order of the rows of each head
            update = update.view(4, 4, 2, -1).transpose(1, 2).reshape(update.shape)
        wanted = factors.scale * factors.B @ factors.A
        assert (update - wanted).norm() <= {"f32": 1e-5, "f16": 1e-2, "q8_0": 3e-2}[outtype] * wanted.norm()


@pytest.mark.skipif(LLAMA_CPP is None, reason="LLAMA_CPP names no folder of llama.cpp")
def test_factors_that_the_real_converter_turns_round_are_noticed(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32, architectures=["GPT2LMHeadModel"]
    )
    backbone = GPT2LMHeadModel(config).eval()
    folder = base(backbone, tmp_path / "base")
    with pytest.raises(UserError, match="turned factors round, as it does with GPT-2's Conv1D"):
        export_lora(attached(backbone, site("attn.c_proj")), tmp_path / "out", gguf=Gguf(LLAMA_CPP, base=folder))
