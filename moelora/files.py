"""Writing folders so that a crash, a full disk or a second writer never leaves half of one.

A folder is written under another name, brought to disk, and takes its place in one rename. Where the place is taken,
the new files wait, whole, in ``.moelora-pending`` inside it and are then moved in one by one, the manifest last;
whoever comes next finishes a move that was cut short. Files that the new folder does not have are left alone.

Locks are advisory ones on the directories themselves: they leave no file behind and end with the process. Where the
file system or the operating system (Windows) has none, a single writer per folder is assumed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
PENDING = ".moelora-pending"
SAVING = ".moelora-saving-"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def plain_errors(path: Path, doing: str = "writing") -> Iterator[None]:
    """Turn an ``OSError`` within the block into a :class:`CheckpointError` that names the path and what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        if error.errno in _NO_SPACE:
            have = f"{megabytes(free_bytes(path))} free at {existing_parent(path)}"
            remedy = f"free some space ({have}) or choose another folder; what was there before is untouched"
        elif error.errno in _NO_PERMISSION:
            remedy = "choose a folder that you may write to, or change its permissions"
        else:
            remedy = "check the disk and the path, then try again"
        raise CheckpointError(f"{path}: {doing} failed at {where}: {reason}; {remedy}") from error


def os_error(error: Exception, path: Path) -> OSError:
    """The ``OSError`` behind another library's report of a failed write; the number is in its text, if anywhere."""
    found = re.search(r"os error ([0-9]+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number) if found else str(error), str(path))


@contextmanager
def staged(final: Path, need: int = 0) -> Iterator[Path]:
    """A fresh folder to write into, on the file system of ``final``; put it in place with :func:`install`.

    Whatever is still there when the block ends is deleted, and so is what a writer that was killed has left. An
    ``OSError`` in the block is reported as one of writing ``final``.

    Args:
        need: bytes about to be written; checked against the free space first.

    Raises:
        CheckpointError: ``final`` is a file, there is too little space, or no permission.
    """
    if final.exists() and not final.is_dir():
        raise CheckpointError(f"{final}: a file is there; a checkpoint is a folder: choose another path")
    parent = final if final.is_dir() else final.parent
    with plain_errors(final):
        parent.mkdir(parents=True, exist_ok=True)
        have = free_bytes(parent)
        if need > have:
            raise CheckpointError(
                f"{final}: need {megabytes(need)}, have {megabytes(have)} at {parent}: free some space or choose "
                "another folder"
            )
        with locked(parent):
            _remove_abandoned(parent)
            outer = Path(tempfile.mkdtemp(prefix=SAVING, dir=parent))
            alive = _lock(outer, wait=False)
        try:
            # The outer folder holds the lock, the inner one is free for another writer to lock.
            folder = outer / "new"
            with plain_errors(final):
                folder.mkdir()
                yield folder
        finally:
            if alive is not None:
                os.close(alive)
            shutil.rmtree(outer, ignore_errors=True)


def install(folder: Path, final: Path) -> None:
    """Put the written ``folder`` in the place of ``final``: at once where that is free, else file by file.

    After a crash at any point ``final`` is either what it was, or what ``folder`` was once :func:`recover` has run.
    """
    with plain_errors(final):
        sync_tree(folder)
        if not final.exists():
            try:
                os.rename(folder, final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                sync_folder(final.parent)
                return
        with locked(final):
            _move_in(final)
            _refuse_links(final, _names_below(folder))
            os.rename(folder, final / PENDING)
            sync_folder(final)
            _move_in(final)


def recover(folder: Path) -> None:
    """Finish the move of a writer that was killed after its files were whole."""
    if (folder / PENDING).is_dir():
        with plain_errors(folder, "finishing an interrupted save"), locked(folder):
            _move_in(folder)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Within the block nobody replaces files of ``folder``; a move that was cut short is finished first.

    Raises:
        CheckpointError: a move was cut short and the folder is not writable.
    """
    while True:
        recover(folder)
        with plain_errors(folder, "reading"), locked(folder, shared=True):
            if not (folder / PENDING).is_dir():
                yield
                return


def _move_in(final: Path) -> None:
    pending = final / PENDING
    if not pending.is_dir():
        return
    names = _names_below(pending)
    _refuse_links(final, names)
    names.sort(key=lambda name: name == Path(MANIFEST))  # last: until then the old manifest tells that files differ
    for name in names:
        target = final / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == Path(MANIFEST):
            for changed in {(final / other).parent for other in names}:
                sync_folder(changed)
        os.replace(pending / name, target)
    shutil.rmtree(pending)
    sync_folder(final)


def _names_below(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir()]


def _refuse_links(final: Path, names: Iterable[Path]) -> None:
    """Check that moving these into ``final`` touches nothing outside it: whoever wrote that may be a stranger.

    Raises:
        CheckpointError: one of the folders on the way is a link.
    """
    inside = {way for name in names for way in name.parents if way.name}
    for way in (final / name for name in sorted({Path(PENDING), *inside})):
        if way.is_symlink():
            raise CheckpointError(
                f"{way}: expected a folder, found a link to {os.readlink(way)}: files are not moved through a link, "
                "which may lead out of the checkpoint; remove it if it is yours, else do not use this copy"
            )


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold the lock of ``folder`` within the block; readers share it."""
    handle = _lock(folder, wait=True, shared=shared)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path, wait: bool, shared: bool = False) -> int | None:
    """A file descriptor that holds the lock, or ``None`` where it is taken or cannot be had."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # a pipe of such a name would be waited for
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{SAVING}*"):
        handle = _lock(path, wait=False)
        if handle is not None:  # a living writer would hold it
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)


def files_below(folder: Path) -> list[str]:
    """Relative names, with forward slashes and sorted, of all files below ``folder`` but the manifest and staging."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    ours = (name for name in names if not name.parts[0].startswith((SAVING, PENDING)))
    return sorted(name.as_posix() for name in ours if name.as_posix() != MANIFEST)


def replace_text(path: Path, text: str) -> None:
    """Write a file that is there as it was, or whole: under another name, to disk, and into its place.

    Raises:
        CheckpointError: it cannot be written; what was there stands.
    """
    staged = path.with_name(f".{path.name}.unfinished")
    with plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(text, encoding="utf-8")
        sync_file(staged)
        os.replace(staged, path)


def sync_file(path: Path) -> None:
    """Bring a file's contents to disk."""
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Bring a folder's names to disk; Windows has no such call."""
    if os.name != "nt":
        sync_file(path)


def sync_tree(folder: Path) -> None:
    """Bring all files and folders below ``folder``, and itself, to disk."""
    for path in folder.rglob("*"):
        sync_folder(path) if path.is_dir() else sync_file(path)
    sync_folder(folder)


def existing_parent(path: Path) -> Path:
    """``path``, or its nearest parent that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def free_bytes(path: Path) -> int:
    """Free space on the file system of ``path``, or of its nearest parent that exists."""
    return shutil.disk_usage(existing_parent(path)).free


def megabytes(count: int) -> str:
    """``"12.3 MB"``."""
    return f"{count / 1e6:,.1f} MB"
