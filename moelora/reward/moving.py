"""Which of a reward model's numbers a phase moves: rows of the stacked experts, and small modules.

All experts of a site are one parameter, so the gradient of those that stay is set to zero before an optimizer sees it;
with no weight decay an optimizer that has just been made then leaves them as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import TrainingError
from .model import RewardModel


@contextmanager
def only(model: RewardModel, views: Collection[str], modules: Collection[str]) -> Iterator[None]:
    """Within the block gradients reach the own experts of these views, and these small modules, and nothing else.

    Args:
        modules: names of parts, such as ``heads.general`` or ``aggregators.math``; what lies in them is meant.

    Raises:
        TrainingError: at the end, something else is not what it was. Parameters that are spread over processes are not
            compared.
    """
    experts = {view.own for view in model.reward.views if view.name in views} - {None}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    hooks = []
    for parameter in before:
        parameter.requires_grad_(False)
    for name, parameter in model.parts.named_parameters():
        parameter.requires_grad_(any(name == module or name.startswith(f"{module}.") for module in modules))
    for container in model.containers().values() if experts else ():
        for bank in container.banks():
            rows = torch.tensor([e in experts for e, rank in enumerate(bank.ranks) for _ in range(rank)])
            for parameter, axis in ((bank.lora_A, 0), (bank.lora_B, 1)):
                parameter.requires_grad_(True)
                hooks.append(parameter.register_hook(_keeping(rows, axis)))
    still = dict(_still(model, experts))
    try:
        yield
        _compare(still, dict(_still(model, experts)))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, trained in before.items():
            parameter.requires_grad_(trained)


def _keeping(rows: Tensor, axis: int) -> Callable[[Tensor], Tensor]:
    """A hook that lets the gradient of these ranks through."""
    others = ~(rows.unsqueeze(1) if axis == 0 else rows.unsqueeze(0))

    def hook(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(others.to(gradient.device), 0.0)

    return hook


def _still(model: RewardModel, experts: Collection[int | None]) -> Iterator[tuple[str, Tensor]]:
    """Copies of what is not to move, of the adapter's tensors that lie whole in this process."""
    banks = {id(p): bank for c in model.containers().values() for bank in c.banks() for p in (bank.lora_A, bank.lora_B)}
    for name, tensor in model.adapter_tensors().items():
        if hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping") or hasattr(tensor, "placements"):
            continue
        if not tensor.requires_grad:
            yield name, tensor.detach().cpu().clone()
        elif id(tensor) in banks:
            bank = banks[id(tensor)]
            axis = 0 if tensor is bank.lora_A else 1
            for expert, part in enumerate(tensor.detach().split(list(bank.ranks), dim=axis)):
                if expert not in experts:
                    yield f"{name}, expert {expert}", part.cpu().clone()


def _compare(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    moved = [name for name, value in before.items() if name in after and not torch.equal(value, after[name])]
    if moved:
        raise TrainingError(
            f"{len(moved)} tensors moved that this phase leaves as they are, such as {moved[0]}: an optimizer that "
            "changes parameters without a gradient (weight decay) cannot be used here"
        )
