"""Checkpoints that are damaged, wrong or meant to harm: each is refused, quickly, with a message that helps.

A message names the file and the key, what was expected and what was found, and what to do.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora import checkpoints
from moelora.errors import CheckpointError

Change = Callable[[Path], Any]
CONFIG, TENSORS = "moelora_config.json", "moelora.safetensors"
ADAPTER, BIN = "adapter_config.json", "adapter_model.bin"
A_KEY = "model.layers.1.self_attn.q_proj.lora_A"
BIN_KEY = "mixlora.layers.1.mlp.up_proj.experts.2.lora_A.weight"


def seal(folder: Path) -> None:
    """Make the manifest agree with the files again, as an attacker would."""
    checkpoints.manifest.write(folder)


def in_config(change: Callable[[dict[str, Any]], Any], name: str = CONFIG) -> Change:
    def apply(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))
        if name == CONFIG:
            seal(folder)

    return apply


def in_text(name: str, change: Callable[[str], str]) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))
        if name == CONFIG:
            seal(folder)

    return apply


def in_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)
        seal(folder)

    return apply


def in_bin(change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
        tensors = {key: value.detach() for key, value in torch.load(folder / BIN, weights_only=True).items()}
        changed = change(tensors)
        torch.save(tensors if changed is None else changed, folder / BIN)

    return apply


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set ``a.b.0`` in nested mappings and lists, or a tensor by its whole name."""

    def change(values: dict[str, Any]) -> None:
        if key in values:
            values[key] = value
            return
        target: Any = values
        *path, last = key.split(".")
        for part in path:
            target = target[int(part)] if isinstance(target, list) else target[part]
        target[int(last) if isinstance(target, list) else last] = value

    return change


def put_tensor(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: value})


def first_number(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        result = tensor.clone()
        result.view(-1)[0] = value
        return result

    return change


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.__delitem__(key)


def replace_tensor(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def flip(name: str, offset: int) -> Change:
    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[offset] ^= 1
        (folder / name).write_bytes(content)

    return apply


def truncate(name: str, by: int, sealed: bool = False) -> Change:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-by])
        if sealed:
            seal(folder)

    return apply


