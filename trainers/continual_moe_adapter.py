"""MoE-Adapters: experts shared by all tasks, a router for each, and what a task used most is frozen when it is over."""

from __future__ import annotations

from typing import ClassVar

from ..config import SiteConfig
from ..experts.freezing import FreezingExperts
from ..mixture import MoELoRAModel
from ..routers.moe_adapter import MoEAdapterConfig, MoEAdapterRouter
from .continual_methods import CONTINUAL_METHODS, Method, MethodConfig, Wants


@CONTINUAL_METHODS.register("moe_adapter")
class MoEAdapter(Method[MethodConfig]):
    """Experts of all tasks, a router for each task, and an oracle that tells the task.

    Yu et al. 2024 (arXiv 2403.11549; JiazuoYu/MoE-Adapters4CL). When a task is over, the ``top_k`` experts that its
    tokens chose most often in training are frozen at each site, beside those that were frozen before; later tasks go
    on using them. Experts that an older task used less often are trained on, so that it may forget.

    The code counts as this does, over all training steps and with the noise of the gate, for each layer of each
    encoder; frozen experts count too, so a task may freeze none. See ``routers/moe_adapter.py`` for what differs and
    for the oracle, which stands for the authors' autoencoders: a task that was not learnt yet is answered by the frozen
    model. The counts are saved with the model and read when the next task begins, so that the last task freezes
    nothing. Sites with one router in common count together.
    """

    wants: ClassVar[Wants] = {
        "experts": {"kind": "freezing"},
        "router": {"kind": "moe_adapter", "num_tasks": 1, "frozen_tasks": 0},
    }

    def begin_task(self, model: MoELoRAModel, number: int) -> None:
        if number > 1:
            freeze_and_add(model)


def freeze_and_add(model: MoELoRAModel) -> None:
    """Freeze the experts that the task just learnt used most, and add a router for the next one.

    Parameters are replaced, so make a new optimizer, or a new Trainer, afterwards. The configuration follows, and the
    model is saved and loaded as any other.

    Args:
        model: experts of kind ``freezing`` and routers of kind ``moe_adapter`` at every site.
    """
    sites = list(model.mixture.sites)
    routers: dict[MoEAdapterRouter, MoEAdapterConfig] = {}  # one that sites share gets one task more
    for group, containers in model.groups().items():
        frozen: dict[str, list[int]] = {}
        for container in containers:
            router = container.router
            assert isinstance(router, MoEAdapterRouter)
            frozen[container.site.path] = sorted({*container.config.experts.frozen, *router.most_used()})
            routers[router] = config = router.config.next_task()
        site = sites[group]
        sites[group] = SiteConfig.parse({**site.to_dict(), "experts": site.experts.freezing(frozen), "router": config})
    for container in model.containers().values():
        container.config = sites[container.group].at(container.site.path)
        for bank in container.banks():
            assert isinstance(bank, FreezingExperts)
            bank.freeze(container.config.experts)
    for router, config in routers.items():
        router.begin_task(config)
    model.mixture = model.mixture.model_copy(update={"sites": sites})
