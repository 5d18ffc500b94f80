"""Processes that train together, started by torch's, accelerate's or DeepSpeed's own launcher; and what ended them."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from ..errors import TrainingError
from .launch_files import is_here

# How long processes that are told to stop have to do so, in seconds; then they are killed.
GRACE = 10
# What DeepSpeed's launcher says of a process that failed; pdsh puts the host in front.
DEEPSPEED_FAILURE = re.compile(r"^(?:(?P<host>[\w.-]+): )?.*exits with return code = (?P<code>-?\d+)")


@dataclass(frozen=True)
class Failure:
    """What ended a launch.

    Attributes:
        who: such as ``rank 3``. host: where it ran. code: its exit code, the negative of a signal that killed it.
    """

    who: str
    host: str
    code: int

    def __str__(self) -> str:
        if self.code >= 0:
            how = f"ended with exit code {self.code}; what it said is above"
        else:
            name = signal.Signals(-self.code).name if -self.code in list(signal.Signals) else "unknown"
            how = f"was killed by signal {-self.code} ({name})"
            if self.code == -signal.SIGKILL:
                how += ", as the system does when memory runs out"
        return f"{self.who} on {self.host} {how}"


def with_torch(words: Sequence[str], processes: int, machines: int, rendezvous: str | None) -> None:
    """Start ``moelora WORDS`` in so many processes on this machine, as torchrun does.

    Args:
        machines: how many run this same command. rendezvous: ``host:port`` where they meet.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes,
        run_id="moelora",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",
        max_restarts=0,
        shutdown_timeout=GRACE,
    )
    with _failures_told():
        elastic_launch(config, sys.executable)("-u", "-m", "moelora", *words)


def with_accelerate(words: Sequence[str], processes: int, config: Path) -> None:
    """Start ``moelora WORDS`` in so many processes on this machine, as ``accelerate launch --config_file`` does."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    options = ["--config_file", str(config), "--num_processes", str(processes), "--num_machines", "1", "--module"]
    with _failures_told():
        launch_command(launch_command_parser().parse_args([*options, "moelora", *words]))


def with_deepspeed(words: Sequence[str], hosts: dict[str, int], hostfile: Path, ssh: Callable[[], None]) -> None:
    """Start ``moelora WORDS`` on the hosts of a hostfile, as the command ``deepspeed`` does.

    Args:
        hosts: processes by host. ssh: raises where a host cannot be reached.
    """
    options = ["--hostfile", str(hostfile), "--num_nodes", str(len(hosts)), "--no_local_rank", "--module"]
    if len(set(hosts.values())) == 1:
        options += ["--num_gpus", str(next(iter(hosts.values())))]
    if len(hosts) == 1 and is_here(next(iter(hosts))):
        options += ["--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
    else:
        ssh()
        # DeepSpeed quotes what has blanks in it; a shell on the other machine reads the rest.
        words = [word if " " in word else shlex.quote(word) for word in words]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *options, "moelora", *words]
    failures: list[Failure] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as runner:  # noqa: S603
        assert runner.stdout is not None
        try:
            for line in runner.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                if match := DEEPSPEED_FAILURE.match(line):
                    failures.append(_of_deepspeed(hosts, match["host"], int(match["code"])))
        except KeyboardInterrupt:
            runner.send_signal(signal.SIGINT)
            runner.wait(3 * GRACE)
            raise typer.Exit(130) from None
    if runner.returncode:
        _end(failures or [Failure("DeepSpeed's launcher", socket.gethostname(), runner.returncode)])


def _of_deepspeed(hosts: dict[str, int], host: str | None, code: int) -> Failure:
    name = host if host in hosts else next(iter(hosts))
    start = sum(list(hosts.values())[: list(hosts).index(name)])
    count = hosts[name]
    who = f"rank {start}" if count == 1 else f"one of the ranks {start} to {start + count - 1}"
    return Failure(who, name, code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _failures_told() -> Iterator[None]:
    """Turn what torch's launcher raises into one message."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # It reports the same failure in three forms of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        yield
    except ChildFailedError as error:
        host = socket.gethostname()
        _end([Failure(f"rank {rank}", host, each.exitcode) for rank, each in error.failures.items()])
    except SignalException as error:
        raise typer.Exit(128 + int(error.sigval)) from None
    except subprocess.CalledProcessError as error:
        _end([Failure("rank 0", socket.gethostname(), error.returncode)])


def _end(failures: list[Failure]) -> None:
    """Say what ended the launch.

    Raises:
        TrainingError: a process was killed, or stopped by itself with an error of training.
        typer.Exit: all that failed did so for a mistake in what was given, which they have said.
    """
    # The launcher ends the others with SIGTERM, and some fail before that because the first no longer answers.
    own = [failure for failure in failures if failure.code != -signal.SIGTERM] or failures
    root = min(own, key=lambda failure: (failure.code >= 0, failure.code))
    if all(failure.code == 2 for failure in own):
        raise typer.Exit(2)
    others = len(own) - 1
    rest = f"; {others} more failed with it" if others else ""
    raise TrainingError(f"{root}{rest}. The launch has ended and every other process was stopped")
