"""One question to an OpenAI-compatible server, over the official client, and every way in which that can fail."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from ..errors import ConfigError
from .cache import Answer
from .config import OPENAI, JudgeConfig
from .questions import Question

NO_KEY = "none"  # the client wants one even for a server that does not
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds, as the client's own


class Failure(Exception):
    """A question that was not answered; the message is plain words, without the key.

    Attributes:
        hopeless: no other question would fare better, as with a refused key.
    """

    def __init__(self, message: str, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    """What is used of an answer. The client itself takes any JSON for one, and leaves out what does not fit."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class Client:
    """A judge that can be asked; several threads may ask at once.

    Failed connections, timeouts and the statuses 408, 409, 429 and 5xx are retried by the ``openai`` client, with
    exponential backoff (0.5 s up to 8 s, less up to a quarter at random), or after as long as ``Retry-After`` says (two
    minutes at most; what would have to wait longer fails). On top of it, and with the same waits, so are answers that
    are no JSON, or JSON without a choice in it.

    Raises:
        ConfigError: the package ``openai`` is missing, or the key is, or cannot be one.
    """

    def __init__(self, config: JudgeConfig) -> None:
        try:
            import openai
        except ImportError:
            raise ConfigError("a judge needs the package openai: pip install 'moelora[judge]'") from None
        self._openai: Any = openai
        self.config = config
        self.retried = 0
        self._lock = threading.Lock()
        self._key = _key(config)
        self._client = openai.OpenAI(
            api_key=self._key, base_url=config.base_url, timeout=config.timeout, max_retries=config.retries
        )

    def ask(self, question: Question) -> Answer:
        """The answer to a question.

        Raises:
            Failure: there is none, after all retries.
        """
        for attempt in range(self.config.retries + 1):
            # `from None` below: what the client raises may hold the request, and so the key.
            try:
                raw = self._client.chat.completions.with_raw_response.create(
                    model=self.config.model,
                    messages=[dict(message) for message in question.messages],  # type: ignore[misc]
                    extra_body=self.config.sampling,
                )
            except self._openai.OpenAIError as error:
                raise self._failure(error) from None
            body = raw.http_response.content
            with self._lock:
                self.retried += raw.retries_taken + (attempt > 0)
            try:
                return _answer(body)
            except ValidationError as error:
                what = "no JSON" if error.errors()[0]["type"] == "json_invalid" else "JSON without an answer in it"
            if attempt < self.config.retries:
                time.sleep(min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * (1 - random.uniform(0, 0.25)))  # noqa: S311
        said = self._plain(body.decode("utf-8", "replace"))
        raise Failure(f"{self.config.base_url} sent {what}, {_tries(self.config.retries + 1)}: {said}")

    def close(self) -> None:
        """Let the connections go."""
        self._client.close()

    def _failure(self, error: Exception) -> Failure:
        openai, config = self._openai, self.config
        # The client counts them there; fewer than allowed where the server asks to wait for long.
        taken = error.request.headers if isinstance(error, openai.APIError) else {}
        times = _tries(int(taken.get("x-stainless-retry-count", "0")) + 1)
        if isinstance(error, openai.APITimeoutError):
            return Failure(f"{config.base_url} did not answer within {config.timeout:g} s, {times}")
        if isinstance(error, openai.APIConnectionError):
            return Failure(f"{config.base_url} cannot be reached, {times}: is the server running?")
        if not isinstance(error, openai.APIStatusError):
            return Failure(f"the client failed: {self._plain(str(error))}")
        status, said = error.status_code, self._plain(_said(error.response.text, error.body))
        if status in (401, 403):
            given = f"the key in ${config.key_env}" if self._key != NO_KEY else f"us, ${config.key_env} being empty"
            return Failure(f"{config.base_url} refused {given} ({status}): {said}", hopeless=True)
        if status == 404:
            return Failure(f"{config.base_url} knows no such place or model {config.model!r} (404): {said}", True)
        if status == 429:
            wait = error.response.headers.get("retry-after")
            asks = f", and asks to wait for {self._plain(wait)}" + " s" * wait.isdigit() if wait else ""
            return Failure(f"{config.base_url} limits the rate, {times}{asks} (429): {said}")
        if status >= 500 or status in (408, 409):
            return Failure(f"{config.base_url} failed, {times} ({status}): {said}")
        return Failure(f"{config.base_url} refused the question ({status}): {said}")

    def _plain(self, text: str) -> str:
        """A server's words: short, printable, and without the key, which some servers repeat."""
        if self._key != NO_KEY:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return "".join(each if each.isprintable() else "?" for each in text)[:300] or "without a word"


def _tries(count: int) -> str:
    return f"after {count} {'try' if count == 1 else 'tries'}"


def _answer(body: bytes) -> Answer:
    made = _Completion.model_validate_json(body)
    choice, usage = made.choices[0], made.usage or _Usage()
    return Answer(choice.message.content or "", choice.finish_reason, usage.prompt_tokens, usage.completion_tokens)


def _said(text: str, body: Any) -> str:
    """The message in an error's body, in whichever of the usual places; else the body."""
    for _ in range(2):
        if isinstance(body, dict):
            body = body.get("message") or body.get("error") or body.get("detail")
    return body if isinstance(body, str) else text


def _key(config: JudgeConfig) -> str:
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        if urlsplit(config.base_url).hostname == urlsplit(OPENAI).hostname:
            raise ConfigError(
                f"{config.base_url} needs a key: put it into the environment variable {config.key_env}, or name "
                "another server with --base-url"
            )
        return NO_KEY
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"${config.key_env} cannot be a key: it holds blanks or characters that no header may hold")
    return key
