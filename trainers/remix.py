"""ReMix: each optimizer step compares several selections of experts, and moves the routers as a policy.

See ``routers/remix.py`` for the method, ``routers/rloo.py`` for the estimator and ``moelora/policy.py`` for a step
without a trainer. The task loss of a step is the one of ``sft``, the mean over all labelled tokens of the step, and
the selections of each example are compared with each other; so neither accumulation nor the number of processes changes
what is estimated. The seeds of an example follow from the run's seed, the step, its place in the step and the number of
the selection, and from nothing else: a resumed run draws what the uninterrupted one does, no two examples or ranks draw
alike, and a step that is cut up otherwise draws the same.

Shapes: B batch, M selections.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn
from transformers import TrainingArguments

from ..config import Recipe
from ..errors import ConfigError
from ..mixture import MoELoRAModel
from ..policy import Objective, PolicyLoss, policy_loss, policy_parts
from ..registry import ROUTERS, TRAINERS
from ..routers import rloo
from .meter import only_listener
from .sft import SFT, SFTConfig, SFTTrainer

Mode = Literal["looped", "batched", "lean"]

NO_STEP_BALANCE = (
    "step_balance measures the load of one forward before the step, but the selections of remix are several and draw "
    "their experts: leave it out"
)


class RemixTrainerConfig(SFTConfig):
    """Options of ``remix``, beside those of ``sft``.

    Attributes:
        selections: M, how many selections of experts are drawn for each example; at least 2.
        mode: how they are computed, with one gradient. ``looped``: M forwards, one backward pass, the memory of M
            graphs. ``batched``: one forward of M copies of the batch, the same memory. ``lean``: the memory of one
            graph, for one more forward of each selection.
        per_example: compare the losses of each example; else those of a whole micro-batch, the paper's literal form.
    """

    kind: str = "remix"
    selections: int = 4
    mode: Mode = "looped"
    per_example: bool = True

    @field_validator("selections")
    @classmethod
    def _something_to_compare(cls, value: int) -> int:
        return checked_selections(value)

    @field_validator("step_balance")
    @classmethod
    def _no_step_balance(cls, value: bool) -> bool:
        if value:
            raise ValueError(NO_STEP_BALANCE)
        return value

    def trainer_options(self) -> dict[str, Any]:
        own = {"selections": self.selections, "mode": self.mode, "per_example": self.per_example}
        return {**super().trainer_options(), **own}


def checked_selections(count: int) -> int:
    """``count`` as it is.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(
            f"selections is {count}: a router learns from how a selection does against the others (leave-one-out), so "
            "there have to be at least 2"
        )
    return count


