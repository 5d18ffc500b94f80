"""What runs of ScaleZero come to: a page of one run, and a table with a page of several arms and seeds.

A saving is told beside that of pruning alone, or not at all; see :func:`~moelora.trainers.progress_ledger.ratio`.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from ..analysis.figures import require_plotly
from ..analysis.report import page, section
from ..errors import ConfigError, DataError
from ..evaluation.continual import write_csv, write_json
from . import scalezero_figures as figures
from .progress_ledger import Ledger, Ratio, ratio
from .scalezero import CONFIG, LEDGER, LOG
from .scalezero_config import ScaleZeroConfig

if TYPE_CHECKING:
    from .progress_ledger import TaskRecord

Arms = Mapping[str, Sequence[Ledger]]


@checked(config=ConfigDict(extra="ignore", allow_inf_nan=False))
class Moment:
    """An evaluation of all tasks, a line of a run's log.

    Attributes:
        stage: after what was decided. reason: why a stage ended then, or ``none``.
        interactions, returns: by task. solved: tasks.
    """

    iteration: int
    stage: int
    reason: str
    interactions: dict[str, int]
    returns: dict[str, float]
    solved: list[str]

    @property
    def spent(self) -> int:
        """Environment steps of all tasks until then."""
        return sum(self.interactions.values())

    @property
    def switched(self) -> bool:
        """Whether a stage ended then."""
        return self.reason != "none"


def read_log(path: Path) -> list[Moment]:
    """The evaluations of a run, in their order.

    Raises:
        DataError: the file is missing, or a line is none of a run's log.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing, so there is no run to report on: give the folder of a run of ScaleZero")
    moments = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            moments.append(TypeAdapter(Moment).validate_json(line))
        except ValidationError as error:
            found = error.errors()[0]
            place = ".".join(str(part) for part in found["loc"])
            raise DataError(f"{path}, line {number}: {place} {found['msg']}: this is no log of ScaleZero") from None
    return moments


def write_report(folder: str | Path) -> Path:
    """Write ``scalezero.html`` beside the files of a run, which may be going on, and return its path.

    The same run gives the same bytes.

    Raises:
        DataError: the folder holds no run. ConfigError, CheckpointError: its options or its ledger cannot be read.
        UserError: plotly is not installed. Nothing is written then.
    """
    require_plotly()
    folder = Path(folder)
    moments = read_log(folder / LOG)
    config = ScaleZeroConfig.load(folder / CONFIG)
    ledger = Ledger.load(folder / LEDGER) if (folder / LEDGER).exists() else None
    path = folder / "scalezero.html"
    path.write_text(_render(config, moments, ledger), encoding="utf-8")
    return path


def _render(config: ScaleZeroConfig, moments: Sequence[Moment], ledger: Ledger | None) -> str:
    targets = config.rules.targets
    last = moments[-1] if moments else Moment(0, 0, "none", dict.fromkeys(targets, 0), {}, [])
    interactions = last.interactions if ledger is None else {t: r.interactions for t, r in ledger.tasks.items()}
    arm = Ledger(config.rules, prunes=config.prune, grows=config.stages is not None).arm
    state = "so far" if ledger is None else "in the end"
    ways = "Stars: solved. Hollow: solved before. Dashed: the target. Dotted: a stage ended."
    parts = [
        f"<h1>{len(last.solved)} of {len(targets)} tasks solved {state}</h1>",
        f'<p class="muted">Arm {arm}, answered {config.answer}, seed {config.seed}: '
        f"{sum(interactions.values()):,} environment steps, stage {last.stage}.</p>",
        "" if ledger is None else _task_table(ledger),
        section("returns", "What was learnt, and was it kept?", ways, figures.returns(moments, targets)),
        section("pool", "When was it solved?", "Dotted: a stage ended, and why.", figures.pool(moments, len(targets))),
        section("spent", "What did each task take?", "Environment steps.", figures.spent(interactions)),
    ]
    solved = {} if ledger is None else {task: record for task, record in ledger.tasks.items() if record.solves}
    if solved:
        text = "Mean returns; dashed is the target. <b>Live</b>: with the agent of the end. <b>Prefix</b>: with the "
        text += "trunk as it was at the end of the stage in which the task was solved; it had gone on learning others."
        parts.append(section("kept", "What is left of it?", text, figures.retention(solved, targets)))
    return page("ScaleZero", parts)


