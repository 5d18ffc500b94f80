"""A repository of the hub: which files it has, fetching those that are wanted, and plain words for what went wrong."""

from __future__ import annotations

import fnmatch
import glob
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.hf_api import RepoFile
from torch import Tensor

from ..errors import CheckpointError
from .folder import Folder
from .reading import SAFETENSORS_DTYPES
from .tensor_file import Header, TensorFile

logger = logging.getLogger(__name__)

PASSING = "token=..., --token, or the environment variable HF_TOKEN"
# What a request that got no answer raises. The package that it is of changes with the versions of huggingface_hub.
_NETWORK: type[BaseException] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Hub:
    """A folder of a repository; the arguments are those of transformers."""

    repo_id: str
    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def fetch(self, patterns: Iterable[str]) -> Path:
        """The local copy of the folder, with those of its files that fit one of the patterns.

        Where the hub cannot be asked it is what the cache has of them.

        Raises:
            CheckpointError: they cannot be had; says why.
        """
        inside = f"{glob.escape(self.subfolder)}/" if self.subfolder else ""
        with self._explained():
            try:
                snapshot = snapshot_download(
                    self.repo_id,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    allow_patterns=[inside + pattern for pattern in dict.fromkeys(patterns)],
                )
            except IncompleteSnapshotError as error:
                # The missing files may be those of another layout.
                snapshot = error.snapshot_path
                logger.warning("%s: some of its files are not in the cache, and cannot be had: %s", self, error)
        return Path(snapshot) / self.subfolder

    def pinned(self, folder: Path) -> Hub:
        """The same at the commit that ``folder`` was fetched from, so that what is fetched next fits it."""
        for _ in filter(None, self.subfolder.split("/")):
            folder = folder.parent
        return replace(self, revision=folder.name)

    def listing(self) -> dict[str, int] | None:
        """All files below the folder and their sizes in bytes; ``None`` where the hub may not be asked, or fails."""
        if self.local_files_only:
            return None
        inside = f"{self.subfolder}/" if self.subfolder else ""
        try:
            with self._explained():
                found = HfApi(token=self.token).list_repo_tree(self.repo_id, recursive=True, revision=self.revision)
                files = {entry.path: entry.size for entry in found if isinstance(entry, RepoFile)}
        except CheckpointError as error:
            logger.debug("%s", error)
            return None
        return {path.removeprefix(inside): size for path, size in files.items() if path.startswith(inside)}

    def headers(self, name: str) -> dict[str, Header]:
        """What a safetensors file says of its tensors, without fetching them.

        Raises:
            CheckpointError: it cannot be had, or is damaged.
        """
        path = f"{self.subfolder}/{name}" if self.subfolder else name
        with self._explained():
            found = HfApi(token=self.token).parse_safetensors_file_metadata(self.repo_id, path, revision=self.revision)
        return {
            key: Header(SAFETENSORS_DTYPES.get(info.dtype, info.dtype), tuple(info.shape))
            for key, info in found.tensors.items()
        }

    def __str__(self) -> str:
        where = f" ({self.subfolder})" if self.subfolder else ""
        return f"{self.repo_id}{where}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (_NETWORK, OSError, SafetensorsParsingError) as error:
            raise CheckpointError(
                f"{self}: no such folder here, and from the hub it cannot be had: {self._reason(error)}"
            ) from error

    def _reason(self, error: BaseException) -> str:
        """What went wrong and what to do."""
        # What kept the library from asking the hub is the cause of its finding nothing in the cache.
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        status = _status(cause)
        known = (reason for kind, reason in _REASONS.items() if isinstance(cause, kind))
        reason = next(known, None) or _STATUS.get(status)
        if reason is None:
            unreachable = isinstance(cause, _NETWORK) and not status
            said = " ".join(str(cause).split()).replace("{", "{{").replace("}", "}}")
            reason = _UNREACHABLE if unreachable else f"{said}; check the name, the network and the disk"
        page = f"huggingface.co/{self.repo_id}"
        return reason.format(revision=self.revision or "main", page=page, status=status)


_ONLY_LOCAL = "local_files_only is set, and the cache does not have it: fetch it without, or name another cache_dir"
_UNREACHABLE = "the hub cannot be reached: check the network (and HF_ENDPOINT, if you have set it)"
_REASONS: Mapping[type[BaseException], str] = {
    GatedRepoError: (
        "its owner lets in only those who asked: ask for access on {page} and pass a token of the account that got it "
        f"({PASSING})"
    ),
    RepositoryNotFoundError: (
        "there is no such repository, or it is private: check the name; for a private one pass a token that may read "
        f"it ({PASSING})"
    ),
    DisabledRepoError: "the hub has disabled this repository: ask its owner",
    RevisionNotFoundError: (
        "the repository has no revision '{revision}': give a branch, a tag or a commit that {page} lists, or none"
    ),
    LocalTokenNotFoundError: "token is True, but this machine has none: run 'hf auth login', or pass the token itself",
    OfflineModeIsEnabled: (
        "HF_HUB_OFFLINE forbids asking the hub, and the cache does not have it: unset it, or name another cache_dir"
    ),
    LocalEntryNotFoundError: _ONLY_LOCAL,
    EntryNotFoundError: "a file that the repository listed is not there any more: try again",
}
_STATUS: Mapping[int, str] = {
    401: f"the hub does not accept the token: make a new one and pass it ({PASSING})",
    403: f"the token may not read it: pass one that may ({PASSING})",
    429: "the hub has had too many requests from here: wait some minutes, or pass a token, and try again",
    **dict.fromkeys((500, 502, 503, 504), "the hub itself fails (HTTP {status}): try again later"),
}


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


class RemoteFolder(Folder):
    """A folder of which some files are here and all are listed; of the others' tensors only the headers are asked for.

    Args:
        path: where the files lie that are here. sizes: of all files, by name.
    """

    def __init__(self, path: Path, hub: Hub, sizes: Mapping[str, int]) -> None:
        super().__init__(path)
        self.hub = hub
        self.sizes = sizes

    def has(self, name: str) -> bool:
        return name in self.sizes

    def names(self, pattern: str = "*") -> list[str]:
        return fnmatch.filter(sorted({name.partition("/")[0] for name in self.sizes}), pattern)

    def below(self, name: str) -> list[str]:
        return sorted(each for each in self.sizes if each.count("/") == 1 and each.endswith(f"/{name}"))

    def size(self, name: str) -> int:
        return self.sizes[name]

    def mapping(self, name: str) -> dict[str, Any]:
        if name in self.sizes and not (self.path / name).exists():
            self.hub.fetch([glob.escape(name)])
        return super().mapping(name)

    def _open(self, name: str) -> TensorFile:
        if (self.path / name).exists() or not self.has(name) or not name.endswith(".safetensors"):
            return super()._open(name)
        return _Headers(self.path / name, self.hub.headers(name))


class _Headers(TensorFile):
    """The headers of a file that is not here."""

    def __init__(self, path: Path, headers: dict[str, Header]) -> None:
        self.path = path
        self.headers = headers

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        raise NotImplementedError(f"{json.dumps(list(keys)[:3])}: only the headers of {self.path.name} were fetched")
