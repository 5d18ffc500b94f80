"""``moelora launch``: run a recipe on several processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, TrainingError
from .common import AsJson, Overrides
from .train import BackboneShape, DryRun, RecipeArgument, Resume, Sequence, data_of, dry_run_of

if TYPE_CHECKING:
    from ..config import Recipe

MACHINES = "Several machines"


def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on each machine; by default one for each of its GPUs.")
    ] = None,
    deepspeed: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="DeepSpeed configuration: zero0 to zero3, zero3_offload, or a file."),
    ] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Start through accelerate with its configuration: ddp, fsdp2, or a file."
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the processors, over gloo.")] = False,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="DeepSpeed hostfile: start on all of its machines over ssh.", rich_help_panel=MACHINES),
    ] = None,
    num_machines: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a hostfile, how many; without one, how many run this same command and meet at --rendezvous.",
            rich_help_panel=MACHINES,
        ),
    ] = None,
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="One of the machines, and a free port on it.", rich_help_panel=MACHINES),
    ] = None,
    resume: Resume = None,
    sequence: Sequence = None,
    dry_run: DryRun = False,
    backbone_config: BackboneShape = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe on several processes, of one machine or of many: the numbers of `moelora train`.

    Example: `moelora launch recipe.yaml --num-processes 8 --deepspeed zero2`,
    or `moelora launch moram --sequence reasoning-gym-8 --num-processes 8`
    """
    from ..config import load_recipe

    words = [*data_of(sequence), *(overrides or ())]
    if deepspeed is not None:
        from .launch_files import deepspeed_config

        words.append(f"trainer.args.deepspeed={json.dumps(deepspeed_config(deepspeed))}")
    if cpu:
        words.append("trainer.args.use_cpu=true")
    loaded = load_recipe(recipe, words)
    _refuse_combinations(accelerate, deepspeed, hostfile, num_machines, rendezvous)
    hosts = _hosts(hostfile, num_machines, num_processes)
    if dry_run:
        world = sum(hosts.values()) if hosts else (num_processes or _gpus() or 1) * (num_machines or 1)
        dry_run_of(loaded, world, backbone_config, as_json)
        return
    command = ["train", recipe, *words, *(["--resume", resume] if resume else [])]
    try:
        _start(command, loaded, hosts, hostfile, num_processes, num_machines, rendezvous, accelerate)
    except TrainingError as error:
        raise TrainingError(f"{error}. {_how_to_go_on(loaded)}") from None


def _hosts(hostfile: Path | None, machines: int | None, processes: int | None) -> dict[str, int]:
    if hostfile is None:
        return {}
    _need_deepspeed()
    from .launch_files import read_hosts

    return read_hosts(hostfile, machines, processes)


def _need_deepspeed() -> None:
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise ConfigError("this needs the package deepspeed, which is not installed: pip install 'moelora[deepspeed]'")


def _refuse_combinations(
    accelerate: str | None,
    deepspeed: str | None,
    hostfile: Path | None,
    machines: int | None,
    rendezvous: str | None,
) -> None:
    if deepspeed is not None:
        _need_deepspeed()
    if accelerate is not None and (hostfile is not None or machines or rendezvous):
        raise ConfigError("--accelerate starts the processes of this machine: leave out --hostfile and --num-machines")
    if hostfile is not None and rendezvous is not None:
        raise ConfigError("--hostfile says where the processes are: leave out --rendezvous")
    if hostfile is None and (machines or 1) > 1 and rendezvous is None:
        raise ConfigError(
            f"--num-machines is {machines}: say with --hostfile which they are, or run this command on each of them "
            "with the same --rendezvous HOST:PORT"
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _processes_here(loaded: Recipe, asked: int | None) -> int:
    """How many processes to start on this machine.

    Raises:
        ConfigError: more than it has GPUs; without any, where the recipe does not allow the CPU.
    """
    if loaded.trainer.args.get("use_cpu"):
        return asked or 1
    gpus = _gpus()
    if (asked or gpus or 1) > gpus:
        raise ConfigError(
            f"--num-processes is {asked or 1}, one for each GPU, and this machine has {gpus or 'none'}: run this where "
            f"there are {asked or 'any'}, add machines with --hostfile, or add --cpu to train on the processors"
        )
    return asked or gpus


def _start(
    command: list[str],
    loaded: Recipe,
    hosts: dict[str, int],
    hostfile: Path | None,
    processes: int | None,
    machines: int | None,
    rendezvous: str | None,
    accelerate: str | None,
) -> None:
    from . import launchers
    from .launch_files import find_config, is_here, refuse_unreachable

    # As torchrun: every process would otherwise start a thread for each core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hostfile is not None:
        here = [count for host, count in hosts.items() if is_here(host)]
        if here:
            _processes_here(loaded, here[0])
        launchers.with_deepspeed(command, hosts, hostfile, lambda: refuse_unreachable(hosts))
        return
    count = _processes_here(loaded, processes)
    if accelerate is not None:
        launchers.with_accelerate(command, count, find_config(accelerate, "accelerate"))
    else:
        launchers.with_torch(command, count, machines or 1, rendezvous)


def _how_to_go_on(loaded: Recipe) -> str:
    from ..checkpoints import latest

    newest: Any = latest(loaded.output_dir)
    if newest is None:
        return f"There is no whole checkpoint in {loaded.output_dir} yet: give the same command again"
    return f"{newest} is whole: give the same command with --resume latest to go on from there"
