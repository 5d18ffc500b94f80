"""Two hundred hostile or damaged checkpoints over all layouts: the same damage done to each layout's own files.

Every case starts from a whole checkpoint of a tiny model, written by the layout itself, and changes one thing. It says
what the refusal has to name. ``scripts/hostile.py`` gives the same folders to PEFT.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moelora
from moelora import checkpoints

HUGE = 10**9
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]


def tiny(family: str = "llama") -> PreTrainedModel:
    """A model of two layers with random weights, always the same."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


@dataclass(frozen=True)
class Form:
    """One layout: the mixture to write in it, and where its files keep things.

    Attributes:
        mixture: for ``attach``. config, tensors: names of the files that are damaged. rank: key of a rank or another
            size, in the configuration. alpha: key of a number above 0. family: of the backbone.
    """

    mixture: dict[str, Any]
    config: str
    tensors: str
    rank: str = "r"
    alpha: str = "lora_alpha"
    family: str = "llama"


def linears(experts: dict[str, Any], router: dict[str, Any] | None, target: list[str]) -> dict[str, Any]:
    """A mixture of linear sites of one kind."""
    return {"sites": [{"target": target, "experts": experts, "router": router}]}


CONFIG, BIN, SAFE, MODEL = "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "model.safetensors"
FOUR = {"num_experts": 4, "r": 4}
FROZEN = {"kind": "frozen", "num_experts": 3, "r": 4, "alpha": 8.0}
SPARSE = {"kind": "sparse_projection", "num_experts": 1, "r": 8, "stop_gradient": True}
SOFTMAX = {"kind": "softmax", "aux_loss_coef": 0.0}
BLOCK = {"target": "mlp", "experts": FOUR, "router": {"kind": "topk", "aux_loss_coef": 0.001}}
PLAIN = {"target": ATTENTION, "experts": {"num_experts": 1, "r": 4}}
LOW_RANK = {"kind": "low_rank", "num_experts": 3, "r": [0, 2, 3]}
FLEX = {"target": "mlp", "experts": LOW_RANK, "router": {"kind": "topk", "normalize": False, "aux_loss_coef": 0.0}}
ARROW = {"kind": "arrow", "top_k": 2, "method": "power"}
BY_TYPE = {"kind": "mask", "by": "task_type", "table": [[], [0], [1], [0]]}
FLY = {"kind": "flylora", "top_k": 2, "select": "signed"}
GROWN = {"kind": "rank1", "num_experts": 2, "r": 4}
FORMS = {
    "native": Form({"sites": [BLOCK, PLAIN]}, "moelora_config.json", "moelora.safetensors", "format_version", ""),
    "mixlora": Form({"sites": [BLOCK, PLAIN]}, CONFIG, BIN),
    "moe_peft": Form(linears(FOUR, SOFTMAX, FFN), CONFIG, BIN),
    "loramoe": Form(linears(FOUR, {**SOFTMAX, "aux_loss_coef": 0.1}, FFN), CONFIG, BIN),
    "hydralora": Form(linears({"kind": "shared_a", "num_experts": 3, "r": 4}, SOFTMAX, FFN), CONFIG, BIN),
    "mola": Form(linears(FOUR, {"kind": "mola", "top_k": 2}, ATTENTION), CONFIG, BIN),
    "peft": Form(linears({"num_experts": 1, "r": 4}, None, ATTENTION), CONFIG, SAFE),
    "peft_arrow": Form(linears(FROZEN, ARROW, ATTENTION), f"task_1/{CONFIG}", f"task_1/{SAFE}"),
    "xlora": Form(linears(FROZEN, {"kind": "xlora"}, ATTENTION), f"adapter_2/{CONFIG}", f"adapter_2/{SAFE}"),
    "peft_xlora": Form(
        linears(FROZEN, {"kind": "xlora"}, ATTENTION), CONFIG, SAFE, "xlora_depth", "softmax_temperature"
    ),
    "meteora": Form(linears(FROZEN, {"kind": "meteora", "top_k": 2}, ATTENTION), CONFIG, MODEL),
    "flylora": Form(linears(SPARSE, FLY, ATTENTION), CONFIG, SAFE),
    "smora": Form(linears({"num_experts": 1, "r": 8}, {"kind": "smora", "top_k": 4}, ATTENTION), CONFIG, SAFE),
    "moram": Form(linears(GROWN, {"kind": "moram", "top_k": 2}, ATTENTION), CONFIG, BIN),
    "phi4": Form(
        linears({**FROZEN, "num_experts": 2}, BY_TYPE, ATTENTION), f"vision-lora/{CONFIG}", f"vision-lora/{SAFE}"
    ),
    "flexmore": Form({"sites": [FLEX]}, "config.json", MODEL, "num_experts_per_tok", "rms_norm_eps", "olmo2"),
}


def write(layout: str, folder: Path) -> None:
    """Write the layout's mixture with random numbers."""
    form = FORMS[layout]
    model = moelora.attach(tiny(form.family), form.mixture)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.adapter_tensors().values():
            value.copy_(torch.randn(value.shape, generator=generator) / 4)
        model.fit_routers()
    native = folder if layout == "native" else folder.with_name(f"{folder.name}.native")
    model.save_pretrained(native)
    if layout != "native":
        checkpoints.convert(native, folder, to=layout)


