"""One registry for every kind of plug-in: routers, expert kinds, trainers, checkpoint layouts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")
K = TypeVar("K", bound=type[Any])


def closest(name: str, known: list[str]) -> str:
    """``"; did you mean 'topk'?"`` when one of ``known`` is near to ``name``, else an empty string."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class Registry(Generic[T]):
    """Classes by name.

    Args:
        what: the noun of the error messages ("router", "expert kind").
        home: the package whose import registers the built-in entries. It is imported at the first look-up, so that a
            configuration can be checked without the caller having imported the methods.
    """

    def __init__(self, what: str, home: str) -> None:
        self.what = what
        self._home = home
        self._entries: dict[str, type[T]] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[K], K]:
        """Class decorator: make a class known as ``name``. ``kind`` on the class is set to that name.

        Raises:
            ValueError: the name or an alias is taken by another class.
        """

        def add(cls: K) -> K:
            for key in (name, *aliases):
                if key in self._entries or key in self._aliases:
                    raise ValueError(f"{self.what} {key!r} is registered twice")
            cls.kind = name
            self._entries[name] = cls
            self._aliases.update(dict.fromkeys(aliases, name))
            return cls

        return add

    def names(self) -> list[str]:
        """All registered names, sorted, without aliases."""
        import_module(self._home)
        return sorted(self._entries)

    def get(self, name: str) -> type[T]:
        """The class registered under ``name`` or one of its aliases.

        Raises:
            ConfigError: no such name; the message lists those that exist and the closest one.
        """
        names = self.names()
        try:
            return self._entries[self._aliases.get(name, name)]
        except (KeyError, TypeError):
            raise ConfigError(
                f"unknown {self.what} {name!r}: known are {', '.join(names)}{closest(str(name), names)}"
            ) from None

    def aliases(self, name: str) -> list[str]:
        """The other names of the class registered as ``name``, sorted."""
        import_module(self._home)
        return sorted(alias for alias, target in self._aliases.items() if target == name)

    def create(self, name: str, *args: Any, **kwargs: Any) -> T:
        """An instance of the class registered under ``name``."""
        return self.get(name)(*args, **kwargs)

    def __contains__(self, name: str) -> bool:
        return name in self.names() or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


ROUTERS: Registry[Any] = Registry("router", "moelora.routers")
EXPERTS: Registry[Any] = Registry("expert kind", "moelora.experts")
TRAINERS: Registry[Any] = Registry("trainer", "moelora.trainers")
