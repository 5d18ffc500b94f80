"""Whole checkpoints of a run: commit, verify, latest."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moelora import checkpoints, files
from moelora.errors import CheckpointError


def commit(run: Path, step: int, content: str = "x") -> Path:
    final = run / f"checkpoint-{step}"
    with files.staged(final) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "optimizer.pt").write_text(content)
        (staging / "trainer_state.json").write_text("{}")
        checkpoints.commit(staging, final)
    return final


def test_manifest_covers_every_file(tmp_path: Path) -> None:
    final = commit(tmp_path, 1)
    manifest = json.loads((final / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["files"]] == ["sub/optimizer.pt", "trainer_state.json"]
    assert manifest["files"][0]["bytes"] == 1
    assert set(manifest["versions"]) == {"moelora", "torch", "safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_latest_is_by_number(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        commit(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-10"


def test_latest_of_nothing(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json: missing; expected a file of 2 bytes"),
        (lambda f: (f / "trainer_state.json").write_text("{}x"), "expected 2 bytes, found 3"),
        (lambda f: (f / "sub" / "optimizer.pt").write_text("y"), "optimizer.pt: expected sha256"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: not a readable json file"),
    ],
)
def test_latest_walks_down_over_damaged_ones(
    damage: Callable[[Path], None], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, newest = commit(tmp_path, 1), commit(tmp_path, 2)
    damage(newest)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.verify(newest)
    assert reason in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest(tmp_path) == whole
    assert "checkpoint-2 is not whole" in caplog.text and reason in caplog.text


def test_verify_names_every_damaged_file(tmp_path: Path) -> None:
    final = commit(tmp_path, 1)
    (final / "trainer_state.json").unlink()
    (final / "sub" / "optimizer.pt").write_text("yy")
    with pytest.raises(CheckpointError, match=r"(?s)optimizer\.pt.*trainer_state\.json.*copy the checkpoint again"):
        checkpoints.verify(final)


def test_a_step_that_is_saved_again(tmp_path: Path) -> None:
    final = commit(tmp_path, 1, "old")
    (final / "notes.txt").write_text("mine")
    commit(tmp_path, 1, "new")
    checkpoints.verify(final)
    assert (final / "sub" / "optimizer.pt").read_text() == "new" and (final / "notes.txt").read_text() == "mine"


def test_an_interrupted_move_is_finished_by_whoever_comes_next(tmp_path: Path) -> None:
    final = commit(tmp_path, 1, "old")
    other = commit(tmp_path, 2, "new")
    other.rename(final / files.PENDING)
    # As if killed after the first of its files had been moved.
    (final / files.PENDING / "sub" / "optimizer.pt").replace(final / "sub" / "optimizer.pt")
    assert checkpoints.latest(tmp_path) == final
    assert (final / "sub" / "optimizer.pt").read_text() == "new"
    assert not (final / files.PENDING).exists()


@pytest.mark.parametrize("link", [files.PENDING, "sub"])
def test_no_file_is_moved_through_a_link(tmp_path: Path, link: str) -> None:
    """An unpacked archive may hold what looks like an interrupted move, with a link that leads out of it."""
    final, mine = commit(tmp_path / "run", 1), tmp_path / "mine"
    mine.mkdir()
    (mine / "optimizer.pt").write_text("mine")
    shutil.rmtree(final / "sub")
    if link != files.PENDING:
        (final / files.PENDING / "sub").mkdir(parents=True)
        (final / files.PENDING / "sub" / "optimizer.pt").write_text("theirs")
    (final / link).symlink_to(mine, target_is_directory=True)
    for use in (lambda: checkpoints.verify(final), lambda: commit(tmp_path / "run", 1)):
        with pytest.raises(CheckpointError, match=f"{link}: expected a folder, found a link to .*mine"):
            use()
        assert [path.read_text() for path in mine.iterdir()] == ["mine"]


def test_saving_through_a_link_leaves_what_is_there(tmp_path: Path) -> None:
    final, other = commit(tmp_path / "run", 1, "old"), tmp_path / "other"
    (final / "sub").rename(other)
    (final / "sub").symlink_to(other, target_is_directory=True)
    with pytest.raises(CheckpointError, match="sub: expected a folder, found a link"):
        commit(tmp_path / "run", 1, "new")
    checkpoints.verify(final)
    assert (other / "optimizer.pt").read_text() == "old"


def test_a_pipe_with_the_name_of_a_staging_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{files.SAVING}x")
    checkpoints.verify(commit(tmp_path, 1))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no folder"):
        checkpoints.verify(tmp_path / "none")
