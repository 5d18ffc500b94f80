"""Which parameters an optimizer gets, in which groups, with which learning rates and weight decays.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): the second factor of an update, which starts at zero, learns best with a
larger learning rate than the first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from ..mixture import MoELoRAModel
from ..schema import Closed


class GroupOptions(Closed):
    """What single groups of parameters are given in place of the Trainer's ``learning_rate`` and ``weight_decay``.

    Attributes:
        router_learning_rate: of the routers; ``None`` means ``args.learning_rate``.
        router_weight_decay: of the routers; ``None`` means ``args.weight_decay``.
        lora_plus_ratio: the learning rate of every ``lora_B`` over that of its ``lora_A``; LoRA+ proposes 16.
    """

    router_learning_rate: Annotated[float, Field(gt=0)] | None = None
    router_weight_decay: Annotated[float, Field(ge=0)] | None = None
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0


@dataclass(frozen=True)
class FactorPair:
    """The two factors of the stacked updates of one projection, as an optimizer that treats them together needs them.

    Attributes:
        name: ``<site>``, or ``<site>.<projection>`` in a block. lora_A: (R, D). lora_B: (O, R).
        ranks: of the experts that are stacked on R.
    """

    name: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    ranks: tuple[int, ...]


def factor_pairs(model: MoELoRAModel) -> list[FactorPair]:
    """The pairs of which a factor is trained, in the order of the backbone's modules."""
    return [
        FactorPair(bank.name, bank.lora_A, bank.lora_B, bank.ranks)
        for container in model.containers().values()
        for bank in container.banks()
        if bank.lora_A.requires_grad or bank.lora_B.requires_grad
    ]


def parameter_groups(
    model: MoELoRAModel, decaying: Collection[str], learning_rate: float, weight_decay: float, options: GroupOptions
) -> list[dict[str, Any]]:
    """The trained parameters of the adapter in the groups ``experts``, ``lora_B``, ``routers`` and ``modules``.

    ``lora_B`` is apart from ``experts`` only under LoRA+. What does not decay has a group of its own with
    ``.no_decay`` after the name. Empty groups are left out.

    Args:
        decaying: names of the model's parameters that decay; see ``Trainer.get_decay_parameter_names``.
    """
    kinds = _kinds(model, options.lora_plus_ratio != 1)
    rates = {"lora_B": learning_rate * options.lora_plus_ratio}
    decays = {}
    if options.router_learning_rate is not None:
        rates["routers"] = options.router_learning_rate
    if options.router_weight_decay is not None:
        decays["routers"] = options.router_weight_decay
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = kinds[id(parameter)]
        decay = decays.get(kind, weight_decay) if name in decaying else 0.0
        key = kind if name in decaying else f"{kind}.no_decay"
        new = {"name": key, "params": [], "lr": rates.get(kind, learning_rate), "weight_decay": decay}
        groups.setdefault(key, new)["params"].append(parameter)
    return list(groups.values())


def learning_rates(optimizer: torch.optim.Optimizer | Any) -> dict[str, float]:
    """``lr/<group>`` of the groups that have a name; those that decay and those that do not have one rate."""
    named = {str(group["name"]).removesuffix(".no_decay"): group for group in optimizer.param_groups if "name" in group}
    return {f"lr/{name}": float(group["lr"]) for name, group in named.items()}


def sync_optimizer(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Let an optimizer go on with the parameters that are trained now, as after ``model.begin_task()``.

    What is trained no longer leaves its group and takes its moments with it; new parameters come into the group of
    their name, or with one of their own (``add_param_group``), without moments; all others keep theirs. A learning-rate
    scheduler has to be made anew where there are other groups than before.

    Args:
        optimizer: whose groups have names, as those of :func:`parameter_groups` do. groups: those of the model as it is
            now; the options of a group that goes on stay what they are.
    """
    before = {group.get("name"): group for group in optimizer.param_groups}
    for group in groups:
        if group["name"] in before:
            before[group["name"]]["params"] = list(group["params"])
        else:
            optimizer.add_param_group(dict(group))
    names = {group["name"] for group in groups}
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group.get("name") in names]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter in [parameter for parameter in optimizer.state if id(parameter) not in held]:
        del optimizer.state[parameter]


def _kinds(model: MoELoRAModel, apart: bool) -> dict[int, str]:
    """The kind of every parameter of the adapter, by its identity."""
    kinds = {id(tensor): "experts" for tensor in model.adapter_tensors().values()}
    for container in model.containers().values():
        if container.router is not None:
            kinds |= {id(parameter): "routers" for parameter in container.router.parameters()}
    for module in model.saved_modules().values():
        kinds |= {id(parameter): "modules" for parameter in module.trained.parameters()}
    if apart:
        kinds |= {id(pair.lora_B): "lora_B" for pair in factor_pairs(model)}
    return kinds
