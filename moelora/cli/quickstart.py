"""``moelora quickstart``: a mixture trained, compared, saved, reloaded and shown on a real 4-bit backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import print_json, stdout

if TYPE_CHECKING:
    from ..config import DatasetData


def quickstart(
    minutes: Annotated[float, typer.Option(min=1.0, help="About how long it may take in all.")] = 10.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Train for so many steps, however long they take, to repeat a run.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="A hub id, a folder or a .gguf file instead of SmolLM2-135M-Instruct.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Storage of the frozen backbone: nf4, int8, bf16, fp16 or fp32.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Your own data: a .jsonl, .json, .csv or .parquet file, or a hub id.")
    ] = None,
    prompt_column: Annotated[str, typer.Option(help="Column of the questions in `--data`.")] = "prompt",
    answer_column: Annotated[str, typer.Option(help="Column of the answers in `--data`.")] = "answer",
    task_column: Annotated[str | None, typer.Option(help="Column of the task names in `--data`, if any.")] = None,
    output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of data, initial weights and batches.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Only reload the checkpoint of an earlier run in this folder and check it.")
    ] = None,
) -> None:
    """Train MixLoRA and plain LoRA on the same data, compare them, and open up the routing.

    Everything is real: SmolLM2-135M-Instruct in 4 bit, six procedural tasks with their own scorers, and held-out
    questions. Writes the checkpoint, its card, metrics and a routing report, reloads the checkpoint in a new process
    and compares the numbers.

    Example: `moelora quickstart --minutes 10`
    """
    from .. import quickstart as library
    from ..config import BackboneConfig

    if check is not None:
        result = library.check(check)
        print_json(result)
        raise typer.Exit(0 if result["agrees"] else 1)
    settings = library.Settings(
        minutes=minutes,
        steps=steps,
        backbone=backbone,
        quantization=None
        if quantization is None
        else BackboneConfig.parse({"quantization": quantization}).quantization,
        data=_own_data(data, prompt_column, answer_column, task_column, seed),
        output=output,
        seed=seed,
        threads=threads,
    )
    library.run(settings, stdout())


def _own_data(
    path: str | None, prompt_column: str, answer_column: str, task_column: str | None, seed: int
) -> DatasetData | None:
    if path is None:
        return None
    from ..config import DatasetData

    columns = {"prompt": prompt_column, "answer": answer_column, "task": task_column}
    return DatasetData.parse({"path": path, "columns": columns, "seed": seed}, where="--data")
