"""``moelora eval --preferences``: how good a reward model is, beside others and ensembles of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..config import BackboneConfig, Closed, DataConfig, PreferenceData, SampledPreferenceData, apply_overrides
from ..errors import ConfigError, DataError
from .common import print_json, print_lines, recipe_values, stderr
from .eval_rewards_tables import show

if TYPE_CHECKING:
    from ..data.ranking import Ranking
    from ..mixture import MoELoRAModel
    from ..reward.model import RewardModel
    from ..reward.scoring import Reward

PANEL = "Reward models"

Preferences = Annotated[
    Path | None,
    typer.Option(
        help="Rankings of responses to judge a reward model on, in any layout of preference data, columns as "
        "`data.columns.category=kind`; a column `subset` is averaged as in RewardBench. Without it, those that the "
        "reward model's recipe holds out. Example: `moelora eval runs/dmoerm --preferences test.jsonl`",
        rich_help_panel=PANEL,
    ),
]
Ensemble = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH",
        help="Another reward model to compare with; given several times, their mean, worst case and mean less variance "
        "too. Example: `moelora eval runs/dmoerm --ensemble runs/a --ensemble runs/b`",
        rich_help_panel=PANEL,
    ),
]
Standardise = Annotated[
    Path | None,
    typer.Option(
        help="Rankings over which each member of an ensemble gets mean 0 and deviation 1: rewards of different models "
        "have no scale in common.",
        rich_help_panel=PANEL,
    ),
]
GivenCategories = Annotated[
    bool,
    typer.Option(
        "--given-categories", help="Give each prompt's category instead of having it chosen.", rich_help_panel=PANEL
    ),
]
BestOf = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Gold score of the response with the largest reward among n = 1 to N; the data has `scores`.",
        rich_help_panel=PANEL,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Folder for metrics.json, rewards.html with figures, and tables.",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True)
class RewardOptions:
    """What is asked of reward models; the options of the command line.

    Attributes:
        whole: the data are there to judge on, so all of them may be taken; else what is held out from training.
        recipe: that names the data and the backbone, instead of the checkpoint's own.
    """

    whole: bool
    recipe: str | None
    ensemble: Sequence[str]
    standardise: Path | None
    given_categories: bool
    best_of: int | None
    out: Path | None
    limit: int | None
    batch_size: int

    def given(self) -> dict[str, bool]:
        """Those that only reward models have, and whether they are given."""
        return {
            "--ensemble": bool(self.ensemble),
            "--standardise": self.standardise is not None,
            "--given-categories": self.given_categories,
            "--best-of": self.best_of is not None,
            "--out": self.out is not None,
        }


class _Asked(Closed):
    """The part of a recipe that ``--preferences`` stands for."""

    data: DataConfig


def preference_data(file: Path, overrides: Sequence[str]) -> PreferenceData:
    """A file of rankings, all of them, with what the command line says about it.

    Raises:
        ConfigError: it says something else than how to read rankings.
    """
    section = {"kind": "preferences", "path": str(file), "test_fraction": 0.0}
    data = _Asked.parse(apply_overrides({"data": section}, overrides), where="command line").data
    if not isinstance(data, PreferenceData):
        raise ConfigError(f"--preferences {file} is of kind 'preferences', not {data.kind!r}: leave out data.kind")
    return data


def evaluate_rewards(
    path: str,
    data: PreferenceData | SampledPreferenceData,
    options: RewardOptions,
    load: Callable[..., MoELoRAModel],
    hub: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Score rankings with the reward model at ``path`` and those beside it, and tell how well it went.

    Args:
        load: a checkpoint's model, by path and ``hub``; its revision and subfolder are those of ``path`` alone.

    Raises:
        ConfigError: a checkpoint is no reward model, or options do not fit together.
        DataError: there is nothing to judge; said before a model is loaded.
    """
    from ..evaluation.reward_report import report, write

    subsets: list[str] | None = None
    if isinstance(data, PreferenceData):
        rankings, subsets = _read(data, options.whole)
    else:
        values, where = recipe_values(path, options.recipe, hub["subfolder"])
        backbone = BackboneConfig.parse(values.get("backbone", {}), where=where)
        rankings = _sampled(Path(path) / (hub["subfolder"] or ""), data, backbone)
    rankings, subsets = _limited(rankings, subsets, options.limit)
    _check(rankings, options)
    beside = {**hub, "revision": None, "subfolder": None}
    scored = _score_all(path, rankings, options, lambda each: load(each, hub=hub if each == path else beside))
    reports = report(
        rankings, scored, best_of=options.best_of, subsets=subsets, given_categories=options.given_categories
    )
    if as_json:
        models = {name: each.to_dict() for name, each in reports.items()}
        print_json({"path": path, "rankings": len(rankings), "models": models})
    else:
        show(reports)
    if options.out is not None:
        page = write(reports, rankings, scored, options.out)
        if not as_json:
            print_lines([f"wrote {page}"])