def _task_table(ledger: Ledger) -> str:
    head = (
        "task",
        "target",
        "environment steps",
        "solved after",
        "in stage",
        "when solved",
        "end, live",
        "end, prefix",
    )
    rows = [(task, *_task_cells(ledger.config.targets[task], record)) for task, record in ledger.tasks.items()]
    stopped = [f"{task} was given up: {record.stopped}" for task, record in ledger.tasks.items() if record.stopped]
    return _table(head, rows) + "".join(f"<p>{html.escape(why)}</p>" for why in stopped)


def _task_cells(target: float, record: TaskRecord) -> tuple[str, ...]:
    solve = record.solves[-1] if record.solves else None
    return (
        f"{target:g}",
        f"{record.interactions:,}",
        "–" if solve is None else f"{solve.interactions:,}",
        "–" if solve is None else str(solve.stage),
        *("–" if value is None else f"{value:.1f}" for value in figures.kept(record).values()),
    )


@dataclass(frozen=True)
class ArmRow:
    """An arm over its seeds.

    Attributes:
        arm: what kind of runs: ``joint``, ``prune``, ``adapters`` or ``dps``.
        environment_steps, complete, last_stage: of each seed: until its end, whether it solved every task, where it
            ended.
        solved, tasks: counted over the seeds.
        below_live, below_prefix: tasks that were solved and are below their target at the end, over the seeds;
            ``below_prefix`` is ``None`` without stages.
    """

    arm: str
    seeds: list[int]
    environment_steps: list[int]
    complete: list[bool]
    solved: int
    tasks: int
    below_live: int
    below_prefix: int | None
    last_stage: list[int]

    @classmethod
    def of(cls, ledgers: Sequence[Ledger]) -> ArmRow:
        """Raises DataError: a run was not evaluated at its end."""
        grows = ledgers[0].grows
        return cls(
            arm=ledgers[0].arm,
            seeds=[ledger.seed for ledger in ledgers],
            environment_steps=[ledger.interactions for ledger in ledgers],
            complete=[ledger.complete for ledger in ledgers],
            solved=sum(ledger.solved(task) is not None for ledger in ledgers for task in ledger.tasks),
            tasks=sum(len(ledger.tasks) for ledger in ledgers),
            below_live=sum(len(ledger.below_target()) for ledger in ledgers),
            below_prefix=sum(len(ledger.below_target(prefix=True)) for ledger in ledgers) if grows else None,
            last_stage=[ledger.switches[-1].stage if ledger.switches else 0 for ledger in ledgers],
        )

    def cells(self) -> tuple[str, ...]:
        """As in the table."""
        steps = zip(self.environment_steps, self.complete, strict=True)
        return (
            ", ".join(f"{count:,}" if whole else f"≥ {count:,}" for count, whole in steps),
            f"{self.solved} of {self.tasks}",
            str(self.below_live),
            "–" if self.below_prefix is None else str(self.below_prefix),
            ", ".join(map(str, self.last_stage)),
        )


HEAD = ("arm", "environment steps", "solved", "below target, live", "below target, prefix", "last stage")
LEGEND = (
    "Environment steps of each seed until the run ended; ≥ where not every task was solved. Below target: tasks that "
    "were solved and, at the end, no longer reach their target, with the agent of then (live) or with the trunk as the "
    "stage in which they were solved left it (prefix), which went on learning other tasks after the solution. Counts "
    "are over the seeds."
)


def write_arms(runs: Arms, folder: str | Path) -> Path:
    """Write ``arms.json``, ``arms.csv``, ``arms.md`` and ``arms.html``, and return the path of the page.

    The same runs give the same bytes.

    Args:
        runs: of each arm, by a name of its own, finished runs of several seeds.

    Raises:
        DataError: there are no runs, those under a name are not of one arm or share a seed, tasks differ, or a run was
            not evaluated at its end. UserError: plotly is not installed. Nothing is written then.
    """
    require_plotly()
    _check(runs)
    rows = {name: ArmRow.of(ledgers) for name, ledgers in runs.items()}
    told = ratios(runs)
    text = markdown(rows, told)
    whole = _render_arms(runs, rows, told)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: asdict(each) if isinstance(each, Ratio) else {"none": each} for name, each in told.items()}
    write_json(folder / "arms.json", {"arms": {name: asdict(row) for name, row in rows.items()}, "ratios": found})
    write_csv(folder / "arms.csv", ("name", "arm", "seed", *MEASURES), _run_rows(runs))
    (folder / "arms.md").write_text(text, encoding="utf-8")
    path = folder / "arms.html"
    path.write_text(whole, encoding="utf-8")
    return path


