"""Methods of continual learning on the image sequence ``digits``, with a small CLIP model that is trained here first.

    python scripts/studies/continual_images.py                  # everything, resumed where it stopped
    python scripts/studies/continual_images.py --minutes 30     # start no run after that, and tell what there is
    python scripts/studies/continual_images.py --methods moram,sequential --seeds 1

Every method has experts at the same linears of both encoders, takes the same number of steps of the same size on the
same 16 images of each class, and about the same number of trained parameters in a task: rank 16 in all of its experts.
The learning rate of each is the best of ``RATES`` by the average of X-TAIL on validation images, for a seed and the
order that no reported run has together. The tables are about test images, classified among the classes of all tasks.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging as bars

from moelora.config import Recipe
from moelora.data import image_sequences
from moelora.data.image_sequences import ImageSequence, read_image_sequence
from moelora.evaluation.accuracy_matrix import AccuracyMatrix
from moelora.evaluation.continual_comparison import write_comparison
from moelora.trainers.clip import ClipRun

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RATES = (5e-4, 2e-3, 8e-3)
SWEEP_SEED = 100
BATCH = 32

RANK1 = {"kind": "rank1", "r": 16, "alpha": 16, "dropout": 0.0}
LORA = {"kind": "lora", "num_experts": 1, "r": 16, "alpha": 16, "dropout": 0.0}
SPLIT = {"kind": "lora", "num_experts": 4, "r": 4, "alpha": 4, "dropout": 0.0}
# By the name in the tables: the method, and what sits at each linear. MoRAM's numbers are those of the released code.
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "moram": (
        "moram",
        {"experts": RANK1, "router": {"kind": "moram", "top_k": 16, "temperature": 0.01, "threshold": 0.2}},
    ),
    "sequential": ("sequential", {"experts": LORA}),
    "per_task": ("per_task", {"experts": RANK1, "router": {"kind": "mask", "by": "task"}}),
    "o_lora": ("o_lora", {"experts": RANK1, "router": {"kind": "static", "weights": "ones"}}),
    "moe": ("sequential", {"experts": SPLIT, "router": {"kind": "topk", "top_k": 2, "aux_loss_coef": 0.01}}),
    "loramoe": ("loramoe", {"experts": SPLIT, "router": {"kind": "softmax", "aux_loss_coef": 0}}),
    "flylora": (
        "flylora",
        {"experts": {"kind": "sparse_projection", "r": 16, "alpha": 16}, "router": {"kind": "flylora", "top_k": 4}},
    ),
    # The authors have two experts for each task. With eight of rank 2 and what is frozen, the trained parameters of a
    # task are those of the others on average: more in the first, fewer in the last.
    "moe_adapter": (
        "moe_adapter",
        {
            "experts": {**SPLIT, "kind": "freezing", "num_experts": 8, "r": 2, "alpha": 2},
            "router": {"kind": "moe_adapter", "top_k": 2},
        },
    ),
    "replay": ({"kind": "replay", "budget": 64}, {"experts": LORA}),
    "joint": ("joint", {"experts": LORA}),
}


def read_validation(shots: int, test_size: int | None, seed: int, path: str | None) -> ImageSequence:
    """``digits`` with the validation images in the place of the test images."""
    whole = read_image_sequence("digits", shots=shots, test_size=test_size, seed=seed, path=path)
    return replace(whole, name="digits-validation", tasks=tuple(replace(task, test=task.val) for task in whole.tasks))


def recipe(name: str, rate: float, steps: int, order: str, seed: int, folder: Path, data: str = "digits") -> Recipe:
    """Of one run; ``seed`` also chooses the training images."""
    method, site = METHODS[name]
    args = {
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta2": 0.9999,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": steps,
    }
    return Recipe.parse(
        {
            "backbone": {"name": "digits-clip", "quantization": None},
            "mixture": {"sites": [{"target": TARGETS, **site}]},
            "data": {"kind": "images", "name": data, "order": order, "seed": seed},
            "trainer": {"kind": "clip", "method": method, "args": args, "collapse_alarm": False},
            "output_dir": str(folder),
            "seed": seed,
        }
    )


def finished(made: Recipe) -> AccuracyMatrix:
    """The matrix of a run, which is started or gone on with where it is not over."""
    folder = Path(made.output_dir)
    if not (folder / "R.json").exists():
        ClipRun.run(made, resume=(folder / "stages.json").exists())
        for stage in folder.glob("stage-*/checkpoint-*"):
            shutil.rmtree(stage)
    return AccuracyMatrix.from_json(folder / "R.json")


class Clock:
    """Says when no further run may start."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def __bool__(self) -> bool:
        return self.end is None or time.monotonic() < self.end


def best_rate(name: str, steps: int, out: Path, clock: Clock) -> float | None:
    """By the validation images, in order ``a``; ``None`` where time ran out."""
    found: dict[float, float] = {}
    for rate in RATES:
        folder = out / "sweep" / f"{name}-{rate:g}"
        if not clock and not (folder / "R.json").exists():
            return None
        made = recipe(name, rate, steps, "a", SWEEP_SEED, folder, "digits-validation")
        found[rate] = finished(made).average
        print(f"{name}: learning rate {rate:g} gives {found[rate]:.3f} on validation images", flush=True)
    return max(found, key=lambda rate: found[rate])


def main(
    out: Annotated[Path, typer.Option(help="Where runs and tables go.")] = Path("runs/study-continual-images"),
    methods: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(METHODS),
    orders: Annotated[str, typer.Option(help="Of the tasks, with commas.")] = "a,b,c",
    seeds: Annotated[int, typer.Option(help="How many.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of each task.", min=1)] = 60,
    minutes: Annotated[float | None, typer.Option(help="Start no run after so many.")] = None,
) -> None:
    """Compare methods of continual learning on images."""
    bars.disable_progress_bar()
    image_sequences.IMAGE_SEQUENCES["digits-validation"] = read_validation
    clock, wanted = Clock(minutes), methods.split(",")
    if unknown := [name for name in wanted if name not in METHODS]:
        raise typer.BadParameter(f"no method {', '.join(unknown)}: there are {', '.join(METHODS)}")
    rates = {name: best_rate(name, steps, out, clock) for name in wanted}
    runs: dict[str, dict[tuple[str, int], AccuracyMatrix]] = {name: {} for name in wanted}
    # Seed by seed, so that what there is when time runs out is about all methods alike.
    for seed in range(seeds):
        for order in orders.split(","):
            for name in wanted:
                rate, folder = rates[name], out / name / f"{order}-{seed}"
                if rate is None or not (clock or (folder / "R.json").exists()):
                    continue
                matrix = runs[name][order, seed] = finished(recipe(name, rate, steps, order, seed, folder))
                told = f"transfer {matrix.transfer:.3f}, average {matrix.average:.3f}, last {matrix.last:.3f}"
                print(f"{name}, order {order}, seed {seed}: {told}", flush=True)
    done = {name: mine for name, mine in runs.items() if mine}
    missing = len(wanted) * seeds * len(orders.split(",")) - sum(len(mine) for mine in done.values())
    if not done:
        raise typer.Exit(1)
    page = write_comparison(done, out)
    settings = {"steps": steps, "batch": BATCH, "shots": 16, "rates": rates, "runs_missing": missing}
    (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"{page}; {missing} runs are missing" if missing else page, flush=True)


if __name__ == "__main__":
    typer.run(main)
