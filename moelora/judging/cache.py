"""Answers on disk: what was paid for once is never asked again.

A SQLite file. Every answer is committed, and brought to disk, before the next question of its kind is asked, so a
process that is killed loses the answers that had not arrived yet and no other. One process writes at a time.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .questions import Question

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, messages TEXT NOT NULL, sampling TEXT NOT NULL, attempt INTEGER NOT NULL,
    answer TEXT NOT NULL, finish TEXT, tokens_in INTEGER, tokens_out INTEGER, asked_at TEXT DEFAULT CURRENT_TIMESTAMP
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Answer:
    """What came back: the text (empty where there was none), why it ended, and tokens, where the server counts them."""

    text: str
    finish: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None


class AnswerCache:
    """Answers by question, of one model and its sampling parameters. May be used from several threads.

    Args:
        path: the file; it is made where there is none. ``None`` keeps nothing beyond this object's life.
        read_only: look up only; a file that is not there is taken for an empty one and not made.

    Raises:
        DataError: not a file of answers, in use by another process, or not to be written.
    """

    def __init__(self, path: Path | None, model: str, sampling: Mapping[str, Any], *, read_only: bool = False) -> None:
        self.path = path
        self.model = model
        self.sampling = dict(sampling)
        self._lock = threading.Lock()
        with self._explained():
            self._base = self._open(read_only)

    def _open(self, read_only: bool) -> sqlite3.Connection:
        if self.path is None or (read_only and not self.path.exists()):
            where = ":memory:"
        else:
            if not read_only:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            where = f"{self.path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        base = sqlite3.connect(where, uri=True, timeout=2, isolation_level=None, check_same_thread=False)
        try:
            if where == ":memory:" or not read_only:
                # Held until this process ends, however it ends: a second one must not ask the same questions.
                base.execute("PRAGMA locking_mode = EXCLUSIVE")
                base.execute("PRAGMA synchronous = FULL")
                base.execute("BEGIN EXCLUSIVE")
                base.execute(_TABLE)
                base.execute("COMMIT")
            base.execute("SELECT count(*) FROM answers").fetchone()
        except sqlite3.Error:
            base.close()
            raise
        return base

    def get(self, question: Question) -> Answer | None:
        """The answer to a question, if it was ever given."""
        with self._lock, self._explained():
            row = self._base.execute(
                "SELECT answer, finish, tokens_in, tokens_out FROM answers WHERE key = ?", (self._key(question),)
            ).fetchone()
        return None if row is None else Answer(*row)

    def put(self, question: Question, answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns."""
        values = (
            self._key(question),
            self.model,
            json.dumps([dict(message) for message in question.messages], ensure_ascii=False),
            json.dumps(self.sampling, sort_keys=True),
            question.attempt,
            # A lone surrogate, which JSON may hold and UTF-8 may not, would be refused.
            answer.text.encode("utf-8", "replace").decode(),
            answer.finish,
            answer.tokens_in,
            answer.tokens_out,
        )
        with self._lock, self._explained():
            self._base.execute(
                "INSERT OR IGNORE INTO answers (key, model, messages, sampling, attempt, answer, finish, tokens_in, "
                "tokens_out) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )

    def close(self) -> None:
        """Let the file go."""
        self._base.close()

    def _key(self, question: Question) -> str:
        return question.key(self.model, self.sampling)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if "locked" in str(error):
                remedy = "another run is using it: wait for its end, or name another file"
            elif "not a database" in str(error):
                remedy = "it is not a file of answers: name another one"
            else:
                remedy = "check the disk and the permissions, then run the same command again"
            raise DataError(f"answers in {self.path}: {error}; {remedy}") from error
