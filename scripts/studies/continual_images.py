"""Methods of continual learning on the image sequence ``digits``, with a small CLIP model that is trained here first.

    python scripts/studies/continual_images.py                  # everything, resumed where it stopped
    python scripts/studies/continual_images.py --minutes 30     # start no run after that, and tell what there is
    python scripts/studies/continual_images.py --methods moram,sequential --seeds 1

Every method has experts at the same linears of both encoders, takes the same number of steps of the same size on the
same 16 images of each class, and has about the same number of trained parameters in a task: rank 16 in all of its
experts. Its learning rate is the one with the best mean over all tasks after the last, on validation images, in order
``a`` with a seed that no reported run has. The tables are about test images, classified among the classes of all tasks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from continual_study import Study, methods
from transformers.utils import logging as bars

from moelora.config import Recipe
from moelora.data import image_sequences
from moelora.data.image_sequences import ImageSequence, read_image_sequence
from moelora.trainers.clip import ClipRun

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
BATCH = 32
# MoRAM's numbers are those of its released vision code; 64 images are a quarter of those of one order.
METHODS = methods(16, 16, {"temperature": 0.01, "threshold": 0.2}, 64)


def read_validation(shots: int, test_size: int | None, seed: int, path: str | None) -> ImageSequence:
    """``digits`` with the validation images in the place of the test images."""
    whole = read_image_sequence("digits", shots=shots, test_size=test_size, seed=seed, path=path)
    return replace(whole, name="digits-validation", tasks=tuple(replace(task, test=task.val) for task in whole.tasks))


class Images(Study):
    """The sequence ``digits``."""

    methods = METHODS
    trainer = ClipRun
    rates: ClassVar[tuple[float, ...]] = (5e-4, 2e-3, 8e-3)

    def recipe(self, name: str, rate: float, order: str, seed: int, folder: Path, validation: bool) -> Recipe:
        method, site = self.methods[name]
        data = "digits-validation" if validation else "digits"
        return Recipe.parse(
            {
                "backbone": {"name": "digits-clip", "quantization": None},
                "mixture": {"sites": [{"target": TARGETS, **site}]},
                "data": {"kind": "images", "name": data, "order": order, "seed": seed},
                "trainer": {
                    "kind": "clip",
                    "method": method,
                    "args": self.args(rate, adam_beta2=0.9999),
                    "collapse_alarm": False,
                },
                "output_dir": str(folder),
                "seed": seed,
            }
        )


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
    study = Images(out, {"steps": steps, "batch": BATCH, "shots": 16}, minutes)
    study.compare(methods.split(","), orders.split(","), seeds)


if __name__ == "__main__":
    typer.run(main)
