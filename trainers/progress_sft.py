"""Progress in supervised training: tasks leave the mixture when their target is met, and stages of experts are added.

The order of the rows depends on the seed, the step and on who was active when, so that a checkpoint holds all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..checkpoints.reading import load_mapping
from ..data import Example, RecipeData, TokenizedSet
from ..data.chat import Row
from ..errors import CheckpointError, ConfigError
from ..evaluation.labels import teacher_forced_match
from ..experts.staged import showing
from ..growth import staged_banks
from ..mixture import MoELoRAModel
from .progress import Decision, ProgressConfig, ProgressScheduler
from .progress_gather import gather_evaluations
from .progress_ledger import Ledger

logger = logging.getLogger(__name__)

LEDGER = "progress.json"


class SFTProgress(ProgressConfig):
    """Progress of a run of ``sft``; steps are optimizer steps, and the metric of a task is the part of its test
    questions whose greedy answer is the reference (:func:`~moelora.evaluation.labels.teacher_forced_match`).

    Attributes:
        eval_every: steps between two evaluations of all tasks, the solved ones too.
        prune: whether the examples of solved tasks are no longer drawn; ``false`` for the run to compare with.
    """

    eval_every: Annotated[int, Field(ge=1)] = 50
    prune: bool = True

    @property
    def rules(self) -> ProgressConfig:
        """What the scheduler goes by."""
        return ProgressConfig.parse({name: getattr(self, name) for name in ProgressConfig.model_fields})


class ProgressRows(Dataset[Row]):
    """The rows of a whole run, in their order, of the tasks that are active when they are drawn.

    A row's task is drawn in the shares that the active ones have in the data, and each task goes through its rows in
    passes, shuffled anew each time.

    Args:
        tokens: of all tasks. per_step: rows of an optimizer step, over all processes. steps: of the run.

    Attributes:
        history: since which step, from 1 on, which tasks are drawn from.
    """

    def __init__(self, tokens: TokenizedSet, per_step: int, steps: int, seed: int) -> None:
        self.tokens, self.per_step, self.steps, self.seed = tokens, per_step, steps, seed
        self._own: dict[str, list[int]] = {}  # numbers of the rows of each task
        for number, row in enumerate(tokens.rows):
            self._own.setdefault(tokens.tasks[row["task_ids"]], []).append(number)
        self.restore([(1, self.tasks)])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that have rows."""
        return tuple(self._own)

    def restore(self, history: Sequence[tuple[int, Sequence[str]]]) -> None:
        """Begin anew with this history; the rows of steps that were drawn under it are drawn again, the same."""
        self.history = [(step, tuple(tasks)) for step, tasks in history]
        self._drawn: list[list[tuple[str, int]]] = []
        self._taken = dict.fromkeys(self._own, 0)
        self._passes: dict[str, tuple[int, list[int]]] = {}

    def draw_from(self, tasks: Sequence[str], step: int) -> None:
        """From ``step`` on take rows of these tasks alone; it must not have been drawn yet."""
        assert len(self._drawn) < step, f"the rows of step {step} have been drawn"
        if tuple(tasks) != self.history[-1][1]:
            self.history.append((step, tuple(tasks)))

    def of_step(self, step: int) -> list[tuple[str, int]]:
        """Task and number of each row of a step, counted from 1."""
        while len(self._drawn) < step:
            self._drawn.append(self._draw(len(self._drawn) + 1))
        return self._drawn[step - 1]

    def _draw(self, step: int) -> list[tuple[str, int]]:
        tasks = next(tasks for since, tasks in reversed(self.history) if since <= step)
        sizes = np.array([len(self._own[task]) for task in tasks])
        generator = np.random.default_rng([self.seed, 0, step])
        chosen = generator.choice(len(tasks), size=self.per_step, p=sizes / sizes.sum())
        return [(tasks[number], self._next(tasks[number])) for number in chosen]

    def _next(self, task: str) -> int:
        number, place = divmod(self._taken[task], len(self._own[task]))
        self._taken[task] += 1
        if self._passes.get(task, (-1, []))[0] != number:
            generator = np.random.default_rng([self.seed, 1, list(self._own).index(task), number])
            self._passes[task] = number, generator.permutation(self._own[task]).tolist()
        return self._passes[task][1][place]

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __getitem__(self, number: int) -> Row:
        step, place = divmod(number, self.per_step)
        return self.tokens.rows[self.of_step(step + 1)[place][1]]


