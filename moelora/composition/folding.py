"""Experts and their weights as plain factors: one expert alone, or a mix that is the same for every token.

Shapes: D in, O out, E experts, R stacked rank, r rank of one expert, U weights of a router (E, or R for one of single
ranks).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..dispatch.linear import over_ranks
from ..errors import ConfigError
from ..experts import ExpertBank
from ..experts.dora import DoRAConfig, DoRAExperts
from ..site_weights import only_one
from .adapter import Adapter, Factors
from .detached import Detached, Site
from .writing import PeftAdapter


def one_expert(mixture: Detached, expert: int, name: str) -> PeftAdapter | None:
    """What the mixture adds when ``expert`` has the weight 1 at every site that has it, and all others have 0.

    A site without a router has one expert, which is always on and so a part of all. ``None`` where all of it has rank
    0: the expert is the frozen backbone.

    Raises:
        ConfigError: some of its modules are DoRA and others are not.
    """
    parts: dict[str, tuple[Factors, Tensor | None]] = {}
    for site in mixture.sites:
        index = 0 if site.config.router is None else expert
        if index < site.config.experts.num_experts:
            parts |= {path: _single(bank, index) for path, bank in site.banks.items() if bank.ranks[index]}
    return _adapter(mixture, name, parts) if parts else None


def one_lora(
    mixture: Detached, weights: Mapping[str, Tensor], name: str, frozen: Mapping[str, nn.Module]
) -> PeftAdapter:
    """What the mixture adds under weights that are the same for every token; in a block, what its linears would add.

    Args:
        weights: (U,) by the path of the site. frozen: the linears of the backbone by path, as far as they are at hand.

    Raises:
        ConfigError: it is no PEFT adapter, because DoRA experts stand beside others, or are mixed and the frozen
            weights are not at hand; or there is nothing in it.
    """
    parts: dict[str, tuple[Factors, Tensor | None]] = {}
    for site in mixture.sites:
        for path, bank in site.banks.items():
            part: tuple[Factors, Tensor | None]
            if isinstance(bank, DoRAExperts):
                part = _mixed_dora(bank, weights[site.path], frozen.get(path))
            else:
                part = _mixed(site, bank, weights[site.path]), None
            if part[0].rank:
                parts[path] = part
    if not parts:
        raise ConfigError(
            f"{mixture.source}: every expert has the weight 0 or the rank 0, which leaves nothing to write"
        )
    return _adapter(mixture, name, parts)


def _adapter(mixture: Detached, name: str, parts: Mapping[str, tuple[Factors, Tensor | None]]) -> PeftAdapter:
    content = mixture.content
    factors = {path: factors for path, (factors, _) in parts.items()}
    magnitudes = {path: magnitude for path, (_, magnitude) in parts.items() if magnitude is not None}
    if magnitudes and len(magnitudes) < len(factors):
        plain = next(path for path in factors if path not in magnitudes)
        raise ConfigError(
            f"{next(iter(magnitudes))} has a DoRA expert and {plain} has none: a PEFT adapter is DoRA everywhere or "
            "nowhere, so this cannot be one adapter"
        )
    adapter = Adapter(name, factors, content.backbone, content.architecture)
    return PeftAdapter(adapter, magnitudes, content.mixture.modules_to_save, mixture.saved)


def _single(bank: ExpertBank, expert: int) -> tuple[Factors, Tensor | None]:
    """The factors of one expert as they are, and the magnitude of a DoRA expert."""
    start = sum(bank.ranks[:expert])
    rows = slice(start, start + bank.ranks[expert])
    factors = Factors(bank.down()[rows].clone(), bank.up()[:, rows].clone(), bank.config.scales[expert])
    return factors, bank.magnitude[expert].clone() if isinstance(bank, DoRAExperts) else None


def _mixed(site: Site, bank: ExpertBank, weights: Tensor) -> Factors:
    """The weighted experts as one pair of factors; one coefficient for all of them is its scale, others are in B."""
    if site.mixes_factors:
        return _mixed_factors(bank, weights)
    scales = torch.tensor(bank.config.scales, dtype=torch.float64)
    per_rank = over_ranks(weights, bank.ranks) if len(weights) == len(bank.ranks) else weights
    per_rank = per_rank.double() * over_ranks(scales, bank.ranks)
    kept = per_rank.nonzero().flatten()
    A, B, coefficients = bank.down()[kept], bank.up()[:, kept], per_rank[kept]
    if len(kept) and bool((coefficients == coefficients[0]).all()):
        return Factors(A.clone(), B.clone(), coefficients[0].item())
    return Factors(A.float(), (B.double() * coefficients).float(), 1.0)


@torch.no_grad()
def _mixed_dora(bank: DoRAExperts, weights: Tensor, linear: nn.Module | None) -> tuple[Factors, Tensor]:
    """Weighted DoRA experts as one of the rank of all of them.

    With rho_e = m_e / n_e and g = 1 + sum_e w_e (rho_e - 1), the experts add ``(g - 1) W x + sum_e w_e rho_e s_e B_e
    A_e x``. One expert adds ``(m / n - 1) W x + (m / n) B A x``, with n the norms of the rows of ``W + B A``: that is
    the same where ``B A`` is the sum divided by g, row by row, and m is ``g n``.
    """
    if only_one(weights):
        factors, magnitude = _single(bank, int(weights.argmax()))
        assert magnitude is not None
        return factors, magnitude
    if linear is None:
        raise ConfigError(
            f"{bank.name}: several DoRA experts become one by the norms of the frozen weight, which is not at hand: "
            "give the loaded model, or export the experts one by one"
        )
    device = cast(Tensor, linear.weight).device
    bank, weights = bank.to(device), weights.to(device)
    ratio_EO = bank.magnitude.float() / bank.norms(linear)
    gain_O = 1 + weights @ (ratio_EO - 1)
    if bool((gain_O.abs() < 1e-6).any()):
        raise ConfigError(
            f"{bank.name}: under these weights its experts take all of the frozen output away: no DoRA does"
        )
    scales_R = over_ranks(weights * weights.new_tensor(bank.config.scales), bank.ranks)
    B_OR = bank.up().float() * over_ranks(ratio_EO.T, bank.ranks) * scales_R / gain_O.unsqueeze(1)
    total = sum(bank.ranks)
    one = DoRAExperts(
        DoRAConfig(num_experts=1, r=total, alpha=float(total)), bank.down().shape[1], len(B_OR), bank.name
    )
    one.load_state_dict({"lora_A": bank.down().float(), "lora_B": B_OR, "magnitude": one.magnitude})
    magnitude_O = gain_O * one.to(device).norms(linear)[0]
    return Factors(bank.down().float().cpu(), B_OR.cpu(), 1.0), magnitude_O.cpu()


def _mixed_factors(bank: ExpertBank, weights: Tensor) -> Factors:
    """``(sum_e w_e s_e B_e) (sum_e w_e A_e)``, of experts of one rank."""
    count, weights = len(bank.ranks), weights.double()
    B = bank.up().double().unflatten(1, (count, -1))
    A = bank.down().double().unflatten(0, (count, -1))
    scales = weights.new_tensor(bank.config.scales)
    mixed_B = (B * (weights * scales).view(1, -1, 1)).sum(1)
    mixed_A = (A * weights.view(-1, 1, 1)).sum(0)
    return Factors(mixed_A.float(), mixed_B.float(), 1.0)
