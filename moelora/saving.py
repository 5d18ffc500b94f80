"""What of a mixture is saved and loaded: its tensors by name, and the native checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor

from .config import BackboneConfig, MixtureConfig
from .experts import Container, SavedModule
from .surface import Surface


class Saving(Surface):
    """The part of a mixture that knows its containers and writes them down.

    Attributes:
        mixture: the configuration. tokenizer: saved with the mixture by :meth:`push_to_hub`, if there is one.
        card: text of the README.md where :meth:`save_pretrained` is given none, such as that of a composition.
    """

    mixture: MixtureConfig
    tokenizer: Any
    card: str | None = None

    def containers(self) -> dict[str, Container]:
        """Every container by the name of its site, in the order of the backbone's modules."""
        return {m.site.name: m for m in self.backbone.modules() if isinstance(m, Container)}

    def saved_modules(self) -> dict[str, SavedModule]:
        """Every module that is trained whole, by its path in the backbone."""
        return {m.name: m for m in self.backbone.modules() if isinstance(m, SavedModule)}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the experts and routers by its name in a checkpoint, ``<site>.lora_A`` and so on.

        Frozen parameters and persistent buffers are among them, and the modules that are saved whole. What sites share
        has the name of the first.
        """
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        parts: dict[str, Container | SavedModule] = {**self.containers(), **self.saved_modules()}
        for name, part in parts.items():
            for key, value in part.adapter_tensors().items():
                if id(value) not in seen:
                    seen.add(id(value))
                    tensors[f"{name}.{key}"] = value
        return tensors

    @property
    def backbone_config(self) -> BackboneConfig:
        from .backbone import backbone_config

        return backbone_config(self.backbone)

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
            card: text of the README.md; by default the model's own, and without one a short card is written.
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
                card=self.card if card is None else card,
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

    def adapter_state(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The adapter's tensors by checkpoint name, detached; from ``state_dict`` where one is given."""
        tensors = self.adapter_tensors()
        if state_dict is None:
            return {name: value.detach() for name, value in tensors.items()}
        named = (*self.named_parameters(), *self.named_buffers())
        names = {id(value): name for name, value in named}
        return {name: state_dict[names[id(value)]].detach() for name, value in tensors.items()}

    @torch.no_grad()
    def load_adapter_state(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Copy checked tensors into the containers; names and shapes are those of :meth:`adapter_tensors`.

        Args:
            tensors: all of them, at once or one after another.

        Raises:
            KeyError: a tensor is missing or unknown.
        """
        missing = self.adapter_tensors()
        for name, value in tensors.items() if isinstance(tensors, Mapping) else tensors:
            missing.pop(name).copy_(value)
        if missing:
            raise KeyError(", ".join(missing))
