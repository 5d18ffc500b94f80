"""What ``moelora train`` does with a recipe of several stages, each a run of its own.

In the run's folder each stage has one of its own, ``stage-1`` and so on, with its checkpoints and, once it is over, its
model; ``stages.json`` says which stage comes next. A stage starts from the model that the stage before it left in its
folder, also in an uninterrupted run, so a run that was killed anywhere goes on as if it had not been.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..config import Recipe
from .mixture_trainer import MixtureTrainer
from .sft import SFT
from .stages import Stages


class Staged(SFT):
    """A kind of run whose stages are prepared one by one; see :class:`SFT`."""

    @classmethod
    def stage_names(cls, recipe: Recipe, content: Any) -> list[str]:
        """What distinguishes the stages; a resumed run has to have the same.

        Args:
            content: what :meth:`examples_of` gave.
        """
        raise NotImplementedError

    @classmethod
    def prepare_stage(cls, recipe: Recipe, content: Any, number: int) -> MixtureTrainer:
        """The trainer of a stage, counted from 1, with the model that the stage before it left.

        Args:
            content: what :meth:`examples_of` gave.
        """
        raise NotImplementedError

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Refuse what can be seen to be wrong before data and backbone are there."""

    @classmethod
    def check_data(cls, recipe: Recipe, content: Any) -> None:
        """Refuse data that do not fit the recipe, before the backbone is there."""

    @classmethod
    def stages(cls, recipe: Recipe, content: Any) -> Stages:
        """Where the run is."""
        return Stages(recipe.output_dir, cls.stage_names(recipe, content))

    @classmethod
    def run(cls, recipe: Recipe, *, resume: bool | str = False) -> Path:
        """Train all stages.

        Args:
            resume: ``True`` for the newest whole state of the run's folder, or a checkpoint of the stage that it is in.

        Returns:
            The run's folder: the model of the last stage, its card, ``recipe.yaml``, metrics, and ``stage-N``.

        Raises:
            UserError: something in the recipe, its data or its folder has to be mended.
            TrainingError: a loss or a gradient was not finite.
        """
        cls.check(recipe)
        content = cls.examples_of(recipe)
        cls.check_data(recipe, content)
        stages = cls.stages(recipe, content)
        first, checkpoint = stages.start(resume)
        for number in range(first, len(stages.names) + 1):
            cls._run_stage(recipe, content, number, checkpoint)
            checkpoint = None
        return stages.run_dir

    @classmethod
    def prepare(cls, recipe: Recipe) -> Any:
        """The trainer of the first stage, ready to train."""
        return cls.prepare_stage(recipe, cls.examples_of(recipe), 1)

    @classmethod
    def finish_stage(cls, trainer: Any) -> dict[str, float]:
        """What is left to do once a stage is trained and before it is saved; metrics of it."""
        return {}

    @classmethod
    def _run_stage(cls, recipe: Recipe, content: Any, number: int, checkpoint: Path | None) -> None:
        trainer = cls.prepare_stage(recipe, content, number)
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        metrics = {**result.metrics, **cls.finish_stage(trainer)}
        if trainer.eval_dataset is not None:
            metrics.update(trainer.evaluate())
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("all", metrics)
        stages, folder = cls.stages(recipe, content), Path(recipe.output_dir)
        last = number == len(stages.names)
        if last:
            trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            if last:
                (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
                shutil.copy(stages.folder(number) / "all_results.json", folder)
            stages.finish(number)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