def link_out(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/etc/hostname")

    return apply


def pipe(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def manifest_name(name: str) -> Change:
    return in_config(put("files.0.name", name), "manifest.json")


def huge_header(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(struct.pack("<Q", 2**40) + content[8:])
    seal(folder)


NATIVE: dict[str, tuple[Change, list[str]]] = {
    "nan": (
        in_tensors(replace_tensor(A_KEY, first_number(float("nan")))),
        [TENSORS, A_KEY, "expected finite numbers, found 1", "earlier checkpoint"],
    ),
    "infinity": (
        in_tensors(replace_tensor("model.layers.0.mlp.router.weight", first_number(float("-inf")))),
        [TENSORS, "model.layers.0.mlp.router.weight", "not finite"],
    ),
    "missing": (in_tensors(drop(A_KEY)), [TENSORS, f"missing: {A_KEY}: expected (2, 32), found nothing", "copy the"]),
    "renamed": (
        in_tensors(lambda t: t.update({"lora_A": t.pop(A_KEY)})),
        [f"missing: {A_KEY}", "unexpected: lora_A: expected only tensors of the adapter, found float32 (2, 32)"],
    ),
    "weights of the backbone": (
        in_tensors(put_tensor("model.layers.0.mlp.base.up_proj.weight", torch.zeros(48, 32))),
        [TENSORS, "unexpected: model.layers.0.mlp.base.up_proj.weight", "must not carry weights of the backbone"],
    ),
    "misshapen": (
        in_tensors(replace_tensor(A_KEY, lambda t: torch.zeros(3, 32))),
        [TENSORS, f"misshapen: {A_KEY}: expected (2, 32), found (3, 32)", "backbone it was trained on"],
    ),
    "transposed": (
        in_tensors(replace_tensor(A_KEY, lambda t: t.T.contiguous())),
        [f"misshapen: {A_KEY}: expected (2, 32), found (32, 2)"],
    ),
    "integers": (
        in_tensors(replace_tensor(A_KEY, lambda t: t.long())),
        [TENSORS, f"wrong dtype: {A_KEY}: expected float32, bfloat16, float16, found I64"],
    ),
    "float8": (
        in_tensors(replace_tensor(A_KEY, lambda t: t.to(torch.float8_e4m3fn))),
        [f"wrong dtype: {A_KEY}", "found F8_E4M3"],
    ),
    "flipped byte of a tensor": (flip(TENSORS, -5), [TENSORS, "expected sha256", "found", "copy the checkpoint again"]),
    "flipped byte of the configuration": (flip(CONFIG, 40), [CONFIG]),
    "truncated": (truncate(TENSORS, 100), [TENSORS, "truncated", "copy it again"]),
    "truncated and sealed": (truncate(TENSORS, 100, sealed=True), [TENSORS, "truncated", "copy it again"]),
    "empty tensor file": (truncate(TENSORS, 10**9), [TENSORS, "truncated", "copy it again"]),
    "header of a terabyte": (huge_header, [TENSORS, "cannot be read", "copy it again"]),
    "no tensor file": (lambda f: (f / TENSORS).unlink(), [TENSORS, "missing", "copy the whole checkpoint folder"]),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ["manifest.json", "interrupted", "older checkpoint"]),
    "tensor file is a pipe": (pipe(TENSORS), [TENSORS, "missing"]),
    "configuration is a pipe": (pipe(CONFIG), ["found README.md, manifest.json", "moelora_config.json"]),
    "manifest is a pipe": (pipe("manifest.json"), ["manifest.json", "missing"]),
    "tensor file links elsewhere": (link_out(TENSORS), [TENSORS, "cannot be read"]),
    "manifest leaves the folder": (manifest_name("../../x"), ["manifest.json", "files.0.name", "'../../x'", "without"]),
    "manifest has an absolute name": (manifest_name("/etc/passwd"), ["manifest.json", "files.0.name", "/etc/passwd"]),
    "manifest has a drive": (manifest_name("C:\\x"), ["manifest.json", "files.0.name", "relative name"]),
    "manifest has a NUL": (manifest_name("a\0b"), ["manifest.json", "files.0.name"]),
    "manifest without the tensors": (
        in_config(lambda v: v.update(files=[e for e in v["files"] if e["name"] != TENSORS]), "manifest.json"),
        [TENSORS, "not listed in manifest.json"],
    ),
    "manifest lists a file twice": (
        in_config(lambda v: v["files"].append(v["files"][0]), "manifest.json"),
        ["manifest.json", "listed twice"],
    ),
    "manifest of the future": (
        in_config(put("format_version", 2), "manifest.json"),
        ["manifest.json", "format_version is 2", "reads 1", "upgrade"],
    ),
    "configuration of the future": (in_config(put("format_version", 7)), [CONFIG, "format_version is 7", "upgrade"]),
    "format true": (in_config(put("format_version", True)), [CONFIG, "format_version is true", "upgrade"]),
    "key given twice": (
        in_text(CONFIG, lambda t: t.replace("{", '{"format_version": 1,', 1)),
        [CONFIG, "'format_version' is given twice"],
    ),
    "nan in the configuration": (
        in_text(CONFIG, lambda t: t.replace('"alpha": 4.0', '"alpha": NaN')),
        [CONFIG, "NaN is not a number"],
    ),
    "overflow in the configuration": (
        in_text(CONFIG, lambda t: t.replace('"alpha": 4.0', '"alpha": 1e999')),
        [CONFIG, "alpha", "restore"],
    ),
    "not json": (in_text(CONFIG, lambda t: t[:-20]), [CONFIG, "not a readable json", "expected plain JSON"]),
    "a list": (in_text(CONFIG, lambda t: "[]"), [CONFIG, "expected a mapping", "got list"]),
    "nested": (in_text(CONFIG, lambda t: "[" * 200_000), [CONFIG, "nested too deeply"]),
    "not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00{"), [CONFIG, "not a readable json"]),
    "large configuration": (
        in_config(put("moelora", "x" * 1_000_001)),
        [CONFIG, "bytes, but a configuration has at most 1000000"],
    ),
    "unknown key": (
        in_config(lambda v: v.update(trust_remote_code=True)),
        [CONFIG, "'trust_remote_code'", "known keys"],
    ),
    "missing key": (in_config(drop("mixture")), [CONFIG, "mixture: this key is missing", "restore"]),
    "unknown router": (
        in_config(put("mixture.sites.0.router.kind", "topkk")),
        [CONFIG, "unknown router 'topkk'", "known are", "topk"],
    ),
    "negative scale": (in_config(put("mixture.sites.0.experts.alpha", -1)), [CONFIG, "alpha", "greater than 0", "-1"]),
    "r of a billion": (
        in_config(put("mixture.sites.0.experts.r", 10**9)),
        [CONFIG, "mixture.sites.0.experts", "4000000000", "longer than 48", "restore"],
    ),
    "a billion experts": (
        in_config(put("mixture.sites.0.experts.num_experts", 10**9)),
        [CONFIG, "mixture.sites.0.experts", "stacked rank of 2000000000"],
    ),
    "expression among the sites": (
        in_config(put("sites.0.0", "re:(a+)+$")),
        [CONFIG, "sites.0.0", "re:(a+)+$", "restore"],
    ),
    "sites of another mixture": (in_config(put("sites", [[]])), [CONFIG, "sites: expected one list for each of the 2"]),
    "two layouts": (
        lambda f: (f / ADAPTER).write_text('{"peft_type": "MIXLORA"}'),
        ["mixlora (adapter_config.json has peft_type 'MIXLORA')", "native (it has moelora_config.json)", "move one"],
    ),
}


