"""A hub on this machine, which answers ``huggingface_hub`` in the form that it expects, and keeps what was asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"


@dataclass
class Repository:
    """The files of a folder at one commit, under ``main`` and other names.

    Attributes:
        access: ``open``, or ``private`` or ``gated``, which need :data:`TOKEN`.
        status: of every answer; other than 200 it is all there is to it.
    """

    folder: Path
    revisions: tuple[str, ...] = ("main",)
    access: str = "open"
    status: int = 200

    @property
    def commit(self) -> str:
        return hashlib.sha1(str(self.folder).encode()).hexdigest()

    def files(self) -> dict[str, Path]:
        return {p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()}


@dataclass
class FakeHub:
    """What :func:`serve` gives.

    Attributes:
        sent: bytes that each file took, by ``owner/name/file``. asked: paths of all requests.
    """

    endpoint: str
    repositories: dict[str, Repository]
    sent: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[FakeHub]:
    """Within the block the server answers."""
    hub = FakeHub("", repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            named = re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/(revision|tree)/([^/]+)", path)
            file = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([^/]+)/(.+)", path)
            match = named or file
            repository = hub.repositories.get(match[1]) if match else None
            if match is None or repository is None:
                return self.refuse(404, "RepoNotFound")
            if repository.status != 200:
                return self.refuse(repository.status, "")
            token = self.headers.get("authorization")
            if token is not None and token != f"Bearer {TOKEN}":
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            if token is None and repository.access == "private":
                return self.refuse(401, "RepoNotFound")
            if token is None and repository.access == "gated":
                return self.refuse(403, "GatedRepo")
            revision = named[3] if named else match[2]
            if revision not in (*repository.revisions, repository.commit):
                return self.refuse(404, "RevisionNotFound")
            if file:
                return self.send_file(match[1], repository, file[3])
            if match[2] == "revision":
                return self.send_json({"id": match[1], "sha": repository.commit, "siblings": []})
            return self.send_json(
                [
                    {"type": "file", "path": name, "size": p.stat().st_size, "oid": _etag(p)}
                    for name, p in repository.files().items()
                ]
            )

        def send_file(self, repo_id: str, repository: Repository, name: str) -> None:
            path = repository.files().get(name)
            if path is None:
                return self.refuse(404, "EntryNotFound")
            content = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
            headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": repository.commit}
            if asked:
                start, stop = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
                headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
                content = content[start : stop + 1]
            if self.command == "GET":
                hub.sent[f"{repo_id}/{name}"] = hub.sent.get(f"{repo_id}/{name}", 0) + len(content)
            return self.send(206 if asked else 200, content, headers)

        def refuse(self, status: int, code: str, message: str = "no") -> None:
            self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

        def send_json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