@dataclass(frozen=True)
class Damage:
    """What one case did.

    Attributes:
        file: name of the file that was damaged; empty where another one may be found wanting as well.
        key: of a tensor or of the configuration, a module, or a number, that a refusal has to name.
    """

    file: str
    key: str = ""


Change = Callable[[Path, Form], Damage]


def in_config(key: Callable[[Form], str], value: Any) -> Change:
    """Set a key of the configuration; ``...`` takes it away."""

    def change(folder: Path, form: Form) -> Damage:
        path, name = folder / form.config, key(form)
        values = json.loads(path.read_text())
        values.pop(name) if value is ... else values.update({name: value})
        path.write_text(json.dumps(values))
        if value == HUGE:  # it may be the tensors that are said to be too small
            return Damage("", str(HUGE)[1:])
        # NaN is refused while the file is read, before its keys are known.
        return Damage(path.name, "" if value != value else name)

    return change


def in_text(edit: Callable[[bytes], bytes], name: str = "config") -> Change:
    """Change the bytes of the configuration, or of the file with the tensors."""

    def change(folder: Path, form: Form) -> Damage:
        path = folder / getattr(form, name)
        path.write_bytes(edit(path.read_bytes()))
        return Damage(path.name)

    return change


def in_tensors(edit: Callable[[dict[str, Tensor]], str]) -> Change:
    """Change the tensors; ``edit`` says which key a refusal has to name."""

    def change(folder: Path, form: Form) -> Damage:
        path = folder / form.tensors
        if path.suffix == ".bin":
            tensors = {key: value.detach() for key, value in torch.load(path, weights_only=True).items()}
            key = edit(tensors)
            torch.save(tensors, path)
        else:
            tensors = load_file(path)
            key = edit(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
        return Damage("" if edit is _renamed else path.name, key)

    return change


def factor(tensors: dict[str, Tensor]) -> str:
    """The first key of a matrix of the adapter that is not square."""
    mine = (key for key in sorted(tensors) if any(part in key for part in ("lora_", "_a.weight", "classifier")))
    return next(key for key in mine if tensors[key].dim() == 2 and len(set(tensors[key].shape)) == 2)


def _module(key: str) -> str:
    """The path of the module that a tensor belongs to; which of its tensors is wrong may be a matter of opinion."""
    return key.removeprefix("base_model.model.").partition(".lora_")[0]


def _renamed(tensors: dict[str, Tensor]) -> str:
    key = factor(tensors)
    tensors[f"{key}x"] = tensors.pop(key)
    return _module(key)


def _foreign(tensors: dict[str, Tensor]) -> str:
    tensors["base_model.model.model.stranger.weight"] = torch.ones(4, 4)
    return "model.stranger.weight"


def _replaced(make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], str]:
    def edit(tensors: dict[str, Tensor]) -> str:
        key = factor(tensors)
        tensors[key] = make(tensors[key])
        return _module(key)

    return edit


def _poisoned(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


class _Attack:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


def _hostile_bytes(content: bytes) -> bytes:
    """A pickle that runs code, or a header that promises more than there is."""
    if content[:2] == b"PK":
        return pickle.dumps(_Attack())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name]["shape"] = [2**40, 2**20]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _pipe(folder: Path, form: Form) -> Damage:
    path = folder / form.tensors
    path.unlink()
    os.mkfifo(path)
    return Damage("")


def _rank(form: Form) -> str:
    return form.rank


def _alpha(form: Form) -> str:
    return form.alpha or form.rank


DAMAGES: dict[str, Change] = {
    "config-cut": in_text(lambda content: content[: len(content) // 2]),
    "config-nested": in_text(
        lambda content: content.rstrip()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    ),
    "config-twice": in_text(lambda content: content.rstrip()[:-1] + b', "x": null, "x": null}'),
    "alpha-nan": in_config(_alpha, float("nan")),
    "rank-huge": in_config(_rank, HUGE),
    "rank-text": in_config(_rank, "eight"),
    "unknown-key": in_config(lambda form: "trust_remote_code", True),
    "tensor-renamed": in_tensors(_renamed),
    "tensor-of-backbone": in_tensors(_foreign),
    "tensor-nan": in_tensors(_replaced(_poisoned)),
    "tensor-turned": in_tensors(_replaced(lambda tensor: tensor.T.contiguous())),
    "tensor-integers": in_tensors(_replaced(lambda tensor: tensor.to(torch.int32))),
    "file-cut": in_text(lambda content: content[: len(content) * 2 // 3], "tensors"),
    "file-hostile": in_text(_hostile_bytes, "tensors"),
    "file-pipe": _pipe,
}


def cases() -> Iterator[tuple[str, str]]:
    """The layout and the damage of every case."""
    for layout, form in FORMS.items():
        for name in DAMAGES:
            # The configuration of a whole model holds what its own class wants.
            if not (form.config == "config.json" and name == "unknown-key"):
                yield layout, name


def damage(folder: Path, layout: str, name: str) -> Damage:
    """Do the damage to a whole checkpoint of the layout; its manifest, if it has one, agrees with it again."""
    done = DAMAGES[name](folder, FORMS[layout])
    if layout == "native" and name != "file-pipe":
        checkpoints.manifest.write(folder)
    return done
