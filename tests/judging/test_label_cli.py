"""``moelora label``: reports, exit codes, limits, and, as its own process, being killed at any moment."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from judges_served import Fault, completion, longer, reply, serving, status

from moelora.cli.app import main

KEY = "sk-very-secret-0123456789"
COUNT = 20
ROWS = [
    {"prompt": f"Say {n}", "responses": ["Hi", "Hello there"], "ranks": [1, 2], "category": "talk"}
    for n in range(COUNT)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "points.yaml").write_text("talk: [humour]\n")
    return tmp_path


def command(folder: Path, url: str, *words: str) -> list[str]:
    paths = [f"{folder}/pairs.jsonl", "-o", f"{folder}/out.jsonl", "--categories", f"{folder}/points.yaml"]
    return [sys.executable, "-m", "moelora", "label", *paths, "--model", "m", "--base-url", url, *words]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return {**kept, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "GOMP_SPINCOUNT": "20000"}


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The verb in this process, as the user would type it; a key only where one is given."""
    logger = logging.getLogger("moelora")
    before = logger.handlers, logger.level, logger.propagate
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def run(url: str, *words: str, key: str | None = None) -> Done:
        if key is None:
            monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        else:
            monkeypatch.setenv("OPENAI_API_KEY", key)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(command(folder, url, *words)[3:])
        return Done(int(stopped.value.code or 0), *capsys.readouterr())

    yield run
    logger.handlers, logger.level, logger.propagate = before


def kept(folder: Path) -> set[str]:
    """The messages of all answers on disk."""
    with sqlite3.connect(folder / "out.jsonl.answers.sqlite") as base:
        return {json.dumps(json.loads(row[0])) for row in base.execute("SELECT messages FROM answers")}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_it_plans_stops_goes_on_and_reports(folder: Path, run: Run) -> None:
    with serving(longer) as seen:
        planned = run(seen.url, "--dry-run", "--price-in", "2", "--price-out", "3")
        assert planned.returncode == 0, planned.stderr
        assert planned.stdout.startswith("20 pairs, 40 questions, 40 of them without an answer yet\nabout ")
        assert "cost: about 0.0" in planned.stdout
        assert not seen.requests
        assert sorted(path.name for path in folder.iterdir()) == ["pairs.jsonl", "points.yaml"]

        part = run(seen.url, "--max-questions", "10", key=KEY)
        assert part.returncode == 0, part.stderr
        assert "the limit of 10 questions is reached; 15 pairs are left" in part.stdout.replace("\n", " ")
        assert len(seen.requests) == 10
        assert {headers["authorization"] for headers in seen.headers} == {f"Bearer {KEY}"}
        assert KEY not in part.stdout + part.stderr
        assert all(KEY.encode() not in path.read_bytes() for path in folder.iterdir())
        assert sum("capabilities" in row for row in rows(folder)) == 5

        whole = run(seen.url, "--json", "--price-in", "2", "--price-out", "3")
        assert whole.returncode == 0, whole.stderr
        assert set(seen.answered.values()) == {1}
    report = json.loads(whole.stdout)
    counts = {"kept": 20, "inconsistent": 0, "undecided": 0, "unreadable": 0, "open": 0}
    assert report["points"] == [{"category": "talk", "point": "humour", "pairs": 20, **counts}]
    assert report["position_bias"] == 0.0
    assert report["spent"]["answers"] == 30
    assert report["spent"]["cost"] == pytest.approx((30 * 100 * 2 + 30 * 2 * 3) / 1e6)
    assert whole.stderr.strip() == "" or "Generating" in whole.stderr
    for given, made in zip(ROWS, rows(folder), strict=True):
        assert made["responses"] == given["responses"]
        assert made["capabilities"]["humour"] in ([2, 1], {"pairs": [[1, 0]], "ties": [], "margins": [0.0]})


def test_it_says_what_went_wrong_and_goes_on(folder: Path, run: Run) -> None:
    dead: list[Fault] = [status(503, "out of order")] * 100
    with serving(longer) as seen:
        run(seen.url, "--max-questions", "10")
        seen.faults = dead
        failed = run(seen.url, "--retries", "0")
        assert failed.returncode == 2
        said = failed.stderr.replace("\n", " ")
        assert f"{seen.url} failed, after 1 try (503): out of order" in said
        assert "15 pairs are left" in said
        assert "run the same command again to go on" in said
        assert "Traceback" not in said
        assert sum("capabilities" in row for row in rows(folder)) == 5
        seen.faults = []
        assert run(seen.url).returncode == 0
        assert set(seen.answered.values()) == {1}
    assert sum("capabilities" in row for row in rows(folder)) == COUNT


def test_a_terminal_sees_a_bar_and_what_was_cut_off(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def cuts_off(handler: Any) -> None:
        body = completion("Let me think about this. The")
        body["choices"][0]["finish_reason"] = "length"
        reply(handler, body)

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with serving(longer, [cuts_off] * 2 * COUNT) as seen:
        done = run(seen.url, "--ask-again", "0")
    assert done.returncode == 0, done.stderr
    assert "Asking" in done.stderr
    assert "40 unreadable answers were cut off: allow longer ones, as with --sampling max_tokens=2000" in done.stdout
    assert "position bias" not in done.stdout


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_it_loses_nothing_and_pays_nothing_twice(folder: Path, run: Run, kill: signal.Signals) -> None:
    with serving(longer, delay=0.1) as seen:
        words = command(folder, seen.url, "--concurrency", "3")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A shell starts what runs in its background deaf to SIGINT, and children inherit that.
        hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(words, env=environment(), preexec_fn=hearing, **pipes) as process:
            while sum(seen.answered.values()) < 12:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(kill)
            process.communicate()
        time.sleep(0.3)  # what was under way still comes to its end at the server
        assert process.returncode == (-9 if kill is signal.SIGKILL else 130)
        before = kept(folder)
        sent = set(seen.answered)
        assert before <= sent
        assert len(before) >= 9
        # Killed, it cannot keep what had not arrived; interrupted, it waits for that.
        assert len(sent - before) <= (3 if kill is signal.SIGKILL else 0)
        assert not (folder / "out.jsonl").exists()
        assert run(seen.url).returncode == 0
        twice = {messages for messages, count in seen.answered.items() if count > 1}
        assert twice == sent - before
    assert sum("capabilities" in row for row in rows(folder)) == COUNT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sampling", "max_tokens"), "--sampling 'max_tokens': expected KEY=VALUE"),
        (("--sampling", "messages=[]"), "'messages' is not for you to set"),
        (("--max-cost", "1"), "--max-cost needs --price-in"),
        (("--categories", "dmorm"), "did you mean 'dmoerm'?"),
        (("--categories", "dmoerm"), "the category 'talk' is not among roleplay, chitchat"),
        (("-o", "{folder}/pairs.jsonl"), "is the file that is read"),
        (("--cache", "{folder}/pairs.jsonl"), "it is not a file of answers"),
        (("data.columns.category=kind",), "data.columns.category is 'kind'"),
    ],
)
def test_a_mistake_is_explained(folder: Path, run: Run, words: tuple[str, ...], message: str) -> None:
    with serving(longer) as seen:
        done = run(seen.url, *(word.format(folder=folder) for word in words))
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())
        assert not seen.requests
