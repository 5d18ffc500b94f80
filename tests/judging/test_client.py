"""One question over real HTTP, to a server that misbehaves on purpose."""

from __future__ import annotations

import re
import socket
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from judges_served import completion, hangs, hangs_up, sends, serving, status

from moelora.errors import ConfigError
from moelora.judging.cache import Answer
from moelora.judging.client import Client, Failure
from moelora.judging.config import JudgeConfig
from moelora.judging.questions import compare

QUESTION = compare(({"role": "user", "content": "?"},), "a", "b", "logic")
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def client(url: str, **options: object) -> Client:
    return Client(JudgeConfig.parse({"model": "m", "base_url": url, "retries": 1, "timeout": 10, **options}))


def fails(asked: Client) -> Failure:
    with pytest.raises(Failure) as caught:
        asked.ask(QUESTION)
    return caught.value


def test_an_answer_comes_with_its_tokens() -> None:
    with serving(lambda question: "first") as seen:
        assert client(seen.url).ask(QUESTION) == Answer("first", "stop", 100, 2)
    (request,) = seen.requests
    assert request == {
        "model": "m",
        "messages": [dict(message) for message in QUESTION.messages],
        "temperature": 0,
        "max_tokens": 32,
    }


def test_an_empty_answer_is_one_and_so_is_one_without_usage() -> None:
    body = completion(None)
    del body["usage"]
    with serving(lambda question: "first", [sends(body)]) as seen:
        assert client(seen.url).ask(QUESTION) == Answer("", "stop", None, None)


@pytest.mark.parametrize(
    "fault",
    [
        status(429, "slow down"),
        status(500),
        status(503),
        status(408),
        hangs_up,
        sends(b"{not json"),
        sends(b"<html>busy</html>"),
        sends(b"\xff\xfe"),
        sends({**completion(""), "choices": []}),
        sends({**completion(""), "choices": None}),
        sends({"error": "busy"}),
        sends([1, 2]),
        sends({**completion(""), "choices": [{"message": {"content": 7}}]}),
    ],
)
def test_what_passes_is_tried_again(fault: object) -> None:
    with serving(lambda question: "first", [fault]) as seen:
        asked = client(seen.url)
        assert asked.ask(QUESTION).text == "first"
    assert len(seen.requests) == 2
    assert asked.retried == 1
    assert 0.3 < seen.times[1] - seen.times[0] < 5


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(429, "slow down", Retry_After="1"), r"limits the rate, after 2 tries, and asks to wait for 1 s .*slow"),
        (status(503, "busy"), r"failed, after 2 tries \(503\): busy"),
        (sends(b"{not json"), "sent no JSON, after 2 tries: {not json"),
        (
            sends({**completion(""), "choices": []}),
            "sent JSON without an answer in it, after 2 tries: .*choices",
        ),
    ],
)
def test_what_stays_is_said(fault: object, words: str) -> None:
    with serving(lambda question: "first", [fault] * 2) as seen:
        failure = fails(client(seen.url))
    assert len(seen.requests) == 2
    assert failure.args[0].startswith(seen.url)
    assert re.search(words, str(failure))
    assert not failure.hopeless


def test_a_slow_server_is_given_up() -> None:
    with serving(lambda question: "first", [hangs(1.5)]) as seen:
        failure = fails(client(seen.url, timeout=0.2, retries=0))
    assert "did not answer within 0.2 s, after 1 try" in str(failure)


def test_a_server_that_is_down_is_said_to_be() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        failure = fails(client(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=0))
    assert "cannot be reached, after 1 try: is the server running?" in str(failure)


@pytest.mark.parametrize("when", ["seconds", "date"])
def test_retry_after_is_kept(when: str) -> None:
    wait = "2" if when == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    with serving(lambda question: "first", [status(429, Retry_After=wait)]) as seen:
        client(seen.url).ask(QUESTION)
    assert seen.times[1] - seen.times[0] >= 1.5  # the client's own first wait is at most 0.5 s


def test_a_long_wait_is_left_to_the_user() -> None:
    with serving(lambda question: "first", [status(429, "quota", Retry_After="3600")]) as seen:
        failure = fails(client(seen.url))
    assert len(seen.requests) == 1
    assert "limits the rate, after 1 try, and asks to wait for 3600 s (429): quota" in str(failure)


@pytest.mark.parametrize(
    ("code", "hopeless", "words"),
    [
        (401, True, "refused us, $OPENAI_API_KEY being empty (401): no"),
        (403, True, "refused us, $OPENAI_API_KEY being empty (403): no"),
        (404, True, "knows no such place or model 'm' (404): no"),
        (400, False, "refused the question (400): no"),
    ],
)
def test_what_no_repetition_mends_is_not_repeated(code: int, hopeless: bool, words: str) -> None:
    with serving(lambda question: "first", [status(code)] * 5) as seen:
        failure = fails(client(seen.url))
    assert len(seen.requests) == 1
    assert words in str(failure)
    assert failure.hopeless is hopeless


def test_the_key_is_sent_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level("DEBUG")
    faults = [status(401, f"the key {KEY} is not known"), status(429, KEY), status(400, KEY)]
    with serving(lambda question: "first", list(faults)) as seen:
        asked = client(seen.url, key_env="MY_KEY", retries=0)
        for _ in faults:
            with pytest.raises(Failure) as caught:
                asked.ask(QUESTION)
            assert "***" in str(caught.value)
            shown = "".join(traceback.format_exception(caught.value))
            assert KEY not in shown
            assert caught.value.__cause__ is None
        assert asked.ask(QUESTION).text == "first"
    assert {headers["authorization"] for headers in seen.headers} == {f"Bearer {KEY}"}
    assert KEY not in caplog.text


def test_a_key_that_no_header_may_hold_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ConfigError, match=r"\$OPENAI_API_KEY cannot be a key") as caught:
        client("http://localhost:1/v1")
    assert KEY not in str(caught.value)


def test_openai_itself_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="environment variable OPENAI_API_KEY"):
        Client(JudgeConfig(model="m"))


@pytest.mark.parametrize("url", ["http://user:geheim@localhost/v1", "localhost:8000", "file:///etc/passwd"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url") as caught:
        JudgeConfig.parse({"model": "m", "base_url": url})
    assert "geheim" not in str(caught.value)


def test_sampling_cannot_change_what_is_asked() -> None:
    with pytest.raises(ConfigError, match="'messages' is not for you to set"):
        JudgeConfig.parse({"model": "m", "sampling": {"messages": []}})
