"""Reading configuration: safe YAML and JSON from files, and ``key=value`` overrides from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and reads ``1e-3`` as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _refuse_constant(text: str) -> Any:
    raise ConfigError(f"{text} is not a number that a configuration may hold")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"the key {twice!r} is given twice")
    return result


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML or JSON file (by its ending) as a mapping, read safely.

    Raises:
        ConfigError: no such file, larger than 1 MB, not valid, nested too deeply, a key given twice, NaN or Infinity,
            or not a mapping.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
    except OSError:
        raise ConfigError(f"{path}: no such file") from None
    if size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {size} bytes, but a configuration has at most {MAX_CONFIG_BYTES}")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_pairs)
        else:
            value = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, yaml.YAMLError, RecursionError, OSError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{path}: not a readable {file.suffix.lstrip('.') or 'YAML'} file: {reason}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top, got {type(value).__name__}")
    return value


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``values`` with ``key.path=value`` overrides of the command line applied; values are read as YAML.

    List items are addressed by index: ``mixture.sites.0.router.top_k=1``.

    Raises:
        ConfigError: an override has no ``=``, or its path leads through something that is not a mapping or list.
    """
    result: dict[str, Any] = json.loads(json.dumps(values))
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"{override!r} is not an override: write key=value, such as trainer.args.max_steps=100")
        try:
            value = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError:
            raise ConfigError(f"{override!r}: {text!r} is not a YAML value; quote it") from None
        target: Any = result
        keys = path.split(".")
        for key in keys[:-1]:
            target = _step(target, key, override)
        if isinstance(target, list):
            _step(target, keys[-1], override)
            target[int(keys[-1])] = value
        else:
            target[keys[-1]] = value
    return result


def _step(target: Any, key: str, override: str) -> Any:
    if isinstance(target, list):
        if not key.isdigit() or int(key) >= len(target):
            raise ConfigError(f"{override!r}: {key!r} is not an index of a list of {len(target)}")
        inner = target[int(key)]
    else:
        inner = target.setdefault(key, {})
    if not isinstance(inner, dict | list):
        raise ConfigError(f"{override!r}: {key!r} holds {inner!r}, which has no keys")
    return inner
