"""Servers to ask: one of ours, over HTTP, that judges by a function and misbehaves when told to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Judge = Callable[[str], str]  # from the last message to the answer
Fault = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Seen:
    """What a server saw. ``faults`` are used up one a request, before any is answered."""

    judge: Judge
    faults: list[Fault] = field(default_factory=list)
    delay: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


@contextmanager
def serving(judge: Judge, faults: list[Fault] | None = None, delay: float = 0.0) -> Iterator[Seen]:
    """A server at ``seen.url`` for as long as the block lasts."""
    seen = Seen(judge, list(faults or []), delay)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.lock:
                seen.requests.append(body)
                seen.headers.append({name.lower(): value for name, value in self.headers.items()})
                seen.times.append(time.monotonic())
                fault = seen.faults.pop(0) if seen.faults else None
            if fault is not None:
                fault(self)
                return
            time.sleep(seen.delay)
            text = seen.judge(body["messages"][-1]["content"])
            with seen.lock:
                seen.answered[json.dumps(body["messages"])] += 1
            reply(self, completion(text))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed, or gave up, is no fault of ours."""

    server = Quiet(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: str | None) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def reply(handler: BaseHTTPRequestHandler, body: Any, status: int = 200, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def status(code: int, message: str = "no", **headers: str) -> Fault:
    return lambda handler: reply(handler, {"error": {"message": message}}, code, **headers)


def sends(body: Any) -> Fault:
    return lambda handler: reply(handler, body)


def hangs(seconds: float) -> Fault:
    return lambda handler: time.sleep(seconds)


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    """Break off in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def shown(question: str) -> tuple[str, str]:
    """The two replies of a question, as they are shown."""
    found = re.findall(r"--- (?:first|second) reply \w+ ---\n(.*?)\n--- end of", question, re.DOTALL)
    first, second = found
    return first, second


def longer(question: str) -> str:
    """A judge with an opinion: the longer reply is better."""
    first, second = shown(question)
    return "first" if len(first) > len(second) else "second" if len(second) > len(first) else "same"
