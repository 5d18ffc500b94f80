"""The ground that configuration stands on: closed classes, plug-in fields, and readable errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, core_schema

from .config_files import read_mapping
from .errors import ConfigError
from .registry import Registry, closest


class Closed(BaseModel):
    """Base of all configuration: frozen, no unknown keys, errors in one readable paragraph."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            known = list(cls.model_fields)
            for key in value:
                if key not in known:
                    raise ValueError(
                        f"unknown key {key!r}: known keys are {', '.join(known)}{closest(str(key), known)}"
                    )
        return value

    @classmethod
    def parse(cls, value: Any, where: str = "") -> Self:
        """Validate ``value`` (an instance, or a mapping) into this class.

        Args:
            where: how the message names the source: a file, "command line".

        Raises:
            ConfigError: every problem found, a line each.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML or JSON file of at most 1 MB into this class; see :func:`read_mapping` and :meth:`parse`."""
        return cls.parse(read_mapping(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; every field is written, defaults too, so that a saved file does not depend on them."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Indented JSON; ``parse(json.loads(config.to_json())) == config``."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_yaml(self) -> str:
        """YAML; ``parse(yaml.safe_load(config.to_yaml())) == config``."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))


class Pluggable(Closed):
    """Base of the configuration classes that plug-ins bring; ``kind`` is their name in a registry."""

    kind: str


class Plugged:
    """Field type: a mapping with ``kind`` is validated by the configuration class of that kind."""

    def __init__(self, registry: Registry[Any], default: str | None = None) -> None:
        self.registry = registry
        self.default = default

    def _validate(self, value: Any) -> Pluggable:
        if isinstance(value, Pluggable):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a mapping with the key 'kind', got {type(value).__name__}")
        kind = value.get("kind", self.default)
        if kind is None:
            raise ValueError(f"the key 'kind' is missing: it names a {self.registry.what}")
        entry = self.registry.get(kind)
        config: type[Pluggable] = entry.Config
        return config.model_validate({**value, "kind": entry.kind})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda config: config.to_dict()),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        variants = []
        for name in self.registry.names():
            variant = self.registry.get(name).Config.model_json_schema()
            variant = _inlined(variant, variant.pop("$defs", {}))
            variant["properties"]["kind"] = {"const": name, "type": "string"}
            variants.append(variant)
        return {"oneOf": variants}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A schema with definitions in the place of references to them, so that it can be a part of another schema."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = {**definitions[schema["$ref"].removeprefix("#/$defs/")], **schema}
        del schema["$ref"]
    return {key: _inlined(value, definitions) for key, value in schema.items()}


def explain(error: ValidationError, cls: type[BaseModel], where: str = "") -> str:
    """One line per problem: the key path, the value, what is allowed, the remedy."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"]) or cls.__name__
        given = item["input"]
        shown = repr(given) if len(repr(given)) < 80 else f"{repr(given)[:77]}..."
        if item["type"] == "missing":
            lines.append(f"{path}: this key is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(given, dict | Closed) else f" (given {shown})"
            lines.append(f"{path}: {message}{shown}")
    prefix = f"{where}: " if where else ""
    return prefix + "; ".join(lines)
