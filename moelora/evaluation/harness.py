"""Tasks of lm-evaluation-harness (the extra ``eval``), run on a live mixture; the numbers are the harness' own.

Source: https://github.com/EleutherAI/lm-evaluation-harness, through its Python API.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import yaml

from ..errors import ConfigError, DataError, UserError
from ..registry import closest
from .scoring import Comparison, bootstrap, evaluating

if TYPE_CHECKING:
    from ..analysis import RoutingRecorder
    from ..mixture import MoELoRAModel

# What of the harness' results is kept; the rest describes the machine, or repeats the tasks' files.
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks that are ready to run.

    Attributes:
        names: of the single tasks, also those within groups.
        items: tasks and groups as lm_eval has them. manager: its ``TaskManager``.
    """

    names: list[str]
    items: list[Any]
    manager: Any


@dataclass(frozen=True)
class Metric:
    """One number of one task or group.

    Attributes:
        task, name: such as ``arc_easy`` and ``acc``. filter: what was done to the answers first, mostly ``none``.
        value, stderr: as the harness says; ``None`` where it has no number.
        shots: examples in the prompt. questions: how many were asked; both ``None`` for a group.
    """

    task: str
    name: str
    filter: str
    value: float | None
    stderr: float | None
    shots: int | None
    questions: int | None


@dataclass(frozen=True)
class HarnessReport:
    """What the harness found.

    Attributes:
        results: its own results, the parts named in ``KEPT``. samples: of each task, its records of single questions.
    """

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without single questions; a number that JSON does not have is ``None``."""
        plain: dict[str, Any] = _plain(self.results)
        return plain

    def metrics(self) -> list[Metric]:
        """Every number of every task, then of every group that has one of its own."""
        rows = []
        for task, values in {**self.results["results"], **self.results.get("groups", {})}.items():
            for key, value in values.items():
                name, comma, chosen = key.partition(",")
                if not comma or name.endswith("_stderr"):
                    continue
                asked = self.results["n-samples"].get(task, {}).get("effective")
                shots = self.results["n-shot"].get(task) if asked is not None else None
                stderr = values.get(f"{name}_stderr,{chosen}")
                rows.append(Metric(task, name, chosen, _number(value), _number(stderr), shots, asked))
        return rows


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> HarnessTasks:
    """Find tasks, and fetch their data.

    Args:
        names: tasks, groups and tags of the harness, or paths that end in ``.yaml``, whose folder may hold what the
            file includes. Relative paths within a file are those of the working folder, as in the harness.
        include_path: a folder of further YAML files, whose tasks can be named.

    Raises:
        UserError: the extra is not installed.
        ConfigError: an unknown name, a task that is given twice, a file that is no task, or a task that would run code
            which models write, or that asks about images.
        DataError: the data of a task cannot be read or fetched.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    if not names:
        raise ConfigError("no task is named: write --tasks arc_easy,hellaswag or --tasks my_task.yaml")
    files = {name: _read_task(name) for name in names if name.endswith((".yaml", ".yml"))}
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path {include_path}: no such folder")
    # To read the thousands of files that come with the harness takes seconds; a group may name any of them.
    defaults = not set(names) <= set(files) or any("group" in content for content in files.values())
    # So may a group's own file name those beside it. Beside a task may lie anything, so it is read by itself.
    folders = [str(Path(name).expanduser().parent) for name, content in files.items() if "group" in content]
    folders += [] if include_path is None else [str(include_path)]
    manager = TaskManager(include_path=[*folders], include_defaults=defaults)
    items: list[Any] = []
    found: dict[str, str] = {}
    for name in names:
        if name not in files and name not in manager.all_tasks:
            raise ConfigError(
                f"lm-evaluation-harness has no task {name!r}{closest(name, manager.all_tasks)}: `lm-eval ls tasks` "
                "lists those that it has; a task of your own is the path of a .yaml file, or a name in --include-path"
            )
        # By its path lm_eval 0.4.13 would call a group by the list of its tasks.
        loaded = _load(manager, files.get(name, {}).get("group", name))
        for task, made in loaded["tasks"].items():
            _check(task, made)
            if task in found:
                raise ConfigError(f"--tasks: {name!r} runs task {task!r}, which {found[task]!r} runs already: drop one")
            found[task] = name
        groups = list(loaded.get("groups", {}).values())
        items += groups[:1] or loaded["tasks"].values()
    return HarnessTasks(list(found), items, manager)