def ratios(runs: Arms) -> dict[str, Ratio | str]:
    """Of each arm with stages, what it took over what the joint runs took, or why that cannot be told."""

    def those(kind: str) -> Sequence[Ledger]:
        return next((ledgers for ledgers in runs.values() if ledgers[0].arm == kind), [])

    told: dict[str, Ratio | str] = {}
    for name, ledgers in runs.items():
        if ledgers[0].grows:
            try:
                told[name] = ratio(ledgers, those("joint"), those("prune"))
            except ConfigError as error:
                told[name] = str(error)
    return told


def markdown(rows: Mapping[str, ArmRow], told: Mapping[str, Ratio | str]) -> str:
    """The table, for a README, and what was saved."""
    lines = [HEAD, ("---",) * len(HEAD), *((name, *row.cells()) for name, row in rows.items())]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return "\n".join([table, LEGEND, "", *(f"- {line}" for line in _savings(told))]).rstrip("\n") + "\n"


def _savings(told: Mapping[str, Ratio | str]) -> list[str]:
    return [
        f"{name}: {each}" if isinstance(each, Ratio) else f"{name}: no ratio ({each})" for name, each in told.items()
    ]


def _render_arms(runs: Arms, rows: Mapping[str, ArmRow], told: Mapping[str, Ratio | str]) -> str:
    tasks = len(next(iter(runs.values()))[0].tasks)
    savings = "".join(f"<li>{html.escape(line)}</li>" for line in _savings(told))
    totals = "A mark is a run; hollow: it ended before every task was solved."
    solved = "A mark is a run: what the task itself had taken when it was solved."
    parts = [
        f"<h1>{len(runs)} ways to learn {tasks} tasks at once</h1>",
        f'<p class="muted">{LEGEND}</p>',
        _table(HEAD, [(name, *row.cells()) for name, row in rows.items()]),
        f'<ul class="findings">{savings}</ul>',
        section("totals", "What did it take?", totals, figures.totals(runs)),
        section("solved", "When was each task solved?", solved, figures.when_solved(runs)),
    ]
    return page("ScaleZero, arms", parts)


MEASURES = ("environment_steps", "complete", "solved", "below_live", "below_prefix", "last_stage")


def _run_rows(runs: Arms) -> list[tuple[Any, ...]]:
    """A line for each run."""
    lines = []
    for name, ledgers in runs.items():
        for ledger in ledgers:
            values = asdict(ArmRow.of([ledger]))
            one = [value[0] if isinstance(value, list) else value for value in (values[key] for key in MEASURES)]
            lines.append((name, ledger.arm, ledger.seed, *one))
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div style="overflow-x:auto"><table><tr>{heads}</tr>{lines}</table></div>'


def _check(runs: Arms) -> None:
    lacking = [name for name, ledgers in runs.items() if not ledgers]
    if not runs or lacking:
        raise DataError(f"a comparison needs runs of each arm, there are none of {', '.join(lacking) or 'any'}")
    tasks = list(next(iter(runs.values()))[0].tasks)
    for name, ledgers in runs.items():
        kinds = sorted({ledger.arm for ledger in ledgers})
        if len(kinds) > 1:
            raise DataError(f"{name}: its runs are of the arms {', '.join(kinds)}: give each a name of its own")
        seeds = [ledger.seed for ledger in ledgers]
        if len(set(seeds)) < len(seeds):
            raise DataError(f"{name}: its runs have the seeds {seeds}: give one run for each seed")
        other = next((ledger for ledger in ledgers if list(ledger.tasks) != tasks), None)
        if other is not None:
            raise DataError(
                f"{name}, seed {other.seed}: it has the tasks {', '.join(other.tasks)}, others have "
                f"{', '.join(tasks)}: compare runs of the same tasks"
            )
