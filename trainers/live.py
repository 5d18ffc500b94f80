"""What a person sees while training, and a clock that ends it.

Shapes: E experts.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from ..mixture import MoELoRAModel
from ..routing import RoutingRecord, SiteInfo
from .meter import LoadMeter

BLOCKS = " ▁▂▃▄▅▆▇█"


class LiveProgress(TrainerCallback):
    """A progress bar with the loss, the auxiliary loss, tokens per second and the load of the experts.

    Away from a terminal it prints a line per line of the log instead; on ranks other than the first, nothing. A
    :class:`~moelora.trainers.MixtureTrainer` that is given one leaves out the Trainer's own bar.

    Args:
        title: what stands before the bar.
        console: where to draw; standard error by default.
    """

    def __init__(self, title: str = "training", console: Console | None = None) -> None:
        self.title = title
        self.console = Console(stderr=True) if console is None else console
        self._bar: Progress | None = None
        self._load: LoadMeter | None = None
        self._model: MoELoRAModel | None = None
        self._began = (0.0, 0)
        self._shown: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._began = (time.monotonic(), state.num_input_tokens_seen)
        self._shown = {}
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        self._model = model
        self._load = LoadMeter(model)
        model.slot.listeners.append(self._hear)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}  {task.fields[load]}"),
            console=self.console,
        )
        self._bar.start()
        self._bar.add_task(self.title, total=state.max_steps, completed=state.global_step, numbers="", load="")

    def _hear(self, site: SiteInfo, record: RoutingRecord) -> None:
        if self._load is not None and self._model is not None and self._model.training:
            self._load(site, record)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is None or self._load is None:
            return
        share = self._load.share()
        self._load.clear()
        load = f"load {load_bar(share[min(share)])}" if share else ""
        self._bar.update(self._bar.task_ids[0], completed=state.global_step, numbers=self._numbers(state), load=load)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        self._shown = dict(logs)
        if self._bar is None:
            step = f"{self.title} {state.global_step}/{state.max_steps}"
            self.console.print(f"{step}  {self._numbers(state)}", highlight=False, soft_wrap=True)
        else:
            self._bar.update(self._bar.task_ids[0], numbers=self._numbers(state))

    def _numbers(self, state: TrainerState) -> str:
        shown = self._shown
        parts = [f"loss {shown.get('task_loss', shown['loss']):.3f}"] if shown else []
        parts += [f"{key.removeprefix('aux/')} {value:.3f}" for key, value in shown.items() if _is_balance(key)]
        began, tokens = self._began
        if state.num_input_tokens_seen > tokens:
            parts.append(f"{(state.num_input_tokens_seen - tokens) / (time.monotonic() - began):.0f} tokens/s")
        return "  ".join(parts)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._model is not None and self._hear in self._model.slot.listeners:
            self._model.slot.listeners.remove(self._hear)
        self._model = self._load = None


class TimeBudget(TrainerCallback, ExportableState):
    """Ends training before the step that would go over a number of minutes, after a last log line and checkpoint.

    The time used is part of the trainer's state: a resumed run has what is left. The first process decides for all.

    Args:
        minutes: of training, over all resumes.

    Attributes:
        seconds_used: so far. stopped: whether the budget, and not the last step, ended the training.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.seconds_used = 0.0
        self.stopped = False
        self._mark = 0.0
        self._longest = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved: Any = state.stateful_callbacks
        attributes = saved.get(type(self).__name__, {}).get("attributes", {})
        self.seconds_used = float(attributes.get("seconds_used", 0.0))
        self.stopped = False
        self._mark = time.monotonic()
        self._longest = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        took, self._mark = now - self._mark, now
        self.seconds_used += took
        self._longest = max(self._longest, took)
        over = torch.tensor(self.seconds_used + self._longest > 60 * self.minutes, device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(over, 0)
        if bool(over):
            self.stopped = True
            control.should_training_stop = control.should_log = True
            control.should_save = control.should_save or SaveStrategy(args.save_strategy) != SaveStrategy.NO

    def state(self) -> dict[str, Any]:
        return {
            "args": {"minutes": self.minutes},
            "attributes": {"seconds_used": self.seconds_used, "stopped": self.stopped},
        }


def load_bar(load_E: Tensor) -> str:
    """A block per expert, of half height at its fair share and full at twice that or more; a dead expert is red."""
    fair = float(load_E.sum()) / len(load_E) or 1.0
    levels = [min(8, max(1, round(4 * float(load) / fair))) if load > 0 else 0 for load in load_E]
    return "".join(BLOCKS[level] if level else "[red]×[/red]" for level in levels)


def _is_balance(key: str) -> bool:
    return key.startswith("aux/") and key.endswith("load_balance")
