"""A PEFT LoRA as a GGUF file, by llama.cpp's own converter; what it writes is read again and compared.

llama.cpp (read at 0b03adaa) multiplies an adapter by ``alpha / rank`` with one alpha for the whole file and the rank of
each tensor; there are no modules that are saved whole and no magnitudes. Its converter takes the factors apart as it
does the weights of the backbone, which it knows by the backbone's configuration. Conv1D (GPT-2) has its weight the
other way round than its factors; there it swaps A and B, which the comparison notices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import gguf as library

from .. import gguf
from ..backbone import DEFAULT_BACKBONE
from ..checkpoints.peft_patterns import most_common
from ..errors import ConfigError, UserError
from .adapter import Adapter, Factors
from .writing import PeftAdapter

SCRIPT = "convert_lora_to_gguf.py"
VARIABLE = "LLAMA_CPP"
OutType = Literal["f32", "f16", "bf16", "q8_0"]
# The share of the norm of all lora_b that rounding may change.
_TOLERANCE = {"f32": 1e-5, "f16": 1e-2, "bf16": 2e-2, "q8_0": 5e-2}


def find_converter(folder: str | Path | None) -> Path:
    """The script in a folder of llama.cpp.

    Args:
        folder: by default that of the environment variable ``LLAMA_CPP``.

    Raises:
        UserError: no folder was named, or it does not hold the script.
    """
    given = folder or os.environ.get(VARIABLE)
    how = "git clone https://github.com/ggml-org/llama.cpp, and name that folder with --llama-cpp or in $LLAMA_CPP"
    if not given:
        raise UserError(
            f"GGUF files are written by llama.cpp's converter {SCRIPT}, which is not part of moelora: {how}"
        )
    script = Path(given).expanduser() / SCRIPT
    if not script.is_file():
        raise UserError(f"{script}: no such file; expected the converter of llama.cpp: {how}")
    return script


def base_folder(name: str, given: str | Path | None) -> Path | None:
    """Where the converter finds the backbone's config.json; ``None`` lets it ask the hub for ``name``.

    Args:
        name: of the backbone. given: a folder that the user names instead.

    Raises:
        UserError: ``given`` has no config.json.
    """
    if given is None and name == DEFAULT_BACKBONE:
        return gguf.default_backbone()
    if given is None and name.lower().endswith(".gguf"):
        return gguf.converted(name)
    path = Path(name if given is None else given).expanduser()
    if (path / "config.json").is_file():
        return path.resolve()
    if given is not None:
        raise UserError(f"{path}: no config.json there; expected the folder of the backbone {name!r}")
    return None


def one_alpha(whole: PeftAdapter) -> PeftAdapter:
    """The same update with one alpha for all modules, what differs from it in B.

    Raises:
        ConfigError: it is more than low-rank factors.
    """
    if whole.magnitudes:
        raise ConfigError("llama.cpp has no DoRA: a GGUF adapter cannot hold magnitudes; export PEFT folders")
    if whole.saved:
        raise ConfigError(
            f"a GGUF adapter holds low-rank factors alone, but {', '.join(whole.saved_modules)} is saved whole: export "
            "PEFT folders, or merge into the backbone"
        )
    adapter = whole.adapter
    alphas = {path: each.scale * each.rank for path, each in adapter.factors.items()}
    alpha = most_common([value for value in alphas.values() if value > 0] or [1.0])
    factors = {
        path: each
        if alphas[path] == alpha
        else Factors(each.A, (each.B.double() * (alphas[path] / alpha)).float(), alpha / each.rank)
        for path, each in adapter.factors.items()
    }
    return PeftAdapter(Adapter(adapter.name, factors, adapter.backbone, adapter.architecture))


def convert(whole: PeftAdapter, folder: Path, target: Path, script: Path, base: Path | None, outtype: OutType) -> None:
    """Run the converter on a PEFT folder and check what it wrote.

    Args:
        whole: what is in ``folder``. target: file to write. base: as of :func:`base_folder`.

    Raises:
        UserError: the converter fails, or its file does not hold this adapter.
    """
    command = [sys.executable, str(script), "--outfile", str(target), "--outtype", outtype]
    command += ["--base", str(base)] if base is not None else []
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode or not target.is_file():
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise UserError(
            f"{script} ended with {done.returncode} and {'a' if target.is_file() else 'no'} file; it said:\n{tail}\n"
            "What to do: check that this llama.cpp knows the backbone and that what it needs is installed "
            f"(requirements/requirements-convert_lora_to_gguf.txt there), in {sys.executable}"
        )
    _compare(whole, target, script, outtype)


def _compare(whole: PeftAdapter, target: Path, script: Path, outtype: OutType) -> None:
    try:
        reader: Any = library.GGUFReader(target)
        found = {tensor.name: tensor for tensor in reader.tensors}
        alpha = float(reader.get_field("adapter.lora.alpha").contents())
        squares = sum(
            float((library.quants.dequantize(tensor.data, tensor.tensor_type).astype("float64") ** 2).sum())
            for name, tensor in found.items()
            if name.endswith(".lora_b")
        )
    except (ValueError, LookupError, AttributeError, OSError) as error:
        raise UserError(
            f"{script} wrote {target.name}, which is no GGUF adapter ({error}): use a newer llama.cpp"
        ) from error
    factors = list(whole.adapter.factors.values())
    wanted = sum(each.B.double().square().sum().item() for each in factors)
    own = factors[0].scale * factors[0].rank
    if abs(alpha - own) > 1e-5 * own or abs(squares**0.5 - wanted**0.5) > _TOLERANCE[outtype] * wanted**0.5:
        raise UserError(
            f"{script} wrote {target.name}, which is not this adapter: alpha {alpha:g} where {own:g} was expected, "
            f"lora_b of the norm {squares**0.5:.6g} where {wanted**0.5:.6g} was. It left modules out or turned factors "
            "round, as it does with GPT-2's Conv1D: this backbone has no GGUF adapters"
        )
