"""What routing statistics mean, in plain words: dead experts, collapse, undecided routers, tasks with own experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from . import metrics
from .stats import RoutingStats, SiteStats

# Where a finding is worth a word. They are judgements, not measurements.
UNEVEN_BELOW = 0.5
UNDECIDED_ABOVE = 0.97
CERTAIN_ABOVE = 0.99
APART_ABOVE = 0.15
LISTED = 12


@dataclass(frozen=True)
class Finding:
    """One sentence or two about the routing; ``good``, a ``note``, or a ``warning`` that something may be wrong."""

    level: Literal["good", "note", "warning"]
    text: str


@dataclass(frozen=True)
class TaskExpert:
    """A task that uses an expert unlike the other tasks: its utilisation, and the mean of the others'."""

    site: SiteStats
    task: str
    expert: int
    own: float
    others: float


def findings(stats: RoutingStats) -> list[Finding]:
    """All findings, the warnings first."""
    found = [_dead(stats), *_collapsed(stats), *_decided(stats), *_tasks(stats), *_few_tokens(stats)]
    rank = {"warning": 0, "good": 1, "note": 2}
    return sorted(found, key=lambda finding: rank[finding.level])


def place(stats: RoutingStats, site: SiteStats) -> str:
    """The site in words, with its kind where sites of several kinds are routed."""
    return site.place if site.layer is None else f"{site.place} {stats.kind(site)}".rstrip()


def dead_experts(stats: RoutingStats) -> list[tuple[SiteStats, int, bool]]:
    """Every dead expert: its site, its index, and whether it was never chosen at all."""
    return [
        (site, int(expert), bool(site.load_E[expert] == 0))
        for site in stats.sites
        for expert in np.flatnonzero(metrics.dead_experts(site.load_E))
    ]


def specialists(stats: RoutingStats, most: int = 5) -> list[TaskExpert]:
    """The tasks and experts that stand out most, at most one for each site and two for each task."""
    found: list[TaskExpert] = []
    for site in stats.sites:
        ratio = metrics.utilisation(site.load_NE)
        ratio = np.where(np.isnan(ratio), 0.0, ratio)
        count = len(stats.tasks)
        others = (ratio.sum(axis=0, keepdims=True) - ratio) / max(count - 1, 1)
        task, expert = (int(i) for i in np.unravel_index(int((ratio - others).argmax()), ratio.shape))
        own, mean = float(ratio[task, expert]), float(others[task, expert])
        found.append(TaskExpert(site, stats.tasks[task], expert, own, mean))
    found.sort(key=lambda item: item.others - item.own)
    kept: list[TaskExpert] = []
    for item in found:
        if sum(other.task == item.task for other in kept) < 2 and item.own > item.others:
            kept.append(item)
    return kept[:most]


def _dead(stats: RoutingStats) -> Finding:
    dead = dead_experts(stats)
    total = sum(site.num_experts for site in stats.sites)
    limit = f"{100 * metrics.DEAD_BELOW:.0f} % of a fair share"
    if not dead:
        return Finding("good", f"No dead experts: each of the {total} gets at least {limit} of its layer's tokens.")
    by_site: dict[str, list[str]] = {}
    for site, expert, unused in dead:
        by_site.setdefault(place(stats, site), []).append(site.label(expert) + " (never chosen)" * unused)
    named = [f"{where}: expert{'s' if len(which) > 1 else ''} {_and(which)}" for where, which in by_site.items()]
    return Finding(
        "warning",
        f"{len(dead)} of {total} experts {'is' if len(dead) == 1 else 'are'} dead (under {limit}): "
        f"{_listed(named, '; ')}. They cost memory and learn nothing; a larger aux_loss_coef spreads the load, though "
        "a loss that is pooled over layers (MixLoRA's) evens all layers together and may leave one of them uneven.",
    )


