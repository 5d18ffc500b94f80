"""Tiny rankings of two categories, trainers for them, and runs of two processes; importable by child processes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reward.reward_made import CATEGORIES, build_reward
from sharded_runs import STEPS, arguments, final, fresh, join
from transformers import TrainingArguments

from moelora.data.preferences import Ranking, comparisons
from moelora.reward.model import RewardModel
from moelora.trainers import RewardTrainer

PHASES = ("base", "capability", "aggregate", "category")
KINDS = ("ddp", "zero1", "zero2", "zero3")


def rankings(count: int = 12) -> list[Ranking]:
    """Prompts of two categories with three responses each; capabilities order them otherwise than the whole does."""
    made = []
    for number in range(count):
        name = ["sums", "letters"][number % 2]
        prompt = f"{number} and {number}" if name == "sums" else "letters " + "abc" * (number + 1)
        made.append(
            Ranking(
                prompt=({"role": "user", "content": prompt},),
                responses=(f"{2 * number}", f"it is {number}, I think", "no"),
                comparisons=comparisons([1, 2, 2 + number % 2]),
                category=name,
                capabilities={point: comparisons([3, 1 + place, 2]) for place, point in enumerate(CATEGORIES[name])},
            )
        )
    return made


def reward_trainer(folder: Path, model: RewardModel, phase: str, **options: Any) -> RewardTrainer:
    own = {"rankings", "eval_rankings", "label_smoothing", "center_coef", "held_out", "callbacks", "begin"}
    given = {"rankings": rankings(), **{name: options.pop(name) for name in own & set(options)}}
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return RewardTrainer(model, args, phase=phase, **given)


def of_phase(kind: str, phase: str, folder: Path, world: int) -> dict[str, torch.Tensor]:
    """The model after six steps of four rankings; each process has rankings of one category alone."""
    fresh()
    order = rankings(24)
    if world == 2:  # of which process 0 gets places 0, 1, 4, 5, ... and process 1 the others
        assert {r.category for r in order[0::2]} != {r.category for r in order[1::2]}
    pairs = [order[place] for start in range(0, 24, 4) for place in (start, start + 2, start + 1, start + 3)]
    model = build_reward("1:", base="category").train()
    options = {**STEPS, "max_steps": 6, "per_device_train_batch_size": 4 // world, **arguments(kind)}
    runner = reward_trainer(folder, model, phase, rankings=pairs, **options)
    runner.train()
    return final(runner, folder / "final")  # type: ignore[arg-type]


def reward_study(rank: int, world: int, port: int, folder: Path) -> None:
    """The model after each phase under each kind of run, into ``results-<rank>.pt``."""
    join(rank, world, port)
    found = {(kind, phase): of_phase(kind, phase, folder / kind / phase, world) for kind in KINDS for phase in PHASES}
    torch.save(found, folder / f"results-{rank}.pt")
    torch.distributed.destroy_process_group()
