"""Smaller ranks: what is lost is what the spectrum says, and no matrix of the size of a weight is formed."""

from __future__ import annotations

import pytest
import torch
from lora_cases import ROOT, fixture, random_adapter, update

from moelora.composition import distance, squeeze
from moelora.composition.adapter import Factors
from moelora.composition.canonical import Term, norm, spectrum, stacked
from moelora.errors import ConfigError

pytestmark = pytest.mark.smoke

RANKS = {"q": 8, "v": 6}


def test_the_spectrum_of_the_factors_is_that_of_the_update() -> None:
    """Also where the rank is above a width."""
    for rank in (1, 4, 11, 15):
        adapter = random_adapter(rank, {"q": rank}, scale=0.3)
        found, dense = spectrum(adapter.factors["q"]), update(adapter, "q")
        assert torch.allclose(found.U * found.S @ found.Vh, dense, atol=1e-12)
        expected = torch.linalg.svdvals(dense)[: len(found.S)]
        assert torch.allclose(found.S, expected, rtol=1e-12, atol=1e-12 * expected[0].item())
        assert len(found.S) == min(rank, 10)


@pytest.mark.parametrize("rank", range(1, 9))
def test_the_error_is_the_norm_of_the_dropped_singular_values(rank: int) -> None:
    adapter = random_adapter(3, RANKS, scale=2.0)
    found = distance(squeeze(adapter, rank=rank), [adapter])
    for path, full in RANKS.items():
        values = torch.linalg.svdvals(update(adapter, path))[:full]
        dropped = values[rank:].square().sum().sqrt().item()
        assert found.modules[path].rank == min(rank, full)
        assert found.modules[path].error == pytest.approx(dropped, rel=1e-5, abs=1e-5 * values[0].item())
        assert found.modules[path].wanted == pytest.approx(values.norm().item())


def test_no_other_factors_of_that_rank_are_nearer() -> None:
    adapter = random_adapter(3, {"q": 6})
    best = distance(squeeze(adapter, rank=2), [adapter]).relative
    cut = adapter.factors["q"]
    rows = Factors(cut.A[:2], cut.B[:, :2], cut.scale)
    assert (
        best < distance(type(adapter)("cut", {"q": rows}, adapter.backbone, adapter.architecture), [adapter]).relative
    )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_the_rank_is_the_smallest_that_keeps_the_energy(energy: float) -> None:
    adapter = random_adapter(4, RANKS)
    small = squeeze(adapter, energy=energy)
    for path, full in RANKS.items():
        squares = torch.linalg.svdvals(update(adapter, path))[:full].square()
        rank = small.factors[path].rank
        kept = [squares[:r].sum() / squares.sum() for r in (rank, rank - 1)]
        assert kept[0] >= energy - 1e-12 > kept[1] - 2e-12
    if energy == 0.9:
        assert len({factors.rank for factors in small.factors.values()}) == 2, "ranks differ from module to module"


def test_factors_are_balanced_and_the_scale_is_in_them() -> None:
    adapter = fixture("plain_r4_a8", 2.0)
    small = squeeze(adapter, rank=3)
    assert small.name == "plain_r4_a8" and small.backbone == adapter.backbone
    for path, factors in small.factors.items():
        assert factors.scale == 1.0
        assert torch.allclose(factors.A @ factors.A.T, factors.B.T @ factors.B, atol=1e-5)
        assert (factors.A @ factors.A.T).diagonal()[0] == pytest.approx(
            torch.linalg.svdvals(update(adapter, path))[0].item(), rel=1e-4
        )
    assert (ROOT / "plain_r4_a8").is_dir()


def test_nothing_is_kept_of_an_update_of_zeros() -> None:
    adapter = random_adapter(1, {"q": 4})
    zero = Factors(adapter.factors["q"].A, torch.zeros(10, 4), 1.0)
    for options in ({"rank": 2}, {"energy": 0.9}):
        small = squeeze(type(adapter)("zero", {"q": zero}, adapter.backbone, adapter.architecture), **options)
        assert small.factors["q"].rank >= 1
        assert update(small, "q").abs().max() == 0


def test_widths_of_a_large_model_need_no_memory_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 squared would be 320 GB."""
    A, B = torch.randn(4, 200_000), torch.randn(200_000, 4)
    terms = [Term(1.0, Factors(A, B, 1.0)), Term(-1.0, Factors(A, B, 1.0))]
    assert norm(terms) < 1e-6
    assert spectrum(stacked(terms[:1])).largest(2).rank == 2


@pytest.mark.parametrize("options", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}])
def test_what_to_keep_must_be_said_once_and_make_sense(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"rank|energy"):
        squeeze(random_adapter(1, RANKS), **options)  # type: ignore[arg-type]
