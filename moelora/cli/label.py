"""``moelora label``: capability labels from a language model that compares replies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ..errors import ConfigError, UserError
from .common import AsJson, print_json, print_lines, print_table, stderr

if TYPE_CHECKING:
    from ..data.preferences import Ranking
    from ..judging import JudgeConfig, Labels
    from ..judging.labelling import Survey

ASKING = "How the judge is asked"
SPENDING = "What it may cost"

Source = Annotated[
    Path, typer.Argument(metavar="PREFERENCES.jsonl", help="Rankings with the field `category`, a JSON row each.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="How the file is read, such as `data.columns.category=kind`."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the rankings go, with the labels added.")]
CategoriesOption = Annotated[
    str,
    typer.Option(help="`dmoerm`, the five of that paper, or a .yaml or .json file of category to points and meanings."),
]
ModelOption = Annotated[str, typer.Option("--model", help="The judge, by the name that the server knows.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="OPENAI_BASE_URL",
        help="An OpenAI-compatible server, such as http://localhost:8000/v1; by default OpenAI's own.",
    ),
]
KeyEnv = Annotated[
    str, typer.Option(help="The environment variable that holds the key; a server that needs none is asked without.")
]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="Where answers are kept, for good; OUTPUT.answers.sqlite by default.")
]
Sampling = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        rich_help_panel=ASKING,
        help="A parameter of the request, once or more; `null` leaves it out. By default temperature=0 and "
        "max_tokens=32: a judge that thinks first needs more, and some servers say max_completion_tokens.",
    ),
]
Concurrency = Annotated[int, typer.Option(min=1, rich_help_panel=ASKING, help="Questions under way at once.")]
Timeout = Annotated[float, typer.Option(min=0.1, rich_help_panel=ASKING, help="Seconds to wait for an answer.")]
Retries = Annotated[
    int, typer.Option(min=0, rich_help_panel=ASKING, help="How often a question is sent again after a fault.")
]
AskAgain = Annotated[
    int,
    typer.Option(min=0, rich_help_panel=ASKING, help="How often an answer that cannot be read is asked for again."),
]
PairsPerRow = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=SPENDING, help="At most this many pairs of a ranking; else all.")
]
MaxQuestions = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=SPENDING, help="End after this many answers; run again to go on.")
]
PriceIn = Annotated[float, typer.Option(min=0, rich_help_panel=SPENDING, help="Price of a million tokens sent.")]
PriceOut = Annotated[float, typer.Option(min=0, rich_help_panel=SPENDING, help="Price of a million tokens received.")]
MaxCost = Annotated[
    float | None,
    typer.Option(min=0, rich_help_panel=SPENDING, help="End before a question that might take the cost above this."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", rich_help_panel=SPENDING, help="Ask nothing: say what there is to ask.")
]


def label(
    source: Source,
    output: Output,
    model: ModelOption,
    overrides: Overrides = None,
    categories: CategoriesOption = "dmoerm",
    base_url: BaseUrl = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    cache: CacheOption = None,
    sampling: Sampling = None,
    concurrency: Concurrency = 4,
    timeout: Timeout = 60.0,
    retries: Retries = 6,
    ask_again: AskAgain = 2,
    pairs_per_row: PairsPerRow = None,
    max_questions: MaxQuestions = None,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    max_cost: MaxCost = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Let a language model say which reply is better on each point of its category (pip install 'moelora\\[judge]').

    Each pair is asked about twice, with the order swapped, and kept where both answers agree. Answers are kept on disk:
    run the same command again to go on where it ended. Replies that argue with the judge may win it over: see to it
    that those under comparison gain nothing by that.

    Example: `moelora label pairs.jsonl -o labelled.jsonl --model NAME --base-url http://localhost:8000/v1`
    """
    from ..judging import JudgeConfig, Limits, Prices
    from ..reward.categories import load_categories

    address = {} if base_url is None else {"base_url": base_url}
    manner = {"concurrency": concurrency, "timeout": timeout, "retries": retries, "ask_again": ask_again}
    asked = {"model": model, "key_env": key_env, "sampling": _sampling(sampling or []), **manner, **address}
    config = JudgeConfig.parse(asked, where="moelora label")
    limits, prices = Limits(questions=max_questions, cost=max_cost), Prices(input=price_in, output=price_out)
    if max_cost is not None and (config.output_limit is None or not price_in + price_out):
        raise ConfigError("--max-cost needs --price-in, --price-out and a longest answer (--sampling max_tokens=...)")
    points = load_categories(categories)
    rankings = _read(source, output, overrides or [])
    options = {"pairs_per_row": pairs_per_row, "prices": prices}
    kept_at = cache or output.with_name(f"{output.name}.answers.sqlite")
    if dry_run:
        _dry_run(rankings, points, config, kept_at, options, as_json)
    else:
        _label(rankings, points, config, kept_at, options | {"limits": limits}, output, as_json)


