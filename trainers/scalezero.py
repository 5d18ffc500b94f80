"""Reinforcement learning on several tasks at once, with ScaleZero's Dynamic Parameter Scaling.

Source: ScaleZero (arXiv 2509.07945) and its loop in LightZero (commit 9f717c80). In each iteration every active task is
played, and learnt from; now and then all are evaluated. A solved task leaves (pruning), its own part is frozen, and a
stage ends by quota or budget: then the shared trunk is frozen as it is, and gets adapters (``experts/staged.py``).

Differences from LightZero: solved tasks are evaluated on, so that forgetting shows, and may be opened again; the
optimizer follows a switch (there adapters are never trained, see ``tests/reference/test_lightzero.py``); stages are
counted from their start. Which arm a run is, ``joint``, ``prune``, ``adapters`` or ``dps``, follows from ``prune`` and
``stages``, and is in its ledger.

An uninterrupted run and a resumed one are the same bit for bit, on environments that depend on nothing but their seeds
and actions, in one process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files
from ..errors import CheckpointError, UserError
from ..experts.staged_linear import Staged, stage_linears
from ..modes import evaluation_mode
from ..rl.agent import Agent, TaskShape
from ..rl.checks import TaskError
from ..rl.environments import TaskEnvironments
from ..rl.learners import LEARNERS, Learner
from .optimizer import sync_optimizer
from .progress import Decision, ProgressScheduler
from .progress_ledger import Ledger
from .scalezero_config import ScaleZeroConfig

logger = logging.getLogger(__name__)

LEDGER, LOG, STATE, CONFIG = "ledger.json", "log.jsonl", "state", "config.yaml"
EVALUATION_SEED = 1_000_000  # of no episode that is played in training but by chance
Watch = Callable[[str, Mapping[str, Any]], None]


class ScaleZero:
    """One run: an agent, its tasks, and the state between iterations.

    Args:
        watch: is told of ``iteration``, ``evaluation`` and ``decision`` with their numbers.

    Attributes:
        agent, staged: the latter ``None`` without stages. scheduler, ledger: see ``progress.py``.
        iteration: how many are over.

    Raises:
        ConfigError: a task cannot be built, or the options do not hold together.
    """

    def __init__(self, config: ScaleZeroConfig | Mapping[str, Any], watch: Watch | None = None) -> None:
        self.config = config = ScaleZeroConfig.parse(config)
        self.folder = Path(config.output_dir)
        self.watch: Watch = watch or (lambda what, numbers: None)
        self.environments = {
            task.name: TaskEnvironments(task, config.learner.copies, config.seed) for task in config.tasks
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            shapes = {n: TaskShape(e.observation_shape, e.num_actions) for n, e in self.environments.items()}
            self.agent = Agent(shapes, config.agent)
        self.staged: Staged | None = None
        if config.stages is not None:
            options = {name: value for name, value in config.stages.to_dict().items() if name != "targets"}
            self.staged = stage_linears(self.agent.trunk, options, config.stages.targets)
        self.learner: Learner[Any] = LEARNERS.create(
            config.learner.kind, config.learner, self.agent, self.environments, config.seed
        )
        self.optimizer = torch.optim.Adam(self._groups(), lr=config.learning_rate)
        self.scheduler = ProgressScheduler(config.rules)
        grows = config.stages is not None
        self.ledger = Ledger(config.rules, prunes=config.prune, grows=grows, seed=config.seed, unit="environment steps")
        self.iteration = 0

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> Ledger:
        """Play, learn and evaluate until all tasks are solved or the budget is spent.

        The folder then holds ``ledger.json``, ``log.jsonl`` (a line for each evaluation), ``config.yaml`` and
        ``state``, the newest checkpoint.

        Args:
            resume: go on with the checkpoint of the run's folder, which may have been killed anywhere.

        Raises:
            UserError: the folder holds a run and ``resume`` is not given, or the other way round.
            TrainingError: a loss was not finite. CheckpointError: the checkpoint is damaged or of other options.
        """
        try:
            self._start(resume)
            while not self.over:
                self.iterate()
                if self.iteration % self.config.save_every == 0:
                    self.save()
            self._conclude()
        finally:
            for environments in self.environments.values():
                environments.close()
        return self.ledger

    def _start(self, resume: bool) -> None:
        there = (self.folder / STATE).exists()
        if there and not resume:
            raise UserError(f"{self.folder} holds a run already: resume it, or choose another output_dir")
        if resume and not there:
            raise UserError(f"{self.folder} holds no checkpoint to go on with: start without resume")
        if there:
            self.load()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        files.replace_text(self.folder / CONFIG, self.config.to_yaml())
        files.replace_text(self.folder / LOG, "")
        self.save()  # from here on the folder is this run's, and a kill before the next one loses nothing

    @property
    def over(self) -> bool:
        """Whether all tasks are solved, or given up, or the budget is spent."""
        return not self.scheduler.active or self.ledger.interactions >= self.config.max_env_steps

    @property
    def playing(self) -> list[str]:
        """Tasks that are played and learnt: all that were not given up, or the unsolved ones alone."""
        if self.config.prune:
            return list(self.scheduler.active)
        return [task for task in self.environments if task not in self.scheduler.stopped]

    def iterate(self) -> None:
        """One iteration: play, learn, and every so often evaluate and decide."""
        self.iteration += 1
        for task, steps in self.learner.collect(self.playing, self._give_up).items():
            self.ledger.spend(task, steps)
        if self.playing:
            self.watch("iteration", self.learner.update(self.optimizer, self.playing))
        if self.iteration % self.config.eval_every == 0 or not self.playing:
            self._decide()

    def _give_up(self, task: str, error: TaskError) -> None:
        """A task whose rewards or observations are no numbers, or that cannot be played, ends; the others go on."""
        logger.warning("iteration %d: %s; the task is given up, the others go on", self.iteration, error)
        self.scheduler.observe(task, float("nan"), self.iteration)

    # -- evaluation and decisions --------------------------------------------------------------------------------

    def evaluate(self, task: str, stage: int | None = None) -> list[float]:
        """Returns of a task's episodes, always of the same seeds, without chance.

        Args:
            stage: with the trunk as it was at the end of this stage, or is in it; ``None``: with that of now.
        """
        with self._at(stage), evaluation_mode(self.agent):
            return self.environments[task].evaluate(
                self.learner.acting(task), self.config.eval_episodes, EVALUATION_SEED
            )

    def record(self, task: str, path: str | Path) -> float:
        """Keep the first episode of :meth:`evaluate` as a GIF: with the trunk that answers for the task.

        Returns:
            Its return.

        Raises:
            ConfigError: there is no such task, or it cannot be drawn here. UserError: ``path`` does not end in .gif.
        """
        with self._at(self._stage_of(task)), evaluation_mode(self.agent):
            return self.environments[task].record(self.learner.acting(task), EVALUATION_SEED, path)

    @contextmanager
    def _at(self, stage: int | None) -> Iterator[None]:
        now = self.staged is None or stage is None or stage == self.staged.stage
        with nullcontext() if now or self.staged is None or stage is None else self.staged.at(stage):
            yield

    def _stage_of(self, task: str) -> int | None:
        """The stage whose trunk answers for a task."""
        solve = self.ledger.solved(task)
        return None if solve is None or self.config.answer == "live" else solve.stage

    def _decide(self) -> None:
        found: dict[str, list[float]] = {}
        for task in self.environments:
            if task not in self.scheduler.stopped:
                try:
                    found[task] = self.evaluate(task, self._stage_of(task))
                except TaskError as error:
                    self._give_up(task, error)
        for task, returns in found.items():
            self.scheduler.observe(task, returns, self.iteration)
        decision = self.scheduler.decide(self.iteration)
        means = {task: sum(returns) / len(returns) for task, returns in found.items()}
        self.ledger.record(decision)
        for task in decision.solved:
            self.ledger.retain(task, "solve", means[task], self.iteration)
        self._follow(decision)
        line = {
            "iteration": self.iteration,
            "stage": decision.stage,
            "reason": decision.reason,
            "interactions": {task: record.interactions for task, record in self.ledger.tasks.items()},
            "returns": means,
            "solved": list(self.scheduler.solved),
        }
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        self.watch("evaluation", line)

    def _follow(self, decision: Decision) -> None:
        """Let the model do what was decided."""
        if self.config.prune:
            for task in (*decision.solved, *decision.stopped):
                self.agent.freeze_task(task)
            for task in decision.reopened:
                self.agent.thaw_task(task)
        if decision.switched and self.staged is not None:
            with torch.random.fork_rng(devices=[]):  # what is drawn depends on the seed and the stage alone
                torch.manual_seed(self.config.seed + 1_000_003 * decision.stage)
                self.staged.advance()
        if decision.switched or decision.solved or decision.reopened or decision.stopped:
            sync_optimizer(self.optimizer, self._groups())

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained now: the trunk, and the part of each task."""
        modules: dict[str, nn.Module] = {"trunk": self.agent.trunk, **dict(self.agent.parts.named_children())}
        return [
            {"name": name, "params": [p for p in module.parameters() if p.requires_grad]}
            for name, module in modules.items()
        ]

    def _conclude(self) -> None:
        """Evaluate what was solved once more, with the agent of now and with the trunk of its stage."""
        for task, record in self.ledger.tasks.items():
            if record.solves and record.stopped is None:  # also where it was opened again since
                live, prefix = (self.evaluate(task, stage) for stage in (None, record.solves[-1].stage))
                ends = [sum(returns) / len(returns) for returns in (live, prefix)]
                self.ledger.retain(task, "end", ends[0], self.iteration, ends[1] if self.staged is not None else None)
        self.save()
        self.ledger.save(self.folder / LEDGER)

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint ``state``, in one piece; what was there stands until then."""
        with files.staged(self.folder / STATE) as folder:
            torch.save(
                {
                    "agent": self.agent.state_dict(),
                    "stage": 0 if self.staged is None else self.staged.stage,
                    "frozen": self._frozen(),
                    "optimizer": self.optimizer.state_dict(),
                    "learner": self.learner.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "ledger": self.ledger.to_dict(),
                    "iteration": self.iteration,
                    "log": (self.folder / LOG).read_text(encoding="utf-8"),
                    "config": self.config.to_dict(),
                },
                folder / "state.pt",
            )
            files.install(folder, self.folder / STATE)

    def load(self) -> None:
        """Go on from the checkpoint of the folder.

        Raises:
            CheckpointError: it cannot be read, or is of other options.
        """
        path = self.folder / STATE / "state.pt"
        try:
            with files.reading(self.folder / STATE):
                state = torch.load(path, weights_only=True)
            config = state["config"]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
            raise CheckpointError(f"{path} is no checkpoint of this trainer ({error}): start anew") from None
        self._refuse_other(config)
        if self.staged is not None:
            for _ in range(state["stage"]):
                self.staged.advance()
        self.agent.load_state_dict(state["agent"])
        for task in state["frozen"]:
            self.agent.freeze_task(task)
        sync_optimizer(self.optimizer, self._groups())
        self.optimizer.load_state_dict(state["optimizer"])
        self.learner.load_state_dict(state["learner"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.ledger = Ledger.from_dict(state["ledger"])
        self.iteration = state["iteration"]
        files.replace_text(self.folder / LOG, state["log"])

    def _frozen(self) -> Sequence[str]:
        parts = self.agent.parts.named_children()
        return [name for name, part in parts if not any(p.requires_grad for p in part.parameters())]

    def _refuse_other(self, saved: Mapping[str, Any]) -> None:
        free = {"output_dir", "max_env_steps", "save_every"}
        now = self.config.to_dict()
        other = sorted(key for key in now if key not in free and now[key] != saved.get(key))
        if other:
            raise CheckpointError(
                f"{self.folder}: the checkpoint is of a run with other {', '.join(other)}: resume with the options it "
                f"was started with, {self.folder / CONFIG}"
            )
