"""How a sequence of tasks is learnt one after another: what each method does between tasks, and to the loss.

A method says which model a task begins with, what it is trained on, what is added to the loss, and which model answers
questions afterwards; all else is the same for all of them, so that they can be compared. See ``trainers/continual.py``.

Shapes: D in, r atoms of the newest task, Q of all older ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from .. import checkpoints
from ..config import MixtureConfig, Pluggable
from ..errors import ConfigError
from ..experts.rank1 import Rank1Experts
from ..experts.sparse_projection import stack_tasks
from ..mixture import MoELoRAModel, attach, put_on
from ..registry import Registry
from .penalised import Penalty

if TYPE_CHECKING:
    from ..data.example import Example
    from ..data.sequences import Task

Wants = Mapping[str, Mapping[str, Any]]

CONTINUAL_METHODS: Registry[Any] = Registry("continual-learning method", "moelora.trainers")


class MethodConfig(Pluggable):
    """Options of a method; these have none."""


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Method(Generic[ConfigT]):
    """One way to learn a sequence; without a line of its own it goes on training what the task before left.

    Attributes:
        continues: a task begins with the model that the task before left, else with a fresh one.
        wants: what every site of the mixture has to have, by part (``experts``, ``router``) and option.
        together: all tasks are learnt in one stage.
    """

    kind: ClassVar[str]
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    continues: ClassVar[bool] = True
    wants: ClassVar[Wants] = {}
    together: ClassVar[bool] = False

    def __init__(self, config: ConfigT, tasks: Sequence[Task], seed: int) -> None:
        self.config: ConfigT = config
        self.tasks = list(tasks)
        self.seed = seed

    @classmethod
    def check_mixture(cls, mixture: MixtureConfig) -> None:
        """See that the mixture has what the method works on.

        Raises:
            ConfigError: not so; the message says what to set.
        """
        for index, site in enumerate(mixture.sites):
            for part, wanted in cls.wants.items():
                found = getattr(site, part)
                for option, value in wanted.items():
                    has = getattr(found, option, None)
                    if has != value:
                        raise ConfigError(
                            f"trainer.method {cls.kind!r} needs {part}.{option} {value!r}, but mixture.sites.{index} "
                            f"has {has!r}: set mixture.sites.{index}.{part} to {dict(wanted)}, or take another method"
                        )

    def check(self) -> None:
        """See that the options fit the tasks.

        Raises:
            ConfigError: not so.
        """

    def stages(self) -> list[list[Task]]:
        """The tasks that are learnt in each stage."""
        return [self.tasks] if self.together else [[task] for task in self.tasks]

    def mixture(self, mixture: MixtureConfig, number: int) -> MixtureConfig:
        """The mixture of a fresh model that stage ``number``, counted from 1, begins with."""
        return mixture

    def begin_task(self, model: MoELoRAModel, number: int) -> None:
        """Prepare the model for stage ``number``, counted from 1, before its optimizer is made."""

    def examples(self, number: int) -> list[Example]:
        """What stage ``number`` is trained on; always the same."""
        return [example for task in self.stages()[number - 1] for example in task.train]

    def penalties(self, model: MoELoRAModel) -> Mapping[str, Penalty]:
        """What is added to the loss of an optimizer step."""
        return {}

    def end_task(self, model: MoELoRAModel, number: int) -> None:
        """What is left to do when stage ``number`` is trained, before its model is saved."""

    def learned(self, folders: Sequence[Path], backbone: PreTrainedModel) -> MoELoRAModel:
        """The model that has learnt all tasks so far, in evaluation mode.

        Args:
            folders: what each stage so far left. backbone: without experts.
        """
        return put_on(backbone, checkpoints.read(folders[-1]))

    def context(self, place: int) -> dict[str, Tensor]:
        """What routers are told of a question of the task at ``place`` of the order; in training it is the same."""
        return {"task_ids": torch.tensor([place])}


class Growing(Method[ConfigT]):
    """Each task has experts of its own in a bank that grows (kind ``rank1``); those of older tasks are frozen."""

    def begin_task(self, model: MoELoRAModel, number: int) -> None:
        if number > 1:
            model.begin_task()


@CONTINUAL_METHODS.register("moram")
class MoRAM(Growing[MethodConfig]):
    """Rank-1 atoms that choose themselves, among those of all tasks: arXiv 2506.21035, see ``routers/moram.py``."""

    wants: ClassVar[Wants] = {"experts": {"kind": "rank1", "num_experts": 1}, "router": {"kind": "moram"}}


@CONTINUAL_METHODS.register("sequential")
class Sequential(Method[MethodConfig]):
    """The same experts trained on, task after task: what forgetting is measured against. Takes any mixture."""


@CONTINUAL_METHODS.register("per_task")
class PerTask(Growing[MethodConfig]):
    """One LoRA for each task and an oracle that tells the task: nothing is forgotten, and nothing is shared.

    A task that was not learnt yet is answered by the frozen model.
    """

    wants: ClassVar[Wants] = {
        "experts": {"kind": "rank1", "num_experts": 1},
        "router": {"kind": "mask", "by": "task", "table": None},
    }


class ReplayConfig(MethodConfig):
    """Options of ``replay``.

    Attributes:
        budget: examples of older tasks that are kept, of all together; each task has the same share of it, so that the
            memory does not grow. A stage is trained on them and on its own examples, each once in an epoch.
    """

    kind: str = "replay"
    budget: Annotated[int, Field(gt=0)] = 100


@CONTINUAL_METHODS.register("replay")
class Replay(Method[ReplayConfig]):
    """The same experts trained on, with examples of older tasks mixed in. Takes any mixture.

    What is kept of a task is drawn once, and a part of it goes whenever another task comes in.
    """

    Config = ReplayConfig

    def check(self) -> None:
        if self.config.budget < len(self.tasks) - 1:
            raise ConfigError(
                f"trainer.method.budget is {self.config.budget}, but the last of {len(self.tasks)} tasks comes after "
                f"{len(self.tasks) - 1} others: keep at least one example of each"
            )

    def examples(self, number: int) -> list[Example]:
        older = self.tasks[: number - 1]
        kept: list[Example] = []
        for place, task in enumerate(older):
            share = self.config.budget // len(older) + (place < self.config.budget % len(older))
            drawn = list(task.train)
            random.Random(f"{self.seed} {task.name}").shuffle(drawn)  # noqa: S311 - not for cryptography
            kept += drawn[:share]
        return [*super().examples(number), *kept]


@CONTINUAL_METHODS.register("joint")
class Joint(Method[MethodConfig]):
    """All tasks at once, in as many steps as the sequence has: the upper bound. Takes any mixture."""

    together = True


class OLoRAConfig(MethodConfig):
    """Options of ``o_lora``; the defaults are those of a reimplementation for TRACE, not checked against the authors'.

    Attributes:
        orthogonal_coef: lambda_1, of the overlap of the newest ``lora_A`` with the older ones.
        norm_coef: lambda_2, of the norms of the newest factors.
    """

    kind: str = "o_lora"
    orthogonal_coef: Annotated[float, Field(ge=0)] = 0.5
    norm_coef: Annotated[float, Field(ge=0)] = 0.0


@CONTINUAL_METHODS.register("o_lora")
class OLoRA(Growing[OLoRAConfig]):
    """A LoRA for each task, kept orthogonal to the older ones, which are frozen; all are added up.

    Published (Wang et al. 2023, arXiv 2310.14152; code cmnfriend/O-LoRA): ``loss + lambda_1 * sum |A_old A_new^T| +
    lambda_2 * sum |p|_2`` over the newest factors p of all sites. The code appends finished factors to the old ones,
    which is the same sum.
    """

    Config = OLoRAConfig
    wants: ClassVar[Wants] = {
        "experts": {"kind": "rank1", "num_experts": 1},
        "router": {"kind": "static", "weights": "ones"},
    }

    def penalties(self, model: MoELoRAModel) -> Mapping[str, Penalty]:
        banks = [b for c in model.containers().values() for b in c.banks() if isinstance(b, Rank1Experts)]
        found: dict[str, Penalty] = {}
        overlaps = [
            (bank.old_lora_A.float() @ bank.lora_A.float().T).abs().sum()  # (Q, D) @ (D, r)
            for bank in banks
            if bank.old_lora_A is not None
        ]
        if self.config.orthogonal_coef and overlaps:
            found["orthogonal"] = Penalty(self.config.orthogonal_coef, _sum(overlaps))
        if self.config.norm_coef:
            norms = [p.float().norm() for bank in banks for p in (bank.lora_A, bank.lora_B)]
            found["norm"] = Penalty(self.config.norm_coef, _sum(norms))
        return found


@CONTINUAL_METHODS.register("loramoe")
class LoRAMoE(Method[MethodConfig]):
    """A dense mixture whose experts and router are trained on, task after task: see ``routers/softmax.py``.

    Dou et al. 2023 (arXiv 2312.09979) made it against forgetting what the backbone knew.
    """

    wants: ClassVar[Wants] = {"experts": {"kind": "lora"}, "router": {"kind": "softmax"}}


@CONTINUAL_METHODS.register("flylora")
class FlyLoRA(Method[MethodConfig]):
    """A FlyLoRA for each task, with a projection of its own, trained alone; then all are averaged.

    Zou et al. 2025 (arXiv 2510.08396, equation 12), whose tasks are nearly orthogonal by chance. Here each goes on
    routing by itself (:func:`~moelora.experts.sparse_projection.stack_tasks`), which the equation leaves out.
    """

    continues = False
    wants: ClassVar[Wants] = {"experts": {"kind": "sparse_projection"}, "router": {"kind": "flylora"}}

    def mixture(self, mixture: MixtureConfig, number: int) -> MixtureConfig:
        sites = []
        for site in mixture.sites:
            experts = {**site.experts.to_dict(), "task_seed": site.experts.task_seed + number - 1}
            sites.append({**site.to_dict(), "experts": experts})
        return MixtureConfig.parse({**mixture.to_dict(), "sites": sites})

    @classmethod
    def check_mixture(cls, mixture: MixtureConfig) -> None:
        super().check_mixture(mixture)
        if mixture.modules_to_save:
            raise ConfigError(
                f"trainer.method 'flylora' averages experts, and mixture.modules_to_save "
                f"({', '.join(mixture.modules_to_save)}) are trained whole: leave them out"
            )

    def learned(self, folders: Sequence[Path], backbone: PreTrainedModel) -> MoELoRAModel:
        states: list[list[dict[str, Tensor]]] = []
        for folder in folders:
            model = put_on(backbone, checkpoints.read(folder))
            mixture, states = model.mixture, [*states, _by_site(model)]
            model.unload()
        stacked = [stack_tasks(site, [state[index] for state in states]) for index, site in enumerate(mixture.sites)]
        merged = attach(backbone, MixtureConfig(sites=[site for site, _ in stacked]))
        merged.load_adapter_state({name: value for _, tensors in stacked for name, value in tensors.items()})
        merged.train(False)
        return merged


def _by_site(model: MoELoRAModel) -> list[dict[str, Tensor]]:
    """The tensors of each entry of ``mixture.sites``, by name."""
    state = model.adapter_state()
    found: list[dict[str, Tensor]] = [{} for _ in model.mixture.sites]
    for path, container in model.containers().items():
        found[container.group] |= {name: value for name, value in state.items() if name.startswith(f"{path}.")}
    return found


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values]).sum()
