"""The layout: what the wheel holds, what an import costs, and which way imports may point."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moelora

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parents[1]
FOR_AN_EXTRA = {"lm_eval_model"}  # modules that derive from classes of an optional package
MAPPED = ("experts", "model_cards", "routers", "trainers")
# Folders of files that `moelora launch` reads. They are named after packages that a script beside them imports, which
# an __init__.py would hide.
FILES = ("scripts/accelerate", "scripts/deepspeed")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def source_folders() -> dict[str, Path]:
    """Package name to folder, for everything on disk that is a package (the typing links inside moelora/ are not)."""
    folders = {"moelora": ROOT / "moelora"}
    for init in (ROOT / "moelora").glob("*/__init__.py"):
        if not init.parent.is_symlink():
            folders[f"moelora.{init.parent.name}"] = init.parent
    for name in (*MAPPED, *FILES):
        folders[f"moelora.{name.replace('/', '.')}"] = ROOT / name
    return folders


def test_wheel_lists_every_package_on_disk() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(source_folders())


def test_folders_are_mapped_and_flat() -> None:
    mapping = {"moelora": "moelora"} | {f"moelora.{name.replace('/', '.')}": name for name in (*MAPPED, *FILES)}
    assert SETUPTOOLS["package-dir"] == mapping
    for package, folder in source_folders().items():
        is_code = folder.relative_to(ROOT).as_posix() not in FILES
        assert (folder / "__init__.py").is_file() == is_code, f"{folder} needs an __init__.py, or must not have one"
        if package != "moelora":
            nested = [path for path in folder.rglob("*/*.py")]
            assert not nested, f"{package} must stay flat: {nested}"


def test_every_data_file_is_packaged() -> None:
    patterns = SETUPTOOLS["package-data"]
    for package, folder in source_folders().items():
        for path in folder.iterdir():
            if path.is_file() and path.suffix not in {".py", ".pyc"}:
                assert any(path.match(pattern) for pattern in patterns.get(package, [])), (
                    f"{path.relative_to(ROOT)} would not be in the wheel: name it in package-data of {package}"
                )


def requirements() -> Iterator[Requirement]:
    project = PYPROJECT["project"]
    for text in [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]:
        yield Requirement(text)


def test_constraints_pin_exactly_the_direct_dependencies() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }
    assert set(pins) == {canonicalize_name(requirement.name) for requirement in requirements()}
    for requirement in requirements():
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} does not admit the pinned {pin}"


@pytest.mark.parametrize("name", ["experts", "routers", "trainers"])
def test_a_stray_import_from_the_root_is_refused(name: str) -> None:
    """`import routers` would make a second copy of every class; relative imports make it fail."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "attempted relative import beyond top-level package" in done.stderr


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of every import statement of a file; level 0 is absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_folders_import_the_package_relatively(name: str) -> None:
    for path in (ROOT / name).glob("*.py"):
        absolute = {module for level, module in imported_modules(path) if level == 0}
        own = {module for module in absolute if module.split(".")[0] in {"moelora", *MAPPED}}
        assert not own, f"{path.name} imports {own} absolutely"


def needed_at_import(path: Path) -> set[str]:
    """Top-level modules that importing a file imports: not those of functions, nor those for type checkers."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found - sys.stdlib_module_names


def test_every_import_is_a_declared_dependency() -> None:
    """What comes along with another package today may not tomorrow."""
    project = PYPROJECT["project"]
    base = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    every = {canonicalize_name(requirement.name) for requirement in requirements()}
    # Released together with, and pinned by, a declared one.
    base.add("pydantic-core")
    every.add("pydantic-core")
    owners = packages_distributions()
    for folder in source_folders().values():
        for path in folder.glob("*.py"):
            at_import = needed_at_import(path)
            later = {module.split(".")[0] for level, module in imported_modules(path) if level == 0}
            for module in later - sys.stdlib_module_names:
                names = {canonicalize_name(name) for name in owners.get(module, [module])}
                allowed = base if module in at_import and path.stem not in FOR_AN_EXTRA else every
                assert names & allowed, f"{path.relative_to(ROOT)} imports {module}: declare it in pyproject.toml"


def test_what_needs_an_extra_is_imported_when_it_is_used() -> None:
    code = "import sys, moelora.evaluation, moelora.cli.app; print({'lm_eval', 'trl'} & {*sys.modules})"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "set()"


@pytest.mark.parametrize("folder", ["routers", "moelora/dispatch"])
def test_tensor_rooms_know_tensors_only(folder: str) -> None:
    """Routers and dispatch know neither Hugging Face nor the rooms above them."""
    third_party = {"torch", "pydantic", "filelock"}  # the last for the one who compiles
    lower = {"", "config", "registry", "routing", "errors"}
    for path in (ROOT / folder).glob("*.py"):
        for level, module in imported_modules(path):
            top = module.split(".")[0]
            if level == 0:
                assert top in third_party or top in sys.stdlib_module_names, f"{path.name} imports {module}"
            elif level == 2:
                assert module in lower, f"{path.name} imports ..{module}"


PROBE = """
import sys, time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start, *sorted({{"torch", "transformers", "datasets"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("module", ["moelora", "moelora.cli.app"])
def test_import_is_quick_and_light(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)], capture_output=True, text=True, check=True
    )
    seconds, *heavy = done.stdout.split()
    assert not heavy, f"import {module} imports {heavy}"
    assert float(seconds) < 3


@pytest.mark.parametrize("name", moelora.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(moelora, name) is not None
    assert name in dir(moelora)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        moelora.atach  # noqa: B018


def test_python_files_stay_short() -> None:
    for folder in source_folders().values():
        for path in folder.glob("*.py"):
            assert len(path.read_text().splitlines()) <= 500, f"{path.relative_to(ROOT)} is too long: split it"
