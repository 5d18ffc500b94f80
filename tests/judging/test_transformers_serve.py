"""The real server that the documentation names, with the real default backbone, asked by the real client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from moelora.data.preferences import Ranking
from moelora.gguf import default_backbone
from moelora.judging import JudgeConfig, label
from moelora.judging.cache import AnswerCache
from moelora.judging.client import Client, Failure
from moelora.judging.questions import Question, compare
from moelora.reward.categories import load_categories

for package in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(package)

PROMPT = ({"role": "user", "content": "What is the capital of France?"},)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``transformers serve`` on SmolLM2-135M-Instruct."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(default_backbone()), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 100
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                if json.load(answer)["status"] == "ok":
                    return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def config(url: str, monkeypatch: pytest.MonkeyPatch) -> JudgeConfig:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    sampling = {"temperature": 0, "max_tokens": 12}
    return JudgeConfig.parse({"model": str(default_backbone()), "base_url": url, "sampling": sampling, "retries": 0})


def test_it_answers_in_words_and_counts_its_tokens(config: JudgeConfig) -> None:
    client = Client(config)
    answer = client.ask(Question(({"role": "user", "content": "What is the capital of France?"},)))
    assert "Paris" in answer.text
    assert answer.finish in ("stop", "length")
    assert answer.tokens_in is not None and 10 < answer.tokens_in < 100
    assert answer.tokens_out is not None and 0 < answer.tokens_out <= 12
    client.close()


def test_it_labels_what_it_is_asked_to(config: JudgeConfig, tmp_path: Path) -> None:
    """A model of this size is a poor judge; what matters is that every answer arrives, is accounted for, and stays."""
    rows = [Ranking(PROMPT, ("Paris.", "Bananas are yellow."), category="facts")]
    cache = AnswerCache(tmp_path / "answers", config.model, config.sampling)
    labels = label(rows, load_categories({"facts": ["correctness"]}), config, cache)
    assert labels.spent.failures == {}
    assert labels.total.asked == 1
    assert 2 <= labels.spent.answers <= 6
    assert labels.spent.uncounted == 0
    # The estimate of a plan is of the right size.
    asked = compare(PROMPT, "Paris.", "Bananas are yellow.", "correctness")
    answer = cache.get(asked)
    assert answer is not None and answer.tokens_in is not None
    assert 0.5 < asked.tokens() / answer.tokens_in < 2
    again = label(rows, load_categories({"facts": ["correctness"]}), config, cache)
    assert again.spent.answers == 0
    assert again.rankings == labels.rankings
    cache.close()


def test_another_model_is_refused_in_its_own_words(config: JudgeConfig) -> None:
    client = Client(config.model_copy(update={"model": "some/other"}))
    with pytest.raises(Failure, match=r"refused the question \(400\): Server is pinned to .* requested 'some/other'"):
        client.ask(Question(({"role": "user", "content": "Hi"},)))
    client.close()
