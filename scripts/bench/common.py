"""What the benchmarks share: interleaved rounds, ratios with their spread, memory kept for backward, table and JSON.

All variants of a comparison run in turn in one process, and each round begins with another one: a machine that other
work slows down slows them all, so the ratios of a round hold where its times do not.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles over rounds of one variant's time divided by another's in the same round."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, own: Sequence[float], other: Sequence[float]) -> Ratio:
        low, middle, high = statistics.quantiles([a / b for a, b in zip(own, other, strict=True)], n=4)
        return cls(middle, low, high)

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}–{self.high:.2f})"


def make_parser(text: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``text`` is what ``--help`` says first."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds, at least 2 (%(default)s)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: seconds of this process alone, for one thread on a machine that has other work (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there as JSON as well")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, check it, and set the number of threads."""
    args = parser.parse_args()
    if args.rounds < 2 or args.threads < 1:
        parser.error("--rounds takes 2 or more, --threads 1 or more")
    if args.clock == "cpu" and args.threads > 1:
        parser.error("--clock cpu adds up the seconds of all threads: it takes --threads 1")
    torch.set_num_threads(args.threads)
    return args


def interleave(
    runs: Mapping[str, Callable[[], object]], args: argparse.Namespace, description: str, console: Console
) -> dict[str, list[float]]:
    """Seconds of every run in every round, after one run of each that does not count.

    Args:
        args: from :func:`parse`.
    """
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    for run in runs.values():
        run()
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    for number in track(range(args.rounds), description=description, console=console, transient=True):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    gc.enable()
    return times


def step(module: nn.Module, x: Tensor, d_out: Tensor) -> Tensor:
    """Forward and backward; gradients of the last step are dropped first, as an optimizer does."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    out: Tensor = module(x)
    out.backward(d_out)
    return out


def kept_for_backward(module: nn.Module, x: Tensor) -> float:
    """MiB that the forward pass keeps for the backward pass, weights not counted, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


def worst_difference(found: Sequence[Tensor], expected: Sequence[Tensor], limit: float = 1e-4) -> float:
    """Largest difference among pairs of tensors, relative to the largest entry of each.

    Raises:
        AssertionError: it exceeds ``limit``: implementations that disagree are not worth timing.
    """
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    assert worst < limit, f"the implementations disagree by {worst:.1e}: do not trust their times"
    return worst


def report(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    args: argparse.Namespace,
    results: Sequence[Any],
) -> None:
    """Print a table, its words to the left and its figures to the right; write ``results`` where --json says.

    Args:
        results: dataclasses, or what JSON can hold.
    """
    table = Table(title=f"{title}; {args.threads} threads, {args.rounds} rounds, {args.clock} time")
    for index, heading in enumerate(headings):
        words = not rows or not any(mark.isdigit() for mark in rows[0][index][:1])
        table.add_column(heading, justify="left" if words else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if args.json is not None:
        plain = [asdict(result) if is_dataclass(result) else result for result in results]  # type: ignore[arg-type]
        content = {
            "threads": args.threads,
            "rounds": args.rounds,
            "clock": args.clock,
            "torch": torch.__version__,
            "results": plain,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def print_peak(step: Callable[[], None]) -> None:
    """Run two steps, and print the most memory that this process held, MiB."""
    step()
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peaks(script: str, names: Sequence[str], args: argparse.Namespace) -> dict[str, float]:
    """What :func:`print_peak` says of each variant, each in a process of its own: ``script`` with ``--child NAME``."""
    common = ["--shape", args.shape, "--tokens", str(args.tokens), "--threads", str(args.threads)]
    if args.layers is not None:
        common += ["--layers", str(args.layers)]
    found = {}
    for name in names:
        command = [sys.executable, script, *common, "--child", name]
        found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found
