"""The model: a frozen backbone that carries containers, and behaves as a transformers model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from .config import BackboneConfig, MixtureConfig
from .errors import ConfigError
from .experts import Container
from .losses import Heard, StepLoad, aux_losses, output_class, real_tokens
from .passes import Passes
from .routers.base import Router
from .routing import RoutingContext
from .slot import RoutingSlot
from .surface import Surface

logger = logging.getLogger(__name__)


class MoELoRAModel(Surface):
    """A frozen backbone that carries containers; behaves as a transformers model.

    Attributes:
        backbone: the model that was given to :func:`attach`, its sites replaced by containers.
        mixture: the configuration. backbone_config: where the backbone came from, as far as it tells.
        tokenizer: set by :func:`from_pretrained`, else ``None``.
    """

    def __init__(self, backbone: PreTrainedModel, mixture: MixtureConfig, slot: RoutingSlot) -> None:
        # PreTrainedModel.__init__ sets up a model to be initialised; this one wraps a model that already is.
        nn.Module.__init__(self)
        self.backbone = backbone
        self.mixture = mixture
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
        self._ignored = vars(self.config).get("keys_to_ignore_at_inference")
        ignored = list(getattr(self.config, "keys_to_ignore_at_inference", ["past_key_values"]))
        self.config.keys_to_ignore_at_inference = [*dict.fromkeys([*ignored, "task_loss", "aux_losses", "aux_share"])]
        self._passes = Passes(backbone, slot, self.containers())
        if backbone.is_activation_checkpointing:
            self.activation_checkpointing_enable()

    # -- parts ---------------------------------------------------------------------------------------------------

    def containers(self) -> dict[str, Container]:
        """Every container by the name of its site, in the order of the backbone's modules."""
        return {m.site.name: m for m in self.backbone.modules() if isinstance(m, Container)}

    def groups(self) -> dict[int, list[Container]]:
        """Containers with a router, by the index of their site configuration."""
        groups: dict[int, list[Container]] = {}
        for container in self.containers().values():
            if container.router is not None:
                groups.setdefault(container.group, []).append(container)
        return groups

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the experts and routers by its name in a checkpoint, ``<site>.lora_A`` and so on.

        Frozen parameters and persistent buffers are among them. What sites share has the name of the first.
        """
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, container in self.containers().items():
            for key, value in container.adapter_tensors().items():
                if id(value) not in seen:
                    seen.add(id(value))
                    tensors[f"{name}.{key}"] = value
        return tensors

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

    @property
    def backbone_config(self) -> BackboneConfig:
        from .backbone import backbone_config

        return backbone_config(self.backbone)

    def trainable_report(self) -> str:
        """One line per group of sites and a total: how many sites, which experts, how many trainable parameters."""
        lines = []
        for index, site in enumerate(self.mixture.sites):
            members = [c for c in self.containers().values() if c.group == index]
            count = sum(p.numel() for p in {id(p): p for c in members for p in c.adapter_tensors().values()}.values())
            router = site.router.kind if site.router is not None else "always on"
            lines.append(
                f"{', '.join(site.target)}: {len(members)} sites, {site.experts.num_experts} x {site.experts.kind} "
                f"experts, router {router}, {count:,} parameters"
            )
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(_unpacked_numel(p) for p in self.parameters())
        lines.append(f"trainable: {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
        return "\n".join(lines)

    def print_trainable_parameters(self) -> None:
        """Print :meth:`trainable_report`."""
        print(self.trainable_report())

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        task_types: Tensor | None = None,
        request_ids: Tensor | None = None,
        modality_mask: Tensor | None = None,
        phase: str | None = None,
        step_load: StepLoad | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward, with the auxiliary losses added.

        Args:
            input_ids: (B, S). attention_mask: (B, S), 1 on real tokens. labels: (B, S), -100 where there is no loss.
            task_ids, task_types, request_ids: (B,) for routers and recorders that use them.
            modality_mask: (B, S) int64, the modality of each token. phase: for methods that train in stages.
            step_load: totals of the optimizer step that this batch is a part of.
            **kwargs: anything else that the backbone takes, such as ``num_items_in_batch``.

        Returns:
            The backbone's output with ``aux_losses``, a dict of unscaled scalars, and, with labels, ``task_loss`` and
            ``loss = task_loss + aux_share * sum of coefficient * auxiliary loss``. ``aux_share`` is 1, or under
            gradient accumulation (``num_items_in_batch`` or ``step_load``) this batch's share of the step.
        """
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        kwargs.update({name: value for name, value in named.items() if value is not None})
        as_tuple = kwargs.pop("return_dict", True) is False
        routing: dict[str, Any] = {"task_ids": task_ids, "task_types": task_types, "request_ids": request_ids}
        routing |= {"modality_mask": modality_mask, "phase": phase}
        heard: Heard = []
        keep = torch.is_grad_enabled() or labels is not None
        listener = (lambda site, record: heard.append((site, record))) if keep else None
        self._check_checkpointing()
        with self.routing_context(**{k: v for k, v in routing.items() if v is not None}):
            with self.slot.using(listener=listener):
                output = self.backbone(**kwargs, return_dict=True)
            if keep and heard:
                output = self._with_losses(output, heard, labels, kwargs.get("num_items_in_batch"), step_load)
        return output.to_tuple() if as_tuple else output

    def _with_losses(
        self,
        output: ModelOutput,
        heard: Heard,
        labels: Tensor | None,
        num_items: Tensor | int | None,
        step_load: StepLoad | None,
    ) -> ModelOutput:
        losses, total = self.aux_losses(heard, step_load)
        output = output_class(type(output))(**output)
        output["aux_losses"] = losses
        if labels is not None and output.get("loss") is not None:
            share: Tensor | float = 1.0
            if step_load is not None:
                share = real_tokens(heard) / step_load.tokens
            elif num_items is not None:
                share = (self._targets(labels) != -100).sum() / num_items
            task_loss = output["loss"]
            output["task_loss"] = task_loss
            output["aux_share"] = share
            output["loss"] = task_loss + share * total
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
        """The backbone's ``generate`` with experts on; takes ``task_ids`` and the like besides its own arguments."""
        fields = {name: kwargs.pop(name) for name in (*RoutingContext.PER_SEQUENCE, "phase") if name in kwargs}
        with self.routing_context(**fields), self.slot.keeping():
            return self.backbone.generate(*args, **kwargs)  # type: ignore[operator]

    # -- checkpointing -------------------------------------------------------------------------------------------

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Checkpoint the backbone's layers so that a recomputation replays the routing of its forward.

        Raises:
            ConfigError: reentrant checkpointing was asked for; it would cut the auxiliary losses from their graph.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise ConfigError(
                "use_reentrant=True: reentrant checkpointing runs the forward without a graph, so auxiliary losses "
                "would train nothing; set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        options.update(use_reentrant=False, context_fn=self.slot.checkpoint_contexts)
        self.backbone.activation_checkpointing_enable(options, every_n_layers=every_n_layers, offload=offload)
        # Non-reentrant checkpointing needs no gradient at the embeddings; without it the backward pass stops at the
        # lowest layer with experts.
        self.backbone.disable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        self.backbone.activation_checkpointing_disable()

    def gradient_checkpointing_disable(self) -> None:
        """The older name of :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def _check_checkpointing(self) -> None:
        """Refuse checkpointing that was switched on behind the mixture's back: it would not replay the routing."""
        if not (self.training and torch.is_grad_enabled()):
            return
        layer = next((m for m in self.backbone.modules() if getattr(m, "gradient_checkpointing", False)), None)
        if layer is None:
            return
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("context_fn") != self.slot.checkpoint_contexts:
            raise ConfigError(
                "gradient checkpointing was enabled on the backbone itself, so a recomputation could not replay the "
                "routing; call model.gradient_checkpointing_enable() on the mixture instead"
            )

    def unload(self) -> PreTrainedModel:
        """Put the frozen layers back in their places and return the backbone; this model is of no use afterwards."""
        self._passes.remove()
        if self._ignored is None:
            vars(self.config).pop("keys_to_ignore_at_inference", None)
        else:
            self.config.keys_to_ignore_at_inference = self._ignored
        for name, container in self.containers().items():
            parent, _, child = name.rpartition(".")
            setattr(self.backbone.get_submodule(parent), child, container.base)
        return self.backbone

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

    # -- saving and loading --------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        card: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the native checkpoint: configuration, adapter tensors, model card; see ``checkpoints/native.py``.

        Args:
            state_dict: tensors to take instead of the model's own, by the model's parameter names (ZeRO-3, FSDP).
            card: text of the README.md; without it a short card is written.
        """
        from .checkpoints import Architecture, native

        if is_main_process:
            groups = range(len(self.mixture.sites))
            native.save(
                save_directory,
                self.mixture,
                self.backbone_config,
                self.adapter_state(state_dict),
                sites=[[name for name, c in self.containers().items() if c.group == group] for group in groups],
                architecture=Architecture.of(self.config),
                card=card,
            )
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload mixture",
        card: str | None = None,
    ) -> Any:
        """Upload the native checkpoint, and the tokenizer if there is one, to a hub repository made for it.

        Not transformers' own method: that one replaces the card after the manifest is written.

        Returns:
            What ``huggingface_hub`` says of the commit.
        """
        api = HfApi(token=token, library_name="moelora")
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=card)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, create_pr=create_pr, commit_message=commit_message
            )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> MoELoRAModel:
        """The same as :func:`moelora.from_pretrained`."""
        from .mixture import from_pretrained

        return from_pretrained(*args, **kwargs)

    def adapter_state(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The adapter's tensors by checkpoint name, detached; from ``state_dict`` where one is given."""
        tensors = self.adapter_tensors()
        if state_dict is None:
            return {name: value.detach() for name, value in tensors.items()}
        named = (*self.named_parameters(), *self.named_buffers())
        names = {id(value): name for name, value in named}
        return {name: state_dict[names[id(value)]].detach() for name, value in tensors.items()}

    def load_adapter_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy checked tensors into the containers; names and shapes are those of :meth:`adapter_tensors`."""
        with torch.no_grad():
            for name, parameter in self.adapter_tensors().items():
                parameter.copy_(tensors[name])


def _unpacked_numel(parameter: nn.Parameter) -> int:
    """Number of weights behind a parameter; a 4-bit one packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()
