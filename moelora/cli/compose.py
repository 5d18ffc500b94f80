"""``moelora compose``: one mixture, or one merged LoRA, out of finished LoRA adapters."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import apply_overrides
from ..errors import ConfigError
from .common import AsJson, Backbone, Quantization, print_json, stderr, stdout

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="LORA|KEY=VALUE",
        help="Adapters, folders or hub ids; then changes such as `router.top_k=2`, `experts.dropout=0.1`, "
        "`trainer.args.per_device_train_batch_size=8`, `search.shots=10`, `merge.rank=8`.",
    ),
]
RouterName = Annotated[
    str | None,
    typer.Option(
        help="What chooses among the adapters: arrow (the default, needs no training), static, task, meteora, xlora, "
        "topk, phatgoose, or any other of `moelora zoo list` that weighs experts."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(help="Weights for all tokens: `0.7,0.4`, `uniform`, or `learned` from `--data`. Router static."),
]
General = Annotated[
    list[str] | None,
    typer.Option(help="An adapter whose knowledge is taken off the others; may be given several times."),
]
TaskColumn = Annotated[
    str | None, typer.Option(help="Column of `--data` with each row's task, named as the adapter that it belongs to.")
]


def compose(
    context: typer.Context,
    words: Words,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DST", help="Folder to write: new, or empty.")],
    router: RouterName = None,
    names: Annotated[
        str | None, typer.Option(help="Names of the adapters, `math,code`; else those of folders.")
    ] = None,
    weights: Weights = None,
    general: General = None,
    subtract: Annotated[str, typer.Option(help="How `--general` is taken off: exact, or peft_factors.")] = "exact",
    data: Annotated[str | None, typer.Option(help="Train on this file (.jsonl, .csv, ...) or hub id.")] = None,
    task_column: TaskColumn = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; by default the router's card's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="By default the router's card's.")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Search the weights on a few examples of `--data`, without gradients.")
    ] = False,
    merge: Annotated[
        str | None, typer.Option(help="Make one LoRA for PEFT instead, by this method: cat, svd, linear, ties, lego...")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first weights, of training and of the search.")] = 0,
    backbone: Backbone = None,
    quantization: Quantization = None,
    as_json: AsJson = False,
) -> None:
    """Compose finished LoRA adapters into one mixture with a router over them.

    Ranks, scales and modules of the adapters may differ, and they stay as they are. The folder gets a card that names
    them. Go on with `moelora generate`, `moelora eval` or `moelora export`.

    Example: `moelora compose loras/math loras/code --backbone auto -o runs/both`

    With training: `moelora compose loras/math loras/code --router meteora --data mixed.jsonl --task-column task
    --steps 500 --backbone auto -o runs/both`

    One LoRA: `moelora compose loras/math loras/code --merge svd merge.rank=16 -o loras/both`
    """
    from ..composition.run import Settings, run

    adapters = [word for word in words if "=" not in word or Path(word).exists()]
    start: dict[str, Any] = {
        "adapters": adapters,
        "output": str(output),
        "names": None if names is None else names.split(","),
        "weights": None if weights is None else _weights(weights),
        "general": general or [],
        "subtract": subtract,
        "router": None if router is None else {"kind": router},
        "backbone": backbone,
        "quantization": quantization,
        "search": {} if search else None,
        "merge": None if merge is None else {"method": merge},
        "seed": seed,
        "command": _command(context),
    }
    training = {"max_steps": steps, "learning_rate": learning_rate}
    if any(value is not None for value in training.values()):
        start["trainer"] = {"args": {name: value for name, value in training.items() if value is not None}}
    if data is not None:
        start["data"] = {"kind": "dataset", "path": data, "columns": {"task": task_column}}
    changes = [word for word in words if word not in adapters]
    settings = Settings.parse(apply_overrides(_open(start, changes), changes), where="moelora compose")
    with _bars() as tell:
        result = run(settings, tell)
    text = result.pop("text")
    if as_json:
        print_json(result)
    else:
        stdout().print(text, highlight=False, markup=False, soft_wrap=True)


def _open(start: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """``start`` with a mapping where a change names a key of one that was not given."""
    for change in changes:
        key, dot, _ = change.partition("=")[0].partition(".")
        if dot and start.get(key) is None:
            start[key] = {}
    return start


def _weights(text: str) -> list[float] | str:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        if text in ("uniform", "learned"):
            return text
        raise ConfigError(f"--weights {text!r}: expected numbers such as '0.7,0.4', 'uniform' or 'learned'") from None


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error for each kind of work; gone when it is done, since training brings its own."""
    from rich.progress import Progress

    bars: dict[str, Progress] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in bars and done < total:
            bars[what] = Progress(console=stderr(), transient=True)
            bars[what].start()
            bars[what].add_task(what, total=total)
        elif what in bars:
            bars[what].update(bars[what].task_ids[0], completed=done)
        if what in bars and done >= total:
            bars.pop(what).stop()

    try:
        yield tell
    finally:
        for bar in bars.values():
            bar.stop()


def _command(context: typer.Context) -> str:
    """The command as the user could have written it."""
    words = ["moelora", "compose"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.param_type_name == "argument":
            words += value or []
        elif value is True:
            words.append(parameter.opts[0])
        elif value not in (None, False, parameter.default) and parameter.name != "as_json":
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(each)]
    return shlex.join(words)
