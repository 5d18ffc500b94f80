"""Typed, closed configuration: what a backbone, a site, a mixture and a recipe may say.

Every class is frozen and closed: an unknown key, a wrong type or an impossible combination raises
:class:`~moelora.errors.ConfigError` before any weight is loaded, naming the key, the value and the remedy. Routers,
expert kinds and trainers bring configuration classes of their own; ``kind`` selects them from the registries, so that
nothing here knows a method by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from .config_files import MAX_CONFIG_BYTES as MAX_CONFIG_BYTES
from .config_files import apply_overrides as apply_overrides
from .config_files import read_mapping as read_mapping
from .data_config import ColumnsConfig as ColumnsConfig
from .data_config import DataConfig as DataConfig
from .data_config import DatasetData as DatasetData
from .data_config import ImageSequenceData as ImageSequenceData
from .data_config import MixtureData as MixtureData
from .data_config import PreferenceColumns as PreferenceColumns
from .data_config import PreferenceData as PreferenceData
from .data_config import ReasoningGymData as ReasoningGymData
from .data_config import SampledPreferenceData as SampledPreferenceData
from .data_config import SequenceData as SequenceData
from .errors import ConfigError
from .registry import EXPERTS, ROUTERS, TRAINERS, closest
from .schema import Closed as Closed
from .schema import Pluggable as Pluggable
from .schema import Plugged
from .schema import explain as explain

FORMAT_VERSION = 1

Quantization = Literal["nf4", "int8", "bf16", "fp16", "fp32"]
DType = Literal["float32", "bfloat16", "float16"]


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
        router: router and its options; ``None`` only when there is a single expert, which is then always on, or where
            the kind of the experts has all act together.
    """

    target: Annotated[list[str], Field(min_length=1)]
    layers: list[int] | str | None = None
    projections: Annotated[list[str], Field(min_length=1)] | None = None
    experts: Annotated[Any, Plugged(EXPERTS, default="lora")] = Field(default_factory=dict)
    router: Annotated[Any, Plugged(ROUTERS)] | None = None

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
        if self.experts.together:
            if self.router is not None:
                raise ValueError(
                    f"router is {self.router.kind!r}, but experts of kind {self.experts.kind!r} all act together: "
                    "leave the router out"
                )
        elif self.router is None:
            if count > 1:
                raise ValueError(
                    f"experts.num_experts is {count} but there is no router: add one, "
                    "such as router: {kind: topk, top_k: 2}, or set num_experts to 1"
                )
        else:
            for experts in (self.experts, *(self.experts.at(name) for name in self.experts.rank_pattern)):
                self.router.check(count, experts.total_rank)
        return self

    def at(self, site: str) -> Self:
        """The configuration of one site, without patterns."""
        experts = self.experts.at(site)
        return self if experts is self.experts else self.model_copy(update={"experts": experts})


class MixtureConfig(Closed):
    """All sites of a mixture, in the order in which they claim modules.

    Attributes:
        modules_to_save: names of modules that are trained and saved whole, such as a classifier's ``score``; matched as
            targets are. Without experts (``disable_experts``) the frozen ones take their place.
    """

    sites: Annotated[list[SiteConfig], Field(min_length=1)]
    modules_to_save: list[Annotated[str, Field(pattern=r"^[\w.-]+$")]] = Field(default_factory=list)


class Recipe(Closed):
    """One run in one file: backbone, mixture, data, trainer.

    Attributes:
        max_length: of an example, in tokens; a longer one is left out.
        packing: put several whole training examples into one row of at most ``max_length`` tokens; attention and
            positions stay within each. A batch then counts rows.
    """

    backbone: BackboneConfig = BackboneConfig()
    mixture: MixtureConfig
    data: DataConfig | None = None
    trainer: Annotated[Any, Plugged(TRAINERS, default="sft")] = Field(default_factory=dict)
    max_length: Annotated[int, Field(gt=0)] = 512
    packing: bool = False
    output_dir: str = "runs/train"
    seed: int = 0

    EXAMPLE: ClassVar[str] = "moelora train mixlora trainer.args.learning_rate=1e-3"


def fits(path: str, name: str) -> bool:
    """Whether the dotted ``path`` of a module equals ``name`` or ends with it after a dot."""
    return path == name or path.endswith(f".{name}")


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
    return sorted(path.stem for path in cards_folder().glob("*.yaml"))


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
    recipe = read_mapping(cards_folder() / f"{name}.yaml").get("recipe")
    if not isinstance(recipe, dict):
        raise ConfigError(f"model card {name!r} has no recipe")
    return recipe


def cards_folder() -> Path:
    """Where the model cards lie."""
    from . import model_cards

    return Path(next(iter(model_cards.__path__)))
