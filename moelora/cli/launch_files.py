"""The configurations that ship for launching, and hostfiles: found, read and checked before any process starts."""

from __future__ import annotations

import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..config import cards_folder, read_mapping
from ..errors import ConfigError, UserError
from ..registry import closest

SSH_TIMEOUT = 5  # seconds


def shipped(folder: str) -> dict[str, Path]:
    """The files of ``scripts/<folder>`` by their names without an ending, in a checkout and in a wheel."""
    files = (cards_folder().resolve().parent / "scripts" / folder).iterdir()
    return {path.stem: path for path in sorted(files) if path.suffix in (".json", ".yaml")}


def find_config(given: str, folder: str) -> Path:
    """The file that ``given`` names: one that ships, such as ``zero2``, or a path.

    Raises:
        ConfigError: it is neither; the message lists what ships and the closest name.
    """
    known = shipped(folder)
    if given in known:
        return known[given]
    if Path(given).is_file():
        return Path(given)
    raise ConfigError(
        f"--{folder} {given!r} is neither a file nor a configuration that ships: those are {', '.join(known)}"
        f"{closest(given, list(known))}"
    )


def deepspeed_config(given: str) -> dict[str, Any]:
    """The DeepSpeed configuration that ``given`` names.

    Raises:
        ConfigError: there is none, it is not JSON, or it says nothing of ZeRO.
    """
    path = find_config(given, "deepspeed")
    values = read_mapping(path)
    if not isinstance(values.get("zero_optimization"), dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration says its stage in 'zero_optimization', which is missing")
    return values


def read_hosts(path: Path, machines: int | None, processes: int | None) -> dict[str, int]:
    """Processes by host, in the order of a hostfile.

    Args:
        machines: take the first so many hosts. processes: start so many on each, in place of its slots.

    Raises:
        ConfigError: no such file, a line that is not ``NAME slots=N``, fewer hosts, or fewer slots than asked for.
    """
    if not path.is_file():
        raise ConfigError(
            f"--hostfile {path}: no such file; it has one line for each machine, such as 'worker-1 slots=8'"
        )
    from deepspeed.launcher.runner import fetch_hostfile

    try:
        hosts = dict(fetch_hostfile(str(path)))
    except ValueError as error:
        raise ConfigError(f"--hostfile {path}: {error}; a line reads 'worker-1 slots=8'") from None
    if machines is not None and machines > len(hosts):
        raise ConfigError(f"--num-machines is {machines}, but {path} names {len(hosts)}: {', '.join(hosts)}")
    hosts = dict(list(hosts.items())[:machines])
    for host, slots in hosts.items():
        if processes is not None and processes > slots:
            raise ConfigError(f"--num-processes is {processes}, but {path} gives {host} slots={slots}")
    return {host: processes or slots for host, slots in hosts.items()}


def is_here(host: str) -> bool:
    """Whether a host of a hostfile is this machine."""
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def refuse_unreachable(hosts: dict[str, int]) -> None:
    """Ask every host for an answer over ssh, all at once.

    Raises:
        UserError: names those that do not answer, and what ssh says; or ssh or pdsh is missing here.
    """
    if shutil.which("ssh") is not None:
        with ThreadPoolExecutor(max_workers=32) as pool:
            answers = dict(zip(hosts, pool.map(_ask, hosts), strict=True))
        if silent := {host: answer for host, answer in answers.items() if answer is not None}:
            raise UserError(
                "; ".join(f"host {host!r} cannot be reached: {answer}" for host, answer in silent.items())
                + f". `ssh {next(iter(silent))} true` has to work here without a password; or take the line out of the "
                "hostfile"
            )
    if missing := [name for name in ("ssh", "pdsh") if shutil.which(name) is None]:
        raise UserError(
            f"starting processes on {len(hosts)} machines needs {' and '.join(missing)}, which this one lacks (try "
            "apt install pdsh openssh-client); or run the command on every machine with --num-machines and --rendezvous"
        )


def _ask(host: str) -> str | None:
    """What ssh says where a host does not answer."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT}", "--", host, "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3 * SSH_TIMEOUT, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"no answer within {3 * SSH_TIMEOUT} s"
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"ssh ended with {done.returncode}"