def run_tasks(
    model: MoELoRAModel,
    tasks: HarnessTasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int = 16,
    recorder: RoutingRecorder | None = None,
) -> HarnessReport:
    """Run tasks on a mixture with its tokenizer, in ``eval`` mode; sets the seeds of random, NumPy and torch.

    Args:
        limit: at most this many questions of each task, its first ones.
        num_fewshot: examples in each prompt, for tasks that do not fix a number of 0; ``None`` is the task's own.
        chat_template: write prompts with the tokenizer's chat template.
        recorder: counts the routing of each task; it knows their names. It changes no number.

    """
    from lm_eval import simple_evaluate

    from .lm_eval_model import MixtureLM

    with evaluating(model), recorder or nullcontext():
        results: Any = simple_evaluate(
            MixtureLM(model, batch_size, recorder),
            tasks=tasks.items,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            task_manager=tasks.manager,
        )
    return HarnessReport({name: results[name] for name in KEPT if name in results}, results["samples"])


def compare_samples(one: HarnessReport, other: HarnessReport) -> dict[tuple[str, str, str], Comparison]:
    """``one`` minus ``other``, question by question, with a bootstrap interval, by (task, metric, filter).

    Only metrics that are means of one number for each question have differences of questions.
    """
    found = {}
    for task, samples in one.samples.items():
        theirs = {(sample["doc_id"], sample["filter"]): sample for sample in other.samples[task]}
        pairs: dict[tuple[str, str, str], list[float]] = {}
        for sample in samples:
            twin = theirs[sample["doc_id"], sample["filter"]]
            for name in sample["metrics"]:
                first, second = _number(sample[name]), _number(twin[name])
                if first is not None and second is not None:
                    pairs.setdefault((task, name, sample["filter"]), []).append(first - second)
        found.update({key: bootstrap([differences]) for key, differences in pairs.items()})
    return found


def require_lm_eval() -> None:
    """Raise a :class:`~moelora.errors.UserError` that names the extra to install, where lm_eval is missing."""
    try:
        import_module("lm_eval")
    except ImportError as error:
        raise UserError(
            f"tasks are run by lm-evaluation-harness, which is not installed ({error}): pip install 'moelora[eval]'"
        ) from None


def _read_task(path: str) -> dict[str, Any]:
    """The content of a task's file, its includes merged, its functions unresolved."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not Path(path).expanduser().is_file():
        raise ConfigError(f"--tasks {path}: no such file")
    try:
        content: dict[str, Any] = load_yaml(path, resolve_func=False)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--tasks {path}: cannot be read as a task: {_line(error)}") from None
    if not content.keys() & {"task", "group"}:
        raise ConfigError(
            f"--tasks {path}: a task's file has a key `task` with its name (or `group`), but the keys are "
            f"{', '.join(map(str, content))}"
        )
    return content


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"task {name!r}: its data cannot be had: {_line(error)}; the harness fetches it from the hub once and "
            "keeps it, so run it once with a connection, or write a task (.yaml) that reads local files: dataset_path: "
            "json, dataset_kwargs: {data_files: {test: my.jsonl}}"
        ) from error
    # A task's file may say anything, and what lm_eval raises for it is as varied.
    except Exception as error:
        raise ConfigError(f"task {name!r} cannot be made: {type(error).__name__}: {_line(error)}") from error


def _check(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"task {name!r} runs code that the model writes, which is not done here: use lm-eval itself")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name!r} asks about images or sounds, and only text is asked here: use lm-eval itself")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _number(value: Any) -> float | None:
    """A finite number, or ``None`` for text such as N/A and for what is no number."""
    if isinstance(value, bool | int | float) or hasattr(value, "__float__"):
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    return _number(value)
