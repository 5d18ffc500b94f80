"""The compiled CPU kernels: built on demand with the machine's own compiler, cached, and never needed.

``MOELORA_CPP`` is ``0`` to leave them alone, ``1`` to make it an error where they cannot be built; without it they are
used where a C++ compiler and ninja are found. The library lies in torch's extension cache (``TORCH_EXTENSIONS_DIR``),
under a name made of the sources, the compiler and the processor's features, so that a home folder that several machines
share holds one for each.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

from filelock import FileLock

from ..errors import UserError

logger = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("block.cpp", "slots.cpp")]
HEADERS = [Path(__file__).with_name(name) for name in ("kernels.h", "slots.h")]
ADDRESS, NUMBER = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "moelora_sort": [ADDRESS, NUMBER, NUMBER, NUMBER, ADDRESS, ADDRESS, ADDRESS],
    "moelora_any": [ADDRESS, NUMBER],
    "moelora_few": [*[ADDRESS] * 2, *[NUMBER] * 2, ADDRESS, NUMBER, *[ADDRESS] * 3, *[NUMBER] * 2, ADDRESS],
    "moelora_to_ranks": [ADDRESS, ADDRESS, NUMBER, ADDRESS, ADDRESS, NUMBER],
    "moelora_from_ranks": [ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, NUMBER, NUMBER],
    "moelora_mix_forward": [ADDRESS, ADDRESS, ADDRESS, ADDRESS],
    "moelora_mix_backward": [ADDRESS, ADDRESS, ADDRESS],
}
FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or ``None`` where there are none; the first call in a process decides, and may take some seconds.

    Raises:
        UserError: ``MOELORA_CPP`` is 1, but they cannot be built.
    """
    wish = os.environ.get("MOELORA_CPP", "")
    if wish == "0":
        return None
    try:
        return _load()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        if wish == "1":
            raise UserError(f"MOELORA_CPP=1, but the CPU kernels cannot be built: {error}") from error
        if not isinstance(error, FileNotFoundError):  # no compiler is no fault
            reason = str(error).partition("\n")[0]
            logger.warning("the CPU kernels cannot be built, the slower torch code is used: %s", reason)
        return None


def compiler() -> str:
    """Path of the C++ compiler that torch would take.

    Raises:
        FileNotFoundError: there is none, or no ninja.
    """
    name = os.environ.get("CXX", "c++")
    found = shutil.which(name)
    for tool, path in ((name, found), ("ninja", shutil.which("ninja"))):
        if path is None:
            raise FileNotFoundError(f"{tool} is not installed")
    assert found is not None
    return found


def name_of_build() -> str:
    """A name for these sources, this compiler and this processor.

    Raises:
        FileNotFoundError: there is no compiler, or no ninja.
    """
    target = subprocess.run(  # noqa: S603
        [compiler(), *FLAGS, "-dM", "-E", "-x", "c++", os.devnull], check=True, capture_output=True
    ).stdout
    digest = hashlib.sha256(target + " ".join(FLAGS).encode())
    for source in SOURCES + HEADERS:
        digest.update(source.read_bytes())
    return f"moelora_{digest.hexdigest()[:16]}"


def _load() -> ctypes.CDLL:
    name = name_of_build()
    # Imported here: it brings setuptools, which takes a while and writes to the log.
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"{name}{cpp_extension.LIB_EXT}"
    done = folder / "done"  # a build that was killed leaves a library that is not whole
    with FileLock(folder / "moelora.lock"):
        if not done.exists():
            # Torch's own lock, which a killed build leaves behind and every later one waits for.
            (folder / "lock").unlink(missing_ok=True)
            logger.warning("building the CPU kernels, once for this machine (MOELORA_CPP=0 does without them)")
            start = time.monotonic()
            cpp_extension.load(
                name,
                [str(source) for source in SOURCES],
                extra_cflags=FLAGS,
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
            done.touch()
            logger.info("built %s in %.1f s", built, time.monotonic() - start)
    kernels = ctypes.CDLL(str(built))
    for function, arguments in SIGNATURES.items():
        getattr(kernels, function).argtypes = arguments
    return kernels
