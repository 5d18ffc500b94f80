"""What a model answers on the tasks of a sequence, kept in a file task by task, so that a killed evaluation goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from .. import files
from ..analysis import RoutingRecorder, RoutingStats, SiteStats
from ..data.example import Example
from ..errors import CheckpointError
from ..evaluation.labels import score_options, teacher_forced_match
from ..evaluation.scoring import generate_answers
from ..evaluation.task_metrics import TASK_METRICS
from ..mixture import MoELoRAModel

if TYPE_CHECKING:
    from ..data.sequences import Task

ItemT = TypeVar("ItemT")
FoundT = TypeVar("FoundT")

FILE = "scores.json"
# Of an answer, where neither the recipe nor the task says how many.
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Answering:
    """How questions are answered: at most so many tokens each (``None``: as the task says), so many at once."""

    max_new_tokens: int | None
    batch_size: int

    def score(self, model: MoELoRAModel, tokenizer: Any, task: Task) -> list[float]:
        """The score of each test question of a task, 0 to 1."""
        return score_task(model, tokenizer, task, self)


class ForcedAnswering(Answering):
    """A question is answered right where greedy decoding would write the reference: one pass for each question."""

    def score(self, model: MoELoRAModel, tokenizer: Any, task: Task) -> list[float]:
        size = self.batch_size
        return shared(task.test, lambda asked: teacher_forced_match(model, tokenizer, asked, size).items)


class Scores:
    """The scores of one model in ``scores.json``: ``{"tasks": {name: {"score": mean, "items": [...]}}}``.

    That the file is there, were it empty of tasks, says that the model it is about lies beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def exists(self) -> bool:
        return self.path.exists()

    def read(self) -> dict[str, list[float]]:
        """The score of each question, 0 to 1, by task.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            tasks = json.loads(self.path.read_text(encoding="utf-8"))["tasks"]
            return {name: [float(item) for item in task["items"]] for name, task in tasks.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{self.path} holds no scores of tasks: evaluate again without the file") from None

    def write(self, items: dict[str, list[float]]) -> None:
        """All scores so far, in one piece; by one process alone."""
        if PartialState().is_main_process:
            tasks = {name: {"score": mean(values), "items": values} for name, values in items.items()}
            write_json(self.path, {"tasks": tasks})
        PartialState().wait_for_everyone()

    def complete(
        self, model: MoELoRAModel, tokenizer: Any, tasks: Sequence[Task], method: Any, answering: Answering
    ) -> dict[str, list[float]]:
        """Answer the tasks that are not in the file yet, and write each down; all scores, by task."""
        items = self.read()
        for place, task in enumerate(tasks):
            if task.name not in items:
                recorder = RoutingRecorder(model)
                with model.routing_context(**method.context(place)), recorder:
                    items[task.name] = answering.score(model, tokenizer, task)
                if model.groups() and model.slot.enabled and PartialState().is_main_process:
                    write_json(routing_file(self.path.parent, task.name), recorder.result().to_dict())
                self.write(items)
        return items


def routing_file(folder: Path, task: str) -> Path:
    """Where the routing of a task's test questions is kept: of those that the first process answered."""
    return folder / "routing" / f"{task}.json"


def read_routing(folder: Path, tasks: Sequence[str]) -> RoutingStats | None:
    """The routing of all tasks in one; ``None`` where the mixture has no router."""
    stored = [routing_file(folder, task) for task in tasks]
    if not all(file.exists() for file in stored):
        return None
    parts = [RoutingStats.from_json(file) for file in stored]
    shares = [part.tokens / sum(part.tokens for part in parts) for part in parts]
    sites = []
    for alike in zip(*(part.sites for part in parts), strict=True):
        changes: dict[str, Any] = {
            "selections": tuple(row for site in alike for row in site.selections),
            "tokens": tuple(count for site in alike for count in site.tokens),
            "entropy": sum(share * site.entropy for share, site in zip(shares, alike, strict=True)),
            "margin": sum(share * site.margin for share, site in zip(shares, alike, strict=True)),
        }
        sites.append(SiteStats(**{**dict(alike[0]), **changes}))
    return RoutingStats(model=parts[0].model, tasks=tuple(tasks), sites=tuple(sites))


def score_task(model: MoELoRAModel, tokenizer: Any, task: Task, answering: Answering) -> list[float]:
    """The score of each test question of a task by its metric, 0 to 1.

    Answers are the likeliest of the task's classes where it has any, else greedy; the processes of a run share the
    questions.
    """
    answers = shared(task.test, lambda asked: _answers(model, tokenizer, task, asked, answering))
    return TASK_METRICS[task.metric](answers, list(task.test))


def shared(asked: Sequence[ItemT], answer: Callable[[list[ItemT]], Sequence[FoundT]]) -> list[FoundT]:
    """What ``answer`` finds for each item; the processes of a run share them, and all have all of it."""
    state = PartialState()
    own = list(range(len(asked)))[state.process_index :: state.num_processes]
    found = answer([asked[index] for index in own]) if own else []
    by_index = dict(gather_object(list(zip(own, found, strict=True))))
    return [by_index[index] for index in range(len(asked))]


def _answers(model: MoELoRAModel, tokenizer: Any, task: Task, asked: list[Example], answering: Answering) -> list[str]:
    if task.classes:
        offered = [replace(example, choices=task.classes) for example in asked]
        return score_options(model, tokenizer, offered, batch_size=answering.batch_size).total.answers
    tokens = answering.max_new_tokens or task.max_new_tokens or MAX_NEW_TOKENS
    return generate_answers(model, tokenizer, asked, max_new_tokens=tokens, batch_size=answering.batch_size)


def mean(values: Sequence[float]) -> float:
    """The mean of at least one number."""
    return sum(values) / len(values)


def write_json(path: Path, value: Any) -> None:
    """A file that is there whole or not at all."""
    files.replace_text(path, json.dumps(value) + "\n")
