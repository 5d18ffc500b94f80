"""Answers on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moelora.errors import DataError
from moelora.judging.cache import Answer, AnswerCache
from moelora.judging.questions import compare

pytestmark = pytest.mark.smoke

PROMPT = ({"role": "user", "content": "?"},)
ONE, TWO = compare(PROMPT, "a", "b", "logic"), compare(PROMPT, "b", "a", "logic")

WRITER = """
import sys
from pathlib import Path
from moelora.judging.cache import Answer, AnswerCache
from moelora.judging.questions import compare
cache = AnswerCache(Path(sys.argv[1]), "m", {})
for number in range(10**6):
    cache.put(compare(({"role": "user", "content": str(number)},), "a", "b", "logic"), Answer(str(number)))
    print(number, flush=True)
"""


def test_an_answer_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers"
    cache = AnswerCache(path, "m", {"temperature": 0})
    assert cache.get(ONE) is None
    given = Answer("first \ud83d\udc4d é", "stop", 10, 2)
    cache.put(ONE, given)
    cache.put(TWO, Answer("", None, None, None))
    cache.close()
    again = AnswerCache(path, "m", {"temperature": 0}, read_only=True)
    assert again.get(ONE) == Answer("first ?? é", "stop", 10, 2)
    assert again.get(TWO) == Answer("")
    again.close()
    other = AnswerCache(path, "m", {"temperature": 1})
    assert other.get(ONE) is None
    other.close()


def test_the_first_answer_stands(tmp_path: Path) -> None:
    cache = AnswerCache(None, "m", {})
    cache.put(ONE, Answer("first"))
    cache.put(ONE, Answer("second"))
    assert cache.get(ONE) == Answer("first")
    cache.close()


def test_looking_makes_no_file(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "none", "m", {}, read_only=True)
    assert cache.get(ONE) is None
    cache.close()
    assert not (tmp_path / "none").exists()


def test_a_second_run_on_the_same_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    cache = AnswerCache(path, "m", {})
    with pytest.raises(DataError, match="another run is using it"):
        AnswerCache(path, "m", {})
    cache.close()
    AnswerCache(path, "m", {}).close()


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes, which are longer than a header " * 10)
    with pytest.raises(DataError, match="not a file of answers"):
        AnswerCache(path, "m", {})
    assert path.read_text().startswith("my notes")


def test_a_killed_writer_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 40:
                os.kill(process.pid, signal.SIGKILL)
                break
        said = [40, *map(int, process.stdout.read().split())]
    cache = AnswerCache(path, "m", {})
    for number in range(said[-1] + 1):
        question = compare(({"role": "user", "content": str(number)},), "a", "b", "logic")
        assert cache.get(question) == Answer(str(number))
    cache.close()