def _read(data: PreferenceData, whole: bool) -> tuple[list[Ranking], list[str] | None]:
    """The rankings that are held out, or ``whole`` data where none are; with their subsets where they have such.

    Raises:
        DataError: none are held out from training.
    """
    from ..data.preferences import read_rankings
    from ..data.tables import open_table
    from ..evaluation.reward_bench import read_bench

    if whole and data.columns.category is None:
        columns = open_table(data, data.path, data.split).column_names
        if "subset" in columns and "category" not in columns:
            return read_bench(data)
    train, test = read_rankings(data)
    if not test and not whole:
        raise DataError(
            "the recipe holds out no rankings to judge on: set data.test_path, or data.test_fraction above 0, as in "
            "training; or name others with --preferences"
        )
    return test or train, None


def _sampled(folder: Path, data: SampledPreferenceData, backbone: BackboneConfig) -> list[Ranking]:
    """The test rankings that were sampled when the reward model in ``folder`` was trained.

    Nothing is sampled here: a checkpoint's recipe does not get to say which backbone is loaded.

    Raises:
        DataError: they are not there.
    """
    from ..data.sampled import Sampler

    def missing() -> Any:
        raise DataError(
            f"{folder}: the answers that its recipe ranks are not all here, in sampled-test-*.jsonl: `moelora train` "
            "samples them into its folder; copy that file here, or name other rankings with --preferences"
        )

    return Sampler(data, backbone, missing, folder).part("test")


def _limited(
    rankings: list[Ranking], subsets: list[str] | None, limit: int | None
) -> tuple[list[Ranking], list[str] | None]:
    """The first ``limit`` rankings of each category, or subset."""
    taken: dict[str | None, int] = {}
    kept = []
    for index, ranking in enumerate(rankings):
        kind = ranking.category if subsets is None else subsets[index]
        taken[kind] = taken.get(kind, 0) + 1
        if limit is None or taken[kind] <= limit:
            kept.append(index)
    return [rankings[i] for i in kept], None if subsets is None else [subsets[i] for i in kept]


def _check(rankings: list[Ranking], options: RewardOptions) -> None:
    """Say what cannot be done before a model is loaded."""
    from ..evaluation.reward_best_of_n import usable
    from ..evaluation.rewards import check_comparisons

    check_comparisons(rankings)
    if options.best_of is not None:
        usable(rankings, options.best_of)
    if options.standardise is not None and len(options.ensemble) < 2:
        raise ConfigError("--standardise is for an ensemble: give --ensemble PATH at least twice")
    if options.out is not None:
        from ..analysis.figures import require_plotly

        require_plotly()
        if options.out.exists() and not options.out.is_dir():
            raise ConfigError(f"--out {options.out}: is a file: name a folder")


def _score_all(
    path: str, rankings: list[Ranking], options: RewardOptions, load: Callable[[str], MoELoRAModel]
) -> dict[str, list[list[Reward]]]:
    """Each model's rewards by its name, one model in memory at a time; then those of the ensembles."""
    from rich.progress import Progress

    from ..data.preferences import read_rankings
    from ..evaluation.reward_ensembles import WAYS, Scale, combine
    from ..evaluation.rewards import score_rankings

    paths = list(dict.fromkeys([path, *options.ensemble]))
    members = list(dict.fromkeys(options.ensemble))
    names = dict(zip(paths, _names(paths), strict=True))
    common: list[Ranking] | None = None
    if options.standardise is not None:
        common, _ = read_rankings(preference_data(options.standardise, ()))
    scored: dict[str, list[list[Reward]]] = {}
    scales: list[Scale] = []
    for each in paths:
        model = _reward_model(each, load)
        # One without categories has none to be given.
        given = options.given_categories and bool(model.reward.names)
        with Progress(console=stderr(), transient=True) as bar:
            task = bar.add_task(f"Scoring with {escape(names[each])}", total=None)
            settings: dict[str, Any] = {
                "batch_size": options.batch_size,
                "given_categories": given,
                "progress": lambda done, total: bar.update(task, completed=done, total=total),  # noqa: B023
            }
            scored[names[each]] = score_rankings(model, rankings, **settings)
            if common is not None and each in members:
                rows = score_rankings(model, common, **settings)
                scales.append(Scale.of([[reward.reward for reward in row] for row in rows]))
        del model
    if len(members) > 1:
        flat = [[reward for row in scored[names[each]] for reward in row] for each in members]
        for way in WAYS:
            found = iter(combine(flat, way, scales or None))
            scored[f"{way} of {len(members)}"] = [[next(found) for _ in ranking.responses] for ranking in rankings]
    return scored


def _reward_model(path: str, load: Callable[[str], MoELoRAModel]) -> RewardModel:
    from ..reward.model import RewardModel

    model = load(path)
    if not isinstance(model, RewardModel):
        raise ConfigError(f"{path}: a mixture, but no reward model: rankings are judged by one that is")
    return model


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, where that tells them apart."""
    short = [Path(path).name or path for path in paths]
    return short if len(set(short)) == len(short) else list(paths)