class RemixTrainer(SFTTrainer):
    """:class:`SFTTrainer` whose step is the RLOO surrogate of several selections; usable by itself.

    Beside the rest it logs, as means over selections, examples and ranks: ``policy/surrogate``, whose gradient is the
    step's and whose value is of no meaning; ``policy/advantage_std`` and ``policy/advantage_max`` of ``L_m - mean of
    the other L``, whose mean is 0; ``policy/log_prob``; and ``policy/loss_spread``, the standard deviation of an
    example's loss, which is all that the routers learn from. ``loss`` and ``task_loss`` are means over selections.

    Args:
        selections, mode, per_example: see :class:`RemixTrainerConfig`.

    Raises:
        ConfigError: no router samples; ``step_balance``; fewer than two selections.
    """

    trains_sampling_routers: ClassVar[bool] = True

    def __init__(
        self,
        model: MoELoRAModel,
        args: TrainingArguments | None = None,
        *,
        selections: int = 4,
        mode: Mode = "looped",
        per_example: bool = True,
        **trainer: Any,
    ) -> None:
        if trainer.get("step_balance"):
            raise ConfigError(NO_STEP_BALANCE)
        super().__init__(model, args, **trainer)
        _refuse_without_sampling({c.router.kind for c in model.containers().values() if c.router is not None})
        try:
            self.selections = checked_selections(selections)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.mode = mode
        self.per_example = per_example

    def selection_seeds(self, rows: int) -> list[list[int]]:
        """M lists of ``rows`` seeds, for the examples of the micro-batch that comes next on this rank."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = (self._done * ranks + rank) * self.args.train_batch_size
        return [[self._seed(first + row, m) for row in range(rows)] for m in range(self.selections)]

    def _seed(self, place: int, selection: int) -> int:
        text = f"{self.args.seed}/{self.state.global_step}/{place}/{selection}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    # -- one micro-batch -----------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The surrogate's gradient with the value of the loss; in evaluation what :class:`SFTTrainer` computes."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert not return_outputs, "the Trainer asks for outputs in evaluation only"
        across, within = self._factors(num_items_in_batch)
        labels = inputs["labels"]
        counts_B = rloo.example_targets(labels, causal=not self.model.config.is_encoder_decoder)
        total = counts_B.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        weights_B = (counts_B / total * across).float()
        aux_weight = self.aux_scale * weights_B.sum()
        objective = Objective(self.per_example, weights_B, aux_weight, model)
        seeds = self.selection_seeds(len(labels))
        if self.mode == "lean":
            found, graph = self._all_but_the_last(inputs, seeds, objective, within)
        else:
            found = policy_loss(self.model, inputs, seeds, objective, batched=self.mode == "batched")
            graph = found.surrogate
        task_loss = (found.losses * weights_B).sum(dim=1).mean()
        self._keep(found, task_loss, weights_B.sum(), within)
        # The value of the loss, the gradient of the surrogate; not finite where either is not.
        return (graph - graph.detach()) + (task_loss + aux_weight * found.aux_total) + 0 * found.surrogate.detach()

    def _all_but_the_last(
        self, inputs: dict[str, Any], seeds: list[list[int]], objective: Objective, within: float
    ) -> tuple[PolicyLoss, Tensor]:
        """Backward passes of M - 1 selections; the Trainer makes the last, in which ranks exchange gradients.

        Args:
            within: by what the Trainer is going to multiply the last.
        """
        with only_listener(self.model.slot):  # the load counts the forwards that are trained by
            found, parts = policy_parts(self.model, inputs, seeds, objective)
        for _ in seeds[1:]:
            with self._unsynced(objective.call):
                self._backward(next(parts) * within)
        return found, next(parts)

    @contextmanager
    def _unsynced(self, model: Any) -> Iterator[None]:
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)  # DeepSpeed steps at the end of a backward pass where this is set
        try:
            with nullcontext() if self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def _backward(self, part: Tensor) -> None:
        """As the Trainer does for what :meth:`compute_loss` returns."""
        self.accelerator.backward(part, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))

    # -- log -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _keep(self, found: PolicyLoss, task_loss: Tensor, share: Tensor, within: float) -> None:
        """Add what was found to the averages of the log; ``share`` is the micro-batch's part of the step."""
        values = {"task_loss": task_loss, "policy/surrogate": found.surrogate}
        values.update({f"aux/{name}": value * share for name, value in found.aux_losses.items()})
        self._window.add(values, within)
        count = self.selections
        advantages_MB = (found.losses - found.losses.mean(dim=0)) * (count / (count - 1))
        statistics = {
            "policy/advantage_std": advantages_MB.std(correction=0),
            "policy/advantage_max": advantages_MB.abs().max(),
            "policy/log_prob": found.log_prob.mean(),
            "policy/loss_spread": found.spread,
        }
        self._window.add(statistics, 1 / self.current_gradient_accumulation_steps)

    @torch.no_grad()
    def _stop(self, what: str, otherwise: str, batches: list[Any], taken: bool = False) -> None:
        # Routers that sites share draw from seeds only.
        with self.model.routing_context(selection_seeds=(self._seed(0, 0),)):
            super()._stop(what, otherwise, batches, taken)


def _refuse_without_sampling(kinds: set[str]) -> None:
    if not any(ROUTERS.get(kind).samples for kind in kinds):
        able = ", ".join(name for name in ROUTERS.names() if ROUTERS.get(name).samples)
        raise ConfigError(
            f"trainer kind 'remix' trains routers that sample their experts, but the mixture has "
            f"{', '.join(map(repr, sorted(kinds))) or 'no router'}: use router kind {able}, or trainer kind sft"
        )


@TRAINERS.register("remix")
class Remix(SFT):
    """What ``moelora train`` does with a recipe whose trainer is ``remix``."""

    Config: ClassVar[type[SFTConfig]] = RemixTrainerConfig
    Trainer: ClassVar[type[SFTTrainer]] = RemixTrainer

    @classmethod
    def prepare(cls, recipe: Recipe) -> SFTTrainer:
        _refuse_without_sampling({site.router.kind for site in recipe.mixture.sites if site.router is not None})
        return super().prepare(recipe)
