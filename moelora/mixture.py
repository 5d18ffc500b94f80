"""A mixture from a backbone and a configuration, or from a checkpoint; and the tape of what it decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from .adapters import Adapter, read_adapter
from .config import BackboneConfig, MixtureConfig, Recipe, load_recipe
from .errors import ConfigError
from .experts import Container
from .losses import StepLoad as StepLoad
from .model import MoELoRAModel as MoELoRAModel
from .parts import build_parts
from .routing import RoutingRecord, SiteInfo, Tape
from .slot import RoutingSlot

if TYPE_CHECKING:
    from .checkpoints import Stored


def attach(
    backbone: PreTrainedModel,
    mixture: MixtureConfig | Recipe | Mapping[str, Any] | str | Path,
    adapter_name: str = "default",
) -> MoELoRAModel:
    """Freeze ``backbone`` and put containers at the sites that ``mixture`` names. Changes ``backbone`` in place.

    All of it is frozen, the head of a classifier too: name that in ``modules_to_save`` to train and save it.

    Args:
        mixture: a configuration, a mapping, a recipe, a model card's name, or the path of a recipe.
        adapter_name: what to call it, where others come beside it (``model.add_adapter``, ``model.load_adapter``).

    Raises:
        ConfigError: a target matches nothing, a module is claimed twice or sits at two places, a matched module cannot
            carry experts, or the backbone carries some already; the backbone is then as it was.
    """
    config = mixture_config(mixture)
    refuse_taken(backbone)
    slot = RoutingSlot()
    return MoELoRAModel(backbone, Adapter(adapter_name, config, build_parts(backbone, config, slot)), slot)


def mixture_config(mixture: MixtureConfig | Recipe | Mapping[str, Any] | str | Path) -> MixtureConfig:
    """A mixture's configuration from all that :func:`attach` takes."""
    if isinstance(mixture, str | Path):
        mixture = load_recipe(mixture)
    if isinstance(mixture, Recipe):
        mixture = mixture.mixture
    return mixture if isinstance(mixture, MixtureConfig) else MixtureConfig.parse(mixture)


def refuse_taken(backbone: PreTrainedModel) -> None:
    """Check that this is a backbone that carries no experts yet.

    Raises:
        ConfigError: it is none, or carries some.
    """
    if not isinstance(backbone, PreTrainedModel):
        raise ConfigError(
            f"attach takes a transformers model, got {type(backbone).__name__}; for another module build containers "
            "one by one with moelora.experts.build"
        )
    taken = next((name for name, module in backbone.named_modules() if isinstance(module, Container)), None)
    if taken is not None:
        raise ConfigError(
            f"this {type(backbone).__name__} already carries experts (at {taken!r}): call add_adapter() or "
            "load_adapter() of its mixture to put others beside them, or unload() to have it back"
        )


def from_pretrained(
    path: str | Path,
    backbone: PreTrainedModel | str | None = None,
    quantization: str | None = None,
    dtype: str | None = None,
    device_map: Any = None,
    adapter_name: str = "default",
    **hub: Any,
) -> MoELoRAModel:
    """Load a mixture in any layout that ``moelora.checkpoints`` reads, on its backbone.

    Args:
        path: a folder or a hub id.
        backbone: a loaded model, or a name for :func:`~moelora.load_backbone`; ``"auto"`` takes the backbone that lies
            in the same files, where a layout keeps it there, else the name that the checkpoint gives. ``None`` does so
            only for the backbone that ships with moelora: a file does not get to choose what is downloaded.
        quantization, dtype, device_map: for loading the backbone; by default as in the checkpoint.
        adapter_name: what to call it, where others come beside it (``model.load_adapter``).
        **hub: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, as in transformers; the last
            three hold for a backbone that is loaded too.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or does not fit the backbone, which is then as it was.
        ConfigError: the checkpoint names a backbone that was not asked for.
    """
    from . import checkpoints

    stored = checkpoints.read(path, **hub)
    tokenizer = None
    if not isinstance(backbone, PreTrainedModel):
        places = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
        backbone, tokenizer = _backbone_of(stored, backbone, quantization, dtype, device_map, **places)
    model = put_on(backbone, stored, adapter_name)
    model.tokenizer = tokenizer
    return model


def put_on(backbone: PreTrainedModel, stored: Stored, adapter_name: str = "default") -> MoELoRAModel:
    """Attach what a checkpoint describes, filled with its numbers; the model is in evaluation mode.

    Of a checkpoint that says how its experts make up a reward it is a :class:`~moelora.RewardModel`.

    Raises:
        CheckpointError, ConfigError: it does not fit or is damaged; the backbone is then as it was.
    """
    refuse_taken(backbone)
    if stored.reward is not None:
        from .reward.model import RewardModel

        return RewardModel.put_on(backbone, stored, adapter_name)
    slot = RoutingSlot()
    model = MoELoRAModel(backbone, read_adapter(stored, backbone, slot, adapter_name), slot)
    model.train(False)
    return model


def _backbone_of(
    stored: Stored, backbone: str | None, quantization: str | None, dtype: str | None, device_map: Any, **places: Any
) -> tuple[PreTrainedModel, Any]:
    """The backbone that the caller named, or allowed the checkpoint to name, and its tokenizer."""
    from .backbone import DEFAULT_BACKBONE, load_backbone

    asked = backbone in (None, "auto")
    if asked and (own := stored.own_backbone(quantization, dtype, device_map)) is not None:
        return own
    named = stored.backbone.name
    if backbone is None and named != DEFAULT_BACKBONE:
        raise ConfigError(
            f"{stored.folder} was trained on {named!r}: pass backbone={named!r} (or backbone='auto') to load it, or "
            "another folder or hub id with the same weights"
        )
    changes: dict[str, Any] = {"name": named if asked else backbone}
    if changes["name"] != named:
        changes.update(revision=None, subfolder=None)
    if quantization is not None:
        changes["quantization"] = quantization
    if dtype is not None:
        changes["dtype"] = dtype
    config = BackboneConfig.parse({**stored.backbone.to_dict(), **changes})
    return load_backbone(config, device_map=device_map, **places)


@contextmanager
def trace(model: nn.Module) -> Iterator[Tape]:
    """Within the block the records of every container in ``model`` go onto the tape, by site name.

    Records keep their graph where gradients are on: trace evaluation under ``torch.no_grad()``.
    """
    tape = Tape()

    def listener(site: SiteInfo, record: RoutingRecord) -> None:
        tape.add(site.name, record)

    slots = {id(m.slot): m.slot for m in model.modules() if isinstance(m, Container)}
    with ExitStack() as stack:
        for slot in slots.values():
            stack.enter_context(slot.using(listener=listener))
        yield tape