class ProgressHost(TrainerCallback, ExportableState):
    """Evaluates, asks the scheduler, and does what it decides; its state is in every checkpoint.

    The next step's batch has been made when a step ends, so a decision after step N holds for the rows from step N + 2
    on. Examples that were drawn of a task are counted in the ledger, ``progress.json`` in the run's folder.

    Args:
        config: rules. rows: what is trained on. test: examples to evaluate on. tokenizer: of the model.

    Attributes:
        on_switch: called with the decision when a stage ended; grows the model.
        log: called with metrics of an evaluation.
    """

    def __init__(
        self, config: SFTProgress, rows: ProgressRows, test: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.config, self.rows, self.tokenizer = config, rows, tokenizer
        self.test = {task: [example for example in test if example.task == task] for task in config.targets}
        self.on_switch: Callable[[Decision], None] = lambda decision: None
        self.log: Callable[[dict[str, float]], None] = lambda metrics: None
        self._begin()

    def _begin(self) -> None:
        self.scheduler = ProgressScheduler(self.config.rules)
        prunes, grows = self.config.prune, self.config.num_stages > 1
        self.ledger = Ledger(self.config.rules, prunes=prunes, grows=grows, seed=self.rows.seed, unit="examples")
        self.rows.restore([(1, tuple(self.config.targets))])

    # -- the run -------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin()
        saved = _saved(state.stateful_callbacks)
        if saved is None and state.global_step == 0:
            return
        if saved is None:
            raise CheckpointError(
                f"trainer.progress: the checkpoint of step {state.global_step} is of a run without it, so it does not "
                "say which tasks were trained on: start anew, or resume without trainer.progress"
            )
        self.scheduler.load_state_dict(saved["scheduler"])
        self.ledger = Ledger.from_dict(saved["ledger"])
        self.rows.restore(saved["history"])
        if not self.scheduler.active:
            state.max_steps = state.global_step  # it had ended here

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        step = state.global_step
        for task, _ in self.rows.of_step(step):
            self.ledger.spend(task, 1)
        if step % self.config.eval_every and step < state.max_steps:
            return
        found = self.evaluate(model, args, tuple(self.test))
        for task, items in found.items():
            self.scheduler.observe(task, items, step)
        decision = self.scheduler.decide(step)
        means = {task: _mean(items) for task, items in found.items()}
        self._write_down(decision, means)
        wanted = control.should_log  # which a line of the log clears
        self.log({**{f"progress/{task}": mean for task, mean in means.items()}, "progress/stage": decision.stage})
        control.should_log = wanted
        if decision.switched:
            self.on_switch(decision)
        drawn = [task for task in self.config.targets if task not in self.scheduler.stopped]
        if not decision.active:
            control.should_training_stop = control.should_log = True
        else:
            self.rows.draw_from(decision.active if self.config.prune else drawn, step + 2)

    def _write_down(self, decision: Decision, means: dict[str, float]) -> None:
        self.ledger.record(decision)
        for task, mean in means.items():
            if task in decision.solved:
                self.ledger.retain(task, "solve", mean, decision.step)
            elif decision.switched and self.ledger.solved(task) is not None:
                self.ledger.retain(task, "stage", mean, decision.step)
        changes = {"solved": decision.solved, "below their targets again": decision.reopened}
        for what, tasks in changes.items():
            if tasks:
                logger.info("step %d, stage %d: %s: %s", decision.step, decision.stage, what, ", ".join(tasks))
        for why in decision.stopped.values():
            logger.warning("step %d: %s; it is given up, the others go on", decision.step, why)
        if decision.switched:
            logger.info("step %d: stage %d begins (%s)", decision.step, decision.stage, decision.reason)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        solved = {task: record for task in self.test if (record := self.ledger.solved(task)) is not None}
        live = self.evaluate(model, args, tuple(solved))
        banks = staged_banks(model)
        for stage in sorted({record.stage for record in solved.values()}):
            tasks = tuple(task for task, record in solved.items() if record.stage == stage)
            with showing(banks, stage + 1):  # the first stage has an adapter already
                before = self.evaluate(model, args, tasks)
            for task in tasks:
                prefix = _mean(before[task]) if banks else None
                self.ledger.retain(task, "end", _mean(live[task]), state.global_step, prefix)
        if args.should_save:
            assert args.output_dir is not None
            self.ledger.save(Path(args.output_dir) / LEDGER)

    def evaluate(self, model: Any, args: TrainingArguments, tasks: Sequence[str]) -> dict[str, list[float]]:
        """1 or 0 for each test question of these tasks; every process answers its part of them."""
        mine = [e for task in tasks for e in self.test[task][args.process_index :: args.world_size]]
        found: dict[str, list[float]] = {}
        if mine:
            report = teacher_forced_match(model, self.tokenizer, mine, args.per_device_eval_batch_size)
            for example, item in zip(mine, report.items, strict=True):
                found.setdefault(example.task, []).append(item)
        return gather_evaluations(found)

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        saved = {
            "scheduler": self.scheduler.state_dict(),
            "ledger": self.ledger.to_dict(),
            "history": [[step, list(tasks)] for step, tasks in self.rows.history],
        }
        return {"args": {}, "attributes": {"saved": saved}}

    @staticmethod
    def catch_up(model: MoELoRAModel, folder: Path) -> None:
        """Grow a fresh model to the stage of a checkpoint, whose tensors are filled in next."""
        saved = _saved(load_mapping(folder / "trainer_state.json").get("stateful_callbacks", {}))
        banks = staged_banks(model)
        if saved is not None and banks:
            for _ in range(len(banks[0].ranks), saved["scheduler"]["stage"] + 1):
                model.begin_task()


def host_progress(
    config: SFTProgress, content: RecipeData, tokens: Any, model: MoELoRAModel, args: TrainingArguments
) -> ProgressHost:
    """What makes a run of ``sft`` go by the progress of its tasks.

    Raises:
        ConfigError: the data, the mixture or the arguments do not allow it.
    """
    if not isinstance(tokens, TokenizedSet):
        raise ConfigError("trainer.progress: rows are drawn by task: set data.streaming and packing to false")
    if args.max_steps <= 0:
        raise ConfigError("trainer.progress: how long a run lasts depends on it: set trainer.args.max_steps, the most")
    if args.dataloader_num_workers > 0:
        raise ConfigError(
            f"trainer.progress: {args.dataloader_num_workers} workers would read ahead with the tasks of now: set "
            "trainer.args.dataloader_num_workers to 0"
        )
    if args.restore_callback_states_from_checkpoint:
        raise ConfigError(
            "trainer.progress: its state is restored without that: set restore_callback_states_from_checkpoint to false"
        )
    if args.deepspeed or args.fsdp:
        raise ConfigError("trainer.progress: processes evaluate by themselves, which sharded weights do not allow")
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = ProgressRows(tokens, per_step, args.max_steps, args.seed)
    tested = {example.task for example in content.test}
    for what, tasks in {"tasks of the training data": set(rows.tasks), "tasks with test examples": tested}.items():
        if tasks != set(config.targets):
            raise ConfigError(
                f"trainer.progress.targets is about {', '.join(sorted(config.targets))}, and the {what} are "
                f"{', '.join(sorted(tasks))}: give each task its target, and each some test examples"
            )
    _check_growth(config, model, args)
    return ProgressHost(config, rows, content.test, model.tokenizer)


def _check_growth(config: SFTProgress, model: MoELoRAModel, args: TrainingArguments) -> None:
    if config.num_stages == 1:
        return
    banks = staged_banks(model)
    where = f"trainer.progress.num_stages is {config.num_stages}"
    if not banks:
        raise ConfigError(
            f"{where}, and this mixture has no experts of kind 'staged': take them, or set it to 1 to prune alone"
        )
    most = min(bank.config.num_stages for bank in banks)
    if most < config.num_stages + 1:
        raise ConfigError(
            f"{where}, each with an adapter of its own upon the frozen backbone, and experts.num_stages is {most}: "
            f"raise it to {config.num_stages + 1}"
        )
    if args.world_size > 1 or args.load_best_model_at_end:
        raise ConfigError(
            f"{where}: stages are added in a run of one process, without load_best_model_at_end (the best model may be "
            "of an earlier stage); set it to 1 to prune alone"
        )


def _saved(callbacks: Any) -> dict[str, Any] | None:
    """What a checkpoint has of a host."""
    saved: dict[str, Any] | None = callbacks.get(ProgressHost.__name__, {}).get("attributes", {}).get("saved")
    return saved


def _mean(items: Sequence[float]) -> float:
    return sum(items) / len(items)
