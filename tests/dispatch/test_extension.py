"""Building the compiled kernels: on demand, once, and never a reason to fail."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moelora.dispatch import extension
from moelora.errors import UserError

build = extension.library.__wrapped__


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty extension cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("MOELORA_CPP", raising=False)
    return tmp_path


@pytest.fixture
def a_compiler() -> None:
    try:
        extension.compiler()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_the_variable_leaves_them_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELORA_CPP", "0")
    assert build() is None
    assert not list(folder.iterdir())


def test_no_compiler_is_no_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build() is None
    assert not caplog.records
    monkeypatch.setenv("MOELORA_CPP", "1")
    with pytest.raises(UserError, match=r"MOELORA_CPP=1, but .*no-such-compiler is not installed"):
        build()


@pytest.mark.usefixtures("a_compiler")
def test_a_build_that_fails_is_said_and_survived(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = folder / "broken.cpp"
    broken.write_text("this is no C++")
    monkeypatch.setattr(extension, "SOURCES", [broken])
    assert build() is None
    last = caplog.records[-1].getMessage()
    assert "the slower torch code is used" in last and "\n" not in last


@pytest.mark.usefixtures("a_compiler")
def test_what_a_killed_build_left_behind_is_built_again_and_then_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = extension.name_of_build()
    (folder / name).mkdir()
    (folder / name / "lock").touch()
    (folder / name / f"{name}.so").write_bytes(b"half a library")
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(build()), daemon=True)
    thread.start()
    thread.join(timeout=100)
    assert found and found[0] is not None
    assert caplog.text.count("building the CPU kernels, once for this machine") == 1
    monkeypatch.setattr("torch.utils.cpp_extension.load", None)
    caplog.set_level(logging.INFO)
    assert build() is not None
    assert caplog.text.count("building") == 1


def test_importing_builds_nothing(folder: Path) -> None:
    code = "import moelora.experts, moelora.dispatch.block; print(moelora.dispatch.block.usable.__module__)"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    assert not list(folder.iterdir())
