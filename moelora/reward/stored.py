"""What a checkpoint says of a reward model, checked before memory is taken for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..checkpoints.layout import Stored
from ..config import MixtureConfig, SiteConfig
from ..errors import CheckpointError, ConfigError
from .config import PARTS, RewardConfig
from .parts import RewardParts


def read_config(stored: Stored, width: int) -> RewardConfig:
    """The configuration of the reward model that a checkpoint holds.

    Args:
        width: of the hidden states of its backbone.

    Raises:
        CheckpointError: it is none, does not hold together, or is not what the checkpoint's mixture and tensors are of.
    """
    if stored.reward is None:
        raise CheckpointError(f"{stored.folder}: a mixture, but no reward model: load it with moelora.from_pretrained")
    where = f"{stored.folder}: reward"
    edited = "the file was damaged or edited: restore it"
    categories = stored.reward.get("categories", {})
    if not isinstance(categories, Mapping):  # a name would be that of a file of this machine
        raise CheckpointError(f"{where}: categories: expected a mapping, found {categories!r:.80}; {edited}")
    try:
        reward = RewardConfig.parse(stored.reward, where=where)
        expected = reward.mixture(_template(stored.mixture))
    except ConfigError as error:
        raise CheckpointError(f"{error}; {edited}") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}; {edited}") from None
    if expected.sites != stored.mixture.sites or PARTS not in stored.mixture.modules_to_save:
        raise CheckpointError(
            f"{where}: these categories and capabilities make {len(reward.views)} views, which are not those of the "
            f"routers in mixture.sites, or modules_to_save lacks {PARTS!r}; {edited}"
        )
    with torch.device("meta"):
        parts = RewardParts(reward, width).state_dict()
    shapes = {key: header.shape for key, header in stored.file.headers.items()}
    wrong = [name for name, value in parts.items() if shapes.get(f"{PARTS}.{name}") != tuple(value.shape)]
    if wrong:
        name = f"{PARTS}.{wrong[0]}"
        found = f"has the shape {list(shapes[name])}" if name in shapes else "is not there"
        raise CheckpointError(
            f"{stored.file.path}: {len(wrong)} tensors are not as the categories ask for, such as {name}: expected "
            f"{list(parts[wrong[0]].shape)}, but it {found}; {edited}"
        )
    return reward


def _template(mixture: MixtureConfig) -> MixtureConfig:
    """The mixture with a single expert at each site, as a reward model is made from."""
    sites = [
        SiteConfig.parse({**site.to_dict(), "experts": {**site.experts.to_dict(), "num_experts": 1}, "router": None})
        for site in mixture.sites
    ]
    return mixture.model_copy(update={"sites": sites})
