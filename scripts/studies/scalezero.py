"""ScaleZero's Dynamic Parameter Scaling on six tasks of Gymnasium: what pruning saves, and what stages do.

    python scripts/studies/scalezero.py                    # everything, resumed where it stopped
    python scripts/studies/scalezero.py --minutes 30       # start no run after that, and tell what there is
    python scripts/studies/scalezero.py --arms joint,prune --seeds 1

Arms: ``joint`` plays all tasks until all are solved; ``prune`` plays solved tasks no more; ``adapters`` has stages and
plays all tasks; ``dps`` prunes and has stages; ``prefix`` is ``dps`` with solved tasks answered by the trunk of their
stage. A task is solved when the mean of 20 episodes, always the same, reaches its target for the first time.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moelora.trainers import Ledger, ScaleZero
from moelora.trainers.progress_ledger import ratio

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
        run.run(resume=(folder / "state").exists())
    return Ledger.load(folder / "ledger.json")


def row(arm: str, ledgers: list[Ledger]) -> dict[str, Any]:
    """One line of the table, over the seeds."""
    tasks = sum(len(ledger.tasks) for ledger in ledgers)
    prefix = arm == "prefix"
    return {
        "arm": arm,
        "seeds": [ledger.seed for ledger in ledgers],
        "environment_steps": [ledger.interactions for ledger in ledgers],
        "solved": sum(ledger.solved(task) is not None for ledger in ledgers for task in ledger.tasks),
        "tasks": tasks,
        "below_target_at_the_end": sum(len(ledger.below_target(prefix)) for ledger in ledgers),
        "last_stage": [ledger.switches[-1].stage if ledger.switches else 0 for ledger in ledgers],
    }


def main(
    out: Annotated[Path, typer.Option(help="Where runs and tables go.")] = Path("runs/study-scalezero"),
    arms: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(ARMS),
    seeds: Annotated[int, typer.Option(help="How many.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Environment steps of a run at most.", min=1)] = 450_000,
    minutes: Annotated[float | None, typer.Option(help="Start no run after so many.")] = None,
) -> None:
    """Hold the arms of ScaleZero against each other."""
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
    table = [row(arm, ledgers) for arm, ledgers in runs.items() if ledgers]
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    for line in table:
        print(json.dumps(line))
    # A saving is told beside that of pruning alone, or not at all.
    for arm in ("adapters", "dps"):
        if all(len(runs.get(each, [])) == seeds for each in (arm, "joint", "prune")):
            print(ratio(runs[arm], runs["joint"], runs["prune"]))


if __name__ == "__main__":
    typer.run(main)
