"""Methods of continual learning on the language sequence ``reasoning-gym-8``, with SmolLM2-135M.

    python scripts/studies/continual_language.py                  # everything, resumed where it stopped
    python scripts/studies/continual_language.py --minutes 60     # start no run after that, and tell what there is
    python scripts/studies/continual_language.py --methods moram,sequential --seeds 1

Every method has experts at all linears of the same upper layers of a 4-bit backbone, takes the same number of steps of
the same size on the same questions, and has about the same number of trained parameters in a task: rank 8 in all of its
experts. Its learning rate is the one with the best mean over all tasks after the last, on validation questions, in
order ``a`` with a seed that no reported run has. The tables are about test questions; an answer is right where greedy
decoding would write the reference, token for token. What the layers below the experts make of a text is kept, in some
GB of memory, so that only the first run passes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from continual_study import Study, methods
from transformers import PreTrainedModel
from transformers.utils import logging as bars

from moelora.config import Recipe
from moelora.data.sequence_gym import ReasoningGym8
from moelora.data.sequences import SEQUENCES, Task
from moelora.lower import LowerStates
from moelora.mixture import MoELoRAModel
from moelora.trainers.continual import Content, Continual

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = "21:"
BATCH, TRAIN, VAL, TEST = 4, 120, 20, 24
# MoRAM's numbers are those of its released language code; 40 questions are a third of those of one task.
METHODS = methods(8, 16, {"temperature": 0.03, "threshold": 0.2}, 40)
VALIDATION = "reasoning-gym-8-validation"


class Validation(ReasoningGym8):
    """``reasoning-gym-8`` with validation and test questions in each other's place."""

    def task(self, name: str) -> Task:
        whole = super().task(name)
        return Task(**{**vars(whole), "val": whole.test, "test": whole.val})


class SharedContent(Content):
    """The runs of a process have one backbone, and what is kept of its lower layers."""

    shared: ClassVar[dict[str, Any]] = {}

    def load(self) -> tuple[PreTrainedModel, Any]:
        if "backbone" not in self.shared:
            self.shared["backbone"] = super().load()
        found: tuple[PreTrainedModel, Any] = self.shared["backbone"]
        return found

    def remember(self, model: MoELoRAModel) -> None:
        lower: LowerStates | None = self.shared.get("lower")
        self._lower = lower
        super().remember(model)
        self.shared["lower"] = self._lower


class SharedRun(Continual):
    """:class:`~moelora.trainers.continual.Continual` with the backbone of the run before."""

    State = SharedContent


class Language(Study):
    """The sequence ``reasoning-gym-8``."""

    methods = METHODS
    trainer = SharedRun
    rates: ClassVar[tuple[float, ...]] = (1e-3, 4e-3)

    def recipe(self, name: str, rate: float, order: str, seed: int, folder: Path, validation: bool) -> Recipe:
        method, site = self.methods[name]
        data = {"name": VALIDATION if validation else "reasoning-gym-8", "order": order, "seed": seed}
        sizes = {"train_size": TRAIN, "val_size": VAL, "test_size": TEST}
        trainer: dict[str, Any] = {
            "method": method,
            "args": self.args(rate),
            "collapse_alarm": False,
            "answers": "forced",
        }
        return Recipe.parse(
            {
                "mixture": {"sites": [{"target": TARGETS, "layers": LAYERS, **site}]},
                "data": {"kind": "sequence", **data, **sizes},
                "trainer": {"kind": "continual", **trainer, "remember_mib": 4096, "eval_batch_size": 40},
                "max_length": 256,
                "output_dir": str(folder),
                "seed": seed,
            }
        )


def main(
    out: Annotated[Path, typer.Option(help="Where runs and tables go.")] = Path("runs/study-continual-language"),
    methods: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(METHODS),
    orders: Annotated[str, typer.Option(help="Of the tasks, with commas.")] = "a,b,c",
    seeds: Annotated[int, typer.Option(help="How many.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of each task.", min=1)] = 30,
    threads: Annotated[int, typer.Option(help="Of torch.", min=1)] = 1,
    minutes: Annotated[float | None, typer.Option(help="Start no run after so many.")] = None,
) -> None:
    """Compare methods of continual learning on language."""
    torch.set_num_threads(threads)
    bars.disable_progress_bar()
    SEQUENCES.register(VALIDATION)(Validation)
    settings = {"steps": steps, "batch": BATCH, "layers": LAYERS, "train": TRAIN, "validation": VAL, "test": TEST}
    study = Language(out, settings, minutes)
    study.compare(methods.split(","), orders.split(","), seeds)


if __name__ == "__main__":
    typer.run(main)