def _sampling(words: list[str]) -> dict[str, Any]:
    from ..judging import JudgeConfig

    values = dict(JudgeConfig(model="any").sampling)
    for word in words:
        name, equals, text = word.partition("=")
        try:
            values[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            equals = ""
        if not equals or not name.strip():
            raise ConfigError(f"--sampling {word!r}: expected KEY=VALUE, such as max_tokens=2000")
    return {name: value for name, value in values.items() if value is not None}


def _read(source: Path, output: Path, overrides: list[str]) -> list[Ranking]:
    from ..config import PreferenceData, apply_overrides
    from ..data.preferences import read_rankings

    if output.exists() and source.exists() and output.samefile(source):
        raise ConfigError(f"--output {output} is the file that is read: name another one")
    given = {"data": {"kind": "preferences", "path": str(source), "test_fraction": 0.0}}
    data = PreferenceData.parse(apply_overrides(given, overrides)["data"], where="data")
    return read_rankings(data)[0]


def _write(output: Path, rankings: list[Ranking]) -> None:
    """Whole or not at all: a run that goes on writes over what an earlier one has left."""
    from ..data.preferences import write_rankings

    unfinished = output.with_name(f".{output.name}.unfinished")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_rankings(unfinished, rankings)
        os.replace(unfinished, output)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written ({error.strerror}): name another file") from None


def _dry_run(
    rankings: list[Ranking], points: Any, config: JudgeConfig, cache: Path, options: dict[str, Any], as_json: bool
) -> None:
    from ..judging import survey
    from ..judging.cache import AnswerCache

    answers = AnswerCache(cache, config.model, config.sampling, read_only=True)
    try:
        found = survey(rankings, points, config, answers, **options)
    finally:
        answers.close()
    if as_json:
        print_json(vars(found))
    else:
        print_lines(_plan_lines(found, options["prices"].input + options["prices"].output > 0))


def _plan_lines(found: Survey, priced: bool) -> list[str]:
    out = "" if found.tokens_out is None else f", and at most {found.tokens_out:,} tokens back"
    lines = [
        f"{found.pairs:,} pairs, {found.questions:,} questions, {found.open:,} of them without an answer yet",
        f"about {found.tokens_in:,} tokens to send (four bytes a token){out}; unreadable answers take more",
    ]
    if priced:
        lines.append(f"cost: about {found.cost:,.4g}")
    if found.skipped:
        lines.append(f"{found.skipped:,} rankings have no category and are left as they are")
    return lines


def _label(
    rankings: list[Ranking],
    points: Any,
    config: JudgeConfig,
    cache: Path,
    options: dict[str, Any],
    output: Path,
    as_json: bool,
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..judging import label as judge
    from ..judging import survey
    from ..judging.cache import AnswerCache

    answers = AnswerCache(cache, config.model, config.sampling)
    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        found = survey(
            rankings, points, config, answers, pairs_per_row=options["pairs_per_row"], prices=options["prices"]
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("Asking", total=found.open)

            def progress(spent: Any) -> None:
                text = f"Asking ({spent.tokens_in:,} + {spent.tokens_out:,} tokens)"
                bar.update(task, advance=1, description=text)

            labels = judge(rankings, points, config, answers, progress=progress, **options)
    finally:
        answers.close()
    _write(output, labels.rankings)
    if as_json:
        print_json({"output": str(output), "cache": str(cache), **summary(labels)})
    else:
        _show(labels, output)
    _complain(labels, cache, as_json)


def summary(labels: Labels) -> dict[str, Any]:
    """The report of a run as plain JSON types."""
    rows = [
        {"category": category, "point": point, "pairs": tally.asked, **vars(tally)}
        for (category, point), tally in labels.tallies.items()
    ]
    total = {"pairs": labels.total.asked, **vars(labels.total)}
    bias = {"position_bias": labels.position_bias, "both_first": labels.both_first, "both_second": labels.both_second}
    other = {"skipped": labels.skipped, "cut_off": labels.cut_off, "spent": vars(labels.spent)}
    return {"points": rows, "total": total, **bias, **other}


def _show(labels: Labels, output: Path) -> None:
    from ..judging.labelling import added

    rows = []
    for category in dict.fromkeys(category for category, _ in labels.tallies):
        points = {point: tally for (each, point), tally in labels.tallies.items() if each == category}
        rows += [[category, *_counts(added(points.values()))]]
        rows += [[f"  {point}", *_counts(tally)] for point, tally in points.items()]
    columns = ["pairs of replies", "asked", "kept", "inconsistent", "undecided", "unread", "open"]
    print_table("Capability labels", columns, [*rows, ["all", *_counts(labels.total)]])
    spent, bias = labels.spent, labels.position_bias
    lines = []
    if bias is not None:
        lines.append(
            f"position bias {bias:+.2f} (-1 always the second, +1 always the first): the first reply twice in "
            f"{labels.both_first:,} pairs, the second twice in {labels.both_second:,}"
        )
    uncounted = f" ({spent.uncounted:,} answers came without their number)" if spent.uncounted else ""
    lines.append(
        f"{spent.answers:,} answers in this run, {spent.retried:,} retries; {spent.tokens_in:,} tokens sent, "
        f"{spent.tokens_out:,} received{uncounted}" + (f"; cost {spent.cost:,.4g}" if spent.cost else "")
    )
    if labels.cut_off:
        lines.append(
            f"{labels.cut_off:,} unreadable answers were cut off: allow longer ones, as with --sampling max_tokens=2000"
        )
    if labels.skipped:
        lines.append(f"{labels.skipped:,} rankings have no category and are left as they are")
    print_lines([*lines, f"wrote {output}"])


def _counts(tally: Any) -> list[str]:
    numbers = (tally.asked, tally.kept, tally.inconsistent, tally.undecided, tally.unreadable, tally.open)
    return [f"{number:,}" for number in numbers]


def _complain(labels: Labels, cache: Path, as_json: bool) -> None:
    """Say what is left to ask; faults of the server are an error, since the labels are not what was asked for."""
    spent = labels.spent
    again = f"{labels.total.open:,} pairs are left; the answers are in {cache}: run the same command again to go on"
    if spent.failures or spent.faulty:
        reasons = [f"{count} x {reason}" for reason, count in spent.failures.items()]
        if spent.stopped and spent.stopped not in spent.failures:
            reasons.append(spent.stopped)
        raise UserError(f"{'; '.join(reasons)}; {again}")
    if spent.stopped and not as_json:
        print_lines([f"{spent.stopped}; {again}"])
