"""Adapters whose parameters lie on several processes, under DeepSpeed's ZeRO and torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import CheckpointError, ConfigError
from ..experts.container import Container
from ..mixture import MoELoRAModel


def whole_state(model: MoELoRAModel) -> dict[str, Tensor]:
    """The adapter's tensors in one piece, on the CPU, by the model's parameter names; every process has to call this.

    Where ZeRO trains a copy in float32 of a parameter in half precision, it is the copy. No parameter of the backbone
    is gathered.
    """
    adapter = {id(tensor) for tensor in model.adapter_tensors().values()}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: _whole(tensor) for name, tensor in named if id(tensor) in adapter}


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of all of a parameter, of which this process may hold a part."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@torch.no_grad()
def fill(model: MoELoRAModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy an adapter's tensors into the model, whatever it is spread over; every process has to call this.

    Args:
        tensors: whole ones, by their names in ``model.adapter_tensors()``.
    """
    for name, target in model.adapter_tensors().items():
        value = tensors[name].to(target.device)
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
        elif hasattr(target, "ds_id") or hasattr(target, "_hp_mapping"):
            _fill_zero(target, value)
        else:
            target.copy_(value)


def _fill_zero(target: Tensor, value: Tensor) -> None:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    with GatheredParameters([target], modifier_rank=0, enabled=hasattr(target, "ds_id")):
        target.copy_(value)
    if target.requires_grad:
        safe_set_full_fp32_param(target, value)


@contextmanager
def optimizer_state_only(engine: Any) -> Iterator[None]:
    """Within the block a DeepSpeed engine saves no weights beside the state of its optimizer."""
    save, weights = engine.save_checkpoint, engine.module_state_dict
    engine.save_checkpoint = partial(save, exclude_frozen_parameters=True)
    engine.module_state_dict = lambda **options: {}
    try:
        yield
    finally:
        engine.save_checkpoint, engine.module_state_dict = save, weights


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach().cpu()
    if not hasattr(tensor, "ds_id") and not hasattr(tensor, "_hp_mapping"):
        return tensor.detach().cpu()
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    try:
        master = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
    except KeyError:  # ZeRO-3 does not know it: it stayed as it was in this run, and may move in another
        master = None
    if master is not None:
        found: Tensor = master.detach().view(whole_shape(tensor)).to("cpu", torch.float32)
        return found
    with GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
        return tensor.detach().cpu().clone()


def gather_with_containers(model: MoELoRAModel) -> None:
    """Let ZeRO-3 gather all parameters below a container before its forward and its backward.

    So it does for those that the model uses itself, such as the heads of a reward model.

    A container uses those of its bank and its router itself, without calling their modules. They are not made one leaf
    of ZeRO-3: it would take their gradients for complete as soon as that of the container's input is, which is too
    early for a first layer, whose input has none, and for a router that looks at a detached input. No process waits for
    an expert without tokens either way, since all experts of a bank are one parameter.

    Raises:
        ConfigError: a router looks at the whole model first, outside of its container.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for container in (module for module in model.modules() if isinstance(module, Container)):
        if container.router is not None and container.router.needs_scoring:
            raise ConfigError(
                f"router {container.router.kind!r} reads the whole model before its sites run, which ZeRO-3 has not "
                "gathered then: take ZeRO stage 2"
            )
        for parameter in container.parameters():
            register_external_parameter(container, parameter)
    for parameter in model.used_outside():
        register_external_parameter(model, parameter)


@contextmanager
def scalars_as_rows(model: nn.Module) -> Iterator[None]:
    """Give frozen parameters without an axis one for a while, and take it off again.

    DeepSpeed looks at every parameter as bytes when it sends them to all processes, and a tensor without an axis, such
    as the ``logit_scale`` of CLIP, cannot be looked at so.
    """
    scalars = [parameter for parameter in model.parameters() if parameter.dim() == 0 and not parameter.requires_grad]
    for parameter in scalars:
        parameter.data = parameter.data.view(1)
    try:
        yield
    finally:
        for parameter in scalars:
            parameter.data = parameter.data.view(())


def refuse_foreign_state(folder: Path, run_dir: Path, processes: int) -> None:
    """Raise where a checkpoint's DeepSpeed state cannot be, or should not be, loaded.

    Raises:
        CheckpointError: it was saved by another number of processes; or it lies outside the run's folder: DeepSpeed
            unpickles it, which runs what the file says.
    """
    if folder.resolve().parent != run_dir.resolve():
        raise CheckpointError(
            f"{folder}: its DeepSpeed state is pickled, and loading it runs whatever it holds; if this run wrote it, "
            f"move it to {run_dir} and resume from there; the mixture itself can be loaded from anywhere"
        )
    states = list(folder.glob("global_step*/*zero_pp_rank_*_mp_rank_*_optim_states.pt"))
    if states and len(states) != processes:
        raise CheckpointError(
            f"{folder}: saved by {len(states)} processes, resumed with {processes}: the optimizer's state is split by "
            f"process; resume with {len(states)}, or train on from the weights alone with a fresh optimizer"
        )


def process_lost(error: RuntimeError) -> bool:
    """Whether an error says that another process of the run is gone; gloo has no class of its own for that."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
