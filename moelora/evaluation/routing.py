"""The routing of each task, recorded while it is evaluated: numbers for JSON, and files.

Shapes: E experts, N tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..analysis import metrics
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..analysis import RoutingRecorder, RoutingStats
    from ..mixture import MoELoRAModel


def recorder_for(model: MoELoRAModel, tasks: list[str]) -> RoutingRecorder:
    """A recorder that knows these tasks.

    Raises:
        ConfigError: nothing in the model is routed.
    """
    from ..analysis import RoutingRecorder

    if not model.groups():
        raise ConfigError("there is no routing to record: this mixture has no router, its experts are always on")
    return RoutingRecorder(model, tasks)


def summary(stats: RoutingStats) -> dict[str, Any]:
    """Of each task and site: the experts' parts of the load (E), its entropy, and the dead experts; plain JSON types.

    Entropies are divided by log E: 1 is an even spread, 0 a single expert. ``router_entropy`` is the mean over all
    tokens of the site of the entropy of the router's own distribution.
    """
    sites = []
    for site in stats.sites:
        by_task = {}
        for task, tokens, load in zip(stats.tasks, site.tokens, site.load_NE, strict=True):
            if tokens:
                by_task[task] = {
                    "tokens": tokens,
                    "load": [round(float(part), 6) for part in metrics.shares(load)],
                    "entropy": round(float(metrics.balance(load)), 6),
                    "dead": np.flatnonzero(metrics.dead_experts(load)).tolist(),
                }
        sites.append(
            {
                "site": site.name,
                "layer": site.layer,
                "experts": [site.label(expert) for expert in range(site.num_experts)],
                "router_entropy": round(site.entropy, 6),
                "task_specialisation": round(metrics.task_specialisation(site.load_NE), 6),
                "dead": np.flatnonzero(metrics.dead_experts(site.load_E)).tolist(),
                "tasks": by_task,
            }
        )
    return {"tokens": stats.tokens, "sites": sites}


def write(stats: RoutingStats, folder: str | Path) -> None:
    """Write ``routing.json`` (which :meth:`RoutingStats.from_json` reads) and ``routing.csv`` into ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "routing.json").write_text(stats.to_json(), encoding="utf-8")
    stats.write_csv(folder / "routing.csv")