class Attack:
    """Runs a command when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def malicious(folder: Path) -> None:
    in_bin(lambda t: {**t, "x": Attack(folder / "canary")})(folder)


def raw_pickle(folder: Path) -> None:
    (folder / BIN).write_bytes(pickle.dumps(Attack(folder / "canary")))


def with_pickle(content: bytes) -> Change:
    """Replace the pickle within the archive."""

    def apply(folder: Path) -> None:
        with zipfile.ZipFile(folder / BIN) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(folder / BIN, "w", zipfile.ZIP_STORED) as archive:
            for name, value in members.items():
                archive.writestr(name, content if name.endswith("data.pkl") else value)

    return apply


def huge_extent(folder: Path) -> None:
    """A tensor that says it is larger than its storage."""
    with zipfile.ZipFile(folder / BIN) as archive:
        content = archive.read("adapter_model/data.pkl")
    key = BIN_KEY.encode()
    at = content.index(b"K\x04K ", content.index(key))  # its shape, (4, 32)
    with_pickle(content[:at] + b"J" + struct.pack("<i", 10**9) + content[at + 2 :])(folder)


def huge_stride(folder: Path) -> None:
    """A tensor whose numbers are as far apart as torch cannot say."""
    with zipfile.ZipFile(folder / BIN) as archive:
        content = archive.read("adapter_model/data.pkl")
    at = content.index(b"K K\x01", content.index(BIN_KEY.encode()))  # its stride, (32, 1)
    with_pickle(content[:at] + b"\x8a\xff" + b"\x01" * 255 + content[at + 2 :])(folder)


def compressed(folder: Path) -> None:
    with zipfile.ZipFile(folder / BIN) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / BIN, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in members.items():
            archive.writestr(name, value)


def twice(name: str) -> Change:
    """Add another pickle, which torch or the examination may take for the first."""

    def apply(folder: Path) -> None:
        with warnings.catch_warnings(), zipfile.ZipFile(folder / BIN, "a") as archive:
            warnings.simplefilter("ignore")  # zipfile says so
            archive.writestr(f"adapter_model/{name}", BYTES_BOMB)

    return apply


def in_archive(change: Callable[[bytes], bytes]) -> Change:
    def apply(folder: Path) -> None:
        (folder / BIN).write_bytes(change((folder / BIN).read_bytes()))

    return apply


TUPLE_BOMB = b"\x80\x02}()q\x00" + b"h\x00h\x00\x86q\x00" * 61 + b"u."
BYTES_BOMB = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
TWO_WAYS = [BIN, "an archive that can be read in two ways", "do not load it"]
MEMO_BOMB = pickle.PROTO + b"\x02" + b"}" + b"r" + struct.pack("<I", 2**32 - 1) + b"."
BUILTIN = b"cbuiltins\neval\n(X\x01\x00\x00\x001tR."

MIXLORA: dict[str, tuple[Change, list[str]]] = {
    "pickle that runs a command": (malicious, [BIN, "posix.system", "could run code", "do not load it"]),
    "bare pickle": (raw_pickle, [BIN, "expected a torch.save file", "do not load it"]),
    "pickle that names a builtin": (with_pickle(BUILTIN), [BIN, "builtins.eval", "could run code"]),
    "pickle that exhausts memory": (with_pickle(MEMO_BOMB), [BIN, "LONG_BINPUT", "exhaust memory"]),
    "pickle whose keys are never hashed": (with_pickle(TUPLE_BOMB), [BIN, "a tuple that unfolds", "do not load it"]),
    "pickle that ends early": (with_pickle(b"\x80\x02}"), [BIN, "cannot be read", "flat dict of tensors"]),
    "pickle of a list": (with_pickle(b"\x80\x02)."), [BIN, "flat dict of tensors, found a tuple"]),
    "compressed archive": (compressed, [BIN, "compressed members"]),
    "archive with a member twice": (twice("data.pkl"), TWO_WAYS),
    "archive with a member twice but for capitals": (twice("DATA.pkl"), TWO_WAYS),
    "archive in an archive": (in_archive(lambda content: content + content), TWO_WAYS),
    "archive with a comment": (in_archive(lambda content: content[:-2] + b"\4\0text"), TWO_WAYS),
    "archive with another list of members": (in_archive(lambda c: c[:-34] + struct.pack("<Q", 9) + c[-26:]), TWO_WAYS),
    "tensor beyond its bytes": (huge_extent, [BIN, BIN_KEY, "(1000000000, 32) without the bytes for it"]),
    "tensor with a huge stride": (huge_stride, [BIN, "a tensor whose extent is not made of whole numbers"]),
    "tensor in a list": (in_bin(lambda t: {**t, "x": [torch.zeros(1)]}), [BIN, "flat dict"]),
    "text among the tensors": (in_bin(lambda t: {**t, "x": "y"}), [BIN, "'x' that is no tensor"]),
    "nested dict": (in_bin(lambda t: {"state": t}), [BIN, "'state' that is no tensor"]),
    "truncated": (truncate(BIN, 1000), [BIN, "expected a torch.save file"]),
    "empty": (truncate(BIN, 10**9), [BIN, "expected a torch.save file"]),
    "nan": (
        in_bin(replace_tensor(BIN_KEY, first_number(float("nan")))),
        [BIN, BIN_KEY, "expected finite numbers, found 1", "earlier checkpoint"],
    ),
    "missing": (in_bin(drop(BIN_KEY)), [BIN, f"missing: {BIN_KEY}: expected (4, 32), found nothing", "copy the"]),
    "misshapen": (
        in_bin(replace_tensor(BIN_KEY, lambda t: torch.zeros(5, 32))),
        [BIN, f"misshapen: {BIN_KEY}: expected (4, 32), found (5, 32)"],
    ),
    "integers": (
        in_bin(replace_tensor(BIN_KEY, lambda t: t.int())),
        [BIN, f"wrong dtype: {BIN_KEY}: expected float32, bfloat16, float16, found int32"],
    ),
    "doubles": (in_bin(replace_tensor(BIN_KEY, lambda t: t.double())), [f"wrong dtype: {BIN_KEY}", "found float64"]),
    "weights of the backbone": (
        in_bin(put_tensor("model.layers.0.mlp.down_proj.weight", torch.zeros(32, 56))),
        [BIN, "unexpected: model.layers.0.mlp.down_proj.weight", "found float32 (32, 56)", "must not carry weights"],
    ),
    "classification head": (in_bin(put_tensor("classifier", torch.zeros(2, 32))), [BIN, "unexpected: classifier"]),
    "a layer left out": (
        in_bin(lambda t: {key.replace("layers.1", "layers.3"): value for key, value in t.items()}),
        [BIN, "mixlora.layers.1", "none of layer 1", "copy the checkpoint again"],
    ),
    "a layer too many": (
        in_bin(lambda t: t.update({key.replace("layers.1", "layers.2"): value for key, value in t.items()})),
        [BIN, "unexpected: mixlora.layers.2"],
    ),
    "num_experts": (
        in_config(put("num_experts", 3), ADAPTER),
        [
            BIN,
            "misshapen: mixlora.layers.0.mlp.moe_gate.weight",
            "unexpected: mixlora.layers.0.mlp.gate_proj.experts.3",
        ],
    ),
    "a billion experts": (
        in_config(put("num_experts", 10**9), ADAPTER),
        [ADAPTER, "num_experts: expected as many as adapter_model.bin holds, found 1000000000", "restore"],
    ),
    "r": (in_config(put("r", 5), ADAPTER), [BIN, f"misshapen: {BIN_KEY}: expected (5, 32), found (4, 32)"]),
    "r of a billion": (
        in_config(put("r", 10**9), ADAPTER),
        [BIN, f"misshapen: {BIN_KEY}: expected (1000000000, 32), found (4, 32)"],
    ),
    "r of nothing": (in_config(put("r", 0), ADAPTER), [ADAPTER, "r: Input should be greater than 0", "restore"]),
    "r in words": (in_config(put("r", "four"), ADAPTER), [ADAPTER, "r:", "'four'"]),
    "no r": (in_config(drop("r"), ADAPTER), [ADAPTER, "r: this key is missing"]),
    "alpha": (in_config(put("lora_alpha", -8), ADAPTER), [ADAPTER, "lora_alpha", "-8"]),
    "top_k": (in_config(put("top_k", 9), ADAPTER), [ADAPTER, "top_k is 9 but there are 4 experts"]),
    "peft_type": (
        in_config(put("peft_type", "ADALORA"), ADAPTER),
        ["expected a checkpoint in a known layout", "peft_type 'ADALORA', which is not read"],
    ),
    "routing_strategy": (
        in_config(put("routing_strategy", "mixlora-magic"), ADAPTER),
        [ADAPTER, "routing_strategy: expected 'mixlora' or", "found 'mixlora-magic'"],
    ),
    "use_dora": (in_config(put("use_dora", True), ADAPTER), [ADAPTER, "use_dora: expected false", "retrain without"]),
    "use_dora of the experts": (in_config(put("expert_lora", {"use_dora": True}), ADAPTER), [ADAPTER, "use_dora"]),
    "bias": (in_config(put("bias", "all"), ADAPTER), [ADAPTER, "bias: expected 'none', found 'all'"]),
    "task_type": (in_config(put("task_type", "TOKEN_CLS"), ADAPTER), [ADAPTER, "task_type: expected", "'TOKEN_CLS'"]),
    "target_modules": (
        in_config(lambda v: v["target_modules"].append("lm_head"), ADAPTER),
        [ADAPTER, "target_modules: expected names among", "found 'lm_head'"],
    ),
    "targets without an FFN": (
        in_config(put("target_modules", ["q_proj"]), ADAPTER),
        [ADAPTER, "expected at least one of", "gate_proj"],
    ),
    "fewer targets": (
        in_config(lambda v: v["target_modules"].remove("q_proj"), ADAPTER),
        [BIN, "unexpected: mixlora.layers.0.self_attn.q_proj.lora_A.weight"],
    ),
    "more targets": (
        in_config(lambda v: v["target_modules"].append("fc1"), ADAPTER),
        [BIN, "missing: mixlora.layers.0.mlp.fc1.experts.0.lora_A.weight"],
    ),
    "key given twice": (in_text(ADAPTER, lambda t: t.replace("{", '{"r": 4,', 1)), [ADAPTER, "'r' is given twice"]),
    "nan in the configuration": (
        in_text(ADAPTER, lambda t: t.replace("0.05", "NaN")),
        [ADAPTER, "NaN is not a number"],
    ),
    "nested": (in_text(ADAPTER, lambda t: '{"peft_type":' + "[" * 200_000), [ADAPTER, "nested too deeply"]),
    "half a character": (
        in_config(put("base_model_name_or_path", "\ud800"), ADAPTER),
        [ADAPTER, "expected text, found '\\ud800'"],
    ),
    "large configuration": (in_text(ADAPTER, lambda t: t + " " * 1_000_000), [ADAPTER, "at most 1000000"]),
    "no tensor file": (lambda f: (f / BIN).unlink(), [BIN, "missing", "copy the whole checkpoint folder"]),
    "tensor file links elsewhere": (link_out(BIN), [BIN, "expected a torch.save file"]),
    "configuration links elsewhere": (link_out(ADAPTER), [ADAPTER, "json"]),
    "tensor file is a pipe": (pipe(BIN), [BIN, "missing"]),
    "two tensor files": (
        lambda f: save_file({"x": torch.zeros(1)}, f / "adapter_model.safetensors"),
        ["expected one file with tensors", "adapter_model.safetensors and adapter_model.bin", "remove one"],
    ),
    "no configuration": (
        lambda f: (f / ADAPTER).unlink(),
        ["known layout", "found adapter_model.bin", "give the folder"],
    ),
}


def refused(load: Callable[[Path], Any], folder: Path, change: Change, parts: list[str]) -> None:
    change(folder)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message
    for part in parts:
        assert part in message, message
    assert not (folder / "canary").exists()
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("case", NATIVE)
def test_native(case: str, native: Path, load_native: Callable[[Path], Any]) -> None:
    assert load_native(native)
    refused(load_native, native, *NATIVE[case])


@pytest.mark.parametrize("case", MIXLORA)
def test_mixlora(case: str, mixlora: Path, load_mixlora: Callable[[Path], Any]) -> None:
    assert load_mixlora(mixlora)
    refused(load_mixlora, mixlora, *MIXLORA[case])


def test_the_attack_would_work(tmp_path: Path) -> None:
    """The canary appears where a pickle is trusted, so its absence above means something."""
    malicious_bytes = pickle.dumps(Attack(tmp_path / "canary"))
    pickle.loads(malicious_bytes)
    assert (tmp_path / "canary").exists()


def test_all_problems_come_in_one_error(native: Path, load_native: Callable[[Path], Any]) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        names = sorted(tensors)
        del tensors[names[0]]
        tensors[names[1]] = torch.zeros(1, 1)
        tensors[names[2]] = tensors[names[2]].int()
        tensors[names[3]] = torch.full_like(tensors[names[3]], float("nan"))
        tensors["lm_head.weight"] = torch.zeros(1)

    in_tensors(spoil)(native)
    with pytest.raises(CheckpointError, match="5 tensors do not fit") as caught:
        load_native(native)
    for kind in ("missing", "misshapen", "wrong dtype", "not finite", "unexpected"):
        assert f"\n  {kind}: " in str(caught.value)


def test_every_flipped_bit_is_seen(native: Path, load_native: Callable[[Path], Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    for name in (CONFIG, TENSORS):
        content = (native / name).read_bytes()
        for bit in torch.randint(0, 8 * len(content), (150,), generator=generator).tolist():
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            (native / name).write_bytes(changed)
            with pytest.raises(CheckpointError):
                load_native(native)
        (native / name).write_bytes(content)
    assert load_native(native)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_to_a_pickle(seed: int, mixlora: Path, load_mixlora: Callable[[Path], Any]) -> None:
    """Whatever the bytes of the pickle become, it is read as numbers of the right shape or refused; nothing else."""
    with zipfile.ZipFile(mixlora / BIN) as archive:
        content = archive.read("adapter_model/data.pkl")
    original = (mixlora / BIN).read_bytes()
    expected = {name: value.shape for name, value in load_mixlora(mixlora).items()}
    generator = torch.Generator().manual_seed(seed)
    refusals = 0
    for _ in range(60):
        changed = bytearray(content)
        for at in torch.randint(0, len(content), (3,), generator=generator).tolist():
            changed[at] = int(torch.randint(0, 256, (1,), generator=generator))
        (mixlora / BIN).write_bytes(original)
        with_pickle(bytes(changed))(mixlora)
        try:
            assert {name: value.shape for name, value in load_mixlora(mixlora).items()} == expected
        except CheckpointError:
            refusals += 1
    assert refusals > 30
