"""A LoRA adapter written as PEFT writes it, with a card; readers see the whole folder or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .. import files
from ..checkpoints.layout import LAYOUTS, Content, Layout
from ..checkpoints.peft_patterns import most_common, site_patterns
from ..config import MixtureConfig
from ..errors import CheckpointError
from .adapter import Adapter, Factors
from .export_card import merged_card

CARD = "README.md"


@dataclass(frozen=True)
class PeftAdapter:
    """What one PEFT folder holds.

    Attributes:
        adapter: the factors. magnitudes: (O,) of each module, which makes it DoRA; of all modules or of none.
        saved_modules: paths of modules that are saved whole. saved: their tensors, by name.
    """

    adapter: Adapter
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    saved_modules: Sequence[str] = ()
    saved: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        pairs = [tensor for factors in self.adapter.factors.values() for tensor in (factors.A, factors.B)]
        return sum(tensor.numel() for tensor in (*pairs, *self.magnitudes.values(), *self.saved.values()))

    def content(self) -> Content:
        """The same as a mixture with one expert, always on, at every module."""
        factors = {path: _positive(each) for path, each in self.adapter.factors.items()}
        ranks = {path: each.rank for path, each in factors.items()}
        alphas = {path: each.scale * each.rank for path, each in factors.items()}
        r, alpha = most_common(ranks.values()), most_common(alphas.values())
        experts = {
            "kind": "dora" if self.magnitudes else "lora",
            "num_experts": 1,
            "r": r,
            "alpha": alpha,
            "rank_pattern": site_patterns(ranks, r),
            "alpha_pattern": site_patterns(alphas, alpha),
        }
        mixture = {
            "sites": [{"target": list(factors), "experts": experts}],
            "modules_to_save": list(self.saved_modules),
        }
        tensors = dict(self.saved)
        for path, each in factors.items():
            tensors |= {f"{path}.lora_A": each.A, f"{path}.lora_B": each.B}
        tensors |= {f"{path}.magnitude": value.unsqueeze(0) for path, value in self.magnitudes.items()}
        return Content(
            self.adapter.backbone, self.adapter.architecture, MixtureConfig.parse(mixture), [list(factors)], tensors
        )

    def write(self, folder: Path, card: str) -> None:
        """Write the files into an empty folder.

        Raises:
            OSError: writing failed.
            CheckpointError: PEFT has no place for it.
        """
        layout: Layout = LAYOUTS.create("peft")
        layout.write(folder, self.content())
        (folder / CARD).write_text(card, encoding="utf-8")


def _positive(factors: Factors) -> Factors:
    """The same update with a scale above 0, as alpha has to be."""
    return factors if factors.scale > 0 else Factors(factors.A, factors.B * factors.scale, 1.0)


@contextmanager
def new_folder(path: str | Path, need: int) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``path`` when the block ends without an error.

    Args:
        need: bytes about to be written.

    Raises:
        CheckpointError: there is something at ``path``, or it cannot be written.
    """
    refuse_taken(path)
    final = Path(path).expanduser()
    with files.staged(final, need=need + 1_000_000) as staging:
        yield staging
        files.install(staging, final)


def refuse_taken(path: str | Path) -> None:
    """Check that a folder may be written; before work that takes long.

    Raises:
        CheckpointError: there is something in it.
    """
    final = Path(path).expanduser()
    if final.is_dir() and any(final.iterdir()):
        raise CheckpointError(f"{final}: expected a new or empty folder, found files in it: choose another")


def write_peft(adapter: Adapter, folder: str | Path, card: str | None = None) -> None:
    """Write an adapter as a PEFT LoRA folder, which stock PEFT loads.

    Scales become ``lora_alpha`` and ``alpha_pattern``, ranks that differ become ``rank_pattern``.

    Args:
        folder: new, or empty. card: text of its README.md; by default a short one.

    Raises:
        CheckpointError: ``folder`` is taken or cannot be written.
    """
    whole = PeftAdapter(adapter)
    with new_folder(folder, 4 * whole.parameters) as staging:
        whole.write(staging, card or merged_card(adapter))
