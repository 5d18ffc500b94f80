"""``moelora eval``: score a checkpoint on a recipe's test data or lm-evaluation-harness; a reward model on rankings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import PreferenceData, SampledPreferenceData
from ..errors import ConfigError
from .common import (
    AsJson,
    Backbone,
    CacheDir,
    Checkpoint,
    LocalFilesOnly,
    Overrides,
    Quantization,
    Questions,
    RecipeOption,
    Revision,
    Subfolder,
    Token,
    hub_options,
    load_model,
    load_questions,
    print_json,
    print_lines,
    read_questions,
)
from .eval_asked import HarnessAsked, QuestionsAsked, Score
from .eval_rewards import (
    BestOf,
    Ensemble,
    GivenCategories,
    Out,
    Preferences,
    RewardOptions,
    Standardise,
    evaluate_rewards,
    preference_data,
)

if TYPE_CHECKING:
    from ..analysis import RoutingRecorder, RoutingStats
    from ..mixture import MoELoRAModel

HARNESS = "Tasks of lm-evaluation-harness (pip install 'moelora\\[eval]')"

ScoreOption = Annotated[
    Score,
    typer.Option(
        help="`generate`: the greedy answer, by the task's scorer. In one forward, so quicker: `exact`, whether the "
        "greedy answer is the reference, token for token; and for questions with options (data.columns.options) "
        "`options`, the most likely option, or `labels`, the most likely letter below a list of the options. "
        "Example: `moelora eval runs/arc --score options data.columns.options=choices`"
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many questions of each task, the first ones.")]
Routing = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the routing of each task, recorded meanwhile (routing.json, routing.csv), and for the scores "
        "(scores.json). Example: `moelora eval runs/quickstart --routing report`"
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks, groups or tags by name, or .yaml files, with commas between them. "
        "Example: `moelora eval runs/quickstart --tasks arc_easy,my_task.yaml --limit 100`",
        rich_help_panel=HARNESS,
    ),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Examples in each prompt, for tasks that leave it open. "
        "Example: `moelora eval runs/quickstart --tasks gsm8k --num-fewshot 5`",
        rich_help_panel=HARNESS,
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option(
        help="Folder of .yaml files whose tasks can be named. "
        "Example: `moelora eval runs/quickstart --tasks my_task --include-path my_tasks`",
        rich_help_panel=HARNESS,
    ),
]
ChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="Ask through the tokenizer's chat template.", rich_help_panel=HARNESS)
]


def evaluate(
    path: Checkpoint,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    score: ScoreOption = Score.GENERATE,
    baseline: Annotated[bool, typer.Option("--baseline", help="Score the bare backbone too, and compare.")] = False,
    limit: Limit = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest generated answer, in tokens.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions, or answers, of one batch.")] = 16,
    routing: Routing = None,
    tasks: Tasks = None,
    num_fewshot: NumFewshot = None,
    include_path: IncludePath = None,
    chat_template: ChatTemplate = False,
    preferences: Preferences = None,
    ensemble: Ensemble = None,
    standardise: Standardise = None,
    given_categories: GivenCategories = False,
    best_of: BestOf = None,
    out: Out = None,
    backbone: Backbone = None,
    quantization: Quantization = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint on test data by task, or on tasks of lm-evaluation-harness; a reward model on rankings.

    Example: `moelora eval runs/quickstart --baseline data.test_size=100`
    """
    hub = hub_options(revision, subfolder, token, cache_dir, local_files_only)
    rewards = RewardOptions(
        preferences is not None, recipe, ensemble or (), standardise, given_categories, best_of, out, limit, batch_size
    )
    scored = {f"--score {score}": score is not Score.GENERATE}
    asked: HarnessAsked | QuestionsAsked
    if tasks is not None:
        other: dict[str, Any] = (
            scored | rewards.given() | {"--recipe": recipe, "KEY=VALUE": overrides, "--preferences": preferences}
        )
        _refuse(other, "has no meaning with --tasks, which bring their own data and scores")
        asked = HarnessAsked(tasks, include_path, limit, num_fewshot, chat_template, batch_size)
    else:
        other = {"--num-fewshot": num_fewshot is not None, "--include-path": include_path}
        _refuse(other | {"--chat-template": chat_template}, "belongs to --tasks of lm-evaluation-harness: name some")
        questions = _questions(path, recipe, overrides, subfolder, preferences)
        if isinstance(questions.data, PreferenceData | SampledPreferenceData):
            _refuse(scored | {"--baseline": baseline, "--routing": routing}, "has no meaning for a reward model")
            load = partial(load_model, backbone=backbone, quantization=quantization)
            return evaluate_rewards(path, questions.data, rewards, load, hub, as_json)
        _refuse(rewards.given(), "is for reward models, and the data here are questions: name rankings: --preferences")
        asked = QuestionsAsked(load_questions(questions).test, score, limit, max_new_tokens, batch_size)
    _answer(path, load_model(path, backbone, quantization, hub), asked, baseline, routing, as_json)


def _questions(
    path: str, recipe: str | None, overrides: list[str] | None, subfolder: str | None, preferences: Path | None
) -> Questions:
    """What to ask: rankings in a file, or what the recipe says."""
    if preferences is None:
        return read_questions(path, recipe, overrides, subfolder)
    _refuse({"--recipe": recipe}, "has no meaning with --preferences, which says which data to use")
    return Questions(data=preference_data(preferences, overrides or ()))


def _answer(
    path: str,
    model: MoELoRAModel,
    asked: HarnessAsked | QuestionsAsked,
    baseline: bool,
    routing: Path | None,
    as_json: bool,
) -> None:
    recorder = None if routing is None else _recorder(model, asked.tasks, routing)
    asked.ask("mixture", model, recorder)
    if baseline:
        with model.disable_experts():
            asked.ask("backbone", model, None)
    result = {"path": path, **asked.result()}
    stats = None if recorder is None else recorder.result(path, f"{', '.join(asked.tasks)}, while evaluating")
    if stats is not None and routing is not None:
        result |= _write(stats, result, routing)
    if as_json:
        print_json(result)
        return
    asked.show()
    if stats is not None:
        _tell(stats, routing)


def _refuse(options: Mapping[str, Any], why: str) -> None:
    for name, given in options.items():
        if given:
            raise ConfigError(f"{name} {why}")


def _recorder(model: MoELoRAModel, tasks: list[str], folder: Path) -> RoutingRecorder:
    from ..evaluation.routing import recorder_for

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--routing {folder}: cannot be written to ({error.strerror}): name a folder") from None
    return recorder_for(model, tasks)


def _write(stats: RoutingStats, result: dict[str, Any], folder: Path) -> dict[str, Any]:
    from ..evaluation.routing import summary, write

    write(stats, folder)
    (folder / "scores.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return {"routing": summary(stats)}


def _tell(stats: RoutingStats, folder: Path | None) -> None:
    from ..analysis.findings import findings

    print_lines([*(f"{finding.level}: {finding.text}" for finding in findings(stats)), f"wrote {folder}/routing.json"])
