"""What a recorder measured: plain numbers per site, checked, and readable from JSON and CSV.

Shapes: E experts, N tasks.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from ..config import Closed, explain
from ..errors import DataError
from .metrics import utilisation

NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class SiteStats(Closed):
    """Routing totals of one site over everything that was recorded.

    Attributes:
        name: dotted path of the site in the backbone. layer: its layer, or ``None`` outside the layers.
        selections: (N, E) how often each expert was chosen by the real tokens of each task; for dense
            routing the sum of its weights.
        tokens: (N,) real tokens of each task.
        entropy: mean over tokens of the entropy of the router's distribution, divided by log E: 0 certain, 1 uniform.
        margin: mean over tokens of the largest probability minus the second largest.
        experts: (E,) names of the experts, such as the adapters that they come from; empty where they have none.
    """

    name: str
    layer: int | None
    selections: tuple[tuple[NonNegative, ...], ...]
    tokens: tuple[Count, ...]
    entropy: float
    margin: float
    experts: tuple[str, ...] = ()

    def label(self, expert: int) -> str:
        """What to call an expert: its name, or else its number."""
        return self.experts[expert] if self.experts else str(expert)

    @cached_property
    def load_NE(self) -> NDArray[np.float64]:
        """(N, E) float64: ``selections`` as an array."""
        return np.array(self.selections, dtype=np.float64)

    @property
    def load_E(self) -> NDArray[np.float64]:
        """(E,) float64: the load of all tasks together."""
        total: NDArray[np.float64] = self.load_NE.sum(axis=0)
        return total

    @property
    def num_experts(self) -> int:
        return len(self.selections[0])

    @property
    def pattern(self) -> str:
        """The name with its first number left open: ``model.layers.*.mlp``; alike for the sites of a group."""
        return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", self.name, count=1) or "site"

    @property
    def place(self) -> str:
        """The site in words: ``layer 3`` or, outside the layers, its path."""
        return (self.name or "site") if self.layer is None else f"layer {self.layer}"


class RoutingStats(Closed):
    """Routing totals of all sites of a model.

    Attributes:
        model, data: what was measured, in words. tasks: (N,) names of the rows of every site's ``selections``.
        sites: in the order of the backbone's modules.
    """

    format: Literal["moelora-routing"] = "moelora-routing"
    version: Literal[1] = 1
    model: str = ""
    data: str = ""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    sites: Annotated[tuple[SiteStats, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _rows(self) -> Self:
        for site in self.sites:
            widths = {len(row) for row in site.selections}
            if len(site.selections) != len(self.tasks) or len(site.tokens) != len(self.tasks) or len(widths) != 1:
                raise ValueError(
                    f"site {site.name!r} has {len(site.selections)} rows of selections with {sorted(widths)} experts "
                    f"and {len(site.tokens)} token counts, for {len(self.tasks)} tasks"
                )
            if len(site.experts) not in (0, site.num_experts):
                raise ValueError(f"site {site.name!r} has {len(site.experts)} names for {site.num_experts} experts")
        return self

    @property
    def tokens(self) -> int:
        """Real tokens that were routed, at the site that saw most."""
        return max(sum(site.tokens) for site in self.sites)

    @cached_property
    def groups(self) -> dict[str, list[SiteStats]]:
        """Sites that differ in the layer alone: ``{"mlp": [...], "self_attn.q_proj": [...]}``.

        A group is named by what comes behind the layer's number, or in full where that is not unique.
        """
        groups: dict[str, list[SiteStats]] = {}
        for site in self.sites:
            groups.setdefault(site.pattern, []).append(site)
        tails = [pattern.rpartition("*.")[2] for pattern in groups]
        names = groups if len(set(tails)) < len(tails) else tails
        return dict(zip(names, groups.values(), strict=True))

    def kind(self, site: SiteStats) -> str:
        """The name of the group of ``site``, where there are several groups, else nothing."""
        return "" if len(self.groups) == 1 else next(name for name, sites in self.groups.items() if site in sites)

    @classmethod
    def from_json(cls, path: str | Path) -> RoutingStats:
        """Read what :meth:`~moelora.config.Closed.to_json` wrote.

        Raises:
            DataError: no such file, or not routing statistics of this version.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); moelora analyze writes routing.json") from None
        except ValidationError as error:
            raise DataError(f"{explain(error, cls, str(path))}; write it anew with moelora analyze") from None

    def rows(self) -> Iterator[dict[str, object]]:
        """One row per site, task and expert: the columns of the CSV file."""
        for site in self.sites:
            for task, tokens, load, ratio in zip(
                self.tasks, site.tokens, site.selections, utilisation(site.load_NE), strict=True
            ):
                for expert in range(site.num_experts):
                    yield {
                        "site": site.name,
                        "layer": "" if site.layer is None else site.layer,
                        "task": task,
                        "expert": expert,
                        "tokens": tokens,
                        "load": round(load[expert], 6),
                        "utilisation": round(float(ratio[expert]), 6),
                    }

    def write_csv(self, path: str | Path) -> None:
        """Write :meth:`rows` as CSV with a heading; utilisation is the load divided by an equal share, 1.0 is fair."""
        rows = list(self.rows())
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
