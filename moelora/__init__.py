"""moelora: mixtures of LoRA experts on one frozen backbone; train, load, inspect, compose and serve them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the sub-packages are siblings of this folder; in a wheel they are inside it.
if not (Path(__file__).parent / "routers").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import analysis as analysis
    from . import experts as experts
    from . import routers as routers
    from . import trainers as trainers
    from .backbone import load_backbone as load_backbone
    from .composition.compose import compose as compose
    from .composition.export import export_experts as export_experts
    from .composition.export import export_lora as export_lora
    from .composition.merging import merge_adapters as merge_adapters
    from .config import BackboneConfig as BackboneConfig
    from .config import MixtureConfig as MixtureConfig
    from .config import Recipe as Recipe
    from .config import SiteConfig as SiteConfig
    from .config import load_recipe as load_recipe
    from .mixture import MoELoRAModel as MoELoRAModel
    from .mixture import attach as attach
    from .mixture import from_pretrained as from_pretrained
    from .mixture import trace as trace
    from .reward.config import RewardConfig as RewardConfig
    from .reward.model import RewardModel as RewardModel

# The public API, resolved at first use so that `import moelora` and `moelora --help` stay quick.
_PUBLIC = {
    "BackboneConfig": "config",
    "MixtureConfig": "config",
    "MoELoRAModel": "mixture",
    "Recipe": "config",
    "RewardConfig": "reward.config",
    "RewardModel": "reward.model",
    "SiteConfig": "config",
    "attach": "mixture",
    "compose": "composition.compose",
    "export_experts": "composition.export",
    "export_lora": "composition.export",
    "from_pretrained": "mixture",
    "load_backbone": "backbone",
    "load_recipe": "config",
    "merge_adapters": "composition.merging",
    "trace": "mixture",
}
_ROOMS = ("analysis", "experts", "routers", "trainers")

__all__ = [*_PUBLIC, *_ROOMS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
