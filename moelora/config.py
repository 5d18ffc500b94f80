"""Typed, closed configuration: what a backbone, a site, a mixture and a recipe may say.

Every class is frozen and closed: an unknown key, a wrong type or an impossible combination raises
:class:`~moelora.errors.ConfigError` before any weight is loaded, naming the key, the value and the remedy. Routers,
expert kinds and trainers bring configuration classes of their own; ``kind`` selects them from the registries, so that
nothing here knows a method by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from .errors import ConfigError
from .registry import EXPERTS, ROUTERS, TRAINERS, Registry, closest

MAX_CONFIG_BYTES = 1_000_000
FORMAT_VERSION = 1

Quantization = Literal["nf4", "int8", "bf16", "fp16", "fp32"]
DType = Literal["float32", "bfloat16", "float16"]
C = TypeVar("C", bound="Closed")


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


class _Plugged:
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
            variant["properties"]["kind"] = {"const": name, "type": "string"}
            variants.append(variant)
        return {"oneOf": variants}


class BackboneConfig(Closed):
    """The frozen model that carries the experts.

    Attributes:
        name: the embedded default (``smollm2-135m-instruct``), a hub id, a local folder, or a ``.gguf`` file.
        quantization: storage of the frozen linears; ``None`` keeps what the source has.
        dtype: arithmetic of everything that is not quantised; ``None`` means float32 on a CPU, bfloat16 on a GPU.
        revision: branch, tag or commit of a hub id.
        subfolder: folder within a hub repository.
    """

    name: str = "smollm2-135m-instruct"
    quantization: Quantization | None = "nf4"
    dtype: DType | None = None
    revision: str | None = None
    subfolder: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        storage = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(self.quantization or "")
        if storage and self.dtype not in (None, storage):
            raise ValueError(
                f"quantization {self.quantization} stores {storage}, so dtype {self.dtype} cannot hold: drop one"
            )
        return self


class SiteConfig(Closed):
    """Where experts attach, which experts, and what routes to them.

    Attributes:
        target: module names. Each matches a module whose dotted path equals it or ends with ``"." + target``; a target
            that starts with ``re:`` is a regular expression matched against the whole path. A matched linear becomes a
            linear site, any other module must be an FFN block and becomes a block site.
        layers: restrict to these layers of the backbone: indices, or a Python slice as text (``"-10:"`` is the last
            ten). ``None`` means all.
        projections: for a block site, the names of the projections that get experts; ``None`` means all of them.
        experts: expert kind and its options.
        router: router and its options; ``None`` only when there is a single expert, which is then always on.
    """

    target: Annotated[list[str], Field(min_length=1)]
    layers: list[int] | str | None = None
    projections: Annotated[list[str], Field(min_length=1)] | None = None
    experts: Annotated[Any, _Plugged(EXPERTS, default="lora")] = Field(default_factory=dict)
    router: Annotated[Any, _Plugged(ROUTERS)] | None = None

    @field_validator("target", "projections", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("layers")
    @classmethod
    def _slice(cls, value: list[int] | str | None) -> list[int] | str | None:
        if isinstance(value, str):
            parse_slice(value)
        return value

    @model_validator(mode="after")
    def _fit(self) -> Self:
        count = self.experts.num_experts
        if self.router is None:
            if count > 1:
                raise ValueError(
                    f"experts.num_experts is {count} but there is no router: add one, "
                    "such as router: {kind: topk, top_k: 2}, or set num_experts to 1"
                )
        else:
            self.router.check(count)
        return self


class MixtureConfig(Closed):
    """All sites of a mixture, in the order in which they claim modules."""

    sites: Annotated[list[SiteConfig], Field(min_length=1)]


class ReasoningGymData(Closed):
    """Procedurally generated tasks of the ``reasoning-gym`` package, each with its own scorer.

    Attributes:
        tasks: names of reasoning-gym data sets; per-task generator options may follow as a mapping.
        train_size: training examples per task.
        test_size: test examples per task.
        seed: seed of the training examples; test examples come from ``test_seed``, and training examples with the same
            question are left out.
        system: system message of every prompt; ``None`` leaves it to the backbone's chat template.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    train_size: Annotated[int, Field(gt=0)] = 500
    test_size: Annotated[int, Field(gt=0)] = 50
    seed: int = 0
    test_seed: int = 1_000_003
    system: str | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return {task: {} for task in value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        if self.seed == self.test_seed:
            raise ValueError(f"seed and test_seed are both {self.seed}: training and test examples would coincide")
        return self


class ColumnsConfig(Closed):
    """Which columns of a user's data hold what; ``task`` is optional, and a text here that is no column is an error."""

    prompt: str = "prompt"
    answer: str = "answer"
    task: str | None = None
    system: str | None = None


class DatasetData(Closed):
    """A user's own data: a local JSONL, JSON, CSV or Parquet file, or a hub id, read through ``datasets``.

    Attributes:
        path: the file (or glob) of training examples, or a hub id.
        test_path: the file of test examples; without it ``test_fraction`` of the training file is held out.
        name: configuration name of a hub data set.
        split: split to train on; test_split: split to evaluate on (hub ids).
        limit: at most this many training examples.
        columns: the column mapping.
        system: system message of every prompt; ``columns.system`` gives one for each row instead.
    """

    kind: Literal["dataset"] = "dataset"
    path: str
    test_path: str | None = None
    name: str | None = None
    split: str = "train"
    test_split: str | None = None
    test_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    limit: Annotated[int, Field(gt=0)] | None = None
    columns: ColumnsConfig = ColumnsConfig()
    system: str | None = None
    seed: int = 0


DataConfig = Annotated[ReasoningGymData | DatasetData, Field(discriminator="kind")]


class Recipe(Closed):
    """One run in one file: backbone, mixture, data, trainer."""

    backbone: BackboneConfig = BackboneConfig()
    mixture: MixtureConfig
    data: DataConfig | None = None
    trainer: Annotated[Any, _Plugged(TRAINERS, default="sft")] = Field(default_factory=dict)
    max_length: Annotated[int, Field(gt=0)] = 512
    output_dir: str = "runs/train"
    seed: int = 0

    EXAMPLE: ClassVar[str] = "moelora train mixlora trainer.args.learning_rate=1e-3"


def parse_slice(text: str) -> slice:
    """``"-10:"`` as a :class:`slice`.

    Raises:
        ValueError: ``text`` is not a Python slice of integers.
    """
    parts = text.split(":")
    try:
        if not 2 <= len(parts) <= 3:
            raise ValueError
        return slice(*(int(part) if part.strip() else None for part in parts))
    except ValueError:
        raise ValueError(f"{text!r} is not a slice: write 'start:stop' or a list of indices, such as '-10:'") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and reads ``1e-3`` as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
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


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from a YAML or JSON path, from the name of a model card that ships with moelora, or from a mapping.

    Args:
        source: a path, a card name such as ``"mixlora"``, a mapping, or a recipe (returned as it is).
        overrides: ``key.path=value`` texts, applied before validation.

    Raises:
        ConfigError: no such file or card, or a recipe that does not hold together.
    """
    where = ""
    if isinstance(source, Recipe):
        source = source.to_dict()
    if isinstance(source, Mapping):
        values = dict(source)
    else:
        where = str(source)
        values = read_mapping(source) if Path(source).suffix else card_recipe(str(source))
    return Recipe.parse(apply_overrides(values, overrides), where=where)


def card_names() -> list[str]:
    """Names of the model cards that ship with moelora."""
    return sorted(path.stem for path in _cards_folder().glob("*.yaml"))


def card_recipe(name: str) -> dict[str, Any]:
    """The ``recipe`` of the model card ``name``.

    Raises:
        ConfigError: no such card; the message lists those that exist.
    """
    names = card_names()
    if name not in names:
        raise ConfigError(
            f"{name!r} is neither a recipe file (.yaml, .json) nor a model card: cards are {', '.join(names)}"
            f"{closest(name, names)}"
        )
    recipe = read_mapping(_cards_folder() / f"{name}.yaml").get("recipe")
    if not isinstance(recipe, dict):
        raise ConfigError(f"model card {name!r} has no recipe")
    return recipe


def _cards_folder() -> Path:
    from . import model_cards

    return Path(next(iter(model_cards.__path__)))


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
