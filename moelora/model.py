"""The model: a frozen backbone that carries containers, and behaves as a transformers model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from .adapters import Adapter, Adapters
from .errors import ConfigError
from .experts import Container
from .losses import Heard, StepLoad, aux_losses, output_class, real_tokens
from .lower import LowerStates, remember
from .passes import Passes
from .recomputing import Recomputing
from .routers.base import Router
from .routers.rloo import example_log_prob
from .routing import RoutingContext
from .slot import RoutingSlot
from .surface import ignore_extras, tells_aux_loss

logger = logging.getLogger(__name__)


class MoELoRAModel(Recomputing):
    """A frozen backbone that carries containers; behaves as a transformers model.

    One thread at a time: what is known of a batch is kept with the model while it runs, so a forward or a generation
    in a second thread is refused.

    Several mixtures, the adapters, may share the backbone: see :meth:`load_adapter` and :meth:`set_adapter`.

    Attributes:
        backbone: the model that was given to :func:`attach`, its sites replaced by containers.
        mixture: the configuration. backbone_config: where the backbone came from, as far as it tells.
        tokenizer: set by :func:`from_pretrained`, else ``None``.
        lower: see :meth:`remember`.
    """

    lower: LowerStates | None = None

    def __init__(self, backbone: PreTrainedModel, adapter: Adapter, slot: RoutingSlot) -> None:
        backbone.requires_grad_(False)
        # PreTrainedModel.__init__ sets up a model to be initialised; this one wraps a model that already is.
        nn.Module.__init__(self)
        self.backbone = backbone
        self.slot = slot
        self.tokenizer: Any = None
        self.config = backbone.config
        self.name_or_path = backbone.name_or_path
        self.loss_type = backbone.loss_type
        self.main_input_name = backbone.main_input_name
        self.supports_gradient_checkpointing = backbone.supports_gradient_checkpointing
        self._no_split_modules = backbone._no_split_modules
        self.all_tied_weights_keys = {
            f"backbone.{a}": f"backbone.{b}" for a, b in getattr(backbone, "all_tied_weights_keys", {}).items()
        }
        ignore_extras(self.config)
        self._unloaded = False
        self._adapters = Adapters(backbone, slot)
        self._adapters.known[adapter.name] = adapter
        self._adapters.put_in([adapter])
        self._passes = Passes(backbone, slot, self.containers())
        if backbone.is_activation_checkpointing:
            self._take_over_checkpointing()

    # -- parts ---------------------------------------------------------------------------------------------------

    def groups(self) -> dict[int, list[Container]]:
        """Containers with a router, by the index of their site configuration."""
        groups: dict[int, list[Container]] = {}
        for container in self.containers().values():
            if container.router is not None:
                groups.setdefault(container.group, []).append(container)
        return groups

    def fit_routers(self) -> None:
        """Let every router set what follows from the experts of its site without training, such as prototypes.

        Raises:
            ConfigError: a router fits the experts of one site, but several sites share it.
        """
        for name, container in self.containers().items():
            if container.router is not None and len(container.site.members) <= 1:
                container.fit_router()
            elif container.router is not None and type(container.router).fit is not Router.fit:
                raise ConfigError(f"the router of {name!r} follows from the experts of one site: set share to 'module'")

    def begin_task(self) -> None:
        """Freeze the experts of growing banks and add fresh ones; then make a new optimizer. See ``growth.py``."""
        from .growth import begin_task

        begin_task(self)

    def remember(self, lower: LowerStates | int) -> LowerStates | None:
        """Keep what the layers below the first with experts make of each text: they do not change, so that every
        further pass over it, in training or scoring, begins above them. :meth:`generate` goes through all layers.

        Args:
            lower: bytes to keep at most, 0 for none; or what another model has kept, whose experts were on the same
                backbone above the same layer.

        Returns:
            What is kept; ``None`` where the first layer has experts already, or something below it is trained: nothing
            is kept then. Gradient checkpointing needs the inputs of all layers, and does without.

        Raises:
            ConfigError: what was kept is of another backbone or layer.
        """
        self.lower = remember(self, lower)
        return self.lower

    def trainable_report(self) -> str:
        """One line per group of sites and a total: how many sites, which experts, how many trainable parameters."""
        lines = []
        for index, site in enumerate(self.mixture.sites):
            members = [c for c in self.containers().values() if c.group == index]
            count = sum(p.numel() for p in {id(p): p for c in members for p in c.adapter_tensors().values()}.values())
            router = site.router.kind if site.router is not None else "always on"
            prefix = members[0].site.prefix if members else ""
            names = getattr(site.experts, "names", None)
            named = f" ({', '.join(names)})" if names else ""
            lines.append(
                f"{prefix}{', '.join(site.target)}: {len(members)} sites, {site.experts.num_experts} x "
                f"{site.experts.kind} experts{named}, router {router}, {count:,} parameters"
            )
        for name, module in self.saved_modules().items():
            lines.append(f"{name}: saved whole, {sum(p.numel() for p in module.trained.parameters()):,} parameters")
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(_unpacked_numel(p) for p in self.parameters())
        lines.append(f"trainable: {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
        return "\n".join(lines)

    def print_trainable_parameters(self) -> None:
        print(self.trainable_report())

    def used_outside(self) -> Iterator[nn.Parameter]:
        """Parameters that the model's own forward uses without calling their modules."""
        return iter(())

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        task_types: Tensor | None = None,
        request_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        modality_mask: Tensor | None = None,
        phase: str | None = None,
        step_load: StepLoad | None = None,
        aux_scale: float = 1.0,
        with_log_prob: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward, with the auxiliary losses added.

        Args:
            input_ids: (B, S). attention_mask: (B, S), 1 on real tokens. labels: (B, S), -100 where there is no loss.
            task_ids, task_types, request_ids: (B,) for routers and recorders that use them.
            segment_ids: (B, S) of a packed batch, see ``data/packing.py``; the backbone then goes by ``position_ids``.
            modality_mask: (B, S) int64, the modality of each token. phase: for methods that train in stages.
            step_load: totals of the optimizer step that this batch is a part of.
            aux_scale: factor of all auxiliary losses in ``loss``, for a warm-up of their coefficients.
            with_log_prob: add ``log_prob`` (B,), of all that routers sampled for each sequence; see ``policy.py``.
            **kwargs: anything else that the backbone takes, such as ``num_items_in_batch``. ``output_router_logits``
                asks for ``aux_loss`` where neither gradients nor labels do.

        Returns:
            The backbone's output with ``aux_losses``, a dict of unscaled scalars, ``aux_loss``, their sum with their
            coefficients (unless the backbone has one of its own), and, with labels, ``task_loss`` and
            ``loss = task_loss + aux_scale * aux_share * sum of coefficient * auxiliary loss``. ``aux_share`` is 1, or
            under gradient accumulation (``num_items_in_batch`` or ``step_load``) this batch's share of the step.
        """
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        kwargs.update({name: value for name, value in named.items() if value is not None})
        if segment_ids is not None:  # a backbone goes by positions only where it has neither mask nor cache
            kwargs.pop("attention_mask", None)
            kwargs["use_cache"] = False
        as_tuple = kwargs.pop("return_dict", True) is False
        routing: dict[str, Any] = {"task_ids": task_ids, "task_types": task_types, "request_ids": request_ids}
        routing |= {"segment_ids": segment_ids, "modality_mask": modality_mask, "phase": phase}
        heard: Heard = []
        keep = torch.is_grad_enabled() or labels is not None or with_log_prob
        listener = (lambda site, record: heard.append((site, record))) if keep else None
        self._check_checkpointing()
        known = {name: value for name, value in routing.items() if value is not None}
        with self._passes.whole(), self.routing_context(**known), self._above(kwargs):
            with self._passes.flat_head(kwargs), self.slot.using(listener=listener):
                output = self.backbone(**kwargs, return_dict=True)
            if keep and heard:
                items = kwargs.get("num_items_in_batch")
                output = self._with_losses(output, heard, labels, items, step_load, aux_scale)
                if with_log_prob:  # in the output, where what wraps a model looks for what its parameters lead to
                    output["log_prob"] = example_log_prob((record for _, record in heard), len(output["logits"]))
        return output.to_tuple() if as_tuple else output

    def _above(self, given: dict[str, Any]) -> AbstractContextManager[None]:
        """Around the backbone's forward: begin with what is kept of the layers below, where anything is."""
        if self.lower is None or self._passes.scoring is not None:
            return nullcontext()
        if torch.is_grad_enabled() or "labels" in given:  # nobody goes on from here
            given.setdefault("use_cache", False)
        return self.lower.above(self, given)

    def _with_losses(
        self,
        output: ModelOutput,
        heard: Heard,
        labels: Tensor | None,
        num_items: Tensor | int | None,
        step_load: StepLoad | None,
        aux_scale: float,
    ) -> ModelOutput:
        losses, total = self.aux_losses(heard, step_load)
        output = output_class(type(output))(**output)
        output["aux_losses"] = losses
        if tells_aux_loss(self.config):
            output["aux_loss"] = total
        if labels is not None and output.get("loss") is not None:
            share: Tensor | float = 1.0
            if step_load is not None:
                share = real_tokens(heard) / step_load.tokens
            elif num_items is not None:
                share = (self._targets(labels) != -100).sum() / num_items
            task_loss = output["loss"]
            output["task_loss"] = task_loss
            output["aux_share"] = share
            output["loss"] = task_loss + aux_scale * share * total
        return output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward; also one that a trainer has put in its place, which calls the backbone without its head.

        Such a one, as of TRL's trainers, computes losses itself: its output is given the mixture's ``aux_loss``.
        """
        if "forward" not in vars(self) or not tells_aux_loss(self.config):
            return super().__call__(*args, **kwargs)
        heard: Heard = []
        hook = self.base_model.register_forward_hook(_without_router_logits)
        try:
            with self._passes.whole(), self.slot.using(listener=lambda site, record: heard.append((site, record))):
                output = super().__call__(*args, **kwargs)
                if heard and isinstance(output, ModelOutput):
                    output["aux_loss"] = self.aux_losses(heard)[1]
        finally:
            hook.remove()
        return output

    def _targets(self, labels: Tensor) -> Tensor:
        """The labels that the Trainer counts as predicted: a causal loss never asks for the first of a row."""
        shifted = LOSS_MAPPING.get(str(self.loss_type)) is ForCausalLMLoss and not self.config.is_encoder_decoder
        return labels[..., 1:] if shifted else labels

    def aux_losses(self, heard: Heard, step_load: StepLoad | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Unscaled auxiliary losses by name, and the sum of each times its coefficient; see ``moelora/losses.py``."""
        return aux_losses(self.groups(), heard, self.slot.context, step_load)

    @contextmanager
    def routing_context(self, **fields: Any) -> Iterator[None]:
        """Within the block every forward, also those of ``generate``, sees these fields of the routing context.

        Raises:
            TypeError: a field that :class:`~moelora.routing.RoutingContext` does not have.
        """
        with self.slot.using(replace(self.slot.context, **fields)):
            yield

    @contextmanager
    def disable_experts(self) -> Iterator[None]:
        """Within the block the model is exactly its backbone."""
        before, self.slot.enabled = self.slot.enabled, False
        try:
            yield
        finally:
            self.slot.enabled = before

    @contextmanager
    def expert_scale(self, scales: Mapping[int, float]) -> Iterator[None]:
        """Within the block the update of each named expert is multiplied by its number, at every routed site.

        Routing itself stays as it is: ``{3: 0.0}`` leaves the frozen layer where expert 3 was chosen.

        Raises:
            ConfigError: no routed site has an expert of that index.
        """
        most = max((c.site.num_experts for c in self.containers().values() if c.router is not None), default=0)
        if any(not 0 <= expert < most for expert in scales):
            raise ConfigError(f"expert_scale names experts {sorted(scales)}, but the routed sites have 0..{most - 1}")
        before = self.slot.expert_scale
        self.slot.expert_scale = {**before, **scales}
        try:
            yield
        finally:
            self.slot.expert_scale = before

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's ``generate`` with experts on; takes ``task_ids`` and the like besides its own arguments.

        Raises:
            UserError: ``prefill_chunk_size`` with a router that decides once for a sequence.
        """
        fields = {name: kwargs.pop(name) for name in (*RoutingContext.PER_SEQUENCE, "phase") if name in kwargs}
        config = kwargs.get("generation_config") or self.generation_config
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        with self._passes.whole(), self.routing_context(**fields), self.slot.keeping(whole_prompt=chunk is None):
            return self.backbone.generate(*args, **kwargs)  # type: ignore[operator]

    def merge_and_unload(
        self, approximate: bool = False, batches: Iterable[Mapping[str, Any]] | None = None, **fields: Any
    ) -> PreTrainedModel:
        """The backbone with the experts in its weights; arguments and errors: see :func:`moelora.merging.merge`.

        What merging did to each site is logged; :func:`~moelora.merging.merge` itself returns it.
        """
        from .merging import merge

        merged = merge(self, approximate, batches, **fields)
        logger.info("merged %d sites\n%s", len(merged.sites), merged)
        return merged.backbone

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> MoELoRAModel:
        """The same as :func:`moelora.from_pretrained`."""
        from .mixture import from_pretrained

        return from_pretrained(*args, **kwargs)


def _without_router_logits(module: nn.Module, args: Any, output: Any) -> None:
    """Tell who computes a load-balance loss of the backbone's own experts that it has none."""
    if isinstance(output, ModelOutput):
        output.router_logits = None


def _unpacked_numel(parameter: nn.Parameter) -> int:
    """Number of weights behind a parameter; a 4-bit one packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()
