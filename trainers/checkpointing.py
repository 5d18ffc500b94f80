"""Whole checkpoints only: a Trainer whose checkpoint folders appear in one piece, and which resumes from whole ones."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from filelock import FileLock, Timeout
from torch import nn
from transformers.integrations.deepspeed import deepspeed_load_checkpoint, is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import rotate_checkpoints

from .. import checkpoints, files
from ..errors import CheckpointError, ConfigError, TrainingError, UserError
from ..mixture import MoELoRAModel
from .sharded import (
    fill,
    gather_with_containers,
    optimizer_state_only,
    process_lost,
    refuse_foreign_state,
    scalars_as_rows,
    whole_shape,
    whole_state,
)
from .streamed import StreamingTrainer

# The Trainer leaves out what begins with an underscore when it uploads a run's folder.
STAGING = "_staging-"
LOCK = "_run.lock"
OWNER = "_run.pid"


class CheckpointingTrainer(StreamingTrainer):
    """A Trainer that writes each ``checkpoint-N`` beside its place and moves it there when it is whole.

    A kill at any moment leaves the checkpoints that were announced before it; the last thing to change is a rename,
    and older checkpoints go only after it. A folder is trained in by one process at a time.
    """

    model: MoELoRAModel
    _staging: Path | None = None
    _push_after_commit = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adapters = self.model.active_adapters

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint folder, or ``True`` for the newest whole one of the run's folder.

        Raises:
            ConfigError: several adapters are active, or another one than when this trainer was made.
            CheckpointError: there is nothing whole to resume from, or the checkpoint is of another mixture.
            UserError: another process is training in the run's folder.
            TrainingError: a loss or a gradient was not finite and the step was not taken; or another process of the
                run is gone.
        """
        self._refuse_adapters()
        with self._only_run():
            source = self._resume_source(resume_from_checkpoint)
            try:
                return super().train(source, trial, ignore_keys_for_eval)
            except RuntimeError as error:
                if self.args.world_size == 1 or not process_lost(error):
                    raise
                raise TrainingError(
                    f"another of the {self.args.world_size} processes of this run has ended, or cannot be reached "
                    f"({' '.join(str(error).split())[:200]}); what it said is above or in its own log. Checkpoints in "
                    f"{self._run_dir} are whole: start all processes again with --resume latest"
                ) from error

    def _refuse_adapters(self) -> None:
        """A run has the optimizer of one adapter, and its checkpoints hold one."""
        active = self.model.active_adapters
        if len(active) > 1:
            raise ConfigError(
                f"adapters {', '.join(map(repr, active))} are active, and a run trains and saves one: call set_adapter "
                "with it before making the trainer; to train it on top of another, merge that into the backbone first"
            )
        if active != self._adapters:
            raise ConfigError(
                f"this trainer was made for adapter {self._adapters[0]!r}, but {active[0]!r} is active: call "
                f"set_adapter({self._adapters[0]!r}), or make another trainer"
            )

    def _resume_source(self, wanted: str | bool | None) -> str | None:
        if not wanted:
            return None
        if wanted is True:
            newest = checkpoints.latest(self._run_dir)
            if newest is None:
                raise CheckpointError(f"{self._run_dir}: no whole checkpoint to resume from; start without resume")
            return str(newest)
        checkpoints.verify(Path(wanted))
        return str(wanted)

    @property
    def _run_dir(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    @contextmanager
    def _only_run(self) -> Iterator[None]:
        """Hold the run's folder; the operating system lets go of it when the process ends, however it ends."""
        if not self.args.should_save:
            yield
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        owner = self._run_dir / OWNER
        lock = FileLock(self._run_dir / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            who = owner.read_text().strip() if owner.exists() else "unknown"
            raise UserError(
                f"{self._run_dir}: process {who} is training in this folder; wait for it, or set another output_dir"
            ) from None
        try:
            owner.write_text(f"{os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    # -- saving --------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(super()._get_output_dir(trial) if self._staging is None else self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._refuse_adapters()
        run_dir = Path(super()._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        staging = run_dir / f"{STAGING}{final.name}"
        if self.args.should_save:
            for left in run_dir.glob(f"{STAGING}*"):
                shutil.rmtree(left)
        self.accelerator.wait_for_everyone()
        self._staging, self._push_after_commit = staging, False
        try:
            with files.plain_errors(final):
                super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(staging / final.name):
                self.state.best_model_checkpoint = str(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staging / final.name / "trainer_state.json"))
                checkpoints.commit(staging / final.name, final)
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best, use_mtime=True)
        if self._push_after_commit:
            self._push_from_checkpoint(str(final))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the mixture in one piece, whatever it is spread over; every process has to call this."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=whole_state(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Both would write the frozen backbone too (the Trainer stops DeepSpeed for PEFT models only), and the adapter,
        # which lies in the checkpoint already.
        if self.is_fsdp_enabled:
            plugin, accelerator = self.accelerator.state.fsdp_plugin, self.accelerator
            save_fsdp_optimizer(plugin, accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                assert self.lr_scheduler is not None
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        elif self.is_deepspeed_enabled:
            with optimizer_state_only(self.model_wrapped):
                super()._save_optimizer_and_scheduler(output_dir)
            for script in Path(output_dir).glob("zero_to_*.py") if self.args.should_save else ():
                script.unlink()  # they recover weights from what is not there
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    # -- uploading -----------------------------------------------------------------------------------------------

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None:
            self._push_after_commit = True
            return
        if self.is_world_process_zero():
            self.model.save_pretrained(self._run_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``save_pretrained`` has written the card, and its checksum is in the manifest."""

    # -- loading -------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:  # else before it was spread
            self._restore_adapter(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._restore_adapter(Path(self.state.best_model_checkpoint))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.is_deepspeed_enabled and is_deepspeed_zero3_enabled():
            gather_with_containers(self.model)
        if resume_from_checkpoint is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            refuse_foreign_state(Path(resume_from_checkpoint), self._run_dir, self.args.world_size)
            self._restore_adapter(Path(resume_from_checkpoint))
        deepspeed = self.is_deepspeed_enabled and resume_from_checkpoint is not None
        given = None if deepspeed else resume_from_checkpoint
        whole = self.is_deepspeed_enabled and not is_deepspeed_zero3_enabled()
        with scalars_as_rows(self.model) if whole else nullcontext():
            result = super()._prepare_for_training(  # type: ignore[no-untyped-call]
                max_steps, train_dataloader, given
            )
        if deepspeed:
            # As the Trainer does for PEFT models: DeepSpeed's files hold no weights, so not strictly.
            assert resume_from_checkpoint is not None
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return result

    def _restore_adapter(self, folder: Path) -> None:
        stored = self._stored(folder)
        shapes = {name: whole_shape(value) for name, value in self.model.adapter_tensors().items()}
        fill(self.model, stored.tensors(shapes))

    def _stored(self, folder: Path) -> checkpoints.Stored:
        stored = checkpoints.read(folder)
        if stored.mixture != self.model.mixture:
            raise CheckpointError(
                f"{folder}: this checkpoint is of another mixture than the one being trained; resume with the recipe "
                "that it was trained with, or choose another output_dir"
            )
        return stored
