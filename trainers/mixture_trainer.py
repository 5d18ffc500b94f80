"""The Trainer for mixtures: auxiliary losses, expert load and controllers, whichever the task's loss is."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_optimizer import is_optimizer_factory

from ..errors import ConfigError
from ..mixture import MoELoRAModel, StepLoad
from ..routing import RoutingRecord, SiteInfo
from .alarm import CollapseAlarm
from .live import LiveProgress
from .meter import Averages, LoadMeter, balanced, only_listener
from .optimizer import GroupOptions, learning_rates, parameter_groups
from .stopping import StoppingTrainer

STATE = "moelora"

logger = logging.getLogger(__name__)


class MixtureTrainer(StoppingTrainer):
    """``transformers.Trainer`` for a :class:`~moelora.mixture.MoELoRAModel`.

    It adds to the log ``task_loss``, every auxiliary loss as ``aux/<name>`` and the load of the experts as
    ``load/<measure>`` (see :meth:`~moelora.trainers.meter.LoadMeter.metrics`), averaged over the logging window,
    accumulation and ranks as ``loss`` is; calls the routers' ``on_step_end`` once per optimizer step; and stops before
    a step whose loss or gradient is not finite. Everything else is the Trainer's.

    Args:
        model: the mixture. args: as for the Trainer.
        step_balance: balance the experts over the whole optimizer step, all micro-batches and ranks, instead of over
            each micro-batch by itself weighted by its share of the step. A load-balance loss that is pooled over all
            sites then does not depend on how a step is cut up; what a router balances within single sites or sequences
            is left as it is. It costs one more forward of every micro-batch, without gradients.
        groups: learning rates and weight decays of single groups of parameters.
        aux_warmup_steps: over so many optimizer steps, or this share of all where it is below 1, the coefficients of
            the auxiliary losses grow linearly to what they are.
        **trainer: any other argument of the Trainer.

    Attributes:
        load: where tokens went since the last line of the log.

    Raises:
        ConfigError: arguments under which auxiliary losses would be lost or routing mixed up.
    """

    trains_sampling_routers: ClassVar[bool] = False

    def __init__(
        self,
        model: MoELoRAModel,
        args: TrainingArguments | None = None,
        *,
        step_balance: bool = False,
        groups: GroupOptions | None = None,
        aux_warmup_steps: float = 0,
        **trainer: Any,
    ) -> None:
        if not isinstance(model, MoELoRAModel):
            raise ConfigError(
                f"this trainer takes a mixture, got {type(model).__name__}; make one with moelora.attach(backbone, ...)"
            )
        super().__init__(model, args, **trainer)
        self._refuse_what_would_be_lost()
        sampling = {c.router.kind for c in model.containers().values() if c.router is not None and c.router.samples}
        if sampling and not self.trains_sampling_routers:
            logger.warning(
                "the routers of %s sample, and this trainer leaves them as they are: RemixTrainer (kind: remix) or "
                "moelora.policy trains them",
                ", ".join(sampling),
            )
        self.step_balance = step_balance
        self.groups = groups or GroupOptions()
        self.aux_warmup_steps = aux_warmup_steps
        self.load = LoadMeter(model, gates=True)
        self._step_load_meter = LoadMeter(model, gates=True)
        self._window = Averages()
        self._evaluated = Averages()
        self._step_load: StepLoad | None = None
        self._rates: dict[str, float] = {}
        # Before all others, which then see what the step came to.
        self.callback_handler.callbacks.insert(0, _Hooks(self))
        if any(isinstance(callback, LiveProgress) for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.remove_callback(PrinterCallback)

    def _refuse_what_would_be_lost(self) -> None:
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs in one process: replicas would share one routing state; start one process per "
                f"GPU with torchrun --nproc-per-node={self.args.n_gpu}, or show one with CUDA_VISIBLE_DEVICES=0"
            )
        for name, value in {
            "label_smoothing_factor": self.args.label_smoothing_factor,
            "compute_loss_func": self.compute_loss_func,
        }.items():
            if value:
                raise ConfigError(
                    f"{name}={value!r}: the Trainer would then compute the loss without the model, and auxiliary "
                    "losses would train nothing; leave it out"
                )

    # -- one optimizer step --------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        slot = self.model.slot
        before = list(slot.listeners)
        slot.listeners.append(self._hear)
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LiveProgress):
                    callback.close()
            slot.listeners = before  # a callback's too, which nobody ends after an error

    def _hear(self, site: SiteInfo, record: RoutingRecord) -> None:
        if self.model.training:
            self._step_load_meter(site, record)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches = super().get_batch_samples(*args, **kwargs)
        self._step_load = None
        return batches

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        # Not in get_batch_samples: after a resume the random state is restored between the two.
        if self._done == 0 and self.step_balance and self.model.groups():
            self._step_load = self._measure_step(num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.model.training:
            inputs = {**inputs, **self.step_inputs()}
        loss, outputs = self.loss_of(model, inputs, num_items_in_batch)
        across, within = self._factors(num_items_in_batch)
        values = {"task_loss": outputs["task_loss"] * across if "task_loss" in outputs else loss}
        share = outputs.get("aux_share", 1.0) * across
        values.update({f"aux/{name}": value * share for name, value in outputs.get("aux_losses", {}).items()})
        values.update({name: value * across for name, value in outputs.get("metrics", {}).items()})
        if self.model.training:
            self._window.add(values, within)
        else:
            rows = len(next(iter(inputs.values())))
            self._evaluated.add(values, rows)
            self._evaluated.weight += rows
        return (loss, outputs) if return_outputs else loss

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        """The loss of a micro-batch as the Trainer's ``compute_loss`` gives it, and the model's output.

        ``metrics`` in the output, scalars by name, are logged and evaluated beside the loss.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items)
        return loss, outputs

    def step_inputs(self) -> dict[str, Any]:
        """What the model is told of the optimizer step beside its batch, in training."""
        told: dict[str, Any] = {} if self._step_load is None else {"step_load": self._step_load}
        return told if self.aux_scale == 1 else {**told, "aux_scale": self.aux_scale}

    @property
    def aux_scale(self) -> float:
        """Factor of the auxiliary losses in the coming optimizer step."""
        steps = self.aux_warmup_steps
        steps = steps if steps >= 1 else steps * self.state.max_steps
        return min(1.0, (self.state.global_step + 1) / steps) if steps > 0 else 1.0

    def _factors(self, num_items: Tensor | int | None) -> tuple[float, float]:
        """By what the Trainer multiplies the model's loss: for averaging over ranks, and over micro-batches."""
        if not (self.model_accepts_loss_kwargs and num_items is not None):
            return 1.0, 1.0 / getattr(self, "current_gradient_accumulation_steps", 1)
        return float(self.accelerator.num_processes if self.args.average_tokens_across_devices else 1), 1.0

    @torch.no_grad()
    def _measure_step(self, num_items: Tensor | int | None) -> StepLoad:
        """Where the tokens of the coming step will go, over all its micro-batches and ranks.

        The forwards draw the same random numbers as those of the backward passes to come, which start from the same
        state and run in the same order; so dropout and jitter lead to the same choices.
        """
        meter = LoadMeter(self.model, balanced)
        with self._same_randomness(), only_listener(self.model.slot, meter):
            self.model.train()
            for batch in self._batches:
                self._forward(batch)
        meter.reduce(self._sum)
        across, within = self._factors(num_items)
        tokens = max(meter.tokens(), 1.0) * across * within / self.accelerator.num_processes
        return StepLoad(share=meter.share(), tokens=tokens)

    def _forward(self, batch: Any) -> Any:
        inputs = self._prepare_inputs(batch)
        return self.model(**{name: value for name, value in inputs.items() if name != "labels"})

    def _same_randomness(self) -> AbstractContextManager[None]:
        device = self.args.device
        if device.type == "cpu":
            return torch.random.fork_rng(devices=[])
        return torch.random.fork_rng(devices=[device], device_type=device.type)

    def _sum(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values, reduction="sum")
        return total

    def _mean(self, values: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(values, reduction="mean")
        return mean

    def _after_step(self) -> None:
        """Controllers, and the step's load into the window."""
        step = self._step_load_meter
        step.reduce(self._sum)
        for router, load in step.by_router().items():  # a router that sites share steps once
            router.on_step_end(load)
        self.load.add(step)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, CollapseAlarm):
                callback.count(step)
        step.clear()
        self._window.weight += 1

    # -- optimizer -----------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, over the adapter's parameters and no other.

        Raises:
            ConfigError: a parameter outside the adapter is trainable; it would be trained but not saved.
        """
        adapter = {id(p): name for name, p in self.model.adapter_tensors().items() if p.requires_grad}
        others = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in adapter]
        if others:
            raise ConfigError(
                f"{len(others)} parameters outside the adapter are trainable ({', '.join(others[:3])}): they would be "
                "trained but not saved; freeze them with requires_grad_(False)"
            )
        if self.optimizer is None:
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & set(options):
                raise ConfigError(f"optim={self.args.optim}: it chooses parameters by itself; take adamw_torch, say")
            decaying = self.get_decay_parameter_names(self.model)
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = kind(parameter_groups(self.model, decaying, rate, decay, self.groups), **options)
        elif self.groups != GroupOptions():
            raise ConfigError(
                f"the groups {self.groups} are of an optimizer that this trainer makes, and it was given one: leave "
                "`optimizer` out of the DeepSpeed configuration, or `optimizers` out of the call"
            )
        if not self.is_deepspeed_enabled:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            assert held == set(adapter), "the optimizer's parameters are not the adapter's"
        return self.optimizer

    # -- log, evaluation, state ----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._window.take(self._mean), **self.load.metrics(), **self._rates)
            self.load.clear()
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's, with ``<prefix>_task_loss`` and ``<prefix>_aux/<name>`` among the metrics."""
        self._evaluated = Averages()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        assert output.metrics is not None
        for name, value in self._evaluated.take(self._mean).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The window of the log belongs to the state: without it the first line after a resume would differ.
        saved: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # the Trainer fails on one that a resumed run did not have
                saved.setdefault(type(callback).__name__, {})
        own = torch.stack([self._tr_loss.double(), *self._window.sums.values()])
        saved[STATE] = {
            "last_logged": self._globalstep_last_logged,
            "names": list(self._window.sums),
            "steps": self._window.weight,
            "sums_of_ranks": self.accelerator.gather(own.unsqueeze(0)).tolist(),
            "load": self.load.state(),
        }
        super()._save_checkpoint(model, trial)

    def _resume_window(self, state: TrainerState) -> None:
        saved: Any = state.stateful_callbacks
        stored = saved.get(STATE)
        self._step_load_meter.clear()
        self._window = Averages()
        self.load.clear()
        if stored is None:
            return
        device = self.args.device
        sums = torch.tensor(stored["sums_of_ranks"], dtype=torch.float64, device=device)
        same_ranks = len(sums) == self.accelerator.num_processes
        loss, *parts = (sums[self.accelerator.process_index] if same_ranks else sums.mean(0)).unbind()
        self._tr_loss = loss.float()
        self._globalstep_last_logged = stored["last_logged"]
        self._window.sums, self._window.weight = dict(zip(stored["names"], parts, strict=True)), stored["steps"]
        self.load.restore(stored["load"], device)


class _Hooks(TrainerCallback):
    """The moments of the loop that the Trainer offers to callbacks only."""

    def __init__(self, trainer: MixtureTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._resume_window(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer._after_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Those of the step just made, as the Trainer's own learning_rate is; the scheduler moves on next.
        self.trainer._rates = learning_rates(self.trainer.optimizer)
