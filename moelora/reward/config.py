"""What a reward model consists of: categories, capabilities, the experts of each, and how their states become a reward.

A *view* is a set of experts that are on together. Every text is looked at under one view or several: the general one,
that of its category, those of the capabilities of its category, and the one that tells categories apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..config import MixtureConfig, SiteConfig
from ..errors import ConfigError
from ..registry import closest
from ..schema import Closed
from .categories import Categories, load_categories

GENERAL = "general"
OUTER = "outer"
PARTS = "reward"
SEPARABLE = ("lora", "rslora")  # kinds whose experts have rows of two stacked factors, and nothing else
Base = Literal["shared", "category", "none"]


@dataclass(frozen=True)
class View:
    """Experts that are on together.

    Attributes:
        name: ``general``, ``outer``, ``<category>`` or ``<category>/<capability>``. experts: their numbers.
        own: the one of them that this view's training moves, or ``None``.
    """

    name: str
    experts: tuple[int, ...]
    own: int | None


class RewardConfig(Closed):
    """The layers of a reward model, in the order in which experts and views are numbered.

    Attributes:
        categories: the outer layer, by name; each has its capabilities, the inner layer. A list of capabilities is
            enough; ``dmoerm`` names the published ones. None at all makes a single reward model.
        base: what the capabilities of a category are added to: ``shared``, one expert for all categories, which is the
            general one as well; ``category``, one for each beside the general one, as published (there a whole model
            for each); ``none``, the backbone as it is.
        aggregator: how the states of all capabilities become one reward: ``mlp``, as published, ``linear`` on their
            scores, or their ``mean``.
        threshold: below this confidence in the category the general expert answers.
        outer_expert: an expert of its own for telling categories apart; else the bare backbone's states have to do.
    """

    categories: Categories = Field(default_factory=dict)
    base: Base = "shared"
    aggregator: str = "mlp"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    outer_expert: bool = True

    @field_validator("categories", mode="before")
    @classmethod
    def _load(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and not value:
            return {}
        try:
            return load_categories(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @field_validator("aggregator")
    @classmethod
    def _known(cls, value: str) -> str:
        from .parts import AGGREGATORS

        if value not in AGGREGATORS:
            raise ValueError(
                f"{value!r} is unknown: known are {', '.join(AGGREGATORS)}{closest(value, [*AGGREGATORS])}"
            )
        return value

    @model_validator(mode="after")
    def _one_category(self) -> Self:
        if self.base == "category" and not self.categories:
            raise ValueError("base is 'category', but there are no categories: name some, or set it to shared")
        return self

    # -- numbering -----------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The categories in their order, which ``category_ids`` count."""
        return list(self.categories)

    def capabilities(self, category: str) -> list[str]:
        """The capabilities of a category in their order, in which states are joined."""
        return list(self.categories[category].capabilities)

    def capability_views(self, category: str) -> list[str]:
        """The names of the views of a category's capabilities, in their order."""
        return [f"{category}/{capability}" for capability in self.capabilities(category)]

    @property
    def views(self) -> list[View]:
        """All views, in the order in which ``request_ids`` count them."""
        return list(self._views())

    def _views(self) -> Iterator[View]:
        count = 0

        def add(name: str, *below: int) -> View:
            nonlocal count
            count += 1
            return View(name, (*below, count - 1), count - 1)

        general = View(GENERAL, (), None) if self.base == "none" else add(GENERAL)
        yield general
        bases = {}
        for category in self.categories:
            bases[category] = add(category) if self.base == "category" else general
            if self.base == "category":
                yield bases[category]
        for category in self.categories:
            for capability in self.capabilities(category):
                yield add(f"{category}/{capability}", *bases[category].experts)
        if len(self.categories) > 1:
            yield add(OUTER) if self.outer_expert else View(OUTER, (), None)

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each view, by its name."""
        return {view.name: number for number, view in enumerate(self.views)}

    def base_view(self, category: str | None) -> str:
        """The view in which a category is judged as a whole."""
        return category if category is not None and self.base == "category" else GENERAL

    # -- mixture -------------------------------------------------------------------------------------------------

    def mixture(self, template: MixtureConfig) -> MixtureConfig:
        """The mixture of all experts, each of which is as the single expert at the template's sites.

        Raises:
            ValueError: a site of the template has a router, or several experts.
        """
        views = self.views
        count = sum(view.own is not None for view in views)
        if count == 0:
            raise ValueError("base is 'none' and there are no categories, which leaves no expert: set base to shared")
        sites = []
        for number, site in enumerate(template.sites):
            if site.router is not None or site.experts.num_experts != 1:
                raise ValueError(
                    f"mixture.sites.{number}: a reward model numbers its own experts, so describe a single one: leave "
                    "out router, and set experts.num_experts to 1"
                )
            if site.experts.kind not in SEPARABLE:
                raise ValueError(
                    f"mixture.sites.{number}: the experts of a reward model are trained apart, and those of kind "
                    f"{site.experts.kind!r} are more than rows of two factors: take {' or '.join(SEPARABLE)}"
                )
            table = [list(view.experts) for view in views]
            router = {"kind": "mask", "by": "request", "table": table}
            experts = {**site.experts.to_dict(), "num_experts": count}
            sites.append(SiteConfig.parse({**site.to_dict(), "experts": experts, "router": router}))
        return MixtureConfig(sites=sites, modules_to_save=[*template.modules_to_save, PARTS])
