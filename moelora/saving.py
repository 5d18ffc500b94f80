"""What of a mixture is saved and loaded: its tensors by name, and the native checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from torch import Tensor

from .carrying import Carrying
from .config import BackboneConfig
from .errors import ConfigError


class Saving(Carrying):
    """The part of a mixture that writes its adapters down.

    Attributes:
        tokenizer: saved with the mixture by :meth:`push_to_hub`, if there is one.
    """

    tokenizer: Any

    def adapter_tensors(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Every tensor of the experts and routers by its name in a checkpoint, ``<site>.lora_A`` and so on.

        Frozen parameters and persistent buffers are among them, and the modules that are saved whole. What sites share
        has the name of the first.

        Args:
            adapter_name: any adapter; ``None`` takes those that are active, with the names that sites have then.

        Raises:
            ConfigError: an unknown name.
        """
        if adapter_name is not None:
            return self._adapters.get(adapter_name).tensors()
        return {f"{a.prefix}{name}": value for a in self._adapters.active for name, value in a.tensors().items()}

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
        selected_adapters: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the native checkpoint: configuration, adapter tensors, model card; see ``checkpoints/native.py``.

        Several adapters go into folders of their names in ``save_directory``, for ``from_pretrained(subfolder=...)``.

        Args:
            selected_adapters: name or names of the adapters to save; ``None`` takes those that are active.
            state_dict: tensors to take instead of the model's own, by the model's parameter names (ZeRO-3, FSDP).
            card: text of the README.md; by default the adapter's own, and without one a short card is written.

        Raises:
            ConfigError: an unknown name, or there is nothing to save.
        """
        from .checkpoints import Architecture, native

        self.refuse_unloaded()
        names = self.active_adapters if selected_adapters is None else selected_adapters
        adapters = [self._adapters.get(name) for name in ([names] if isinstance(names, str) else names)]
        if not adapters:
            raise ConfigError(
                f"selected_adapters is empty: name one of {', '.join(map(repr, self.adapters))}, or leave it out"
            )
        for adapter in adapters if is_main_process else ():
            native.save(
                Path(save_directory) / adapter.name if len(adapters) > 1 else save_directory,
                adapter.mixture,
                self.backbone_config,
                self.adapter_state(state_dict, adapter.name),
                sites=adapter.sites(),
                architecture=Architecture.of(self.config),
                card=adapter.card if card is None else card,
                **self.sections(),
            )
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, selected_adapters=selected_adapters, **kwargs)

    def sections(self) -> dict[str, Any]:
        """What a kind of model adds to the configuration of its checkpoint, as arguments of ``native.save``."""
        return {}

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
        selected_adapters: str | Sequence[str] | None = None,
    ) -> Any:
        """Upload the native checkpoint, and the tokenizer if there is one, to a hub repository made for it.

        Not transformers' own method: that one replaces the card after the manifest is written.

        Returns:
            What ``huggingface_hub`` says of the commit.
        """
        api = HfApi(token=token, library_name="moelora")
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=card, selected_adapters=selected_adapters)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, create_pr=create_pr, commit_message=commit_message
            )

    def adapter_state(
        self, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str | None = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors by checkpoint name, detached; from ``state_dict`` where one is given.

        Args:
            state_dict: by the model's parameter names, of which an adapter that is not active has none.
            adapter_name: as in :meth:`adapter_tensors`.
        """
        tensors = self.adapter_tensors(adapter_name)
        if state_dict is None:
            return {name: value.detach() for name, value in tensors.items()}
        named = (*self.named_parameters(), *self.named_buffers())
        names = {id(value): name for name, value in named}
        given = {key: state_dict[names[id(value)]] for key, value in tensors.items() if id(value) in names}
        return {key: given.get(key, value).detach() for key, value in tensors.items()}

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What transformers calls :meth:`adapter_state`."""
        return self.adapter_state(state_dict, adapter_name)

    def load_adapter_state(
        self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], adapter_name: str | None = None
    ) -> None:
        """Copy checked tensors into the containers; names and shapes are those of :meth:`adapter_tensors`.

        Args:
            tensors: all of them, at once or one after another.
            adapter_name: any adapter; ``None`` is the active one.

        Raises:
            KeyError: a tensor is missing or unknown.
            ConfigError: an unknown name, or several adapters are active and none is named.
        """
        adapter = self._sole() if adapter_name is None else self._adapters.get(adapter_name)
        adapter.fill(tensors.items() if isinstance(tensors, Mapping) else tensors)
