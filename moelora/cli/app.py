"""The ``moelora`` command.

Exit codes: 0 done, 1 a bug of ours, 2 a mistake in what was given, 3 a training run that had to stop, 130 interrupted.
Verbs import torch and transformers when they run, so that help and completion stay quick.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import TrainingError, UserError
from .analyze import analyze
from .common import stderr
from .compose import compose
from .convert import ListsLayouts, convert
from .env import env
from .eval import evaluate
from .export import export
from .generate import generate
from .info import info
from .label import label
from .launch import launch
from .quickstart import quickstart
from .schema import schema
from .train import train
from .zoo import zoo

app = typer.Typer(
    name="moelora",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Mixtures of LoRA experts on one frozen backbone: train, load, inspect and convert them.",
    epilog="Start with `moelora quickstart`; every verb has its own `--help` with an example.",
)

app.command()(quickstart)
app.command()(train)
app.command()(launch)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(analyze)
app.command()(info)
app.command()(label)
app.command(cls=ListsLayouts)(convert)
app.command()(compose)
app.command()(export)
app.command()(schema)
app.command()(env)
app.add_typer(zoo, name="zoo")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of every error; may stand anywhere in the command.")
    ] = False,
) -> None:
    pass


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        args: the words after ``moelora``; those of the process by default.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words or os.environ.get("MOELORA_DEBUG") == "1"
    # How long OpenMP threads spin at the end of a parallel region before they sleep, read when torch is imported. GNU's
    # default slows training several times on a machine that does anything else; not to spin at all (OMP_WAIT_POLICY
    # PASSIVE) slows it by a fifth to a third on an idle one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    _log_to_stderr(logging.DEBUG if debug else logging.INFO)
    try:
        app(args=[word for word in words if word != "--debug"], prog_name="moelora")
    except (UserError, TrainingError) as error:
        if debug:
            traceback.print_exc()
        _say(str(error))
        sys.exit(3 if isinstance(error, TrainingError) else 2)
    except Exception:
        traceback.print_exc()
        _say("this is a bug in moelora; please report it with the output of `moelora env`")
        sys.exit(1)


def _say(message: str) -> None:
    from rich.text import Text

    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    # At once: several processes may write to one terminal.
    begin = "error:" if rank is None else f"error (rank {rank}):"
    stderr().print(Text.assemble((begin, "bold red"), " ", message), highlight=False, soft_wrap=True)


def _log_to_stderr(level: int) -> None:
    from rich.logging import RichHandler

    handler: Any = RichHandler(console=stderr(), show_time=False, show_path=False, show_level=level == logging.DEBUG)
    logger = logging.getLogger("moelora")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    # It recommends an optional package each time it is imported.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
