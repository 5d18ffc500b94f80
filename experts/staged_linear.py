"""Stages on the linears of any module, which is trained from scratch in stage 0.

The stages are the expert kind ``staged``, see ``staged.py``; what is here puts them on linears that train themselves,
and moves all of them from stage to stage together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SiteConfig
from ..dispatch.linear import Gate
from ..errors import CheckpointError, ConfigError, UserError
from ..sites import match_sites, refuse_idle_patterns, refuse_twins
from .staged import StagedConfig, StagedExperts, showing

# The names of LightZero's CurriculumLoRALinear, which has the parameters of all stages itself.
_THEIRS = re.compile(r"adapters\.(\d+)\.lora_([AB])|adapter_scales\.(\d+)\.logit|base_weight_scale\.logit")


class StagedLinear(nn.Linear):
    """A linear that trains in stage 0; from stage 1 on it is frozen, and stages are made as they begin.

    ``load_state_dict`` enters the stage of what it reads; a layer of another stage gets new parameters, so make the
    optimizer afterwards. It reads LightZero's layers, of both branches, as well. Those do not say their stage: taken is
    the last whose ``lora_B`` is not zero, and the scales at the ends of older stages are not known.

    Attributes:
        config: of stage 1. name: where the linear sits, for messages. stages: ``None`` in stage 0.
    """

    stages: StagedExperts | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: StagedConfig,
        name: str = "",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if config.num_experts != 1:
            raise ConfigError(
                f"num_experts {config.num_experts}: a linear that is trained from scratch begins in stage 0, and makes "
                "later stages itself: leave num_experts out"
            )
        self.config = config
        self.name = name
        self.stages = None

    @classmethod
    def of(cls, linear: nn.Linear, config: StagedConfig, name: str = "") -> StagedLinear:
        """One with the parameters of a linear, the very same, in stage 0."""
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        made = cls(*sizes, config=config, name=name, device="meta")
        made.weight = linear.weight
        made.bias = linear.bias
        return made.train(linear.training)

    @property
    def stage(self) -> int:
        """Where training is."""
        return 0 if self.stages is None else len(self.stages.ranks)

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., O)."""
        out = super().forward(input)
        if self.stages is None:
            return out
        return self.stages.add_to(out, input, None, Gate(None, None, self.stages.ranks, 1.0), self)

    def set_stage(self, stage: int) -> None:
        """Go on to a later stage; each that ends so is kept, and what trains follows.

        Raises:
            ConfigError: it is over already, or beyond ``num_stages``.
        """
        if not self.stage <= stage < self.config.num_stages:
            raise ConfigError(
                f"{self.name!r} is in stage {self.stage} of num_stages {self.config.num_stages} and cannot go on to "
                f"stage {stage}: an older stage can be shown, with at({stage}), but not trained"
            )
        while self.stage < stage:
            if self.stages is None:
                bank = StagedExperts(self.config, self.in_features, self.out_features, self.name)
                self.stages = bank.to(self.weight).train(self.training)
                self.weight.requires_grad_(False)
                if self.bias is not None:
                    self.bias.requires_grad_(False)
            else:
                self.stages.begin_task(self.stages.config.next_task())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._translate(state_dict, prefix)
        ends = state_dict.get(f"{prefix}stages.ends")
        stage = 0 if ends is None else len(ends)
        if stage >= self.config.num_stages:
            raise CheckpointError(
                f"{prefix}stages.ends is of stage {stage}, but num_stages is {self.config.num_stages}: raise it"
            )
        if stage != self.stage:
            self.stages = None
            self.requires_grad_(True)
            self.set_stage(stage)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translate(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Give the tensors of LightZero's layer the names that they have here."""
        found = {key: match for key in state_dict if (match := _THEIRS.fullmatch(key.removeprefix(prefix)))}
        if not found:
            return
        if any("base_weight" in key for key in found) != self.config.trains.base_scale:
            has, branch = ("no", "paper") if self.config.trains.base_scale else ("a", "head")
            raise CheckpointError(
                f"{prefix or 'the layer'} has {has} base_weight_scale, but policy is {self.config.policy!r}: "
                f"set policy to {branch!r}"
            )
        taken = {key: state_dict.pop(key) for key in found}
        last = max((int(m[1]) for k, m in found.items() if m[2] == "B" and bool(taken[k].any())), default=-1)
        for key, match in found.items():
            index = int(match[1] or match[3] or 0)
            if index > last:  # adds nothing
                continue
            if match[2]:
                name = f"lora_{match[2]}" if index == last else f"old_lora_{match[2]}.{index}"
            else:
                name = f"scale_logits.{index}" if match[3] else "base_logit"
            state_dict[f"{prefix}stages.{name}"] = taken[key] if match[2] else taken[key].reshape(1)
        if last >= 0:
            state_dict[f"{prefix}stages.ends"] = self.weight.new_full((last + 1, last + 2), torch.nan)


class Staged:
    """All staged linears of a module, which are in one stage.

    In stage 0 the module trains as it was set up. From stage 1 on everything else in it (norms, gates, embeddings) is
    frozen as well, as by LightZero's controller; what shall train on, such as heads, must lie outside. Loading a state
    restores all of that.

    Args:
        module: with staged linears in it, such as a copy of one that :func:`stage_linears` was called on.

    Attributes:
        linears: by their paths.

    Raises:
        ConfigError: it has no staged linear.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.linears = {path: each for path, each in module.named_modules() if isinstance(each, StagedLinear)}
        if not self.linears:
            raise ConfigError(f"{type(module).__name__} has no staged linears: call stage_linears first")
        self._held: list[nn.Parameter] = []
        module.register_load_state_dict_post_hook(self._after_loading)
        self._freeze_others()

    @property
    def stage(self) -> int:
        """The stage of all linears.

        Raises:
            UserError: they are in different ones.
        """
        stages: dict[int, str] = {linear.stage: path for path, linear in self.linears.items()}
        if len(stages) > 1:
            (one, first), (other, second), *_ = stages.items()
            raise UserError(f"{first!r} is in stage {one}, but {second!r} in stage {other}: load a state of one module")
        return next(iter(stages))

    def advance(self) -> list[nn.Parameter]:
        """End this stage and begin the next. What copies parameters of a module, such as DistributedDataParallel, knows
        those alone that it was made with: wrap the module anew, which makes fresh factors alike in all processes, too.

        Returns:
            The parameters that train now and did not before; ``sync_optimizer`` lets an optimizer follow.

        Raises:
            ConfigError: this stage is the last; nothing was changed.
        """
        before = {id(parameter) for parameter in self.trainable()}
        stage = self.stage + 1
        for linear in self.linears.values():
            linear.set_stage(stage)
        self._freeze_others()
        return [parameter for parameter in self.trainable() if id(parameter) not in before]

    def trainable(self) -> list[nn.Parameter]:
        """The parameters of the module that train in this stage."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @contextmanager
    def at(self, stage: int) -> Iterator[None]:
        """Within the block the module is what it was at the end of a stage, bit for bit; see ``staged.showing``.

        Buffers that move in training, as those of BatchNorm do, are not kept: put such layers outside.

        Raises:
            UserError: no such stage, or its scales are not known.
        """
        if not 0 <= stage <= self.stage:
            raise UserError(f"stage {stage}: there are stages 0 to {self.stage} so far")
        with showing((linear.stages for linear in self.linears.values() if linear.stages is not None), stage):
            yield

    def _freeze_others(self) -> None:
        if self.stage == 0:  # also where a state of stage 0 was loaded later
            while self._held:
                self._held.pop().requires_grad_(True)
            return
        own = {id(parameter) for linear in self.linears.values() for parameter in linear.parameters()}
        for parameter in self.module.parameters():
            if parameter.requires_grad and id(parameter) not in own:
                parameter.requires_grad_(False)
                self._held.append(parameter)

    def _after_loading(self, module: nn.Module, incompatible: Any) -> None:
        self._freeze_others()


def stage_linears(module: nn.Module, config: StagedConfig | dict[str, Any], targets: str | Sequence[str]) -> Staged:
    """Put :class:`StagedLinear` in the places of linears, in stage 0: the module computes what it did.

    Args:
        targets: names of linears, matched as in :class:`~moelora.config.SiteConfig`: ``w1`` fits the ``w1`` of every
            expert of a MoE layer.

    Raises:
        ConfigError: a target matches nothing, or what is no plain linear, or one that is used in two places.
    """
    experts = {**(config.to_dict() if isinstance(config, StagedConfig) else config), "kind": "staged"}
    site = SiteConfig.parse({"target": list([targets] if isinstance(targets, str) else targets), "experts": experts})
    paths = match_sites(module, site)
    refuse_twins(module, paths)
    refuse_idle_patterns(site, paths)
    for path in paths:
        found = module.get_submodule(path)
        # Not a subclass: that of nn.MultiheadAttention is never called, and others compute something else.
        if type(found) is not nn.Linear:
            raise ConfigError(f"target {path!r} is a {type(found).__name__}, expected nn.Linear: name linears")
    made = {path: StagedLinear.of(module.get_submodule(path), site.at(path).experts, path) for path in paths}  # type: ignore[arg-type]
    for path, linear in made.items():
        module.set_submodule(path, linear)
    return Staged(module)