def _collapsed(stats: RoutingStats) -> list[Finding]:
    bad = []
    for site in stats.sites:
        picks = site.load_E.sum() / max(sum(site.tokens), 1)
        # With few experts the most that top-k can reach, E / K, is itself below 4.
        limit = min(4.0, 0.95 * site.num_experts / max(picks, 1e-9))
        ratio = metrics.utilisation(site.load_E)
        uneven = metrics.balance(site.load_E) < UNEVEN_BELOW or ratio.max() > limit
        if 0 < picks < 0.95 * site.num_experts and uneven:
            bad.append(
                f"{place(stats, site)} (expert {site.label(int(ratio.argmax()))}, {ratio.max():.1f} × a fair share)"
            )
    if not bad:
        return []
    return [
        Finding(
            "warning",
            f"Collapse in {len(bad)} of {len(stats.sites)} sites: nearly all tokens go to the same experts at "
            f"{_listed(bad, '; ')}. Raise aux_loss_coef, or train longer with a smaller learning rate for the router.",
        )
    ]


def _decided(stats: RoutingStats) -> list[Finding]:
    sites = [site for site in stats.sites if site.num_experts > 1]
    found = []
    unsure = [site for site in sites if site.entropy > UNDECIDED_ABOVE]
    if unsure:
        found.append(
            Finding(
                "note",
                f"At {len(unsure)} of {len(sites)} sites the router is close to undecided, giving every expert almost "
                f"the same probability: {_layers(stats, unsure)}. That is how training starts; if it stays, the "
                "experts have no reason to differ.",
            )
        )
    certain = [site for site in sites if site.margin > CERTAIN_ABOVE]
    if len(certain) > len(sites) / 2:
        found.append(
            Finding(
                "warning",
                f"At {len(certain)} of {len(sites)} sites the router is practically certain for every token, so it "
                "hardly learns any more; a router z-loss (z_loss_coef) keeps its logits small.",
            )
        )
    return found


def _tasks(stats: RoutingStats) -> list[Finding]:
    if len(stats.tasks) < 2:
        return []
    amount = {site.name: metrics.task_specialisation(site.load_NE) for site in stats.sites}
    top = max(stats.sites, key=lambda site: amount[site.name])
    share = f"{100 * amount[top.name]:.0f} % of a task's selections differ from the average task's"
    if amount[top.name] < APART_ABOVE:
        return [
            Finding(
                "note",
                f"Tasks are routed much alike: at most {share} ({place(stats, top)}). Different words alone explain as "
                "much; a router that was never trained can show 10 %.",
            )
        ]
    examples = [
        f"{item.task} favours expert {item.site.label(item.expert)} of {place(stats, item.site)} ({item.own:.1f} × a "
        f"fair share, the other tasks {item.others:.1f} ×)"
        for item in specialists(stats, 3)
    ]
    return [
        Finding(
            "good",
            f"Tasks have experts of their own, most of all in {place(stats, top)}, where {share}: "
            f"{'; '.join(examples)}.",
        )
    ]


def _few_tokens(stats: RoutingStats) -> list[Finding]:
    experts = max(site.num_experts for site in stats.sites)
    counts = np.max([site.tokens for site in stats.sites], axis=0)
    few = [f"{task} ({count})" for task, count in zip(stats.tasks, counts, strict=True) if count < 50 * experts]
    if not few:
        return []
    text = f"Few tokens for {_listed(few, ', ')}: with under {50 * experts} the numbers of a task are rough."
    return [Finding("note", text)]


def _layers(stats: RoutingStats, sites: Sequence[SiteStats]) -> str:
    """Layers as ranges, ``layers 0-4, 7``; any other sites by name."""
    if len(stats.groups) > 1 or any(site.layer is None for site in sites):
        return _listed([place(stats, site) for site in sites], ", ")
    numbers = sorted({site.layer for site in sites if site.layer is not None})
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    parts = [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True)]
    return f"layer{'s' if len(numbers) > 1 else ''} {_listed(parts, ', ')}"


def _listed(parts: Sequence[str], separator: str) -> str:
    more = len(parts) - LISTED
    return separator.join(parts[:LISTED]) + (f"{separator}and {more} more in the table below" if more > 0 else "")


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
