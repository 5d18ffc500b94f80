"""Give moelora and PEFT the damaged checkpoints of tests/checkpoints/corpus.py, and count what becomes of them.

    python scripts/hostile.py

Each is loaded in a process of its own, which is killed after ``--limit`` seconds. PEFT gets the folder with the
``adapter_config.json``. Of what is accepted, the logits are compared with those of the same checkpoint without damage;
where a library does not read a layout at all, it should refuse the damaged one too.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import moelora
from moelora.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "checkpoints"))
import corpus

OUTCOMES = [
    "refused in plain words",
    "refused by an error of its insides",
    "accepted, the same numbers",
    "accepted, other numbers",
    "accepted, numbers that are not finite",
    "still busy at the limit",
    "ran code of the file",
]


def by_moelora(folder: Path, layout: str) -> Any:
    """The mixture."""
    return moelora.from_pretrained(folder, corpus.tiny(corpus.FORMS[layout].family))


def by_peft(folder: Path, layout: str) -> Any:
    """The PeftModel."""
    from peft import PeftModel

    form = corpus.FORMS[layout]
    model = corpus.tiny(form.family)
    if layout == "peft_xlora":
        model.config.use_cache = False
        os.chdir(folder)  # its configuration names adapters relative to the checkpoint
    return PeftModel.from_pretrained(model, folder / Path(form.config).parent)


LOADERS: dict[str, Callable[[Path, str], Any]] = {"moelora": by_moelora, "PEFT": by_peft}


def logits_of(library: str, folder: Path, layout: str) -> torch.Tensor:
    """The logits of a loaded checkpoint, and an error if it cannot be loaded."""
    model = LOADERS[library](folder, layout).eval()
    kinds = {"task_types": torch.tensor([1])} if library == "moelora" else {}
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9).view(1, 8), **kinds).logits


def attempt(library: str, folder: Path, layout: str, whole: torch.Tensor | None, answers: Any) -> None:
    """In a process of its own: what became of one checkpoint."""
    os.chdir(folder.parent)
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of this process
    try:
        logits = logits_of(library, folder, layout)
    except UserError:
        answers.put(0)
    except Exception as error:
        # PEFT has no error of its own for a user's file: a ValueError with its name is as plain as it gets.
        answers.put(0 if type(error) is ValueError and str(folder) in str(error) else 1)
    else:
        same = whole is not None and torch.equal(logits, whole)
        answers.put(4 if not torch.isfinite(logits).all() else 2 if same else 3)


def outcome(library: str, folder: Path, layout: str, whole: torch.Tensor | None, limit: float) -> str:
    """The outcome of one checkpoint, by name."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=attempt, args=(library, folder, layout, whole, answers))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return OUTCOMES[5]
    if (folder.parent / "canary").exists() or (folder / "canary").exists():
        return OUTCOMES[6]
    return OUTCOMES[answers.get()] if not answers.empty() else f"died with {process.exitcode}"


def main(limit: Annotated[float, typer.Option(help="Seconds for one checkpoint.")] = 10.0) -> None:
    """Count what moelora and PEFT make of two hundred damaged checkpoints."""
    torch.set_num_threads(1)
    cases = list(corpus.cases())
    counts: dict[str, Counter[str]] = {library: Counter() for library in LOADERS}
    slowest = dict.fromkeys(LOADERS, 0.0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        wholes: dict[tuple[str, str], torch.Tensor | None] = {}
        for layout in corpus.FORMS:
            corpus.write(layout, root / "whole" / layout)
            for library in LOADERS:
                wholes[library, layout] = _whole(library, root / "whole" / layout, layout)
        for index, (layout, damage) in enumerate(track(cases, description="checkpoints")):
            for library in LOADERS:
                folder = root / str(index) / library / "checkpoint"
                shutil.copytree(root / "whole" / layout, folder)
                corpus.damage(folder, layout, damage)
                began = time.monotonic()
                found = outcome(library, folder, layout, wholes[library, layout], limit)
                slowest[library] = max(slowest[library], time.monotonic() - began)
                counts[library][found] += 1
                if library == "moelora" and found != OUTCOMES[0]:
                    typer.echo(f"moelora: {layout} {damage}: {found}")
    read = {library: sum(wholes[library, layout] is not None for layout in corpus.FORMS) for library in LOADERS}
    typer.echo(f"\n| {len(cases)} damaged checkpoints | {' | '.join(LOADERS)} |\n| --- | ---: | ---: |")
    typer.echo("| layouts read without damage | " + " | ".join(str(read[library]) for library in LOADERS) + " |")
    for found in dict.fromkeys([*OUTCOMES, *(key for each in counts.values() for key in each)]):
        typer.echo(f"| {found} | " + " | ".join(str(counts[library][found]) for library in LOADERS) + " |")
    typer.echo("| slowest, s | " + " | ".join(f"{slowest[library]:.1f}" for library in LOADERS) + " |")


def _whole(library: str, folder: Path, layout: str) -> torch.Tensor | None:
    """The logits without damage; ``None`` where the library does not read the layout."""
    here = Path.cwd()
    try:
        return logits_of(library, folder, layout)
    except Exception:
        return None
    finally:
        os.chdir(here)


if __name__ == "__main__":
    typer.run(main)
