"""ScaleZero's Dynamic Parameter Scaling on six tasks of Gymnasium: what pruning saves, and what stages do.

    python scripts/studies/scalezero.py                    # everything, resumed where it stopped
    python scripts/studies/scalezero.py --minutes 30       # start no run after that, and tell what there is
    python scripts/studies/scalezero.py --arms joint,prune --seeds 1

Arms: ``joint`` plays all tasks until all are solved; ``prune`` plays solved tasks no more; ``adapters`` has stages and
plays all tasks; ``dps`` prunes and has stages; ``prefix`` is ``dps`` with solved tasks answered by the trunk of their
stage. A task is solved when the mean of 20 episodes, always the same, reaches its target for the first time.

Each run leaves a page, ``scalezero.html``, and a film of each task it solved; all together ``arms.json``, ``.csv``,
``.md`` and ``.html``. Figures are drawn with plotly: pip install 'moelora[rl,viz]'.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moelora.analysis.figures import require_plotly
from moelora.trainers import Ledger, ScaleZero
from moelora.trainers.scalezero_report import write_arms, write_report

ARMS: dict[str, dict[str, Any]] = {
    "joint": {"prune": False, "stages": None},
    "prune": {"stages": None},
    "adapters": {"prune": False},
    "dps": {},
    "prefix": {"answer": "prefix"},
}


def finished(arm: str, seed: int, steps: int, out: Path) -> Ledger:
    """The ledger of a run, which is started, or gone on with, where it is not over."""
    folder = out / arm / str(seed)
    if not (folder / "ledger.json").exists():
        run = ScaleZero(
            {
                **ARMS[arm],
                "agent": {"trunk": {"layers": 1}},
                "learner": {"kind": "ppo", "epochs": 6},
                "max_env_steps": steps,
                "output_dir": str(folder),
                "seed": seed,
            }
        )
        ledger = run.run(resume=(folder / "state").exists())
        for task in ledger.tasks:
            if ledger.solved(task) is not None:
                run.record(task, folder / f"{task}.gif")
        write_report(folder)
    return Ledger.load(folder / "ledger.json")


def main(
    out: Annotated[Path, typer.Option(help="Where runs and tables go.")] = Path("runs/study-scalezero"),
    arms: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(ARMS),
    seeds: Annotated[int, typer.Option(help="How many.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Environment steps of a run at most.", min=1)] = 450_000,
    minutes: Annotated[float | None, typer.Option(help="Start no run after so many.")] = None,
) -> None:
    """Hold the arms of ScaleZero against each other."""
    require_plotly()  # before hours of runs, not after
    torch.set_num_threads(1)
    wanted = arms.split(",")
    if unknown := [arm for arm in wanted if arm not in ARMS]:
        raise typer.BadParameter(f"no arm {', '.join(unknown)}: there are {', '.join(ARMS)}")
    end = None if minutes is None else time.monotonic() + 60 * minutes
    runs: dict[str, list[Ledger]] = {arm: [] for arm in wanted}
    for seed in range(seeds):
        for arm in wanted:
            if end is None or time.monotonic() < end or (out / arm / str(seed) / "ledger.json").exists():
                ledger = finished(arm, seed, steps, out)
                runs[arm].append(ledger)
                solved = sum(ledger.solved(task) is not None for task in ledger.tasks)
                print(f"{arm}, seed {seed}: {solved} solved after {ledger.interactions:,} steps", flush=True)
    over = {arm: ledgers for arm, ledgers in runs.items() if ledgers}
    if over:
        page = write_arms(over, out)
        print(page.with_suffix(".md").read_text(encoding="utf-8"))
        print(page)


if __name__ == "__main__":
    typer.run(main)
