"""What a judge is, and how much may be asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ..schema import Closed

OPENAI = "https://api.openai.com/v1"


class JudgeConfig(Closed):
    """A model behind an OpenAI-compatible endpoint, and how it is asked. The key itself is never part of it.

    Attributes:
        model: its name, as the server knows it.
        base_url: where the server is, with ``/v1`` where it has one.
        key_env: the environment variable that holds the key. A server that needs none is asked without.
        sampling: parameters of every question besides the model and the messages, as the server knows them. Together
            with those they are what an answer is kept under, so other values ask anew.
        concurrency: questions under way at once.
        timeout: seconds to wait for an answer.
        retries: how often a question is sent again after a fault of the server or of the way to it.
        ask_again: how often a judge whose answer cannot be read is asked for a plain one.
    """

    model: str = Field(min_length=1)
    base_url: str = OPENAI
    key_env: str = Field(default="OPENAI_API_KEY", min_length=1)
    sampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 0, "max_tokens": 32})
    concurrency: int = Field(default=4, ge=1, le=256)
    timeout: float = Field(default=60.0, gt=0)
    retries: int = Field(default=6, ge=0)
    ask_again: int = Field(default=2, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _no_password(cls, value: Any) -> Any:
        # Not at the field: the message would show what was given there.
        if isinstance(value, Mapping) and "@" in urlsplit(str(value.get("base_url", ""))).netloc:
            raise ValueError(
                "base_url: a user name or password does not belong in the address: put the key into the environment"
            )
        return value

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("expected an address such as http://localhost:8000/v1")
        return value

    @field_validator("sampling")
    @classmethod
    def _parameters(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in ("model", "messages", "stream", "n"):
            if name in value:
                raise ValueError(f"{name!r} is not for you to set")
        return value

    @property
    def output_limit(self) -> int | None:
        """The most tokens of one answer, where the sampling parameters say so."""
        given = self.sampling.get("max_completion_tokens", self.sampling.get("max_tokens"))
        return given if isinstance(given, int) else None


class Prices(Closed):
    """Money for a million tokens, in whichever currency, of what is sent and of what comes back."""

    input: float = Field(default=0.0, ge=0)
    output: float = Field(default=0.0, ge=0)

    def of(self, tokens_in: int, tokens_out: int) -> float:
        """What so many tokens cost."""
        return (tokens_in * self.input + tokens_out * self.output) / 1e6


class Limits(Closed):
    """Where one run ends, whatever is left to ask.

    Attributes:
        questions: the most requests that are answered, and so paid for.
        cost: the most money; before each question its cost is estimated, the longest answer included.
    """

    questions: int | None = Field(default=None, ge=0)
    cost: float | None = Field(default=None, ge=0)
