"""What the studies of continual learning share: a sweep of the learning rate, runs that are resumed, and the tables.

Two processes may work on one folder when each is given methods of its own; a last call with all of them makes the
tables of what is there.
"""

from __future__ import annotations

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import typer

from moelora.config import Recipe
from moelora.evaluation.accuracy_matrix import AccuracyMatrix
from moelora.evaluation.continual_comparison import write_comparison
from moelora.trainers.continual import Continual

SWEEP_ORDER, SWEEP_SEED = "a", 100
FACTOR = 4.0  # between two learning rates of a sweep
MOST = 6  # rates that a sweep tries at most

RANK1 = {"kind": "rank1", "dropout": 0.0}
LORA = {"kind": "lora", "dropout": 0.0}


def methods(r: int, alpha: int, moram: Mapping[str, Any], replay: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """By the name in the tables the method, and what sits at each linear: experts of rank ``r`` in all.

    Args:
        moram: temperature and threshold of the router ``moram``. replay: examples that ``replay`` keeps.
    """
    whole, four = {"r": r, "alpha": alpha}, {"r": r // 4, "alpha": alpha // 4, "num_experts": 4}
    rank1, lora, split = {**RANK1, **whole}, {**LORA, **whole, "num_experts": 1}, {**LORA, **four}
    # The authors have two experts for each task. With what is frozen, the trained parameters of a task are those of
    # the others on average: more in the first, fewer in the last.
    freezing = {**LORA, "kind": "freezing", "r": r // 8, "alpha": alpha // 8, "num_experts": 8}
    fly = {"kind": "sparse_projection", **whole}
    return {
        "moram": ("moram", {"experts": rank1, "router": {"kind": "moram", "top_k": r, **moram}}),
        "sequential": ("sequential", {"experts": lora}),
        "per_task": ("per_task", {"experts": rank1, "router": {"kind": "mask", "by": "task"}}),
        "o_lora": ("o_lora", {"experts": rank1, "router": {"kind": "static", "weights": "ones"}}),
        "loramoe": ("loramoe", {"experts": split, "router": {"kind": "softmax", "aux_loss_coef": 0}}),
        "moe_adapter": ("moe_adapter", {"experts": freezing, "router": {"kind": "moe_adapter", "top_k": 2}}),
        "flylora": ("flylora", {"experts": fly, "router": {"kind": "flylora", "top_k": r // 4}}),
        "replay": ({"kind": "replay", "budget": replay}, {"experts": lora}),
        "joint": ("joint", {"experts": lora}),
    }


def pairs(orders: Sequence[str], seeds: int) -> list[tuple[str, int]]:
    """All orders with all seeds; what there is when time runs out is about all methods, orders and seeds alike."""
    return [(order, (place + shift) % seeds) for shift in range(seeds) for place, order in enumerate(orders)]


class Clock:
    """Says when no further run may start."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def __bool__(self) -> bool:
        return self.end is None or time.monotonic() < self.end


class Study(ABC):
    """Runs of several methods on one sequence.

    Attributes:
        methods: see :func:`methods`. trainer: what a run is run by. rates: the first learning rates of a sweep, rising.
        settings: what a run has beside method, rate, order and seed; written into ``settings.json``.
    """

    methods: ClassVar[Mapping[str, tuple[Any, dict[str, Any]]]]
    trainer: ClassVar[type[Continual]]
    rates: ClassVar[Sequence[float]]

    def __init__(self, out: Path, settings: Mapping[str, Any], minutes: float | None) -> None:
        self.out, self.settings, self.clock = out, dict(settings), Clock(minutes)

    @abstractmethod
    def recipe(self, name: str, rate: float, order: str, seed: int, folder: Path, validation: bool) -> Recipe:
        """Of one run; ``seed`` also chooses what is trained on.

        Args:
            validation: whether what is asked about is the validation part of each task.
        """

    def args(self, rate: float, **more: Any) -> dict[str, Any]:
        """Of the trainer of every task."""
        return {
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_steps": self.settings["steps"],
            "per_device_train_batch_size": self.settings["batch"],
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": self.settings["steps"],
            **more,
        }

    def compare(self, wanted: Sequence[str], orders: Sequence[str], seeds: int) -> None:
        """Run what is missing, and write the tables.

        Raises:
            typer.Exit: there was no time for any run.
        """
        if unknown := [name for name in wanted if name not in self.methods]:
            raise typer.BadParameter(f"no method {', '.join(unknown)}: there are {', '.join(self.methods)}")
        rates = {name: self.best_rate(name) for name in wanted}
        runs: dict[str, dict[tuple[str, int], AccuracyMatrix]] = {name: {} for name in wanted}
        for order, seed in pairs(orders, seeds):
            for name in wanted:
                rate, folder = rates[name], self.out / name / f"{order}-{seed}"
                if rate is None or not self.may(folder):
                    continue
                matrix = runs[name][order, seed] = self.matrix(name, rate, order, seed, folder, False)
                told = f"learnt {matrix.learning_accuracy:.3f}, last {matrix.last:.3f}"
                print(f"{name}, order {order}, seed {seed}: {told}", flush=True)
        done = {name: mine for name, mine in runs.items() if mine}
        if not done:
            raise typer.Exit(1)
        missing = len(wanted) * seeds * len(orders) - sum(len(mine) for mine in done.values())
        page = write_comparison(done, self.out)
        told = {**self.settings, "rates": rates, "parameters": self.parameters(done), "runs_missing": missing}
        (self.out / "settings.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        print(f"{page}; {missing} runs are missing" if missing else page, flush=True)

    def may(self, folder: Path) -> bool:
        """Whether a run is over, or may still start."""
        return bool(self.clock) or (folder / "R.json").exists()

    def best_rate(self, name: str) -> float | None:
        """The rate with the best mean over all tasks after the last one; ``None`` where time ran out.

        It is looked for beyond the ends of ``rates`` as long as the best one is an end.
        """
        found: dict[float, float] = {}
        ahead = list(self.rates)
        while ahead:
            rate = ahead.pop(0)
            folder = self.out / "sweep" / f"{name}-{rate:g}"
            if not self.may(folder):
                return None
            found[rate] = self.matrix(name, rate, SWEEP_ORDER, SWEEP_SEED, folder, True).last
            print(f"{name}: learning rate {rate:g} gives {found[rate]:.3f} in validation", flush=True)
            best = max(found, key=lambda rate: found[rate])
            if not ahead and len(found) < MOST:
                ahead = [best * FACTOR] * (best == max(found)) or [best / FACTOR] * (best == min(found))
        return best

    def matrix(self, name: str, rate: float, order: str, seed: int, folder: Path, validation: bool) -> AccuracyMatrix:
        """Of a run, which is started, or gone on with, where it is not over."""
        if not (folder / "R.json").exists():
            made = self.recipe(name, rate, order, seed, folder, validation)
            self.trainer.run(made, resume=(folder / "stages.json").exists())
            for stage in folder.glob("stage-*/checkpoint-*"):
                shutil.rmtree(stage)
        return AccuracyMatrix.from_json(folder / "R.json")

    def parameters(self, done: Mapping[str, Mapping[tuple[str, int], Any]]) -> dict[str, dict[str, int]]:
        """Of each method how many parameters the first task trains, and the last model has."""
        found = {}
        for name, mine in done.items():
            order, seed = next(iter(mine))
            growth = json.loads((self.out / name / f"{order}-{seed}" / "metrics.json").read_text("utf-8"))["growth"]
            found[name] = {"trained": int(growth["trained"][0]), "in_the_end": int(growth["parameters"][-1])}
        return found
